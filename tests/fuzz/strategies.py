"""What Hypothesis draws: a call of each public function, and what one can get wrong in it."""

from __future__ import annotations

import dataclasses
import math

import torch
from calls import LAYOUTS, Call, Input
from hypothesis import strategies as st

from vitkernels.reference import ACTIVATIONS

SIZES = (1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 129)
TOKENS = (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 49, 50, 63, 64, 65, 67, 129, 197, 260)
HEAD_DIMS = (1, 2, 3, 8, 15, 16, 17, 24, 31, 32, 33, 36, 48, 63, 64, 65, 72, 80, 97)
WINDOW_SIDES = (7, 4, 8, 1, 2, 3, 5, 12, 16)
BATCHES = (1, 2, 3, 5, 0)
HALVES = (torch.float16, torch.bfloat16)

dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float64))
fp8_dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
sizes, tokens, head_dims, batches, window_sides = map(
    st.sampled_from, (SIZES, TOKENS, HEAD_DIMS, BATCHES, WINDOW_SIDES)
)
layouts = st.one_of(st.just("contiguous"), st.sampled_from(sorted(LAYOUTS)))
seeds = st.integers(0, 2**31)
activations = st.sampled_from((*ACTIVATIONS, None))
epsilons = st.sampled_from((1e-6, 1e-5, 1e-3, 0.1))
leads = st.one_of(
    st.tuples(batches),
    st.tuples(batches, tokens),
    st.tuples(batches, st.sampled_from((1, 2, 3)), st.sampled_from(TOKENS[:-3])),
    st.just(()),
)


class Draw:
    """Adds inputs to a call, each with a layout, a dtype and a wish for its gradient."""

    def __init__(self, draw, dtype: torch.dtype):
        self.draw, self.dtype, self.inputs = draw, dtype, {}
        self.all_train = draw(st.booleans())  # the common case; else each by itself

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def add(self, name: str, *shape: int, kind: str = "normal", grad: bool | None = None, dtypes=()) -> None:
        if grad is None:
            grad = self.all_train or self.maybe()
        dtype = self.draw(st.sampled_from((None, *dtypes)))
        self.inputs[name] = Input(shape, kind, dtype, self.draw(layouts), grad)

    def maybe_add(self, name: str, *shape: int, **options) -> bool:
        """Leave it out now and then."""
        given = self.maybe()
        if given:
            self.add(name, *shape, **options)
        return given

    def done(self, op: str, **options) -> Call:
        if options.get("is_causal") and (options.get("scale") or 0.0) < 0.0:
            options["scale"] = 0.3  # PyTorch's attention on a CPU multiplies its −∞ by the scale: NaN
        upstream = self.draw(layouts)
        if any(name.endswith("eps") for name in options) or "logit_scale" in self.inputs:
            # A constant row, or gradient, is all noise behind a norm; tests/ops/test_layer_norm.py looks at it.
            upstream = _without(upstream, "expanded_last")
            self.inputs = {n: _relaid(x, "expanded_last") for n, x in self.inputs.items()}
        # PyTorch draws its dropout by itself.
        backends = (None,) if options.get("dropout_p") else (None, None, None, "torch")
        return Call(
            op, self.dtype, self.inputs, options, upstream, self.draw(seeds), self.draw(st.sampled_from(backends))
        )


def _without(layout: str, unwanted: str) -> str:
    return "gapped" if layout == unwanted else layout


def _relaid(x: Input, unwanted: str) -> Input:
    return dataclasses.replace(x, layout=_without(x.layout, unwanted))


def _wider(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a norm's parameters may have beside ``dtype``."""
    return (torch.float32,) if dtype in HALVES else ()


@st.composite
def norms(draw, op: str):
    d = Draw(draw, draw(dtypes))
    lead, C = draw(leads), draw(st.one_of(sizes, st.just(8200)))  # wider than a program holds
    adds = op.startswith("add")
    if C == 8200:
        lead = lead[:1]
    # Gradients of the sum's parts hang together in PyTorch: the second output has none without them.
    d.add("x", *lead, C, grad=True if adds else None)
    if adds:
        d.add("residual", *lead, C, dtypes=_wider(d.dtype))
        if lead:
            d.maybe_add("drop_path_scale", lead[0], kind="drop_path", grad=False)
        d.maybe_add("layer_scale", C)
    # The parameters go with the wider of x and the residual.
    wide = adds and d.inputs["residual"].dtype is not None
    for name in ("weight",) if "rms" in op else ("weight", "bias"):
        if d.maybe_add(name, C, dtypes=_wider(d.dtype)) and wide:
            d.inputs[name] = dataclasses.replace(d.inputs[name], dtype=torch.float32)
    eps = draw(st.one_of(epsilons, st.none())) if "rms" in op else draw(epsilons)
    return d.done(op, eps=eps)


def _epilogue(d: Draw, lead: tuple[int, ...], N: int) -> None:
    d.maybe_add("residual", *lead, N, dtypes=_wider(d.dtype))
    d.maybe_add("layer_scale", N, dtypes=_wider(d.dtype))


@st.composite
def linears(draw):
    d = Draw(draw, draw(dtypes))
    lead, N, K = draw(leads), draw(sizes), draw(sizes)
    d.add("x", *lead, K)
    d.add("weight", N, K, kind="weight")
    d.maybe_add("bias", N)
    _epilogue(d, lead, N)
    return d.done("linear", activation=draw(activations))


@st.composite
def mlps(draw):
    d = Draw(draw, draw(dtypes))
    lead, C, F, out = draw(leads), draw(sizes), draw(sizes), draw(sizes)
    d.add("x", *lead, C)
    d.add("w1", F, C, kind="weight")
    d.add("w2", out, F, kind="weight")
    for name, n in (("b1", F), ("b2", out)):
        if not d.maybe_add(name, n):
            d.inputs[name] = Input((), "none")
    _epilogue(d, lead, out)
    return d.done("mlp", activation=draw(activations), recompute=d.maybe())


@st.composite
def swiglu_mlps(draw):
    d = Draw(draw, draw(dtypes))
    lead, C, F, out = draw(leads), draw(sizes), draw(sizes), draw(sizes)
    d.add("x", *lead, C)
    if d.maybe():
        d.add("w12", 2 * F, C, kind="weight")
        d.maybe_add("b12", 2 * F)
    else:
        d.add("w1", F, C, kind="weight")
        d.add("w2", F, C, kind="weight")
        if d.maybe_add("b1", F):
            d.add("b2", F)
    d.add("w3", out, F, kind="weight")
    if not d.maybe_add("b3", out):
        d.inputs["b3"] = Input((), "none")
    options = {"activation": draw(activations), "gate_last": d.maybe(), "recompute": d.maybe()}
    if F > 2 and d.maybe():  # of one or two features a norm leaves signs
        d.maybe_add("norm_weight", F, dtypes=_wider(d.dtype))
        d.maybe_add("norm_bias", F, dtypes=_wider(d.dtype))
        options["eps"] = draw(epsilons)
    _epilogue(d, lead, out)
    return d.done("swiglu_mlp", **options)


def _prepare(d: Draw, B: int, H: int, N: int, D: int, *, rope: bool, prefix: bool) -> dict[str, object]:
    """Draw RoPE and QK-norm."""
    options = {}
    turned = rope and D % 2 == 0 and d.maybe()
    if turned:
        R = d.draw(st.sampled_from(sorted({0, 1, N}))) if prefix else 0
        shape = d.draw(st.sampled_from(((N - R, D), (H, N - R, D), (1, 1, N - R, D), (B, 1, N - R, D))))
        trained = d.draw(st.sampled_from((False, False, True)))
        for name in ("cos", "sin"):
            d.add(name, *shape, grad=trained, dtypes=_wider(d.dtype))
        options["interleaved"] = d.maybe()
        if prefix:
            options["num_prefix_tokens"] = R
        turned = R < N
    for name in ("q", "k"):
        if D > 2 and d.maybe():
            kind = d.draw(st.sampled_from(("layer", "rms")))
            options |= {f"{name}_kind": kind, f"{name}_eps": d.draw(epsilons)}
            d.maybe_add(f"{name}_weight", D, dtypes=_wider(d.dtype))
            if kind == "layer":
                # What is added to all keys alike leaves the softmax alone: a gradient of nothing but noise.
                d.maybe_add(f"{name}_bias", D, dtypes=_wider(d.dtype), grad=None if name == "q" or turned else False)
    return options


def _scores(d: Draw, B: int, H: int, N_q: int, N_kv: int) -> dict[str, object]:
    """Draw scale, causality, mask and dropout."""
    options = {
        "scale": d.draw(st.sampled_from((None, None, 0.3, 1.0, 0.0, -0.2))),
        "is_causal": d.draw(st.sampled_from((False, False, True))),
        "dropout_p": d.draw(st.sampled_from((0.0, 0.0, 0.0, 0.3))),
    }
    if d.maybe():
        whole = (B, H, N_q, N_kv)
        shape = tuple(d.draw(st.sampled_from((1, n))) for n in whole)[d.draw(st.integers(0, 3)) :]
        kind = d.draw(st.sampled_from(("keep", "normal", "holes")))
        # A mask that is one for all keys leaves the softmax alone, too.
        # Of no images PyTorch forgets it.
        grad = None if kind == "normal" and shape[-1] > 1 and B else False
        d.add("attn_mask", *shape, kind=kind, grad=grad, dtypes=() if kind == "keep" else _wider(d.dtype))
    if d.maybe():
        d.add("key_bias", B, N_kv, grad=None if N_kv > 1 and B else False, dtypes=_wider(d.dtype))
    return options


def _without_zero_gradients(call: Call) -> Call:
    """Where a query sees one key, its weight is 1: what goes into the scores gets a gradient of exactly zero, and
    PyTorch's rounding of it, or ours, is no yardstick. tests/ops/test_attention.py looks at that case."""
    frozen = (
        "q", "k", "attn_mask", "key_bias", "cos", "sin", "q_weight", "q_bias", "k_weight", "k_bias", "bias_table",
        "logit_scale", "rel_pos_h", "rel_pos_w",
    )  # fmt: skip
    inputs = {n: dataclasses.replace(x, grad=x.grad and n not in frozen) for n, x in call.inputs.items()}
    return dataclasses.replace(call, inputs=inputs)


@st.composite
def attentions(draw):
    d = Draw(draw, draw(dtypes))
    B, H, N_q, N_kv, D = draw(batches), draw(st.sampled_from((1, 2, 3))), draw(tokens), draw(tokens), draw(head_dims)
    if d.maybe():
        N_kv = N_q
    d.add("q", B, H, N_q, D)
    d.add("k", B, H, N_kv, D)
    d.add("v", B, H, N_kv, D)
    options = _scores(d, B, H, N_q, N_kv) | _prepare(d, B, H, N_q, D, rope=N_q == N_kv, prefix=True)
    call = d.done("attention", **options)
    few = N_kv <= 8 and ("attn_mask" in call.inputs or options["is_causal"])
    return _without_zero_gradients(call) if N_kv == 1 or few or options["scale"] == 0.0 else call


@st.composite
def attentions_qkvpacked(draw):
    d = Draw(draw, draw(dtypes))
    B, H, N, D = draw(batches), draw(st.sampled_from((1, 2, 3))), draw(tokens), draw(head_dims)
    d.add("qkv", B, N, 3, H, D)
    options = _scores(d, B, H, N, N) | _prepare(d, B, H, N, D, rope=True, prefix=True)
    call = d.done("attention_qkvpacked", **options)
    return _without_zero_gradients(call) if N <= 8 or call.options["scale"] == 0.0 else call


@st.composite
def attentions_varlen(draw):
    d = Draw(draw, draw(dtypes))
    lengths = draw(st.lists(st.sampled_from((0, *TOKENS[:-1])), min_size=1, max_size=4))
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    T, H, D = starts[-1] + draw(st.sampled_from((0, 0, 5))), draw(st.sampled_from((1, 2, 3))), draw(head_dims)
    for name in ("q", "k", "v"):
        d.add(name, T, H, D)
    options = {
        "starts": tuple(starts),
        "starts_dtype": draw(st.sampled_from((torch.int32, torch.int64))),
        "max_seqlen": max(lengths) + draw(st.sampled_from((0, 0, 9))),
        "scale": draw(st.sampled_from((None, None, 0.3, 1.0, -0.2))),
        "is_causal": draw(st.sampled_from((False, False, True))),
    }
    for name in ("k", "v"):  # of equal keys or values the gradients of the scores are zero
        d.inputs[name] = _relaid(d.inputs[name], "expanded")
    call = d.done("attention_varlen", **options, **_prepare(d, 1, H, T, D, rope=True, prefix=False))
    return _without_zero_gradients(call) if max(lengths) <= 8 else call


def _relative(d: Draw, H: int, D: int, entries: int) -> dict[str, object]:
    """Draw what the two ops of relative positions share."""
    d.maybe_add("bias_table", entries, H, dtypes=_wider(d.dtype))
    scale = d.draw(st.sampled_from((None, None, 0.3, 1.0, 0.0, -0.2)))
    if D > 2 and d.maybe():  # the norm of one or two channels leaves signs
        d.add("logit_scale", H, kind="factor", dtypes=_wider(d.dtype))
        scale = None
    return {"scale": scale, "dropout_p": d.draw(st.sampled_from((0.0, 0.0, 0.0, 0.3)))}


@st.composite
def window_attentions(draw):
    d = Draw(draw, draw(dtypes))
    B, H, D = draw(batches), draw(st.sampled_from((1, 2, 3))), draw(head_dims)
    sides = draw(st.tuples(window_sides, window_sides))
    grid = draw(st.sampled_from((False, False, False, True)))
    if grid:
        image = tuple(side * draw(st.sampled_from((1, 2, 3))) for side in sides)
        shift = (0, 0)
    else:
        image = tuple(draw(st.integers(1, 2 * side + 3)) for side in sides)
        shift = tuple(draw(st.one_of(st.just(0), st.just(side // 2), st.integers(0, side - 1))) for side in sides)
    d.add("qkv", B, *image, 3, H, D)
    options = _relative(d, H, D, (2 * sides[0] - 1) * (2 * sides[1] - 1))
    filled = d.maybe()
    if filled:
        padded = any(length % side for length, side in zip(image, sides, strict=True))
        d.add("padding", 3, H, D, grad=None if padded else False, dtypes=_wider(d.dtype))
    keys = math.prod(_keys(*axis, filled) for axis in zip(image, sides, shift, strict=True))
    if keys == 1:
        d.inputs["qkv"] = dataclasses.replace(d.inputs["qkv"], grad=False)
    equal = sides[0] == sides[1] and shift[0] == shift[1] and d.maybe()
    call = d.done(
        "window_attention",
        window_size=sides[0] if equal else sides,
        shift=shift[0] if equal else shift,
        grid=grid,
        roll_padded=d.maybe(),
        **options,
    )
    return _without_zero_gradients(call) if keys <= 8 or options["scale"] == 0.0 else call


def _keys(length: int, side: int, shift: int, filled: bool) -> int:
    """Return how many keys a query attends to along an axis of an image: of its window, or of its region of the only
    one, and of the image unless padding is attended to."""
    keys = max(shift, side - shift) if length <= side else side
    return keys if filled else min(keys, length)


@st.composite
def relative_attentions(draw):
    d = Draw(draw, draw(dtypes))
    B, H, D = draw(batches), draw(st.sampled_from((1, 2, 3))), draw(head_dims)
    (Y, X), R = draw(st.tuples(window_sides, window_sides)), draw(st.sampled_from((0, 1, 2, 5)))
    d.add("qkv", B, R + Y * X, 3, H, D)
    options = _relative(d, H, D, (2 * Y - 1) * (2 * X - 1) + 3 * (R > 0))
    if R + Y * X == 1:
        d.inputs["qkv"] = dataclasses.replace(d.inputs["qkv"], grad=False)
    call = d.done("relative_attention", grid_size=(Y, X), num_prefix_tokens=R, **options)
    return _without_zero_gradients(call) if R + Y * X <= 8 or options["scale"] == 0.0 else call


@st.composite
def decomposed_attentions(draw):
    d = Draw(draw, draw(dtypes))
    B, H, D = draw(batches), draw(st.sampled_from((1, 2, 3))), draw(head_dims)
    sides = draw(st.tuples(window_sides, window_sides))
    whole = d.maybe()
    image = sides if whole else tuple(draw(st.integers(1, 2 * side + 3)) for side in sides)
    d.add("qkv", B, *image, 3, H, D)
    for axis, side in zip("hw", sides, strict=True):
        d.add(f"rel_pos_{axis}", 2 * side - 1, D, dtypes=_wider(d.dtype))
    filled = d.maybe()
    if filled:
        padded = any(length % side for length, side in zip(image, sides, strict=True))
        d.add("padding", 3, H, D, grad=None if padded else False, dtypes=_wider(d.dtype))
    keys = math.prod(side if filled else min(side, length) for length, side in zip(image, sides, strict=True))
    if keys == 1:
        d.inputs["qkv"] = dataclasses.replace(d.inputs["qkv"], grad=False)
    call = d.done(
        "decomposed_attention",
        window_size=None if whole else sides,
        scale=draw(st.sampled_from((None, None, 0.3, 1.0, 0.0, -0.2))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.0, 0.3))),
    )
    return _without_zero_gradients(call) if keys <= 8 else call


@st.composite
def patch_mergings(draw):
    d = Draw(draw, draw(dtypes))
    B, Y, X = draw(batches), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    C, F, norm_last = draw(sizes), draw(sizes), d.maybe()
    d.add("x", B, Y, X, C)
    d.add("weight", F, 4 * C, kind="weight")
    if norm_last:  # of equal rows, behind a norm, all is noise
        d.inputs["weight"] = _relaid(d.inputs["weight"], "expanded")
    d.maybe_add("bias", F)
    for name in ("norm_weight", "norm_bias"):
        d.maybe_add(name, F if norm_last else 4 * C, dtypes=_wider(d.dtype))
    return d.done("patch_merging", eps=draw(epsilons), norm_last=norm_last)


@st.composite
def blocks(draw):
    d = Draw(draw, draw(dtypes))
    B, N, H, D = draw(batches), draw(tokens), draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((8, 12, 16, 17)))
    C, F = draw(st.sampled_from((24, 33, 48))), draw(st.sampled_from((17, 40, 64)))
    N = min(N, 129)
    d.add("x", B, N, C)
    weights = {"qkv": (3 * H * D, C), "proj": (C, H * D), "fc1": (F, C), "fc2": (C, F)}
    for name, shape in weights.items():
        d.add(f"{name}_weight", *shape, kind="weight")
        if name != "qkv":
            d.maybe_add(f"{name}_bias", shape[0])
    if d.maybe():
        # That of the keys leaves the softmax alone, and that of the queries nearly so among few.
        for name, grad in (("q", None if N >= 50 else False), ("k", False), ("v", None)):
            d.add(f"{name}_bias", H * D, grad=grad)
    for name in ("norm1", "norm2"):
        for part in ("weight", "bias"):
            d.maybe_add(f"{name}_{part}", C, dtypes=_wider(d.dtype))
    d.maybe_add("gamma1", C)
    d.maybe_add("gamma2", C)
    return d.done(
        "block",
        num_heads=H,
        eps=(draw(epsilons), draw(epsilons)),
        scale=draw(st.sampled_from((None, 0.3))),
        activation=draw(activations),
        recompute=d.maybe(),
    )


@st.composite
def patch_embeds(draw):
    d = Draw(draw, draw(dtypes))
    B, channels, PY, PX = (
        draw(batches),
        draw(st.sampled_from((3, 1, 4))),
        *draw(st.tuples(*[st.sampled_from((1, 2, 3, 4, 14, 16))] * 2)),
    )
    rows, columns, C = draw(st.sampled_from((1, 2, 3, 7))), draw(st.sampled_from((1, 2, 5))), draw(sizes)
    R, N = draw(st.sampled_from((0, 1, 5))), rows * columns
    options = {"pos_embed_prefix": d.maybe()}
    shape = (B, channels, rows * PY, columns * PX)
    if d.maybe():
        options["normalize"] = tuple(
            tuple(draw(st.floats(low, high)) for _ in range(channels)) for low, high in ((0.2, 0.6), (0.2, 0.4))
        )
        if d.maybe():
            d.add("images", *shape, kind="pixels", grad=False)
        else:
            d.add("images", *shape, kind="unit", dtypes=(torch.float32, torch.float16))
    else:
        d.add("images", *shape)
    d.add("weight", C, channels, PY, PX, kind="weight")
    d.maybe_add("bias", C)
    if R:
        d.add("prefix_tokens", 1, R, C)
    if d.maybe():
        length = R + N if options["pos_embed_prefix"] else N
        d.add("pos_embed", *([1] if d.maybe() else []), length, C)
    chosen = draw(st.sampled_from((None, None, "mask", "visible")))
    if chosen == "mask":
        d.add("mask", B, N, kind="keep", grad=False)
        d.add("mask_token", *draw(st.sampled_from(((C,), (1, C), (1, 1, C)))))
    elif chosen == "visible":  # expanded, its indices would not be distinct
        d.inputs["visible"] = Input(
            (B, draw(st.integers(1, N))), f"below {N}", d.draw(st.sampled_from((None, torch.int32)))
        )
    return d.done("patch_embed", **options)


@st.composite
def rows_fp8(draw, op: str):
    d = Draw(draw, draw(fp8_dtypes))
    lead, C = draw(leads), draw(st.one_of(sizes, st.just(1152)))
    d.add("x", *lead, C, grad=False)
    if op == "quantize_fp8":
        return d.done(op)
    wide = False
    if op.startswith("add"):
        d.add("residual", *lead, C, grad=False, dtypes=_wider(d.dtype))
        wide = d.inputs["residual"].dtype is not None
        d.maybe_add("layer_scale", C, grad=False, dtypes=_wider(d.dtype))
    for name in ("weight", "bias"):
        if d.maybe_add(name, C, grad=False, dtypes=_wider(d.dtype)) and wide:
            d.inputs[name] = dataclasses.replace(d.inputs[name], dtype=torch.float32)
    return d.done(op, eps=draw(epsilons))


@st.composite
def linears_fp8(draw):
    d = Draw(draw, draw(fp8_dtypes))
    # Steps are of 128 features: below, of one, with a rest, and several.
    lead, N, K = draw(leads), draw(st.one_of(sizes, st.just(260))), draw(st.sampled_from((16, 48, 128, 144, 384)))
    d.add("x", *lead, K, grad=False)
    d.add("weight", N, K, kind="weight", grad=False)
    for name, shape in (("bias", (N,)), ("residual", (*lead, N)), ("layer_scale", (N,))):
        d.maybe_add(name, *shape, grad=False, dtypes=_wider(d.dtype))
    return d.done("linear_fp8", activation=draw(activations), grouped=d.maybe(), quantized=d.maybe())


@st.composite
def lora_linears(draw):
    d = Draw(draw, draw(dtypes))
    lead, N, K, rank = draw(leads), draw(sizes), draw(sizes), draw(sizes)
    d.add("x", *lead, K)
    d.add("weight", N, K, kind="weight")
    if not d.maybe_add("bias", N):
        d.inputs["bias"] = Input((), "none")
    _lora(d, "lora", rank, N, K)
    if d.maybe():
        d.add("lora_x", *lead, K)
    _epilogue(d, lead, N)
    return d.done("lora_linear", activation=draw(activations))


@st.composite
def lora_mlps(draw):
    call = draw(mlps())
    d = Draw(draw, call.dtype)
    F, C = call.inputs["w1"].shape
    for name, N, K in (("lora1", F, C), ("lora2", call.inputs["w2"].shape[0], F)):
        if d.maybe():
            _lora(d, name, draw(sizes), N, K)
    return dataclasses.replace(call, op="lora_mlp", inputs=call.inputs | d.inputs)


def _lora(d: Draw, name: str, rank: int, N: int, K: int) -> None:
    d.add(f"{name}_a", rank, K, kind="weight")
    d.add(f"{name}_b", N, rank, kind="weight")


CALLS = {
    **{op: norms(op) for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")},
    "linear": linears(),
    "mlp": mlps(),
    "lora_linear": lora_linears(),
    "lora_mlp": lora_mlps(),
    "swiglu_mlp": swiglu_mlps(),
    "attention": attentions(),
    "attention_qkvpacked": attentions_qkvpacked(),
    "attention_varlen": attentions_varlen(),
    "window_attention": window_attentions(),
    "relative_attention": relative_attentions(),
    "decomposed_attention": decomposed_attentions(),
    "patch_merging": patch_mergings(),
    "block": blocks(),
    "patch_embed": patch_embeds(),
}
# Of tensors that calls.py quantizes; tests/ops/test_fp8.py gives the ops what does not fit.
FP8_CALLS = {
    **{op: rows_fp8(op) for op in ("quantize_fp8", "layer_norm_fp8", "add_layer_norm_fp8")},
    "linear_fp8": linears_fp8(),
}
