"""``torch.jit.trace``, which the older ONNX export stands on: the reference is recorded, as no launch can be."""

import pytest
import torch

from vitkernels import layers, models, ops

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",  # of the checks of shapes, which a trace is without
    "ignore:.*torch.jit.* is deprecated",
)
IMAGES = torch.tensor([0, 3, 8], dtype=torch.int32)


def attention(q, k, v, mask, cos, sin, weight):
    norm = ops.QKNorm(weight, None, 1e-6, True)
    return ops.attention(q, k, v, attn_mask=mask, rope=ops.Rope(cos, sin), num_prefix_tokens=1, q_norm=norm)


def block(x, *p):
    return ops.block(
        x, norm1=p[:2], qkv=p[2:4], proj=p[4:6], norm2=p[6:8], fc1=p[8:10], fc2=p[10:12], num_heads=2, eps=(1e-6, 1e-6)
    )


# By op, a function of tensors and their shapes; those of activations begin with the batch, 2.
NORM = ((2, 5, 16), (16,))
HEADS = (2, 2, 5, 8)
MLP = ((2, 5, 16), (32, 16), (32,), (16, 32), (16,))
CALLS = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b, 1e-6), (*NORM, (16,))),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), NORM),
    "add_layer_norm": (
        lambda x, r, w, g: ops.add_layer_norm(x, r, w, None, 1e-6, layer_scale=g),
        (NORM[0], *NORM, (16,)),
    ),
    "add_rms_norm": (lambda x, r, w, s: ops.add_rms_norm(x, r, w, 1e-6, drop_path_scale=s), (NORM[0], *NORM, (2,))),
    "linear": (lambda x, w, b: ops.linear(x, w, b, activation="gelu"), MLP[:3]),
    "mlp": (lambda x, *p: ops.mlp(x, *p, activation="gelu", residual=x), MLP),
    "swiglu_mlp": (lambda x, *p: ops.swiglu_mlp(x, *p, residual=x), (*MLP[:3], (16, 16), (16,))),
    "attention": (attention, (HEADS, HEADS, HEADS, (2, 1, 5, 5), (4, 8), (4, 8), (8,))),
    "attention_qkvpacked": (lambda qkv: ops.attention_qkvpacked(qkv, is_causal=True), ((2, 5, 3, 2, 8),)),
    "attention_weights": (lambda q, k: ops.attention_weights(q, k, query=0), (HEADS, HEADS)),
    "block": (
        block,
        ((2, 5, 16), (16,), (16,), (48, 16), (48,), (16, 16), (16,), (16,), (16,), (32, 16), (32,), (16, 32), (16,)),
    ),
    "patch_embed": (
        lambda x, w, b, p, t: ops.patch_embed(x, w, b, pos_embed=p, prefix_tokens=t),
        ((2, 3, 16, 16), (8, 3, 8, 8), (8,), (1, 5, 8), (1, 1, 8)),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_the_reference_is_recorded_for_any_batch(op, device, computed_by_pytorch):
    function, shapes = CALLS[op]
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    traced = torch.jit.trace(function, inputs)
    assert "vitkernels::" not in str(traced.inlined_graph)
    larger = [torch.cat((x, x + 1)) if (x.ndim > 2 and len(x) == 2) or x.shape == (2,) else x for x in inputs]
    for given in (inputs, larger):
        got, want = traced(*given), function(*given)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_packed_images_are_refused():
    """Where they begin are values, which a trace would keep for good."""
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace would keep these cu_seqlens.* torch\.export"):
        torch.jit.trace(lambda q: ops.attention_varlen(q, q, q, IMAGES, 5), torch.randn(8, 2, 8))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: layers.Block(32, 2, init_values=0.1), (2, 5, 32)),
        (lambda: layers.SwiGLU(32, 24), (2, 5, 32)),
        (
            lambda: models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2),
            (2, 3, 16, 16),
        ),
    ],
    ids=["block", "swiglu", "model"],
)
def test_modules(build, shape, device):
    module, x = build().to(device).eval(), torch.randn(shape, device=device)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "vitkernels::" not in str(traced.inlined_graph)
        for other in (x, torch.randn(3, *shape[1:], device=device)):
            torch.testing.assert_close(traced(other), module(other), rtol=1e-4, atol=1e-4)
