"""The model part of ``verify``: models by name, their shapes, and an accelerated copy judged, good and defective."""

import json
import sys

import pytest
import torch
from torch import nn

from vitkernels import runtime
from vitkernels.tools.console import UserError
from vitkernels.tools.verify.model import Inputs, Unreached, as_inputs, check_model, checks, load, model_checks, shapes
from vitkernels.tools.verify.mutants import Mutant, seeded_defect
from vitkernels.tools.verify.results import NOTHING, Verification

timm = pytest.importorskip("timm")


def vit(**options) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes | options)


def images() -> Inputs:
    return as_inputs(torch.randn(1, 3, 16, 16))


def results_of(model, inputs, device, **options):
    options = {"dtype": torch.float32, "device": device, "seed": 0, "steps": 0} | options
    return list(check_model("model", model, inputs, **options))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vit_tiny_patch16_223", "is neither a model of timm nor a folder with a config.json; did you mean vit_tiny"),
        ("own/vit", "own/vit is neither a folder nor in the Hugging Face hub's cache on this machine"),
        ("timm/", "names no model"),
        ("timm/vit_tiny_patch16_223", "did you mean vit_tiny_patch16_224"),
        ("hf/nowhere", "there is no folder nowhere"),
        ("hf/.", "has no config.json"),
        ("hf/broken", "cannot read broken/config.json: no JSON"),
        ("hf/other", "other/config.json holds a list; expected an object"),
        ("nowhere:model", "there is no module 'nowhere'"),
        ("needy:model", "needy needs nowhere_else, which is not installed"),
        ("mine:modl", "'modl' does not exist in mine; did you mean model"),
        ("mine:number", "'number' is no function"),
        ("mine:text", "returned a str; expected a torch.nn.Module"),
        ("mine:fails", "cannot be built: ZeroDivisionError"),
        ("mine:linear", "the size of the images that mine:linear takes is not known"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_line(spec, words, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("[]")
    (tmp_path / "needy.py").write_text("import nowhere_else\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nnumber = 3\ndef model(): pass\ndef text(): return 'no'\ndef fails(): 1 / 0\n"
        "def linear(): return nn.Linear(3, 4)\n"
    )
    enter(tmp_path, monkeypatch)
    with pytest.raises(UserError) as error:
        load(spec)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def enter(folder, monkeypatch):
    """Go to ``folder``, and forget afterwards what is imported there."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_function_returns_a_model_or_one_with_inputs(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def pair(): return nn.LayerNorm(8), torch.ones(2, 5, 8)\n"
        "def named(): return nn.LayerNorm(8), {'input': torch.ones(2, 5, 8)}\n"
        "def model():\n    import timm\n    return timm.create_model('test_vit')\n"
    )
    enter(tmp_path, monkeypatch)
    model, inputs, words = load("mine:pair")
    assert isinstance(model, nn.LayerNorm) and inputs.args[0].shape == (2, 5, 8) and "mine:pair" in words
    assert load("mine:named")[1].kwargs["input"].shape == (2, 5, 8)
    assert load("mine:model", batch=3)[1].args[0].shape == (3, 3, 160, 160)


@pytest.mark.parametrize("spec", ["timm/test_vit", "test_vit", "hf_hub:timm/test_vit.r160_in1k"])
def test_a_name_of_timm_gives_random_weights_and_its_own_image_size(spec):
    model, inputs, words = load(spec)
    assert inputs.args[0].shape == (2, 3, 160, 160)
    assert model(*inputs.args).shape == (2, 1000)
    assert "random weights" in words


@pytest.mark.parametrize("weights", [True, False])
def test_a_folder_of_transformers(weights, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48, image_size=16, patch_size=8
    )
    saved = transformers.ViTForImageClassification(config)
    (saved if weights else config).save_pretrained(tmp_path)
    if not weights:
        config_file = tmp_path / "config.json"
        described = json.loads(config_file.read_text())
        config_file.write_text(json.dumps(described | {"architectures": ["ViTForImageClassification"]}))
    model, inputs, words = load(f"hf/{tmp_path}")
    assert type(model) is transformers.ViTForImageClassification
    assert inputs.kwargs["pixel_values"].shape == (2, 3, 16, 16)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert same == weights
    assert ("its weights" in words) == weights
    (case,) = shapes(model, inputs)
    assert (case.tokens, case.channels, case.heads, case.hidden) == (5, 32, 2, 48)


def test_shapes_are_what_the_model_gives_the_ops():
    (case,) = shapes(vit(init_values=1e-5, reg_tokens=2, depth=3), images(), batch=3)
    assert (case.batch, case.image, case.patch, case.prefix, case.tokens) == (3, 16, 8, 3, 7)
    assert (case.channels, case.heads, case.head_dim, case.hidden) == (16, 2, 8, 64)
    assert (case.activation, case.layer_scale, case.norm, case.mlp) == ("gelu", True, "layer_norm", "mlp")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "eva02_large_patch14_448",
            {"image": 448, "patch": 14, "prefix": 1, "hidden": 2730, "mlp": "separate", "mlp_norm": True,
             "attention": ("rope_interleaved",)},
        ),
        ("vit_giant_patch14_reg4_dinov2", {"tokens": 1374, "heads": 24, "hidden": 4096, "mlp": "packed", "prefix": 5}),
        ("aimv2_large_patch14_224", {"tokens": 256, "norm": "rms_norm", "activation": "silu", "mlp": "separate"}),
        ("vit_base_r50_s16_224", {"tokens": 197, "channels": 768, "heads": 12}),  # tokens of a ResNet, no patches
    ],
)  # fmt: skip
def test_shapes_of_models_in_full_size_cost_no_memory(name, wanted):
    with torch.device("meta"):
        model = timm.create_model(name)
        size = model.pretrained_cfg["input_size"]
        (case,) = shapes(model, as_inputs(torch.empty(1, *size)))
    assert {key: getattr(case, key) for key in wanted} == wanted


def test_a_model_that_no_op_runs_in_is_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(UserError, match="no part of Sequential runs on vitkernels"):
        shapes(model, images())


def test_a_model_that_does_not_run_is_told():
    with pytest.raises(UserError, match="does not run on its inputs"):
        shapes(vit(), as_inputs(torch.randn(1, 4, 16, 16)))


def test_a_good_model_passes_and_is_left_as_it_is(device):
    model = vit(init_values=1e-5, drop_path_rate=0.5, pos_drop_rate=0.5).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    results = results_of(model, images(), device, steps=3)
    assert [(r.name, r.status) for r in results] == [
        (name, "passed") for name in ("swapped", "output", "gradients", "loss curve")
    ], results
    assert "Block → FusedBlock" in results[0].detail
    assert results[2].detail.startswith(f"{len(before)} parameters, worst gradient of ")
    assert [type(m) for m in model.modules()] == classes and model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# What is wrong, the edit, and a parameter whose gradient shows it.
DEFECTS = {
    "a branch off by 0.1 %": (
        "ops._block:_forward", "    h2, r, mean2", "    branch = branch * 1.001\n    h2, r, mean2", "proj.weight",
    ),
    "scores off by 0.1 %": (
        "ops._block:_forward", "_fwd(qkv, scale)", "_fwd(qkv, scale * 1.001)",
        "qkv.weight",
    ),
    "no gradient of a bias": (
        "ops._block:_backward", "    if folded2 and (need_w2",
        "    d_b2 = None if d_b2 is None else d_b2 * 0\n    if folded2 and (need_w2", "fc2.bias",
    ),
}  # fmt: skip


def defect(name: str):
    where, old, new, _ = DEFECTS[name]
    return seeded_defect(Mutant(name, where, old, new, "block"))


@pytest.mark.parametrize("name", DEFECTS)
def test_gradients_show_a_defect_by_the_parameters_name(name, device):
    subject = checks.Subject(vit(), images(), torch.float32, device)
    with defect(name):
        results = list(checks.check_gradients("model", subject, seed=0))
    assert {r.status for r in results} == {"failed"}
    assert any(DEFECTS[name][-1] in r.name for r in results), results
    assert "max error" in results[0].detail and "limit" in results[0].detail


@pytest.mark.parametrize("name", ["a branch off by 0.1 %", "no gradient of a bias"])
def test_the_loss_curve_shows_a_defect(name, device):
    subject = checks.Subject(vit(), images(), torch.float32, device)
    with defect(name):
        (result,) = checks.check_curve("model", subject, seed=0, steps=4)
    assert result.status == "failed" and result.ratio > 30, result


def test_a_curve_may_be_as_far_from_fp64_as_roundings_take_pytorch():
    truth = torch.linspace(1.0, 0.5, 20, dtype=torch.float64)
    noise = 1e-6 * torch.randn(5, 20, dtype=torch.float64)
    own = [truth + n for n in noise]
    eps = torch.finfo(torch.float32).eps
    assert checks.judge_curve(truth - 2 * noise[0], own, truth, eps).passed
    assert not checks.judge_curve(truth - 10 * noise[0], own, truth, eps).passed
    assert not checks.judge_curve(truth * float("nan"), own, truth, eps).passed
    exact = [truth] * 5
    assert checks.judge_curve(truth + eps / 2, exact, truth, eps).passed  # nobody's loss is rounded finer
    assert not checks.judge_curve(truth + 4 * eps, exact, truth, eps).passed


def test_a_comparison_without_a_kernel_is_no_comparison(device):
    subject = checks.Subject(vit(), images(), torch.float32, device)
    with runtime.use_backend("torch"):
        (result,) = results_of(vit(), images(), device)
        with pytest.raises(Unreached, match="called no kernel"):
            list(checks.check_gradients("model", subject, 0))
    assert result.status == "broken" and "none calls a kernel" in result.detail


def test_a_model_that_nothing_is_swapped_in_is_not_verified(device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    (result,) = results_of(model, images(), device)
    assert result.status == "skipped" and "a plain Linear" in result.detail
    assert Verification({}, "", [result]).exit_code == NOTHING


def test_where_time_is_short_the_first_blocks_alone_run_on_kernels(device):
    subject = checks.Subject(vit(depth=3), images(), torch.float32, device)
    depth, note, affordable = checks._depth(subject, seconds=1e-9, passes=1.0)
    assert depth == 1 and note.startswith("kernels in the first 1 of 3 modules alike") and affordable < 1.0
    trio = checks._trio(subject, 0, depth)
    names = [type(b).__qualname__ for b in trio.fast.blocks]
    assert names == ["FusedBlock", "Block", "Block"]
    assert type(trio.fast.norm).__qualname__ == "FusedLayerNorm"
    assert checks._depth(subject, seconds=1e9, passes=1.0)[:2] == (None, "")
    (result,) = checks.check_curve("model", subject, 0, seconds=1e-9)
    assert result.status == "passed" and result.detail.endswith("3 of 20 steps"), result


def test_the_checks_of_a_model_by_name(device):
    made = {c.id: c for c in model_checks("timm/test_vit", device, 0, dtypes=("bf16",))}
    parts = {id.removeprefix("model/timm/test_vit/") for id in made}
    assert {"swapped", "outputs/bf16", "gradients/bf16", "loss curve/bf16"} <= parts
    assert "ops/block/101 tokens of 64 channels/bf16" in parts
    (result,) = made["model/timm/test_vit/swapped"].run()
    assert result.status == "passed" and "random weights" in result.detail
    with runtime.use_backend("torch"):
        (result,) = made["model/timm/test_vit/outputs/bf16"].run()
    assert (result.status, result.dtype) == ("broken", "bf16")
