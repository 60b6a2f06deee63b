"""Runs another project's own tests on accelerated models: a plugin of pytest, for who has timm's or open_clip's source.

    PYTHONPATH=tests/swap python -m pytest -p upstream --attention FOLDER/tests/test_models.py
    PYTHONPATH=tests/swap python -m pytest -p upstream --accelerate=layers FOLDER/tests/test_layers.py

Every model that ``timm.create_model`` or ``open_clip.create_model`` makes is accelerated before the test gets it; with
``--accelerate=layers`` each layer that can be swapped, as soon as it is made; with ``--accelerate=nothing`` nothing is,
which gives the failures to compare with. Where ``VITKERNELS_BACKEND=emulated`` is set the kernels run; else the
forward that was there before.
"""

from __future__ import annotations

import functools
import importlib
import sys

from torch import nn

from vitkernels import accelerate, explain
from vitkernels.swap import _rules

# Of each of timm's families that attend, a small model for each kind of attention and of what is swapped beside it.
# fmt: off
ATTENTION = frozenset([
    "beit_base_patch16_224", "mobilevit_xxs", "resnet50_clip", "bat_resnext26ts", "lamhalobotnet50ts_256",
    "eca_botnext26ts_256", "halonet_h1", "mobilevitv2_050", "lambda_resnet26t", "cait_xxs24_224", "coat_tiny",
    "convit_tiny", "cpubone_nano", "crossvit_tiny_240", "csatv2", "davit_tiny", "davit_base_fl",
    "deepseek_vit_412m", "deit_tiny_distilled_patch16_224", "edgenext_xx_small", "efficientformer_l1",
    "efficientformerv2_s0", "efficientvit_m0", "vit_pe_core_tiny_patch16_384", "vit_base_patch16_sapiens2",
    "vit_pe_spatial_tiny_patch16_512", "eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3", "fastvit_mci0", "gcvit_xxtiny", "gemma4_vit_167m", "hiera_tiny_224",
    "sam2_hiera_tiny", "levit_128s", "lowformer_b0", "test_coatnet", "maxvit_tiny_pm_256", "test_maxvit",
    "caformer_s18", "mobilenetv4_hybrid_medium_075", "mobilenetv5_base", "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap", "naflexvit_base_patch16_siglip", "nest_tiny", "nextvit_small",
    "pit_ti_224", "pvt_v2_b0", "qwen3_vit_88m", "skresnet18", "resnest14d", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "twins_pcpvt_small", "twins_svt_small", "visformer_tiny", "vitamin_small_224",
    "vit_tiny_r_s16_p8_224", "test_vit", "test_vit4", "aimv2_large_patch14_224", "vit_small_patch16_18x2_224",
    "vit_base_patch16_rpn_224", "test_vit3", "vit_dwee_patch16_reg1_gap_256", "test_vit_relpos",
    "samvit_base_patch16_224", "volo_d1_224", "xcit_nano_12_p8_224",
])
# fmt: on

_FACTORIES = ("timm.models._factory", "open_clip.factory")


def pytest_addoption(parser):
    group = parser.getgroup("upstream")
    group.addoption("--accelerate", choices=["models", "layers", "nothing"], default="models")
    group.addoption("--attention", action="store_true", help="of tests of models by name, those of ATTENTION alone")


def pytest_configure(config):
    found = [factory for factory in _FACTORIES if _imported(factory)]
    chosen = config.getoption("--accelerate")
    if chosen == "models":
        for factory in found:
            _accelerate_models(factory)
    elif chosen == "layers":
        explain(nn.Identity())  # the rules of every library that is imported are known from here on
        for cls in {rule.original for rule in _rules.RULES.values()}:
            _accelerate_instances(cls)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--attention"):
        left = [item for item in items if _model(item) not in ATTENTION | {None}]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def _model(item) -> str | None:
    """Return the name of the model that a test is of, without the tag of its weights."""
    name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
    return name and name.partition(".")[0]


def _imported(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _accelerate_models(factory: str) -> None:
    original = sys.modules[factory].create_model

    @functools.wraps(original)
    def create_model(*args, **kwargs):
        model = original(*args, **kwargs)
        accelerate(model)
        return model

    # Wherever the library hands it on, before the tests take it from there.
    library = factory.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == library and vars(module).get("create_model") is original:
            module.create_model = create_model


def _accelerate_instances(cls: type[nn.Module]) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is cls:
            accelerate(self)

    cls.__init__ = __init__
