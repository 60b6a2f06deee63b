"""What a launcher did is remembered, and repeated without it where tensors lie as they did.

A launcher works out tilings, strides, alignment and up to 58 arguments a kernel, which takes the host longer than a
small batch takes the GPU. It reads no value of a tensor: what it does follows from how its tensors lie, from its
options and from the device. So it is watched once, PyTorch's ops by a ``TorchDispatchMode`` and the kernels by
:func:`vitkernels.ops._triton.watching`, and its :class:`Plan` is kept: allocate these outputs, launch these compiled
kernels on these pointers, sum these shares. Inference, training, compiled and exported calls all come by here, behind
the checks, autograd and the dispatcher.

A call is watched when its key comes for the second time: shapes that come once, as of images packed, would be watched
in vain. No plan is made of a call that is given one tensor twice, as the two cannot be told apart, or that uses a
tensor from elsewhere. A plan holds no tensor, and frees each as soon as the launcher could have.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitkernels import runtime
from vitkernels.ops._triton import current_stream, launches_are_hooked, watching

MAX_PLANS = 1024  # of an op; past it all are made anew
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_aten = torch.ops.aten
_ALLOCATE = frozenset(
    {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}
)
# PyTorch's functions take half the time of the ops that they call.
_SHORTER = {
    _aten.add.Tensor: torch.add, _aten.addmm.default: torch.addmm, _aten.cat.default: torch.cat,
    _aten.clone.default: torch.clone, _aten.mm.default: torch.mm, _aten.mul.Tensor: torch.mul,
    _aten.reshape.default: torch.reshape, _aten.sum.dim_IntList: torch.sum, _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose, _aten.unbind.int: torch.unbind, _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
}  # fmt: skip
_all: list[Plans] = []


def forget() -> None:
    """Forget every plan: for who replaces a kernel, a launcher or what chooses a configuration."""
    for plans in _all:
        plans.forget()


class Plans:
    """A launcher that remembers: called as ``launcher`` is, and with what names the device before.

    Raises what the launcher raises; a call that fails is not remembered.
    """

    def __init__(self, launcher: Callable):
        self._launcher = launcher
        self._plans: dict[Hashable, Plan | None] = {}
        self._seen: set[int] = set()  # hashes of keys
        _all.append(self)

    def forget(self) -> None:
        """Forget all plans of this launcher."""
        self._plans.clear()
        self._seen.clear()

    def __call__(self, device: Hashable, *args):
        key, tensors = _key(device, args)
        if key is None:
            return self._launcher(*args)
        try:
            plan = self._plans[key]
        except KeyError:
            return self._first(key, tensors, args)
        if plan is None or launches_are_hooked():
            return self._launcher(*args)
        return plan.run(device, *tensors)

    def _first(self, key: Hashable, tensors: list[Tensor], args: tuple):
        seen = hash(key)
        if seen not in self._seen:
            if len(self._seen) >= MAX_PLANS:
                self.forget()
            self._seen.add(seen)
            return self._launcher(*args)
        if len({*map(id, tensors)}) < len(tensors):
            return self._launcher(*args)
        watch = _Watch(tensors)
        with watching(watch.kernel), watch:
            results = self._launcher(*args)
        self._plans[key] = watch.plan(results)
        return results


def _key(device: Hashable, args: tuple) -> tuple[Hashable | None, list[Tensor]]:
    """All that a launcher looks at, or None where a tensor is of a class of its own; and the tensors."""
    key: list[Any] = [device]
    tensors = []
    single = False
    for x in args:
        kind = type(x)
        if kind in _PLAIN:
            dtype = x.dtype
            # Triton tells an address that 16 divides from another; attention tells all powers of two up to it.
            key.append((x.shape, x.stride(), dtype, x.data_ptr() & 15))
            tensors.append(x)
            single = single or dtype is torch.float32
        elif kind is list:
            key.append(tuple(x))
        elif isinstance(x, Tensor):
            return None, tensors
        else:
            key.append(x)
    if single:
        key.append(runtime.allowed_precision())
    return tuple(key), tensors


class Plan(NamedTuple):
    """What a launcher did, as a function of the tensors.

    Attributes:
        run: Called with what names the device, and the tensors.
        source: Its source: read it to see what an op does at a shape.
    """

    run: Callable
    source: str


class _Unknown(Exception):
    """A launcher used a tensor that neither was given to it nor came of an op."""


class _Slot(NamedTuple):
    """Which tensor an argument is: first come those of the call, then what the steps make."""

    index: int

    def __repr__(self) -> str:
        return f"t{self.index}"


class _Step(NamedTuple):
    """A call that a launcher made: ``reads`` and ``results`` are slots, ``kept`` is one that does more than return."""

    name: str
    call: Callable
    arguments: list[Any]
    options: dict[str, Any]
    reads: set[int]
    results: int | list[int] | None
    kept: bool


_STREAM = object()


class _Writer:
    """Writes a plan's source; what has no literal is a global of its own."""

    def __init__(self):
        self.globals: dict[str, Any] = {"current_stream": current_stream}
        self.lines: list[str] = []
        self.launches = False

    def value(self, value: Any) -> str:
        if type(value) in (_Slot, int, bool, str, type(None)):
            return repr(value)
        if value is _STREAM:
            return "stream"
        if type(value) is list:
            return f"[{', '.join(map(self.value, value))}]"
        return self.name("c", value)

    def name(self, prefix: str, value: Any) -> str:
        name = f"{prefix}{len(self.globals)}"
        self.globals[name] = value
        return name

    def step(self, step: _Step, spent: set[int]) -> None:
        if _STREAM in step.arguments and not self.launches:
            self.launches = True
            self.lines.append("stream = current_stream(device)")
        arguments = [self.value(each) for each in step.arguments]
        arguments += [f"{key}={self.value(each)}" for key, each in step.options.items()]
        call = self.name(f"{step.name}_", step.call)
        results = step.results
        if type(results) is list:
            results = f"({''.join(f't{slot}, ' for slot in results)})"
        elif results is not None:
            results = f"t{results}"
        self.lines.append(
            f"{results} = {call}({', '.join(arguments)})" if results else f"{call}({', '.join(arguments)})"
        )
        if spent:
            self.lines.append(f"del {', '.join(f't{slot}' for slot in sorted(spent))}")

    def plan(self, given: int, returned: str) -> Plan:
        head = f"def run({', '.join(['device', *(f't{slot}' for slot in range(given))])}):"
        source = "\n    ".join([head, *self.lines, f"return {returned}"])
        exec(compile(source, "<a plan of vitkernels>", "exec"), self.globals)
        return Plan(self.globals["run"], source)


class _Watch(TorchDispatchMode):
    """Sees what a launcher does."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self._tensors = list(tensors)  # by slot; alive meanwhile, so that an id stays one tensor's
        self._slots = {id(t): i for i, t in enumerate(tensors)}
        self._given = len(tensors)
        self._known = True
        self._views: dict[int, int] = {}  # of which slot one is a view that begins where it does
        self._steps: list[_Step] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        try:
            self._add(func, list(args), dict(kwargs or {}), result)
        except _Unknown:
            self._known = False
        return result

    def kernel(self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Note a launch."""
        try:
            if compiled is None or grid is None:
                raise _Unknown
            ordered = [self._to_slots(arguments[name], through_views=True) for name in kernel.arg_names]
        except _Unknown:
            self._known = False
            return
        # As the JIT launches, but for its hooks' arguments: where there are hooks no plan is run.
        launch = [*(*grid, 1, 1)[:3], _STREAM, compiled.function, compiled.packed_metadata, None, None, None, *ordered]
        self._steps.append(_Step(kernel.__name__, compiled.run, launch, {}, _slots_in(ordered), None, kept=True))

    def _add(self, func, args: list, kwargs: dict, result: Any) -> None:
        arguments, options = self._to_slots(args), self._to_slots(kwargs)
        if isinstance(result, Tensor):
            if func is _aten.detach.default:  # as torch.empty() ends with: another handle of the same
                self._tensors.append(result)
                self._slots[id(result)] = self._slots[id(args[0])]
            if id(result) in self._slots and not func._schema.is_mutable:  # as contiguous() of what is
                return
            results = self._slot_of(result)
            if func.is_view and args[0].data_ptr() == result.data_ptr() and result.numel():
                self._views[results] = self._slots[id(args[0])]
        elif isinstance(result, (list, tuple)) and all(isinstance(t, Tensor) for t in result):
            results = [self._slot_of(t) for t in result]
        else:
            raise _Unknown
        if func in _ALLOCATE:
            self._steps.append(self._allocation(result, results))
            return
        reads = _slots_in(arguments) | _slots_in(options)
        name, kept = func.overloadpacket.__name__, func._schema.is_mutable
        self._steps.append(_Step(name, _SHORTER.get(func, func), arguments, options, reads, results, kept))

    def _allocation(self, made: Tensor, slot: int) -> _Step:
        """The shortest way to a tensor like ``made``: what it came of, the launcher looked up."""
        size, options = list(made.shape), {"dtype": made.dtype, "device": made.device}
        if made.stride() != torch.empty(made.shape, device="meta").stride():  # of dims of size 1, too
            return _Step("empty", torch.empty_strided, [size, list(made.stride())], options, set(), slot, kept=False)
        for i, given in enumerate(self._tensors[: self._given]):
            if given.dtype is made.dtype and given.device == made.device:
                return _Step("empty", Tensor.new_empty, [_Slot(i), size], {}, {i}, slot, kept=False)
        return _Step("empty", torch.empty, [size], options, set(), slot, kept=False)

    def _slot_of(self, tensor: Tensor) -> int:
        slot = self._slots.setdefault(id(tensor), len(self._tensors))
        if slot == len(self._tensors):
            self._tensors.append(tensor)
        return slot

    def _to_slots(self, value: Any, through_views: bool = False) -> Any:
        if isinstance(value, Tensor):
            slot = self._slots.get(id(value))
            if slot is None:
                raise _Unknown
            while through_views and slot in self._views:  # a kernel takes the address alone
                slot = self._views[slot]
            return _Slot(slot)
        if type(value) in (list, tuple):
            return type(value)([self._to_slots(each) for each in value])
        if type(value) is dict:
            return {name: self._to_slots(each) for name, each in value.items()}
        return value

    def plan(self, results: Any) -> Plan | None:
        """What was seen up to the ``results``, or None where that cannot be repeated."""
        results_ = list(results) if isinstance(results, (list, tuple)) else [results]
        if not self._known or not all(isinstance(t, Tensor) and id(t) in self._slots for t in results_):
            return None
        returned = [self._slots[id(t)] for t in results_]
        needed, steps = set(returned), []
        for step in reversed(self._steps):
            made = [] if step.results is None else [step.results] if type(step.results) is int else step.results
            if step.kept or needed.intersection(made):
                steps.append((step, {slot for slot in {*step.reads, *made} - needed if slot >= self._given}))
                needed |= step.reads
        writer = _Writer()
        for step, spent in reversed(steps):
            writer.step(step, spent)
        tensors = [f"t{slot}" for slot in returned]
        return writer.plan(self._given, tensors[0] if isinstance(results, Tensor) else f"({', '.join(tensors)},)")


def _slots_in(value: Any) -> set[int]:
    if type(value) is _Slot:
        return {value.index}
    parts: Iterable = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return set().union(*map(_slots_in, parts))
