"""Decomposed attention's registered ops: adapters for the launchers, references, and fake outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import reference
from vitkernels.ops._decomposed_attention.backward import backward_outputs, decomposed_attention_backward
from vitkernels.ops._decomposed_attention.forward import decomposed_attention_forward
from vitkernels.ops._registry import reference_gradients, register
from vitkernels.ops._window_attention.forward import forward_outputs
from vitkernels.ops._window_attention.registered import drawn_dropout
from vitkernels.ops._window_attention.windows import DecomposedOptions, Windows


def _options(Y, X, window, height, width, padding, seed, scale, dropout_p):
    return DecomposedOptions(Windows(Y, X, *window), (height, width), padding, seed, scale, dropout_p)


def _forward(qkv, *options):
    return decomposed_attention_forward(qkv, _options(*options))


def _fake_forward(qkv, *options):
    return forward_outputs(qkv)


def _reference_forward(qkv, *options):
    o = _reference(qkv, *options[3:6], *options[:3], *options[6:])
    return o.to(qkv.dtype).contiguous(), forward_outputs(qkv)[1]


def _reference(qkv, height, width, padding, Y, X, window, seed, scale, dropout_p):
    options = _options(Y, X, window, height, width, padding, seed, scale, dropout_p)
    return by_pytorch(qkv, options, dropout_scale=drawn_dropout(qkv, options))


def by_pytorch(qkv: Tensor, options: DecomposedOptions, **dropout: object) -> Tensor:
    """Compute attention on qkv (B, N, 3, H, D) in plain PyTorch, with ``dropout`` in place of the options'."""
    windows = options.windows
    return reference.window_attention(
        qkv, (windows.Y, windows.X), (windows.rows, windows.columns), rel_pos=options.rel_pos, padding=options.padding,
        scale=options.scale, **dropout,
    )  # fmt: skip


def _backward(do, qkv, o, lse, needed, *options):
    return decomposed_attention_backward(do, qkv, o, lse, _options(*options), needed)


def _fake_backward(do, qkv, o, lse, needed, *options):
    return backward_outputs(qkv, _options(*options), needed)


def _reference_backward(do, qkv, o, lse, needed, Y, X, window, height, width, padding, *rest):
    needs_dtables, needs_dpadding = needed
    dqkv, dheight, dwidth, dpadding = reference_gradients(
        lambda *tensors: _reference(*tensors, Y, X, window, *rest), (qkv, height, width, padding), (do,),
        (True, needs_dtables, needs_dtables, needs_dpadding),
    )  # fmt: skip
    return dqkv, torch.cat([dheight, dwidth]) if needs_dtables else dheight, dpadding


# Image, window (rows, columns), and the options.
_OPTIONS = (
    "SymInt Y, SymInt X, int[] window, Tensor rel_pos_h, Tensor rel_pos_w, Tensor? padding, Tensor? seed, float scale, "
    "float dropout_p"
)
decomposed_attention_fwd = register(
    f"decomposed_attention_fwd(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)",
    launcher=_forward,
    reference=_reference_forward,
    fake=_fake_forward,
    work="attention",
)
decomposed_attention_bwd = register(
    f"decomposed_attention_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, bool[] needed, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    launcher=_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)
