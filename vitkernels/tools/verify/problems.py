"""Test problems for the ops: the workloads of :mod:`vitkernels.testing.workloads` at the sizes of a :class:`Case`.

Inputs are drawn on the CPU, so that a seed gives the same inputs on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels.runtime import cdiv
from vitkernels.testing import fp8
from vitkernels.testing.cases import Case
from vitkernels.testing.workloads import Workload, packed_lengths, workloads

SEED = 7  # of dropout

# Small cases that together cover every path: partial tiles, one program and many, all three regimes of attention.
WINDOW = Case(
    "10 tokens of 40 channels", 2, 24, 8, 1, 40, 2, 72, layer_scale=True,
    attention=(
        "biased", "key_bias", "key_mask", "pair_mask", "causal", "dropout", "varlen", "rope_half", "rope_interleaved",
        "swin", "swin_cosine", "swin_dropout", "relative", "decomposed", "decomposed_windows",
        "visible", "lora",
    ),
)  # fmt: skip
ROW = Case(
    "70 tokens of 72 channels", 1, 32, 4, 6, 72, 3, 100, "gelu_tanh",
    attention=("key_mask", "biased", "causal", "swin", "swin_cosine", "swin_grid"),
)  # fmt: skip
BLOCKS = Case(
    "122 tokens of 136 channels", 1, 44, 4, 1, 136, 1, 96, "quick_gelu",
    attention=("biased", "key_mask", "causal", "swin_wide", "relative", "decomposed"),
)  # fmt: skip
# More than 256 channels: a row of LayerNorm's backward takes two warps.
GATED = Case("12 tokens, packed gate", 3, 24, 8, 3, 300, 3, 60, "silu", layer_scale=True, mlp="packed")
GATED_APART = Case(
    "11 tokens, gate apart with a norm, RMSNorm", 2, 24, 8, 2, 36, 2, 52, "silu",
    norm="rms_norm", mlp="separate", mlp_norm=True,
)  # fmt: skip
# Attention's backward by rows runs one program per head. It needs as many heads as an H100 has multiprocessors (132);
# with fewer, the backward runs by blocks.
MANY = Case("65 tokens, 132 heads", 44, 32, 4, 1, 48, 3, 72)
# For GPUs alone, where the emulated one would take hours: the sizes from which Hopper runs the kernels in Gluon.
LARGE = Case("577 tokens of 1024 channels", 8, 384, 16, 1, 1024, 16, 2048, layer_scale=True)
QUICK = (WINDOW, ROW, BLOCKS, GATED, GATED_APART, MANY)


@dataclasses.dataclass(frozen=True)
class Problem:
    """An op with its inputs and its reference.

    Attributes:
        op: The public function's name.
        variant: What is special about this problem, or "".
        case: The sizes.
        draw: Takes ``(dtype, device)`` and returns the inputs by name, with ``requires_grad`` set.
        function: The op, called with the inputs by name.
        reference: The same in plain PyTorch.
    """

    op: str
    variant: str
    case: Case
    draw: Callable[[torch.dtype, torch.device], dict[str, Tensor]]
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]

    @property
    def id(self) -> str:
        """``op/variant/sizes``, or ``op/sizes`` without a variant."""
        return "/".join(part for part in (self.op, self.variant, self.case.name) if part)


def problems(case: Case) -> Iterator[Problem]:
    """Yield every problem from the block and the patch embedding of ``case``."""
    return (_problem(workload, case) for workload in workloads(case) if workload.variant is not None)


def fp8_problems(case: Case) -> Iterator[Problem]:
    """Yield the problems of FP8's ops, which have no gradients, from the block of ``case``.

    Their operands have the channels that the block's have, made up to a multiple of 16.
    """
    C, F = 16 * cdiv(case.channels, 16), case.hidden
    rows = {"x": (case.batch, case.tokens, C)}
    affine = {"weight": (C,), "bias": (C,)}
    product, wide = (rows | {"weight": (features, C), "bias": (features,)} for features in (F, 3 * C))
    scaled = {"residual": (case.batch, case.tokens, F), "layer_scale": (F,)}
    eps, activation = {"eps": 1e-3}, {"activation": case.activation}
    made = (
        ("quantize_fp8", "", rows, {}),
        ("layer_norm_fp8", "", rows | affine, eps),
        ("add_layer_norm_fp8", "", rows | {"residual": rows["x"], **affine, "layer_scale": (C,)}, eps),
        ("linear_fp8", "residual", product | scaled, {}),
        # As between the MLP's products: scales of 128 channels in and out.
        ("linear_fp8", f"{case.activation} to e4m3", wide, activation | {"grouped": True, "quantized": True}),
    )
    for op, variant, shapes, options in made:
        draw = functools.partial(_draw_fp8, shapes)
        both = [functools.partial(run, op, **options) for run in (fp8.call_op, fp8.call_reference)]
        yield Problem(op, variant, case, draw, *both)


def _draw_fp8(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    drawn = {}
    for name, shape in shapes.items():
        scale = shape[1] ** -0.5 if len(shape) == 2 else 1.0  # of a product's weight
        drawn[name] = (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype)
    return drawn


def _problem(workload: Workload, case: Case) -> Problem:
    # Two tokens after the last packed image belong to no image.
    draw = functools.partial(workload.draw, case, T=sum(packed_lengths(case)) + 2)
    both = [functools.partial(f, case) for f in (workload.function, workload.reference)]
    if "dropout_p" in workload.options(case):
        both = [functools.partial(_from_seed, f) for f in both]
    return Problem(workload.op, workload.variant.format_map(vars(case)), case, draw, *both)


def _from_seed(function: Callable, **tensors: Tensor) -> Tensor:
    """Call ``function`` with the same random draws every time."""
    device = next(iter(tensors.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        return function(**tensors)
