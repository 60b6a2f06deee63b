"""Test problems for the ops: inputs as in a vision transformer with the sizes of a :class:`Case`.

A problem is an op, a way to draw its inputs, and the reference. Inputs are drawn on the CPU in fp64 and then rounded,
so that a seed gives the same inputs on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels import ops, reference
from vitkernels.testing.cases import Case

Tensors = dict[str, Tensor]
Draw = Callable[[torch.dtype, torch.device], Tensors]

# Small cases that together cover every path: partial tiles, one program and many, all three regimes of attention.
WINDOW = Case(
    "10 tokens of 40 channels", 2, 24, 8, 1, 40, 2, 72, layer_scale=True,
    attention=("biased", "key_mask", "pair_mask", "causal", "dropout", "varlen", "rope_half", "rope_interleaved"),
)  # fmt: skip
ROW = Case("70 tokens of 72 channels", 1, 32, 4, 6, 72, 3, 100, "gelu_tanh", attention=("key_mask", "biased", "causal"))
BLOCKS = Case(
    "122 tokens of 136 channels", 1, 44, 4, 1, 136, 1, 96, "quick_gelu", attention=("biased", "key_mask", "causal")
)
GATED = Case("12 tokens, packed gate", 3, 24, 8, 3, 40, 1, 60, "silu", layer_scale=True, mlp="packed")
GATED_APART = Case(
    "11 tokens, gate apart with a norm, RMSNorm", 2, 24, 8, 2, 36, 2, 52, "silu",
    norm="rms_norm", mlp="separate", mlp_norm=True,
)  # fmt: skip
# Attention's backward by rows runs one program per head. It needs as many heads as an H100 has multiprocessors (132);
# with fewer, the backward runs by blocks.
MANY = Case("65 tokens, 132 heads", 44, 32, 4, 1, 48, 3, 72)
QUICK = (WINDOW, ROW, BLOCKS, GATED, GATED_APART, MANY)


@dataclasses.dataclass(frozen=True)
class Problem:
    """An op with its inputs and its reference.

    Attributes:
        op: The public function's name.
        variant: What is special about this problem, or "".
        case: The sizes.
        draw: Takes ``(dtype, device)`` and returns the inputs by argument name, with ``requires_grad`` set.
        function: The op, called with the inputs by name.
        reference: The same in plain PyTorch.
    """

    op: str
    variant: str
    case: Case
    draw: Draw
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]

    @property
    def id(self) -> str:
        """``op/variant/sizes``, or ``op/sizes`` without a variant."""
        return "/".join(part for part in (self.op, self.variant, self.case.name) if part)


def problems(case: Case) -> Iterator[Problem]:
    """Yield every problem from the block and the patch embedding of ``case``."""
    yield from _norms(case)
    yield from _products(case)
    yield from _attention(case)
    yield from _embedding(case)
    if case.mlp == "mlp" and case.norm == "layer_norm":
        yield _block(case)


def normal(*shape: int, scale: float = 1.0, shift: float = 0.0, grad: bool = True):
    """Return a function of ``(dtype, device)`` that draws a normally distributed tensor of ``shape``."""

    def draw(dtype: torch.dtype, device: torch.device) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale + shift).to(device, dtype).requires_grad_(grad)

    return draw


def _drawing(**draws: Callable[[torch.dtype, torch.device], Tensor]) -> Draw:
    return lambda dtype, device: {name: draw(dtype, device) for name, draw in draws.items()}


def _weight(rows: int, columns: int):
    return normal(rows, columns, scale=columns**-0.5)


def _path(batch: int):
    """Return a function that makes DropPath's scales; the first of several samples is dropped."""

    def draw(dtype: torch.dtype, device: torch.device) -> Tensor:
        scales = torch.full((batch,), 1.25)
        scales[: batch > 1] = 0.0
        return scales.to(device, dtype)

    return draw


def _norms(case: Case) -> Iterator[Problem]:
    B, N, C = case.batch, case.tokens, case.channels
    x, weight, bias = normal(B, N, C, scale=2.0, shift=0.5), normal(C, scale=0.5, shift=1.0), normal(C)
    parameters = {"weight": weight} if case.norm == "rms_norm" else {"weight": weight, "bias": bias}

    def problem(op: str, variant: str, **draws) -> Problem:
        draws = {"x": x} | draws
        return Problem(op, variant, case, _drawing(**draws), getattr(ops, op), getattr(reference, op))

    yield problem(case.norm, "", **parameters)
    # With inputs of ordinary size the variance would hide an error in eps.
    yield problem(case.norm, "variance near eps", x=normal(B, N, C, scale=1e-3), **parameters)
    added = {"residual": normal(B, N, C), **parameters}
    yield problem(f"add_{case.norm}", "", **added)
    if case.layer_scale:
        yield problem(f"add_{case.norm}", "scaled", **added, layer_scale=normal(C), drop_path_scale=_path(B))


def _products(case: Case) -> Iterator[Problem]:
    B, N, C, F = case.batch, case.tokens, case.channels, case.hidden
    x, residual = normal(B, N, C), normal(B, N, C)
    gamma = {"layer_scale": normal(C, scale=0.2)} if case.layer_scale else {}

    def problem(op: str, variant: str, function=None, spec=None, **draws) -> Problem:
        return Problem(
            op, variant, case, _drawing(x=x, **draws), function or getattr(ops, op), spec or getattr(reference, op)
        )

    yield problem("linear", "", weight=_weight(3 * C, C), bias=normal(3 * C))
    yield problem("linear", "residual", weight=_weight(C, C), bias=normal(C), residual=residual, **gamma)
    fc1 = {"w1": _weight(F, C), "b1": normal(F)} if case.mlp == "mlp" else {}
    if fc1:
        activation = case.activation
        yield problem(
            "linear",
            activation,
            lambda **t: ops.linear(**t, activation=activation),
            lambda **t: reference.linear(**t, activation=activation),
            weight=fc1["w1"], bias=fc1["b1"],
            **({"layer_scale": normal(F, scale=0.2)} if case.layer_scale else {}),
        )  # fmt: skip
        for variant in ("", "recompute"):
            yield problem(
                "mlp",
                variant,
                lambda recompute=bool(variant), **t: ops.mlp(**t, activation=activation, recompute=recompute),
                lambda **t: reference.mlp(**t, activation=activation),
                **fc1, w2=_weight(C, F), b2=normal(C), residual=residual, **gamma,
            )  # fmt: skip
    else:
        for recompute in (False, True):
            yield _gated(case, problem, residual, gamma, recompute)


def _gated(case: Case, problem, residual, gamma, recompute: bool) -> Problem:
    C, F = case.channels, case.hidden
    if case.mlp == "packed":
        first = {"w12": _weight(2 * F, C), "b12": normal(2 * F)}
    else:
        first = {"w1": _weight(F, C), "w2": _weight(F, C), "b1": normal(F), "b2": normal(F)}
    norm = {"norm_weight": normal(F, scale=0.5, shift=1.0), "norm_bias": normal(F)} if case.mlp_norm else {}

    def call(function, **options):
        def run(x, w3, b3, residual, layer_scale=None, norm_weight=None, norm_bias=None, **first):
            packed = "w12" in first
            return function(
                x,
                first["w12"] if packed else (first["w1"], first["w2"]),
                first["b12"] if packed else (first["b1"], first["b2"]),
                w3,
                b3,
                activation=case.activation,
                norm=(norm_weight, norm_bias, 1e-6) if case.mlp_norm else None,
                residual=residual,
                layer_scale=layer_scale,
                **options,
            )

        return run

    return problem(
        "swiglu_mlp",
        f"{case.mlp} weights" + ", norm" * case.mlp_norm + ", recompute" * recompute,
        call(ops.swiglu_mlp, recompute=recompute),
        call(reference.swiglu_mlp),
        **first, **norm, w3=_weight(C, F), b3=normal(C), residual=residual, **gamma,
    )  # fmt: skip


def _attention(case: Case) -> Iterator[Problem]:
    B, N, H, D = case.batch, case.tokens, case.heads, case.head_dim
    qkv = normal(B, N, 3, H, D)
    yield Problem(
        "attention_qkvpacked", "", case, _drawing(qkv=qkv), ops.attention_qkvpacked, reference.attention_qkvpacked
    )
    q, k, v = (normal(B, H, N, D) for _ in range(3))

    def problem(variant: str, function=ops.attention, spec=reference.attention, **draws) -> Problem:
        return Problem("attention", variant, case, _drawing(q=q, k=k, v=v, **draws), function, spec)

    yield problem("")
    for variant in case.attention:
        if variant == "biased":
            # If the bias needs a gradient, PyTorch computes half precision in fp32, which is no fair yardstick for a
            # kernel that does not. So the reference is PyTorch's plain formula.
            yield problem("learned bias", spec=_plain_attention, attn_mask=normal(H, N, N))
        elif variant in ("key_mask", "pair_mask"):
            yield problem(variant.replace("_", " "), attn_mask=_mask(B, N, pairs=variant == "pair_mask"))
        elif variant == "causal":
            yield problem(
                "causal",
                lambda **t: ops.attention(**t, is_causal=True),
                lambda **t: reference.attention(**t, is_causal=True),
            )
        elif variant == "dropout":
            yield problem("dropout", *_dropout(0.3))
        elif variant.startswith("rope"):
            yield from _rope(case, interleaved=variant == "rope_interleaved")
        elif variant == "varlen":
            yield _varlen(case)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    return reference.attention_weights(q, k, attn_mask=attn_mask) @ v


def _mask(B: int, N: int, *, pairs: bool):
    """Return a function that draws a bool mask without the last key; with ``pairs`` one query per image has no key."""

    def draw(dtype: torch.dtype, device: torch.device) -> Tensor:
        mask = torch.rand(B, 1, N if pairs else 1, N) > 0.3
        mask[..., 0] = True
        mask[..., -1] = False
        if pairs:
            mask[:, :, N // 2] = False
        return mask.to(device)

    return draw


def _dropout(p: float):
    """Return attention with dropout from a fixed seed, and the reference with the same dropout mask."""
    seed = 7

    def function(q, k, v):
        with torch.random.fork_rng(devices=[q.device] if q.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return ops.attention(q, k, v, dropout_p=p)

    def spec(q, k, v):
        with torch.random.fork_rng(devices=[q.device] if q.device.type == "cuda" else []):
            torch.manual_seed(seed)
            drawn = int(torch.randint(2**62, (1,), device=q.device))  # as in the op
        scale = reference.dropout_scale(drawn, (*q.shape[:3], k.shape[2]), p)
        return reference.attention(q, k, v, dropout_scale=scale.to(q.device, q.dtype))

    return function, spec


def _rope(case: Case, *, interleaved: bool) -> Iterator[Problem]:
    B, N, H, D, prefix = case.batch, case.tokens, case.heads, case.head_dim, case.prefix
    angles = torch.arange(N - prefix, dtype=torch.float64)[:, None] * torch.linspace(1.0, 0.01, D // 2).double()
    angles = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)

    def call(function):
        def run(q_weight, k_weight, **qkv):
            like = next(iter(qkv.values()))
            tables = (angles.cos().to(like), angles.sin().to(like), interleaved)
            norms = {"q_norm": (q_weight, None, 1e-6, True), "k_norm": (k_weight, None, 1e-6, True)}
            return function(**qkv, rope=tables, num_prefix_tokens=prefix, **norms)

        return run

    draws = {name: normal(B, H, N, D) for name in ("q", "k", "v")}
    norms = {name: normal(D, scale=0.3, shift=1.0) for name in ("q_weight", "k_weight")}
    variant = "RoPE of neighbours, QK-norm" if interleaved else "RoPE of halves, QK-norm"
    for op, given in (("attention", draws), ("attention_qkvpacked", {"qkv": normal(B, N, 3, H, D)})):
        yield Problem(
            op, variant, case, _drawing(**given, **norms), call(getattr(ops, op)), call(getattr(reference, op))
        )


def _varlen(case: Case) -> Problem:
    B, N, H, D = case.batch, case.tokens, case.heads, case.head_dim
    lengths = [max(1, N - 3 * i) for i in range(B)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()

    def function(q, k, v, cu_seqlens):
        return ops.attention_varlen(q, k, v, cu_seqlens, max(lengths))

    # Two tokens after the last image belong to no image.
    draws = {name: normal(sum(lengths) + 2, H, D) for name in ("q", "k", "v")}
    draws["cu_seqlens"] = lambda dtype, device: bounds.to(device)
    return Problem("attention_varlen", "", case, _drawing(**draws), function, reference.attention_varlen)


def _embedding(case: Case) -> Iterator[Problem]:
    B, Y, P, R, N, C = (
        case.batch,
        case.image // case.patch * case.patch,
        case.patch,
        case.prefix,
        case.tokens,
        case.channels,
    )
    draws = {"weight": normal(C, 3, P, P, scale=(3 * P * P) ** -0.5), "bias": normal(C), "pos_embed": normal(1, N, C)}
    if R:
        draws["prefix_tokens"] = normal(1, R, C)
    images = normal(B, 3, Y, Y)
    yield Problem("patch_embed", "", case, _drawing(images=images, **draws), ops.patch_embed, reference.patch_embed)

    statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def pixels(dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randint(256, (B, 3, Y, Y), dtype=torch.uint8).to(device)

    yield Problem(
        "patch_embed",
        "uint8",
        case,
        _drawing(images=pixels, **draws),
        lambda **t: ops.patch_embed(**t, normalize=statistics),
        lambda **t: reference.patch_embed(**t, normalize=statistics),
    )


def _block(case: Case) -> Problem:
    B, N, C, F, width = case.batch, case.tokens, case.channels, case.hidden, case.heads * case.head_dim
    draws = {
        "x": normal(B, N, C),
        "norm1_weight": normal(C, scale=0.5, shift=1.0), "norm1_bias": normal(C),
        "qkv_weight": _weight(3 * width, C), "qkv_bias": normal(3 * width),
        "proj_weight": _weight(C, width), "proj_bias": normal(C),
        "norm2_weight": normal(C, scale=0.5, shift=1.0), "norm2_bias": normal(C),
        "fc1_weight": _weight(F, C), "fc1_bias": normal(F),
        "fc2_weight": _weight(C, F), "fc2_bias": normal(C),
    }  # fmt: skip
    if case.layer_scale:
        draws |= {"gamma1": normal(C), "gamma2": normal(C)}

    def call(function):
        def run(x, gamma1=None, gamma2=None, **t):
            layers = {n: (t[f"{n}_weight"], t[f"{n}_bias"]) for n in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")}
            return function(x, **layers, layer_scale=(gamma1, gamma2), num_heads=case.heads, activation=case.activation)

        return run

    return Problem("block", "", case, _drawing(**draws), call(ops.block), call(reference.block))
