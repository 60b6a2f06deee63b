"""A fused class goes by the name of the class it stands for; pickle finds it by a name of its own."""

import copy
import importlib.util
import io
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import test_dino  # noqa: F401, makes its libraries importable
import torch
from torch import nn

from vitkernels import accelerate, explain
from vitkernels.swap import _rules

timm = pytest.importorskip("timm")
TINY = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 5}


@pytest.fixture
def pair(device) -> tuple[nn.Module, nn.Module]:
    plain = timm.create_model("vit_tiny_patch16_224", **TINY).eval().to(device)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain, fast


def rules() -> list[_rules.Rule]:
    """Of every library that is there; other tests make known what lies elsewhere."""
    for name in ("torchvision.models", "open_clip", "transformers.models.vit.modeling_vit"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    explain(nn.Identity())
    found = {id(rule): rule for rule in _rules.RULES.values()}.values()
    return [rule for rule in found if rule.fused.__module__.startswith("vitkernels.swap.")]


def test_every_fused_class():
    found = rules()
    assert len({rule.fused.__module__.split(".")[2] for rule in found}) >= 4
    for rule in found:
        fused = rule.fused
        assert fused.__name__ == rule.original.__name__
        assert fused.__qualname__ == f"Fused{rule.original.__name__}"
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(fused, protocol)) is fused
        assert copy.deepcopy(fused) is fused


def test_tools_see_the_same_model(pair):
    plain, fast = pair
    assert repr(fast) == repr(plain)
    assert [type(m) for m in fast.modules()] != [type(m) for m in plain.modules()]


def test_device_maps_cut_between_the_same_layers(pair):
    """accelerate's, which keeps the classes that it is told in one piece."""
    library = pytest.importorskip("accelerate")
    memory = {"cpu": 4 * sum(p.nbytes for p in pair[0].blocks[0].parameters()), "disk": 10**9}
    maps = [library.infer_auto_device_map(model, memory, no_split_module_classes=["Block"]) for model in pair]
    assert maps[1] == maps[0]
    assert {f"blocks.{i}" for i in range(4)} <= maps[1].keys()


def test_wrap_policies_by_name(pair):
    """Of FSDP, as accelerate and transformers make them of names."""
    library = pytest.importorskip("accelerate.utils.dataclasses")
    cls = library.get_module_class_from_name(pair[1], "Block")
    assert [module for module in pair[1].modules() if isinstance(module, cls)] == list(pair[1].blocks)


def test_quantizer_by_names(pair):
    """torchao's filters get the module and its path: by class name they choose what they chose before."""
    chosen = [[n for n, m in model.named_modules() if type(m).__name__ in ("Attention", "Mlp")] for model in pair]
    assert chosen[1] == chosen[0] != []


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])  # torch.save's, and the newest
def test_pickles_name_the_fused_class(pair, protocol):
    """Under the names that they always had: older pickles can be read, and newer ones by older releases."""
    model = pair[1]
    made = pickle.dumps(model, protocol)
    strings = [argument for _, argument, _ in pickletools.genops(made) if isinstance(argument, str)]
    words = {word for string in strings for word in string.split()}
    assert {"vitkernels.swap.timm.vision_transformer", "FusedBlock", "FusedLayerNorm"} <= words
    assert [type(m) for m in pickle.loads(made).modules()] == [type(m) for m in model.modules()]


def test_pickle_of_torchs_norm():
    """Its instances say that they are of torch.nn (for torch.fx): its class is found where it lies."""
    model = nn.Sequential(nn.LayerNorm(8))
    accelerate(model)
    norm = model[0]
    assert norm.__module__ == "torch.nn" and type(norm).__module__ == "vitkernels.swap.torch_nn"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert type(pickle.loads(pickle.dumps(norm, protocol))) is type(norm)
    assert type(copy.deepcopy(norm)) is type(copy.copy(norm)) is type(norm)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert type(norm).__name__ == "ParametrizedLayerNorm"
    assert type(norm).__module__ == norm.__module__ == "torch.nn.utils.parametrize"


def test_another_process_reads_it(pair, tmp_path, device):
    images = torch.randn(2, 3, 32, 32, device=device)
    with torch.no_grad():
        torch.save({"model": pair[1], "images": images, "expected": pair[0](images)}, tmp_path / "it.pt")
    script = (
        "import sys, torch; it = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(it['model'](it['images']), it['expected'], rtol=1e-4, atol=1e-4)\n"
        "print(type(it['model'].blocks[0]).__qualname__)"
    )
    root = str(Path(__file__).parents[2])
    shim = Path(__file__).parents[1] / "conftest.py"
    script = f"import sys; sys.path[:0] = [{root!r}, {str(shim.parent)!r}]; import conftest\n" + script
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "it.pt"], capture_output=True, text=True)
    assert done.stdout == "FusedBlock\n", done.stderr


def test_a_package_holds_it(pair):
    """torch.package finds classes by the same names."""
    file = io.BytesIO()
    with torch.package.PackageExporter(file) as exporter:
        exporter.extern("**")
        exporter.save_pickle("model", "model.pkl", pair[1])
    file.seek(0)
    read = torch.package.PackageImporter(file).load_pickle("model", "model.pkl")
    assert [type(m) for m in read.modules()] == [type(m) for m in pair[1].modules()]
