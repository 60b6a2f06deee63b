"""Count how often a transformer block passes over its activations, from the inputs and outputs of each op.

One pass is T·C elements (T = batch · tokens). The block of timm runs on meta tensors under a dispatch mode, plain and
accelerated. Each op reads every distinct input once and writes every output once. An expanded input counts with its
elements in memory; views, allocations and no-ops count nothing. For an op of vitkernels, its launcher runs: PyTorch's
ops inside count like any other, and a kernel's reads and writes are found in its Triton IR, so that there is no table
of kernels to keep up to date. Tensors that do not grow with the batch (weights, their gradients, partial sums of a
bounded number of programs) are counted separately.

"Least" is what products and attention must read and write: a product its operands and its result; attention q, k, v and
o, and in backward q, k, v, o, do, dq, dk and dv. "Extra" is the rest.

The count misses two things: a tile that several programs of one launch read, which depends on caches; and the inside of
PyTorch's ops, which count as one kernel even if they launch several (as the backward of LayerNorm and of attention do).
Both favour PyTorch, whose ops are the larger.

What torch.compile makes of timm's block is counted by Inductor: see :mod:`vitkernels.tools.aot.inductor`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import unittest.mock
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from triton._C.libtriton import ir, passes
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from vitkernels import runtime, swap
from vitkernels._intercept import Access, Intercept, accesses, op_accesses, tensors
from vitkernels.ops._registry import OPS
from vitkernels.tools.aot.build import TARGETS
from vitkernels.tools.console import import_timm, one_line, warn
from vitkernels.tools.names import build, resolve

PROVIDERS = ("timm", "torch.compile", "vitkernels")
TARGET = TARGETS["sm_90"]  # launchers ask for the device's facts

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


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


@dataclasses.dataclass
class _Event:
    """One op or kernel that ran."""

    phase: str
    op: str
    accesses: list[Access]
    attention: bool = False


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

    def run(batch: int) -> list[_Event]:
        x = torch.empty((batch, *shape[1:]), dtype=dtype, device="meta", requires_grad=train)
        counter = _Counter()
        with _recorded_launches(counter), _FlashAttention(), counter:
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

    def run(batch: int) -> list[_Event]:
        x = torch.empty((batch, *shape[1:]), dtype=dtype, device="meta", requires_grad=train)
        events = [_Event(*kernel) for kernel in compiled_kernels(function, (x, *rest), train=train)]
        for event in events:
            event.attention = "attention" in event.op
            # An attention's statistics and random states are smaller than its q by a factor of the head dim.
            smallest = max(a.elements for a in event.accesses) // 6 if event.attention else 0
            for access in event.accesses:
                if event.attention or event.op in PRODUCTS:
                    access.least = access.elements if access.elements > smallest else 0
        return events

    return _traffic(run, shape)


def _traffic(run: Callable[[int], list[_Event]], shape: Sequence[int]) -> Traffic:
    """Return the traffic of ``run(shape[0])``; what changes with one more in the batch grows with it."""
    events, larger = run(shape[0]), run(shape[0] + 1)
    if [(e.op, len(e.accesses)) for e in events] != [(e.op, len(e.accesses)) for e in larger]:
        raise RuntimeError(f"other ops run at batch {shape[0] + 1} than at {shape[0]}: try another batch")
    return Traffic(tuple(_row(a, b, math.prod(shape)) for a, b in zip(events, larger, strict=True)))


def _row(event: _Event, larger: _Event, unit: int) -> Row:
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


class _Counter(Intercept):
    """Records PyTorch's ops when they are dispatched, and kernels when :func:`_recorded_launches` reports them."""

    def __init__(self):
        super().__init__(self._look_inside, self._record, in_parts=lambda op: True)
        self.events: list[_Event] = []
        self.phase = "forward"
        self.within = ""

    def _look_inside(self, op, args, kwargs):
        if op.namespace != "vitkernels":
            return NotImplemented
        name, first = op.overloadpacket.__name__, len(self.events)
        outside, self.within = self.within, f"{name}: "
        try:
            with self:
                out = OPS[name].launcher(*args, **kwargs)
        finally:
            self.within = outside
        if "attention" in name:
            _attention_least(self.events[first:], tensors((args, kwargs)), tensors(out))
        return out

    def _record(self, op, args, kwargs, out) -> None:
        name, found = op.overloadpacket.__name__, op_accesses(op, args, kwargs, out)
        if not found:
            return
        event = _Event(self.phase, self.within + name, found)
        if name in PRODUCTS:
            summand = tensors(args[:1]) if name in ("addmm", "baddbmm") else []
            spared = {t.untyped_storage()._cdata for t in summand}
            for access in found:
                access.least = 0 if access.storage._cdata in spared else access.elements
        if "attention" in name:
            _attention_least([event], tensors((args, kwargs)), tensors(out))
        self.events.append(event)

    def launch(self, kernel: triton.JITFunction, arguments: dict[str, object]) -> None:
        """Record the launch of ``kernel``."""
        uses = _uses(kernel, arguments)
        read, written, multiplied = ([arguments[name] for name in names] for names in uses)
        event = _Event(self.phase, self.within + kernel.fn.__name__, accesses(read, written))
        if multiplied:
            operands = {t.untyped_storage()._cdata for t in multiplied}
            for access in event.accesses:
                if not access.written and access.storage._cdata in operands:
                    access.least = access.elements
            result = max((a for a in event.accesses if a.written), key=lambda a: a.elements)
            result.least = result.elements
        self.events.append(event)


def _attention_least(events: list[_Event], inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Mark as least the op's own inputs and outputs, once each, in the accesses of its kernels."""
    # The first input is q, do, or all of qkv. Statistics and random states are smaller by a factor of the head dim.
    demanded = [t for t in inputs + outputs if t.numel() > inputs[0].numel() // 6]
    budget = {a.storage._cdata: a.elements for a in accesses(demanded, ())}
    for event in events:
        event.attention = True
        for access in event.accesses:
            access.least = min(access.elements, budget.get(access.storage._cdata, 0))
            if access.least:
                budget[access.storage._cdata] -= access.least


class _FlashAttention(TorchFunctionMode):
    """Runs PyTorch's attention as the fused op of a GPU; meta tensors would run products and a softmax instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _fused_attention(*args, **kwargs)


def _fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        raise NotImplementedError("attention with grouped heads is not counted")
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    needs_lse = torch.is_grad_enabled()
    mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, needs_lse, dropout_p, is_causal, scale=scale
    )[0]  # fmt: skip


@contextlib.contextmanager
def _recorded_launches(counter: _Counter) -> Iterator[None]:
    """Report each launch, configured for :data:`TARGET`, to ``counter`` instead of running it."""

    def record(kernel, *args, grid, warmup, **kwargs):
        arguments = inspect.signature(kernel.fn).bind(*args, **{k: kwargs[k] for k in kernel.arg_names if k in kwargs})
        arguments.apply_defaults()
        counter.launch(kernel, arguments.arguments)

    with (
        unittest.mock.patch.object(triton.JITFunction, "run", record),
        unittest.mock.patch.object(runtime, "device_facts", return_value=TARGET.facts),
        runtime.use_backend("triton"),
    ):
        yield


# Triton's names for the dtypes of pointers.
POINTEES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


def _uses(kernel: triton.JITFunction, arguments: dict[str, object]) -> tuple[set[str], set[str], set[str]]:
    """Return the pointers that ``kernel`` reads, those that it writes, and the read ones whose data a product uses."""
    signature, constants = {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + POINTEES[value.dtype]
        elif isinstance(value, (int, float)):
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        else:
            raise NotImplementedError(f"{kernel.fn.__name__}: {name} is a {type(value).__name__}, which is not counted")
    return _read_ir(kernel, tuple(signature.items()), tuple(constants.items()))


@functools.cache
def _read_ir(kernel: triton.JITFunction, signature: tuple, constants: tuple) -> tuple[set[str], set[str], set[str]]:
    backend = make_backend(TARGET.triton)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ASTSource(kernel, dict(signature), dict(constants)).make_ir(
        TARGET.triton, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    # Inline everything into one function, and remove unused loads, which would count as reads.
    manager = ir.pass_manager(context)
    passes.common.add_inliner(manager)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    manager.run(module, "traffic")

    entry = module.get_function(module.get_entry_func_name())
    taken = [(name, kind) for name, kind in signature if kind != "constexpr"]
    flow = _Flow({entry.args(i).id(): name for i, (name, kind) in enumerate(taken) if kind.startswith("*")})
    module.walk(flow.visit)
    return flow.solve()


class _Flow:
    """Data flow in a kernel's IR: addresses derive from pointer arguments, data from loads through addresses."""

    def __init__(self, pointers: dict[int, str]):
        self.addresses = {value: {name} for value, name in pointers.items()}
        self.data: dict[int, set[str]] = {}
        self.edges: list[tuple[int, int]] = []
        self.loads: list[tuple[int, int]] = []  # address, result
        self.stores: list[int] = []
        self.factors: list[int] = []
        self.yields: dict[int, tuple[list[int], list[int]]] = {}  # results and arguments of each region

    def visit(self, op) -> None:
        """Add ``op``; the ops in its regions must have been added before."""
        name = op.get_name()
        operands = [op.get_operand(i).id() for i in range(op.get_num_operands())]
        results = [op.get_result(i).id() for i in range(op.get_num_results())]
        if name in ("scf.yield", "scf.condition"):
            block = op.get_block()
            arguments = [block.get_argument(i).id() for i in range(block.get_num_arguments())]
            self.yields[block.get_parent().id()] = operands, arguments
            return
        inner = [self.yields.get(op.get_region(i).id()) for i in range(op.get_num_regions())]
        if name == "scf.for":
            ((ends, arguments),) = inner
            for start, end, argument, result in zip(operands[3:], ends, arguments[1:], results, strict=True):
                self.edges += [(start, argument), (end, argument), (start, result), (end, result)]
        elif name == "scf.if":
            for ends, _ in filter(None, inner):
                self.edges += zip(ends, results, strict=True)
        elif name == "scf.while":
            raise NotImplementedError("a kernel with a while loop is not counted")
        elif name.endswith(("load", "gather")):
            self.loads.append((operands[0], results[0]))
        elif name.endswith(("store", "scatter")):
            self.stores.append(operands[0])
        elif "atomic" in name or name == "tt.descriptor_reduce":
            self.loads += [(operands[0], result) for result in results or operands[:1]]
            self.stores.append(operands[0])
        else:
            if name.startswith("tt.dot"):
                self.factors += operands[:2]
            self.edges += [(operand, result) for operand in operands for result in results]

    def solve(self) -> tuple[set[str], set[str], set[str]]:
        """Return the names of the pointers read, written, and multiplied."""
        self._spread(self.addresses)
        for address, result in self.loads:
            self.data.setdefault(result, set()).update(self.addresses[address])
        self._spread(self.data)
        read = set().union(*(self.addresses[address] for address, _ in self.loads))
        written = set().union(*(self.addresses[address] for address in self.stores))
        return read, written, set().union(*(self.data.get(factor, ()) for factor in self.factors))

    def _spread(self, labels: dict[int, set[str]]) -> None:
        changed = True
        while changed:
            changed = False
            for source, sink in self.edges:
                new = labels.get(source, set()) - labels.get(sink, set())
                if new:
                    labels.setdefault(sink, set()).update(new)
                    changed = True


class _Stop(Exception):
    pass


def count_block(model: nn.Module, shape: Sequence[int], *, train: bool, compiled: bool = False) -> Traffic:
    """Count the first block of ``model``, a ViT of timm on device meta, at images of ``shape`` (B, 3, Y, X).

    With ``compiled`` count it as ``torch.compile`` fuses it.

    Raises:
        ValueError: The model has no ``blocks``.
        RuntimeError: As for :func:`count`.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise ValueError(f"{type(model).__name__} has no blocks; expected a Vision Transformer of timm")
    block = blocks[0]
    seen = []

    def stop(module, args, kwargs):
        seen.append((args, kwargs))
        raise _Stop

    dtype = next(model.parameters()).dtype
    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Stop), runtime.use_backend("torch"):
            model(torch.empty((1, *shape[1:]), dtype=dtype, device="meta"))
    finally:
        hook.remove()
    ((x, *args), kwargs) = seen[0]
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
    with _FlashAttention():
        return torch.func.functional_call(block, state, (x, *args), kwargs)


def run_traffic(
    model_name: str, *, batch: int = 32, train: bool | None = None, providers: Sequence[str] = PROVIDERS
) -> dict[str, object]:
    """Print how often a block of ``model_name`` passes over its activations in bf16: plain, compiled, accelerated.

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
    shape = (batch, *import_timm().data.resolve_model_data_config(model)["input_size"])
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
