"""Record what a function launches on a GPU, without one: PyTorch's ops as they are dispatched, and Triton's kernels.

The function runs on tensors without data, on device meta or fake. Views, allocations and no-ops are left out. For an op
of vitkernels its launcher runs: PyTorch's ops inside count like any other, and a kernel's reads and writes are found in
its Triton IR, so that there is no table of kernels to keep up to date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import unittest.mock
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton._C.libtriton import ir, passes
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from vitkernels import runtime
from vitkernels._intercept import Access, Intercept, accesses, op_accesses, tensors
from vitkernels.ops import _product_hopper, _triton
from vitkernels.ops._attention import forward_hopper
from vitkernels.ops._registry import OPS
from vitkernels.tools.aot.build import TARGETS, Target

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
TARGET = TARGETS["sm_90"]  # what the IR of kernels is made for


@dataclasses.dataclass(frozen=True)
class Call:
    """A launch of a Triton kernel, to be repeated."""

    kernel: triton.JITFunction
    args: tuple
    grid: tuple[int, ...]
    options: dict[str, object]

    def __call__(self) -> None:
        self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.options)

    @property
    def key(self) -> str:
        """What two launches of the same work have in common; tensors count by their layout and who shares storage."""
        storages: dict[int, int] = {}

        def described(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
            return value.dtype, (*value.shape,), value.stride(), value.storage_offset(), storage

        named = {name: described(value) for name, value in self.options.items()}
        return f"{self.kernel.fn.__name__} {self.grid} {[described(value) for value in self.args]} {named}"


@dataclasses.dataclass
class Event:
    """One op or kernel that ran.

    Attributes:
        phase: ``forward`` or ``backward``.
        op: Its name, behind that of the op of vitkernels within which it ran.
        accesses: What it reads and writes; nothing for a kernel whose IR was not read.
        flops: FLOPs of a product or an attention of PyTorch, 2 a multiply-add.
        attention: Whether it is part of an attention.
        attended: Queries and keys of an attention of PyTorch.
        call: The launch, if it is a Triton kernel's.
    """

    phase: str
    op: str
    accesses: list[Access]
    flops: int = 0
    attention: bool = False
    attended: tuple[int, int] | None = None
    call: Call | None = None

    @property
    def name(self) -> str:
        """The op's or kernel's own name."""
        return self.op.rpartition(": ")[2]


class Recorder(Intercept):
    """Records PyTorch's ops when they are dispatched, and kernels when :func:`recorded_launches` reports them.

    With ``reads`` the accesses of Triton's kernels are found in their IR.
    """

    def __init__(self, *, reads: bool = True):
        # prim's ops, such as an attribute that a TorchFunctionMode calls, are no ops of the dispatcher.
        super().__init__(self._look_inside, self._record, in_parts=lambda op: op.namespace != "prim")
        self.reads = reads
        self.events: list[Event] = []
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
        event = Event(self.phase, self.within + name, found)
        if name in PRODUCTS:
            a, b = tensors((args, kwargs))[-2:]
            event.flops = 2 * a.numel() * b.shape[-1]
            summand = tensors(args[:1]) if name in ("addmm", "baddbmm") else []
            spared = {t.untyped_storage()._cdata for t in summand}
            for access in found:
                access.least = 0 if access.storage._cdata in spared else access.elements
            if name == "bmm":
                leave_out_scores(found)
        if "attention" in name:
            given = tensors((args, kwargs))
            backward = name.endswith("backward")
            q, k = given[backward : backward + 2]  # (B, H, N, D), behind do in the backward
            event.attended = q.shape[-2], k.shape[-2]
            event.flops = (5 if backward else 2) * 2 * q.numel() * k.shape[-2]  # five products, and two
            _attention_least([event], given, tensors(out))
        self.events.append(event)

    def launch(self, call: Call) -> None:
        """Record ``call``."""
        event = Event(self.phase, self.within + call.kernel.fn.__name__, [], call=call)
        self.events.append(event)
        if not self.reads:
            return
        named = {k: v for k, v in call.options.items() if k in call.kernel.arg_names}
        bound = inspect.signature(call.kernel.fn).bind(*call.args, **named)
        bound.apply_defaults()
        arguments = bound.arguments
        read, written, multiplied = ([arguments[name] for name in names] for names in _uses(call.kernel, arguments))
        event.accesses = accesses(read, written)
        if multiplied:
            operands = {t.untyped_storage()._cdata for t in multiplied}
            for access in event.accesses:
                if not access.written and access.storage._cdata in operands:
                    access.least = access.elements
            result = max((a for a in event.accesses if a.written), key=lambda a: a.elements)
            result.least = result.elements


def leave_out_scores(found: list[Access]) -> None:
    """Take the scores out of what a batched product needs: a fused attention writes none.

    Of the three matrices of each product in an attention two have the size of q.
    """
    sizes = [access.elements for access in found]
    for access in found:
        if len(sizes) == 3 and sizes.count(access.elements) == 1:
            access.least = 0


def _attention_least(events: list[Event], inputs: list[Tensor], outputs: list[Tensor]) -> None:
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


class FlashAttention(TorchFunctionMode):
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
def recorded_launches(recorder: Recorder, target: Target = TARGET, backend: str = "triton") -> Iterator[None]:
    """Report each launch, configured for ``target``, to ``recorder`` instead of running it.

    Where the recorder reads kernels' IR, ops launch no kernel in Gluon, whose IR it cannot read, but the one in Triton
    in its place, which reads and writes the same tensors.
    """

    def record(kernel, *args, grid, warmup, **options):
        recorder.launch(Call(kernel, args, grid, options))

    with (
        unittest.mock.patch.object(_product_hopper, "HAS_GLUON", _triton.HAS_GLUON and not recorder.reads),
        unittest.mock.patch.object(forward_hopper, "HAS_GLUON", _triton.HAS_GLUON and not recorder.reads),
        unittest.mock.patch.object(triton.JITFunction, "run", record),
        unittest.mock.patch.object(runtime, "device_facts", return_value=target.facts),
        runtime.use_backend(backend),
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
