"""The report, as data and as text."""

import json
import pickle
import sys

import pytest
import torch
from torch import nn

from vitkernels import accelerate, explain, restore, use_backend

timm = pytest.importorskip("timm")

SWAPPED = [
    ("patch_embed", "PatchEmbed"),
    *[
        (f"blocks.{i}{child}", cls)
        for i in range(2)
        for child, cls in [
            ("", "Block"),
            (".norm1", "LayerNorm"),
            (".attn", "Attention"),
            (".norm2", "LayerNorm"),
            (".mlp", "Mlp"),
        ]
    ],
    ("norm", "LayerNorm"),
]
TEXT = """\
vitkernels: 12 swapped, 2 kept
  patch_embed        PatchEmbed         → FusedPatchEmbed
  blocks.*       ×2  Block              → FusedBlock
  blocks.*.norm1 ×2  LayerNorm          → FusedLayerNorm
  blocks.*.attn  ×2  Attention          → FusedAttention
  blocks.*.norm2 ×2  LayerNorm          → FusedLayerNorm
  blocks.*.mlp   ×2  Mlp                → FusedMlp
  norm               LayerNorm          → FusedLayerNorm
  (the model)        VisionTransformer  kept: its own forward runs and holds cls_token, pos_embed; see its children
  head               Linear             kept: a plain Linear: already one library product
about 99 % of the time of a 3×32×32 image lies in what is swapped
attention of 5 tokens, head dim 16, ×2: triton"""
ESTIMATE = {
    "image": (3, 32, 32),
    "attention": ({"queries": 5, "keys": 5, "head_dim": 16, "calls": 2, "provider": "triton"},),
}


@pytest.fixture
def model():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=2, num_classes=5)


def test_to_dict(model):
    report = accelerate(model).to_dict()
    estimate = report.pop("estimate")
    assert 0.8 < estimate.pop("fused_share") < 1.0
    assert estimate == ESTIMATE
    assert report == {
        "swapped": [{"module": path, "was": cls, "now": f"Fused{cls}"} for path, cls in SWAPPED],
        "kept": [
            {
                "module": "",
                "class": "VisionTransformer",
                "reason": "its own forward runs and holds cls_token, pos_embed; see its children",
            },
            {"module": "head", "class": "Linear", "reason": "a plain Linear: already one library product"},
        ],
    }


def test_to_json(model):
    report = explain(model)
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))


def test_text(model):
    assert str(explain(model)) == TEXT


def test_print_without_rich(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    explain(model).print()
    assert capsys.readouterr().out == TEXT + "\n"


def test_print_with_rich(model, capsys):
    pytest.importorskip("rich")
    explain(model).print()
    out = capsys.readouterr().out
    assert "12 swapped, 2 kept" in out
    assert all(word in out for word in ("blocks.*.attn", "×2", "FusedAttention", "head"))


def test_a_reason_may_hold_brackets(capsys):
    """rich takes [text] for markup, and class names made at run time may hold anything."""
    pytest.importorskip("rich")
    norm = type("Norm[int]", (nn.LayerNorm,), {})(4)
    explain(nn.Sequential(norm)).print()
    assert "Norm[int]" in capsys.readouterr().out


def test_rows_differ_where_reasons_differ():
    first, second = nn.LayerNorm((2, 4)), nn.LayerNorm((2, 3, 4))
    text = str(explain(nn.ModuleList([first, second, nn.LayerNorm((4, 4))])))
    assert "*  " in text.replace(" ×2", "  ")
    assert text.count("kept:") == 2


def share(model: nn.Module) -> float:
    return explain(model).estimate.fused_share


def test_share_of_time_counts_what_is_swapped_alone(model):
    whole = share(model)
    model.blocks[1].mlp.act = nn.ReLU()
    assert 0.5 < share(model) < whole, "the second block is kept, its norms and attention are swapped"
    assert share(timm.create_model("resnet18", device="meta")) == 0.0
    assert share(timm.create_model("vit_base_patch16_224", device="meta")) > 0.95
    hybrid = share(timm.create_model("vit_base_r50_s16_384", device="meta"))
    assert 0.4 < hybrid < 0.7, "a ResNet-50 stem is about as much work as the blocks behind it"


def test_share_of_time_of_modules_that_call_their_children():
    """NaFlexVit is swapped itself, but its forward calls what else there is, a kept head among it."""
    model = timm.create_model("naflexvit_base_patch16_gap", device="meta", depth=1)
    assert "" in {entry.module for entry in explain(model).swapped}
    assert share(model) < 0.97


def test_estimate_touches_nothing(model):
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    model.train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert explain(model).estimate is not None
    assert calls == []
    assert model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_no_estimate_where_there_is_no_telling(model):
    assert explain(nn.LayerNorm(4)).estimate is None, "of what size its input would be"
    model.forward = lambda x: x.cpu().numpy()
    assert explain(model).estimate is None, "it cannot run without data"
    report = explain(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    assert report.estimate is None, "its model is gone"


def test_report_can_be_pickled(model):
    report = explain(model)
    again = pickle.loads(pickle.dumps(report))
    assert again == report
    assert again.estimate == report.estimate


def test_who_attends_on_a_cpu(model):
    with use_backend("torch"):
        assert explain(model).estimate.attention[0].provider == "sdpa"


@pytest.mark.filterwarnings("ignore:.torch.jit.(script|trace|trace_method). is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiled", ["script", "trace"])
def test_a_model_of_torchscript_is_left_as_it_is(compiled):
    """Its code is fixed: nothing is swapped, nothing breaks."""
    plain = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    x = torch.randn(2, 3, 8)
    model = torch.jit.script(plain) if compiled == "script" else torch.jit.trace(plain, x)
    expected = model(x)
    assert not explain(model).swapped
    assert not accelerate(model).swapped
    restore(model)
    assert torch.equal(model(x), expected)
