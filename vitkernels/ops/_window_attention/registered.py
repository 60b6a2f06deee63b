"""Window attention's registered ops: adapters for the launchers, references, and fake outputs."""

from __future__ import annotations

from torch import Tensor

from vitkernels import reference
from vitkernels.ops._registry import reference_gradients, register
from vitkernels.ops._window_attention.backward import backward_outputs, window_attention_backward
from vitkernels.ops._window_attention.forward import forward_outputs, window_attention_forward
from vitkernels.ops._window_attention.windows import DecomposedOptions, Options, Windows


def _options(Y, X, window, table, padding, logit_scale, seed, scale, dropout_p):
    return Options(Windows(Y, X, *window), table, padding, logit_scale, seed, scale, dropout_p)


def _forward(qkv, *options):
    return window_attention_forward(qkv, _options(*options))


def _fake_forward(qkv, *options):
    return forward_outputs(qkv)


def _reference_forward(qkv, *options):
    o = _reference(qkv, *options[3:6], *options[:3], *options[6:])
    return o.to(qkv.dtype).contiguous(), forward_outputs(qkv)[1]


def _reference(qkv, table, padding, logit_scale, Y, X, window, seed, scale, dropout_p):
    options = _options(Y, X, window, table, padding, logit_scale, seed, scale, dropout_p)
    return by_pytorch(qkv, options, dropout_scale=drawn_dropout(qkv, options))


def drawn_dropout(qkv: Tensor, options: Options | DecomposedOptions) -> Tensor | None:
    """Return the factors that the kernels draw for the weights of all windows; None without dropout."""
    if not options.dropout_p:
        return None
    windows = options.windows
    count = windows.counts[0] * windows.counts[1] * qkv.shape[0]
    shape = (count, qkv.shape[3], windows.tokens, windows.tokens)
    return reference.dropout_scale(int(options.seed), shape, options.dropout_p).to(qkv.device)


def by_pytorch(qkv: Tensor, options: Options, **dropout: object) -> Tensor:
    """Compute attention on qkv (B, N, 3, H, D) in plain PyTorch, with ``dropout`` in place of the options'."""
    windows = options.windows
    return reference.window_attention(
        qkv, (windows.Y, windows.X), (windows.rows, windows.columns), shift=(windows.shift_y, windows.shift_x),
        num_prefix_tokens=windows.prefix, grid=bool(windows.grid), roll_padded=bool(windows.roll_padded),
        mask_value=windows.mask_value, bias_table=options.table, padding=options.padding,
        logit_scale=options.logit_scale, scale=options.scale, **dropout,
    )  # fmt: skip


def _backward(do, qkv, o, lse, needed, *options):
    return window_attention_backward(do, qkv, o, lse, _options(*options), needed)


def _fake_backward(do, qkv, o, lse, needed, *options):
    return backward_outputs(qkv, _options(*options), needed)


def _reference_backward(do, qkv, o, lse, needed, Y, X, window, table, padding, logit_scale, *rest):
    return reference_gradients(
        lambda *tensors: _reference(*tensors, Y, X, window, *rest), (qkv, table, padding, logit_scale), (do,),
        (True, *needed),
    )  # fmt: skip


# Image, window (the rest of Windows), and the options.
_OPTIONS = (
    "SymInt Y, SymInt X, int[] window, Tensor? table, Tensor? padding, Tensor? logit_scale, Tensor? seed, float scale, "
    "float dropout_p"
)
window_attention_fwd = register(
    f"window_attention_fwd(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)",
    launcher=_forward,
    reference=_reference_forward,
    fake=_fake_forward,
    work="attention",
)
window_attention_bwd = register(
    f"window_attention_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, bool[] needed, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launcher=_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)
