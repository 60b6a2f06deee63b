"""The report, as data and as text."""

import sys

import pytest
from torch import nn

from vitkernels import accelerate, explain

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
  head               Linear             kept: a plain Linear: already one library product"""


@pytest.fixture
def model():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=2, num_classes=5)


def test_to_dict(model):
    assert accelerate(model).to_dict() == {
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
