"""The report, as data and as text."""

import json
import pickle
import sys

import pytest
import torch
from torch import nn

from vitkernels import accelerate, explain, restore, use_backend
from vitkernels.swap.estimate import Attention

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
    "attention": ({"queries": 5, "keys": 5, "head_dim": 16, "calls": 2, "provider": "triton", "on_cpu": "triton"},),
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


def test_who_attends_where_pytorch_is_asked_for(model):
    with use_backend("torch"):
        (attention,) = explain(model).estimate.attention
    assert (attention.provider, attention.on_cpu) == ("sdpa", "sdpa")


def _of_timm() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=2)


def _of_torchvision() -> nn.Module:
    vision = pytest.importorskip("torchvision.models")
    return vision.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)


HF_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
HF_SIZES |= {"image_size": 32, "patch_size": 16}


def _of_hf() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF_SIZES))


def _of_a_pair_of_hf() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    text = {k: v for k, v in HF_SIZES.items() if not k.endswith("_size")} | {"hidden_size": 8, "intermediate_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=HF_SIZES, text_config=text))


def _of_open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 2, "layers": 1}
    return open_clip.CLIP(16, vision, text)


OF_LIBRARIES = [_of_timm, _of_torchvision, _of_hf, _of_a_pair_of_hf, _of_open_clip]


@pytest.mark.parametrize("of", OF_LIBRARIES)
@pytest.mark.parametrize("backend", ["auto", "emulated"])
def test_who_attends_is_one_truth(of, backend):
    """The same of a model without data, which ``vitkernels explain`` makes, with data, and accelerated."""
    model, without_data = of(), of().to("meta")
    with use_backend(backend):
        said = [explain(without_data), explain(model), accelerate(model), explain(model)]
        assert all(report.estimate for report in said)  # which is made when it is first looked at
    cpu = "triton" if backend == "emulated" else "sdpa"
    who = "triton" if backend == "emulated" else "triton on a GPU, sdpa on a CPU"
    for report in said:
        (attention,) = report.estimate.attention
        assert attention == Attention(5, 5, 16, 2, "triton", cpu)
        assert str(report).endswith(f"attention of 5 tokens, head dim 16, ×2: {who}")
        assert report.to_dict()["estimate"]["attention"][0]["on_cpu"] == cpu


def test_attention_without_pytorchs_own(model, monkeypatch):
    """timm's products and softmax, with fused attention off: the kernels take their place all the same."""
    monkeypatch.delenv("VITKERNELS_BACKEND")
    for block in model.blocks:
        block.attn.fused_attn = False
    assert explain(model).estimate.attention == (Attention(5, 5, 16, 2, "triton", "eager"),)
    with use_backend("torch"):
        assert explain(model).estimate.attention == (Attention(5, 5, 16, 2, "eager", "eager"),)


def test_what_the_tuning_table_says_of_a_gpu(model, monkeypatch):
    monkeypatch.delenv("VITKERNELS_BACKEND")
    monkeypatch.setattr("vitkernels.ops.attention_provider", lambda *shape_dtype_and_device: "sdpa")
    report = accelerate(model)
    assert report.estimate.attention == (Attention(5, 5, 16, 2, "sdpa", "sdpa"),)
    assert str(report).endswith("×2: sdpa")


def test_kernels_asked_for_on_a_cpu_that_has_none(model, monkeypatch):
    """The calls would raise; a report does not."""
    monkeypatch.delenv("VITKERNELS_BACKEND")
    with use_backend("triton"):
        assert str(explain(model)).endswith("triton on a GPU, none on a CPU")


def test_upsampling_counts_as_one_op():
    """Its parts, as PyTorch's Python has them and determinism takes them, would count many times what else runs."""
    torch.use_deterministic_algorithms(False)  # the fixture of all tests sets it back
    assert share(timm.create_model("coat_tiny", device="meta")) > 0.3


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
