"""Every public op on tiny valid tensors, one table for all of this folder: an input is made hostile by one change.

An op's tensors are written by dim: ``"B N C"`` is (B, N, C), ``"3HD C"`` is (3·H·D, C); sizes are in :data:`SIZES`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from vitkernels import ops, reference
from vitkernels.models import VisionTransformer
from vitkernels.testing import check_op

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# Batch, tokens, channels, heads, head dim, hidden features; image channels, patch, height, width; prefix tokens.
SIZES = {"B": 2, "N": 5, "C": 16, "H": 2, "D": 8, "F": 12, "I": 3, "P": 4, "Y": 8, "X": 12, "R": 1}


@dataclasses.dataclass(frozen=True)
class Op:
    """A public op as a function of named tensors, and what it is held against.

    Attributes:
        shapes: Of every tensor it takes, by name.
        inputs: Which of them are activations, with a sample along the first dim; the others are parameters.
        optional: Which may be None.
        normed: Whether it takes ``eps``.
        options: Further arguments, made from sizes and device.
    """

    function: Callable
    reference: Callable
    shapes: dict[str, str]
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    normed: bool = False
    options: Callable[[dict[str, int], torch.device], dict] = lambda sizes, device: {}


@dataclasses.dataclass(frozen=True)
class Call:
    """An op with its arguments."""

    op: Op
    tensors: dict[str, Tensor | None]
    options: dict

    def __call__(self, **changed):
        return self.op.function(**{**self.tensors, **self.options, **changed})

    def outputs(self, **changed) -> tuple[Tensor, ...]:
        result = self(**changed)
        return result if isinstance(result, tuple) else (result,)

    def changed(self, **tensors: Tensor | None) -> Call:
        return dataclasses.replace(self, tensors={**self.tensors, **tensors})

    def map(self, change: Callable[[Tensor], Tensor], names: Iterable[str]) -> Call:
        """With ``change`` applied to the tensors of these names, which stay leaves of autograd."""
        given = {n: self.tensors[n] for n in names if self.tensors[n] is not None}
        return self.changed(**{n: change(t.detach()).requires_grad_(t.requires_grad) for n, t in given.items()})

    def check(self, **more) -> None:
        """Hold outputs and gradients against fp64 by the error rule."""
        check_op(self.op.function, self.op.reference, self.tensors, options=self.options, **more)


def call(name: str, *, dtype=torch.float32, device="cpu", grad=True, **sizes: int) -> Call:
    """Make a call of the op ``name`` on random tensors, with other sizes where they are given."""
    op, sizes = OPS[name], {**SIZES, **sizes}
    tensors = {
        n: (0.5 * torch.randn(shape(spec, sizes), dtype=torch.float64)).to(device, dtype).requires_grad_(grad)
        for n, spec in op.shapes.items()
    }
    if "drop_path_scale" in tensors:
        tensors["drop_path_scale"].requires_grad_(False)  # a drawn constant
    return Call(op, tensors, op.options(sizes, torch.device(device)))


def tiny_model(device="cpu", **more) -> VisionTransformer:
    """A ViT of one block for images of 16 × 16 pixels."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**sizes, **more}, device=device)


def shape(spec: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """``"3HD C"`` in numbers; T is what patch_embed makes of the image."""
    sizes = {**sizes, "T": sizes["R"] + (sizes["Y"] // sizes["P"]) * (sizes["X"] // sizes["P"])}
    return tuple(
        math.prod(sizes[f] if f.isalpha() else int(f) for f in re.findall(r"\d+|[A-Z]", dim)) for dim in spec.split()
    )


def parameters(name: str) -> list[str]:
    """The tensors of an op that are no activations."""
    return [n for n in OPS[name].shapes if n not in OPS[name].inputs]


def each_op(names: Iterable[str] | None = None, **having):
    """Run a test once an op: of all, of ``names``, or of those whose attributes are as given."""
    chosen = [n for n in names or OPS if all(getattr(OPS[n], key) == value for key, value in having.items())]
    return pytest.mark.parametrize("op", chosen)


def _block(function: Callable) -> Callable:
    def block(
        x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale1, norm2_weight,
        norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale2, *, num_heads, eps=1e-6,
    ):  # fmt: skip
        return function(
            x, norm1=(norm1_weight, norm1_bias), qkv=(qkv_weight, qkv_bias), proj=(proj_weight, proj_bias),
            norm2=(norm2_weight, norm2_bias), fc1=(fc1_weight, fc1_bias), fc2=(fc2_weight, fc2_bias),
            layer_scale=(layer_scale1, layer_scale2), num_heads=num_heads, eps=(eps, eps),
        )  # fmt: skip

    return block


def _swiglu(function: Callable) -> Callable:
    def swiglu_mlp(x, w12, b12, w3, b3, norm_weight, norm_bias, residual, layer_scale, *, eps=1e-6):
        norm = (norm_weight, norm_bias, eps)
        return function(x, w12, b12, w3, b3, norm=norm, residual=residual, layer_scale=layer_scale)

    return swiglu_mlp


def _varlen_reference(q, k, v, cu_seqlens, max_seqlen, **options):
    return reference.attention_varlen(q, k, v, cu_seqlens, **options)


def _packed_images(sizes: dict[str, int], device: torch.device) -> dict:
    starts = torch.arange(sizes["B"] + 1, dtype=torch.int32, device=device) * sizes["N"]
    return {"cu_seqlens": starts, "max_seqlen": max(1, sizes["N"])}


_NORM = {"x": "B N C", "weight": "C", "bias": "C"}
_RMS = {"x": "B N C", "weight": "C"}
_SUM = {"residual": "B N C", "layer_scale": "C", "drop_path_scale": "B"}
_QKV = dict.fromkeys("qkv", "B H N D")
_BLOCK = {
    "x": "B N C", "norm1_weight": "C", "norm1_bias": "C", "qkv_weight": "3HD C", "qkv_bias": "3HD",
    "proj_weight": "C HD", "proj_bias": "C", "layer_scale1": "C", "norm2_weight": "C", "norm2_bias": "C",
    "fc1_weight": "F C", "fc1_bias": "F", "fc2_weight": "C F", "fc2_bias": "C", "layer_scale2": "C",
}  # fmt: skip
_SCALES = ("layer_scale", "drop_path_scale")

OPS = {
    "layer_norm": Op(ops.layer_norm, reference.layer_norm, _NORM, ("x",), ("weight", "bias"), normed=True),
    "add_layer_norm": Op(
        ops.add_layer_norm, reference.add_layer_norm, _NORM | _SUM, ("x", "residual"),
        ("weight", "bias", *_SCALES), normed=True,
    ),
    "rms_norm": Op(ops.rms_norm, reference.rms_norm, _RMS, ("x",), ("weight",), normed=True),
    "add_rms_norm": Op(
        ops.add_rms_norm, reference.add_rms_norm, _RMS | _SUM, ("x", "residual"), ("weight", *_SCALES), normed=True
    ),
    "linear": Op(
        functools.partial(ops.linear, activation="gelu"), functools.partial(reference.linear, activation="gelu"),
        {"x": "B N C", "weight": "F C", "bias": "F", "residual": "B N F", "layer_scale": "F"},
        ("x", "residual"), ("bias", "residual", "layer_scale"),
    ),
    "mlp": Op(
        ops.mlp, reference.mlp,
        {"x": "B N C", "w1": "F C", "b1": "F", "w2": "C F", "b2": "C", "residual": "B N C", "layer_scale": "C"},
        ("x", "residual"), ("b1", "b2", "residual", "layer_scale"),
    ),
    "swiglu_mlp": Op(
        _swiglu(ops.swiglu_mlp), _swiglu(reference.swiglu_mlp),
        {"x": "B N C", "w12": "2F C", "b12": "2F", "w3": "C F", "b3": "C", "norm_weight": "F", "norm_bias": "F",
         "residual": "B N C", "layer_scale": "C"},
        ("x", "residual"), ("b12", "b3", "norm_weight", "norm_bias", "residual", "layer_scale"), normed=True,
    ),
    "attention": Op(ops.attention, reference.attention, _QKV, ("q", "k", "v")),
    "attention_qkvpacked": Op(
        ops.attention_qkvpacked, reference.attention_qkvpacked, {"qkv": "B N 3 H D"}, ("qkv",)
    ),
    "attention_varlen": Op(
        ops.attention_varlen, _varlen_reference, dict.fromkeys("qkv", "BN H D"), ("q", "k", "v"),
        options=_packed_images,
    ),
    "block": Op(
        _block(ops.block), _block(reference.block), _BLOCK, ("x",),
        tuple(n for n in _BLOCK if n.startswith("norm") or n.endswith("bias") or n.startswith("layer_scale")),
        normed=True, options=lambda sizes, device: {"num_heads": sizes["H"]},
    ),
    "patch_embed": Op(
        ops.patch_embed, reference.patch_embed,
        {"images": "B I Y X", "weight": "C I P P", "bias": "C", "pos_embed": "1 T C", "prefix_tokens": "1 R C"},
        ("images",), ("bias", "pos_embed", "prefix_tokens"),
    ),
}  # fmt: skip

ATTENTION = ("attention", "attention_qkvpacked", "attention_varlen")
ROWS = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "linear", "mlp", "swiglu_mlp")
