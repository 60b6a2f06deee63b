"""accelerate(precision="fp8"): what runs in FP8, what does not and why, state, copies, accuracy."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import shake
from torch import nn

import vitkernels
from vitkernels import accelerate, compare_precision, explain, restore, use_backend
from vitkernels.layers import fp8

timm = pytest.importorskip("timm")
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 11}
COST = 0.2  # the relative error of logits that e4m3's 3 bits of mantissa may cost at random weights


def build(cls=VisionTransformer, dtype=torch.bfloat16, **more) -> nn.Module:
    return shake(cls(**{**TINY, **more})).to(dtype).eval()


@pytest.fixture
def images(device):
    return torch.randn(3, 3, 32, 32, device=device, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _nothing_kept():
    fp8._entries.clear()


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def run(model, images):
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("more", [{}, {"init_values": 0.5, "qkv_bias": False}, {"qk_norm": True}], ids=str)
def test_kernels_compute_what_pytorch_computes(more, images, device):
    """Both differ from the model's own precision by what e4m3's 3 bits cost, and by less between themselves."""
    model = build(**more).to(device)
    own = run(model, images)
    report = accelerate(model, precision="fp8")
    assert [s.module for s in report.swapped if s.precision == "fp8"] == ["blocks.0", "blocks.1"]
    assert not [s for s in report.swapped if s.reason]
    got = run(model, images)
    with use_backend("auto"):
        reference = run(model.cpu(), images.cpu())
    assert 1e-3 < relative(got, own) < COST
    assert relative(got.cpu(), reference) < 0.7 * relative(got, own)
    with use_backend("torch"):  # which asks for the original forward
        assert torch.equal(run(model.cpu(), images.cpu()), own.cpu())


def test_fp32_on_a_cpu_is_the_quantized_reference(images, computed_by_pytorch):
    """Each block's products, done by hand with weights and rows rounded to e4m3."""
    model = build(dtype=torch.float32, depth=1)
    x = torch.randn(2, 5, 64)
    block = model.blocks[0]

    def rounded(t):
        scale = t.abs().amax(-1, keepdim=True) / 448
        return (t / scale).to(torch.float8_e4m3fn).float() * scale

    with torch.no_grad():
        qkv = F.linear(rounded(block.norm1(x)), rounded(block.attn.qkv.weight), block.attn.qkv.bias)
        q, k, v = qkv.view(2, 5, 3, 2, 32).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        r = x + F.linear(rounded(out), rounded(block.attn.proj.weight), block.attn.proj.bias)
        hidden = F.gelu(F.linear(rounded(block.norm2(r)), rounded(block.mlp.fc1.weight), block.mlp.fc1.bias))
        hidden = rounded(hidden.unflatten(-1, (-1, 128))).flatten(-2)
        want = r + F.linear(hidden, rounded(block.mlp.fc2.weight), block.mlp.fc2.bias)
        plain = block(x)
        accelerate(model, precision="fp8")
        got = block(x)
    assert relative(got, want) < 0.1 * relative(plain, want)  # what is left are values beside a tie


def test_restore_is_bit_for_bit(images, device):
    model = build().to(device)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    accelerate(model)
    own = run(model, images)
    accelerate(model, precision="fp8")
    assert not torch.equal(run(model, images), own)
    assert fp8._entries
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    accelerate(model)  # back to the model's own precision
    assert torch.equal(run(model, images), own) and not fp8._entries
    accelerate(model, precision="fp8")
    restore(model)
    assert type(model.blocks[0]).__qualname__ == "Block" and not fp8._entries
    assert not [name for m in model.modules() for name in vars(m) if "vitkernels" in name]


def test_weights_follow_changes(images, computed_by_pytorch):
    model = build()
    accelerate(model, precision="fp8")
    first = run(model, images)
    weight = model.blocks[0].mlp.fc1.weight
    kept = fp8.weight(weight)
    assert fp8.weight(weight).values is kept.values

    def fresh():
        other = build()
        other.load_state_dict(model.state_dict())
        accelerate(other, precision="fp8")
        return run(other, images)

    def changed():
        out = run(model, images)
        assert not torch.equal(out, first)
        assert torch.equal(out, fresh())

    with torch.no_grad():
        weight.mul_(2)
    changed()
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})
    changed()
    model.blocks[0].mlp.fc1.weight = nn.Parameter(weight.detach() * -1)
    changed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    changed()
    model.blocks[0].attn.qkv.weight.data.mul_(3)  # which PyTorch does not count
    accelerate(model, precision="fp8")
    changed()


def test_copies_pickles_and_moves(images, computed_by_pytorch):
    model = build()
    accelerate(model, precision="fp8")
    out = run(model, images)
    held = len(fp8._entries)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, images), out)
    with torch.no_grad():
        twin.blocks[0].mlp.fc1.weight.mul_(2)
    assert not torch.equal(run(twin, images), out) and torch.equal(run(model, images), out)
    del twin
    assert len(fp8._entries) == held  # the table keeps nothing alive
    data = pickle.dumps(model)
    assert torch.equal(run(pickle.loads(data), images), out)
    assert len(data) < len(pickle.dumps(restore(model) and model)) + 1000
    buffer = io.BytesIO()
    accelerate(model, precision="fp8")
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(run(torch.load(buffer, weights_only=False), images), out)
    half = run(model.half(), images.half())
    assert half.dtype == torch.float16 and relative(half, out) < 0.1
    assert relative(run(model.bfloat16(), images), out) < 0.1


def test_gradients_and_dropout_raise(images, no_launch, device):
    model = build(proj_drop_rate=0.1)
    with use_backend("torch"):
        accelerate(model, precision="fp8")
    block, x = model.blocks[0], torch.randn(2, 5, 64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="a gradient is wanted, and FP8 is for inference"):
        block(x)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"model.eval\(\)"):
        block.train()(x)


def test_reasons():
    def reasons(model):
        report = explain(model, precision="fp8")
        assert not any(vars(m).get("_vitkernels_precision") for m in model.modules())
        return {s.module: s.reason for s in report.swapped if s.reason}

    assert reasons(build()) == {}
    odd = reasons(build(embed_dim=72))
    assert odd["blocks.0"] == "a layer takes 72 features; FP8 takes a multiple of 16, at most 8192"
    rms = reasons(build(norm_layer=timm.layers.RmsNorm))
    assert rms["blocks.0"] == "its norms are RMSNorms; FP8 takes LayerNorms"
    gated = reasons(build(mlp_layer=timm.layers.GluMlp))
    assert gated["blocks.0"] == "its MLP is gated"
    assert "float64" in reasons(build(dtype=torch.float64))["blocks.0"]
    report = explain(build(embed_dim=72), precision="fp8")
    assert "→ FusedBlock, not in fp8: a layer takes 72" in str(report)
    assert report.to_dict()["swapped"][1]["reason"] == odd["blocks.0"]
    assert "precision" not in explain(build()).to_dict()["swapped"][0]
    with pytest.raises(NotImplementedError, match="strict, and 6 modules cannot run in fp8"):
        accelerate(build(embed_dim=72), precision="fp8", strict=True)
    accelerate(build(), precision="fp8", strict=True)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        accelerate(build(), precision="int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is no other GPU")
def test_an_older_gpu_raises():
    model = build()
    with use_backend("emulated:sm_80"), pytest.raises(NotImplementedError, match="sm_80 has no e4m3 products"):
        accelerate(model, precision="fp8")
    assert type(model.blocks[0]).__qualname__ == "Block"
    with use_backend("auto"):
        accelerate(model, precision="fp8")
    with use_backend("emulated:sm_80"), pytest.raises(NotImplementedError, match="sm_80 has no e4m3 products"):
        run(model, torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))


def test_eva_with_rope(images, computed_by_pytorch):
    model = build(Eva, use_rot_pos_emb=True, dynamic_img_size=False)
    own = run(model, images)
    report = accelerate(model, precision="fp8")
    assert [s.module for s in report.swapped if s.precision] == ["blocks.0", "blocks.1"]
    assert 1e-3 < relative(run(model, images), own) < COST


def test_torchvision(computed_by_pytorch):
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    model = shake(vision_transformer.VisionTransformer(32, 16, 2, 2, 64, 128, num_classes=5)).eval()
    x = torch.randn(2, 3, 32, 32)
    own = run(model, x)
    report = accelerate(model, precision="fp8")
    assert len([s for s in report.swapped if s.precision]) == 2 and not [s for s in report.swapped if s.reason]
    assert 1e-3 < relative(run(model, x), own) < COST


def test_transformers(computed_by_pytorch):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.models.vit.modeling_vit, "ViTMLP"):
        pytest.skip("releases 4.5x cut an attention in two, which does not run in FP8")
    size = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
    config = transformers.ViTConfig(**size, image_size=32, patch_size=16)
    model = shake(transformers.ViTModel(config)).eval()
    x = torch.randn(2, 3, 32, 32)
    own = run(model, x).last_hidden_state
    report = accelerate(model, precision="fp8")
    assert len([s for s in report.swapped if s.precision]) == 4, str(report)  # attentions, and layers with their MLPs
    assert not [s for s in report.swapped if s.reason]
    assert 1e-3 < relative(run(model, x).last_hidden_state, own) < COST
    found = compare_precision(restore(model) and model, {"pixel_values": x})
    assert len(found.modules) == 4 and found.outputs < COST


def test_compile_and_export(images, device):
    model = build(depth=1).to(device)
    accelerate(model, precision="fp8")
    want = run(model, images)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(images), want)
        exported = torch.export.export(model, (images,))
        assert torch.equal(exported.module()(images), want)


def test_compare_precision(images, computed_by_pytorch):
    model = build()
    found = compare_precision(model, images)
    assert type(model.blocks[0]).__qualname__ == "Block" and not fp8._entries
    assert list(found.modules) == ["blocks.0", "blocks.1"] and found.rows == 3
    assert 1e-3 < found.outputs < COST and 0 <= found.agreement <= 1
    own = run(model, images)
    accelerate(model, precision="fp8")
    assert found.outputs == pytest.approx(relative(run(model, images), own))
    assert "top-1 agreement" in str(found) and "blocks.1" in str(found)
    with pytest.raises(ValueError, match="no module can run in fp8"):
        compare_precision(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match="expected 'fp8'"):
        compare_precision(model, images, None)


def test_digits_are_read_as_well():
    pytest.importorskip("sklearn")
    from vitkernels.tools.demo.digits import load_digits, load_model

    own = load_model()
    model = VisionTransformer(8, 2, 1, 10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0).bfloat16().eval()
    model.load_state_dict(own.state_dict())
    digits = load_digits()[1]
    x = digits.images.bfloat16()
    with vitkernels.use_backend("auto"):
        found = compare_precision(model, x)
        assert found.agreement >= 0.995, str(found)
        before = (run(model, x).argmax(-1) == digits.labels).sum()
        accelerate(model, precision="fp8")
        assert (run(model, x).argmax(-1) == digits.labels).sum() == before
