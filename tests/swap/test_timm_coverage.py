"""Models of every family of timm, in full size but without data: what the report says is what runs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vitkernels import accelerate, explain
from vitkernels.tools.cli import main

timm = pytest.importorskip("timm")

SCRIPT = Path(__file__).parents[2] / "docs" / "make_coverage.py"
spec = importlib.util.spec_from_file_location("make_coverage", SCRIPT)
make_coverage = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = make_coverage  # dataclasses look there
spec.loader.exec_module(make_coverage)

WHOLE = {
    "vit_small_patch14_reg4_dinov2": "vision_transformer.Block",
    "vitamin_small_224": "vision_transformer.Block",
    "pit_ti_224": "vision_transformer.Block",
    "mobilevit_xxs": "vision_transformer.Block",
    "naflexvit_base_patch16_gap": "vision_transformer.Block",
    "vit_base_patch16_rpn_224": "vision_transformer.ResPostBlock",
    "eva02_large_patch14_448": "eva.EvaBlock",
    "vit_huge_plus_patch16_dinov3": "eva.EvaBlock",
    "vit_small_patch16_rope_mixed_ape_224": "eva.EvaBlock",
    "beitv2_base_patch16_224": "beit.Block",
    "vit_relpos_small_patch16_224": "vision_transformer_relpos.RelPosBlock",
    "vit_relpos_base_patch32_plus_rpn_256": "vision_transformer_relpos.ResPostRelPosBlock",
    "coatnet_rmlp_nano_rw_224": "maxxvit.TransformerBlock2d",
    "maxvit_tiny_tf_224": "maxxvit.PartitionAttentionCl",
    "maxvit_tiny_pm_256": "maxxvit.ParallelPartitionAttention",
    "nest_tiny": "nest.TransformerLayer",
    "davit_tiny": "davit.SpatialBlock",
    "twins_svt_small": "twins.Block",
    "gcvit_xxtiny": "gcvit.GlobalContextVitBlock",
    "sam2_hiera_tiny": "hieradet_sam2.MultiScaleBlock",
    "volo_d1_224": "volo.Transformer",
    "swin_tiny_patch4_window7_224": "swin_transformer.SwinTransformerBlock",
    "swinv2_tiny_window8_256": "swin_transformer_v2.SwinTransformerV2Block",
    "swinv2_cr_tiny_224": "swin_transformer_v2_cr.SwinTransformerV2CrBlock",
}
PARTS = {
    "hiera_tiny_224": {"LayerNorm", "Mlp"},
    "mixer_s16_224": {"LayerNorm", "Mlp", "PatchEmbed"},
    "vit_dwee_patch16_reg1_gap_256": {"LayerNorm", "Mlp", "PatchEmbed"},  # differential attention
}
CONVOLUTIONAL = {
    "mobilevit_xxs", "coatnet_rmlp_nano_rw_224", "maxvit_tiny_tf_224", "maxvit_tiny_pm_256", "gcvit_xxtiny",
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_blocks(name):
    found = make_coverage.look_at(timm, name)
    assert WHOLE[name] in found.whole
    assert "WindowAttentionGlobal" not in found.attention - found.swapped, "the block reads it"
    assert found.share > (0.1 if name in CONVOLUTIONAL else 0.5)


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    found = make_coverage.look_at(timm, name)
    assert not found.whole
    assert PARTS[name] <= found.swapped
    assert 0.0 < found.share < 1.0


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vgg11"])
def test_nothing_to_swap(name):
    assert not make_coverage.look_at(timm, name).swapped


def test_a_report_that_lies_is_found(monkeypatch):
    """The check itself: an attention that goes back to its own forward must show."""
    model = timm.create_model("vit_tiny_patch16_224", device="meta", depth=2, act_layer=nn.ReLU).eval()
    accelerate(model)
    assert not make_coverage.original_forwards(model)
    model.blocks[1].attn.proj.register_forward_hook(lambda *_: None)
    assert make_coverage.original_forwards(model) == {"Attention": 1}


def test_the_page_counts_what_was_found():
    found = {
        "a": make_coverage.Found(
            "vision_transformer",
            frozenset({"Attention"}),
            frozenset({"Block", "Attention"}),
            frozenset({"vision_transformer.Block"}),
            0.9,
        ),
        "b": make_coverage.Found("swin", frozenset({"WindowAttention"}), frozenset({"Mlp"}), frozenset(), 0.4),
        "c": make_coverage.Found("resnet", frozenset(), frozenset(), frozenset(), None),
    }
    page = "".join(make_coverage.lines(found, "1.0"))
    assert "of 1 names run fused" in page
    assert "`vision_transformer.Block` 1" in page
    assert "| swin | 1 | 1 | 0 | 1 | 40 % | Mlp | WindowAttention |" in page
    assert "| resnet | 1 | 0 | 0 | 0 | not known | — | — |" in page


def test_the_page_in_the_docs_is_of_all_names():
    """At least 199 plain names, all 73 of EVA's, and 300 in all: what issue and field ask for."""
    page = SCRIPT.with_name("coverage.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ") and "family" not in line]
    assert sum(int(row[1]) for row in rows) == len(timm.list_models()) or timm.__version__ not in page
    assert sum(int(row[3]) for row in rows) >= 300
    assert "`eva.EvaBlock` 73" in page


def test_explain_on_the_command_line(capsys):
    assert main(["explain", "vit_small_patch16_dinov3"]) == 0
    out = capsys.readouterr().out
    assert "EvaBlock" in out
    assert "attention of 261 tokens, head dim 64, ×12: triton" in out


def test_explain_as_json(capsys):
    assert main(["explain", "vit_tiny_patch16_224.augreg_in21k", "--json"]) == 0
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224.augreg_in21k")
    assert capsys.readouterr().out == explain(model).to_json() + "\n"


def test_explain_a_folder_of_timms(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 10}')
    assert main(["explain", str(tmp_path)]) == 0
    assert "FusedBlock" in capsys.readouterr().out


def test_explain_a_folder_of_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.ViTConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path)]) == 0
    assert "LayerNorm" in capsys.readouterr().out


def test_explain_says_what_is_wrong(capsys, tmp_path):
    assert main(["explain", "vit_tiny_patch16_225"]) == 2
    error = capsys.readouterr().err
    assert "'vit_tiny_patch16_225' is neither a model of timm nor a folder" in error
    assert "vit_tiny_patch16_224" in error
    (tmp_path / "config.json").write_text("{")
    assert main(["explain", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
