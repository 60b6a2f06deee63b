"""Count how often a transformer block passes over its activations, from the inputs and outputs of each op.

One pass is T·C elements (T = batch · tokens). The block of timm runs on meta tensors under a dispatch mode, plain and
accelerated. Each op reads every distinct input once and writes every output once. An expanded input counts with its
elements in memory; views, allocations and no-ops count nothing. :mod:`vitkernels.tools.aot.recorder` tells how ops and
kernels are found. Tensors that do not grow with the batch (weights, their gradients, partial sums of a bounded number
of programs) are counted separately.

"Least" is what products and attention must read and write: a product its operands and its result; attention q, k, v and
o, and in backward q, k, v, o, do, dq, dk and dv, but no scores. "Extra" is the rest. Of Swin all blocks of the first
stage are counted.

The count misses two things: a tile that several programs of one launch read, which depends on caches; and the inside of
PyTorch's ops, which count as one kernel even if they launch several (as the backward of LayerNorm and of attention do).
Both favour PyTorch, whose ops are the larger.

What torch.compile makes of timm's block is counted by Inductor: see :mod:`vitkernels.tools.aot.inductor`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitkernels import swap
from vitkernels.tools.aot.block import call_of_block
from vitkernels.tools.aot.recorder import (
    PRODUCTS,
    Event,
    FlashAttention,
    Recorder,
    leave_out_scores,
    recorded_launches,
)
from vitkernels.tools.console import import_timm, one_line, warn
from vitkernels.tools.names import build, resolve

PROVIDERS = ("timm", "torch.compile", "vitkernels")


@dataclasses.dataclass(frozen=True)
class Row:
    """One op or kernel: reads, writes and least in passes, ``fixed`` in elements that do not grow with the batch."""

    phase: str
    op: str
    reads: float
    writes: float
    least: float
    fixed: int
    attention: bool

    @property
    def extra(self) -> float:
        return self.reads + self.writes - self.least


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The rows of one run, in order."""

    rows: tuple[Row, ...]

    def total(self, column: str, **where: object) -> float:
        """Return the sum of ``column`` over the rows with the attributes in ``where``."""
        rows = (row for row in self.rows if all(getattr(row, k) == v for k, v in where.items()))
        return sum(getattr(row, column) for row in rows)

    def to_dict(self) -> dict[str, object]:
        """Return rows and totals as JSON types."""
        columns = ("reads", "writes", "least", "extra", "fixed")
        return {
            "rows": [dataclasses.asdict(row) | {"extra": row.extra} for row in self.rows],
            **{column: self.total(column) for column in columns},
            "extra_of_attention": self.total("extra", attention=True),
        }

    def to_text(self) -> str:
        """Return a table."""
        lines = [f"{'':8}  {'op':52}  {'reads':>7}  {'writes':>7}  {'least':>7}  {'extra':>7}"]

        def line(phase: str, op: str, source: Callable[[str], float]) -> None:
            figures = (source(column) for column in ("reads", "writes", "least", "extra"))
            lines.append(f"{phase:8}  {op:52}  " + "  ".join(f"{x:7.2f}" for x in figures))

        for row in self.rows:
            if row.reads or row.writes:
                line(row.phase, row.op, functools.partial(getattr, row))
        for phase in dict.fromkeys(row.phase for row in self.rows):
            line(phase, "total", functools.partial(self.total, phase=phase))
        line("", "total", self.total)
        line("", "of which attention's own", functools.partial(self.total, attention=True))
        lines.append(f"Beside these, {self.total('fixed') / 1e6:.1f} M elements that do not grow with the batch.")
        return "\n".join(lines)


def count(
    function: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    *,
    parameters: Sequence[Tensor] = (),
    train: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """Count the passes of ``function(x)`` over its activations, for a meta tensor x of ``shape``.

    Args:
        function: Anything that runs on meta tensors; one pass is as many elements as x has.
        shape: Shape of x, (B, N, C) or any other whose first dim is the batch.
        parameters: Parameters of ``function`` on device meta; ``train`` computes their gradients and x's.
        train: Also count the backward.
        dtype: Dtype of x.

    Raises:
        RuntimeError: Different ops run at batch B + 1 than at B, so that we cannot tell what grows with the batch.
    """

    def run(batch: int) -> list[Event]:
        x = torch.empty((batch, *shape[1:]), dtype=dtype, device="meta", requires_grad=train)
        counter = Recorder()
        with recorded_launches(counter), FlashAttention(), counter:
            with torch.set_grad_enabled(train):
                y = function(x)
            if train:
                counter.phase = "backward"
                torch.autograd.grad(y, (x, *parameters), torch.empty_like(y))
        return counter.events

    return _traffic(run, shape)


def count_compiled(
    function: Callable[..., Tensor], shape: Sequence[int], rest: tuple, *, train: bool, dtype: torch.dtype
) -> Traffic:
    """Count the passes of ``torch.compile(function)(x, *rest)`` as :func:`count` does of ``function(x)``.

    ``train`` computes the gradients of x and of all tensors in ``rest`` that require one. See
    :mod:`vitkernels.tools.aot.inductor` for what is counted.

    Raises:
        RuntimeError: As for :func:`count`, or from Inductor.
    """
    from vitkernels.tools.aot.inductor import compiled_kernels

    def run(batch: int) -> list[Event]:
        x = torch.empty((batch, *shape[1:]), dtype=dtype, device="meta", requires_grad=train)
        events = [Event(*kernel) for kernel in compiled_kernels(function, (x, *rest), train=train)]
        for event in events:
            event.attention = "attention" in event.op
            # An attention's statistics and random states are smaller than its q by a factor of the head dim.
            smallest = max(a.elements for a in event.accesses) // 6 if event.attention else 0
            for access in event.accesses:
                if event.attention or event.op in PRODUCTS:
                    access.least = access.elements if access.elements > smallest else 0
            if event.op == "bmm":
                leave_out_scores(event.accesses)
        return events

    return _traffic(run, shape)


def _traffic(run: Callable[[int], list[Event]], shape: Sequence[int]) -> Traffic:
    """Return the traffic of ``run(shape[0])``; what changes with one more in the batch grows with it."""
    events, larger = run(shape[0]), run(shape[0] + 1)
    if [(e.op, len(e.accesses)) for e in events] != [(e.op, len(e.accesses)) for e in larger]:
        raise RuntimeError(f"other ops run at batch {shape[0] + 1} than at {shape[0]}: try another batch")
    return Traffic(tuple(_row(a, b, math.prod(shape)) for a, b in zip(events, larger, strict=True)))


def _row(event: Event, larger: Event, unit: int) -> Row:
    grow = [a for a, b in zip(event.accesses, larger.accesses, strict=True) if a.elements != b.elements]
    return Row(
        event.phase,
        event.op,
        reads=sum(a.elements for a in grow if not a.written) / unit,
        writes=sum(a.elements for a in grow if a.written) / unit,
        least=sum(a.least for a in grow) / unit,
        fixed=sum(a.elements for a in event.accesses) - sum(a.elements for a in grow),
        attention=event.attention,
    )


def count_block(model: nn.Module, shape: Sequence[int], *, train: bool, compiled: bool = False) -> Traffic:
    """Count the first block of ``model``, a ViT of timm on device meta, at images of ``shape`` (B, 3, Y, X).

    With ``compiled`` count it as ``torch.compile`` fuses it.

    Raises:
        ValueError: The model has no ``blocks``.
        RuntimeError: As for :func:`count`.
    """
    block, x, args, kwargs = call_of_block(model, shape)
    dtype = next(model.parameters()).dtype
    block.train(train)
    options = {"train": train, "dtype": dtype}
    if compiled:
        state = dict(block.named_parameters()) | dict(block.named_buffers())
        return count_compiled(
            functools.partial(_call_block, block), (shape[0], *x.shape[1:]), (state, args, kwargs), **options
        )
    return count(
        lambda x: block(x, *args, **kwargs),
        (shape[0], *x.shape[1:]),
        parameters=[p for p in block.parameters() if p.requires_grad],
        **options,
    )


def _call_block(block: nn.Module, x: Tensor, state: dict[str, Tensor], args: tuple, kwargs: dict) -> Tensor:
    with FlashAttention():
        return torch.func.functional_call(block, state, (x, *args), kwargs)


def run_traffic(
    model_name: str, *, batch: int = 32, train: bool | None = None, providers: Sequence[str] = PROVIDERS
) -> dict[str, object]:
    """Print how often a block of ``model_name`` passes over its activations in bf16: plain, compiled, accelerated.

    DropPath is left out.

    Args:
        model_name: A Vision Transformer of timm, in any form that :func:`vitkernels.tools.names.resolve` accepts, which
            is counted at its default image size.
        batch: Number of images.
        train: True counts forward and backward, False inference; None counts both cases.
        providers: Which of :data:`PROVIDERS` to count, in their order.

    Returns:
        ``{"inference" | "training": {"timm" | "torch.compile" | "vitkernels": Traffic.to_dict()}}``.

    Raises:
        UserError: timm is missing, or does not know the name.
        RuntimeError: As for :func:`count`.
        ValueError: The model is no Vision Transformer, or ``batch`` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected 1 or more")
    with torch.device("meta"):
        model = build(resolve(model_name).for_timm)[0].to(torch.bfloat16)
    timm = import_timm()
    for module in model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0  # Swin's default is 0.1; Inductor's random numbers cannot be counted without a GPU
    shape = (batch, *timm.data.resolve_model_data_config(model)["input_size"])
    counted = {"inference": {}, "training": {}}
    for name in providers:
        if name == "vitkernels":
            swap.accelerate(model)
        for kind in counted:
            if train is None or train == (kind == "training"):
                compiled = name == "torch.compile"
                try:
                    counted[kind][name] = count_block(model, shape, train=kind == "training", compiled=compiled)
                except Exception as error:
                    if not compiled:
                        raise
                    # Inductor's internals differ between versions of PyTorch.
                    warn(f"torch.compile's block is not counted: {type(error).__name__}: {one_line(error)}")
    for kind, traffics in counted.items():
        for name, traffic in traffics.items():
            block = {"torch.compile": "timm by torch.compile"}.get(name, name)
            title = f"{model_name}, a block of {block}, {kind}, batch {batch}: passes over the activations"
            print(f"{title}\n{traffic.to_text()}\n")
        if traffics:
            extras = (f"{name} {traffic.total('extra'):.1f}" for name, traffic in traffics.items())
            print(f"Beyond what products and attention need, {kind}: {', '.join(extras)} passes.\n")
    return {
        kind: {name: traffic.to_dict() for name, traffic in traffics.items()}
        for kind, traffics in counted.items()
        if traffics
    }
