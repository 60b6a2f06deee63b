"""Record what a launcher does, and replay it on tensors of the same layout.

A launcher works out tilings, strides, alignment and up to 58 arguments per kernel. On the host this takes longer than
a small batch takes on the GPU. The launcher never reads a tensor's values: its actions depend only on tensor layouts,
options and the device. So one call is recorded: a ``TorchDispatchMode`` records PyTorch's ops,
:func:`vitkernels.ops._triton.watching` records the kernels. The recording is stored as a :class:`Plan`: allocate these
outputs, launch these compiled kernels on these pointers, sum these partial results. Inference, training, compiled and
exported calls all come here, after the checks, autograd and the dispatcher.

A call is recorded when its key occurs for the second time: recording a shape that occurs only once, as with packed
images, would be wasted work. A call gets no plan if it is given the same tensor twice (the two arguments cannot be
told apart), or if its launcher uses a tensor from elsewhere. A plan keeps no tensor alive; when it runs, it frees each
intermediate tensor after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitkernels import runtime
from vitkernels.ops._triton import TensorDescriptor, at_another, current_stream, launches_are_hooked, watching

MAX_PLANS = 1024  # keys per op; beyond this, the op forgets all its plans
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_aten = torch.ops.aten
_ALLOCATE = frozenset(
    {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}
)
# Calling these PyTorch functions takes half the time of calling the ops directly.
_SHORTER = {
    _aten.add.Tensor: torch.add, _aten.addmm.default: torch.addmm, _aten.cat.default: torch.cat,
    _aten.clone.default: torch.clone, _aten.mm.default: torch.mm, _aten.mul.Tensor: torch.mul,
    _aten.reshape.default: torch.reshape, _aten.sum.dim_IntList: torch.sum, _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose, _aten.unbind.int: torch.unbind, _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
}  # fmt: skip
_all: list[Plans] = []
# Of the torch ops: ``vitkernels``, or the name of one of several versions that the hub's ``kernels`` loads (tools/hub).
NAMESPACE = __name__.partition(".")[0]
_launchers: dict[str, Callable] = {}  # of the registered ops, by name


def forget() -> None:
    """Forget every plan; call this after replacing a kernel, a launcher or a function that chooses a configuration."""
    for plans in _all:
        plans.forget()


class Plans:
    """A launcher with a cache of plans; called with a device key, then the arguments of ``launcher``.

    Raises what the launcher raises; a failed call gets no plan.

    Args:
        launcher: The launcher of a registered op, or a function of tensors that calls registered ops and PyTorch's.
        op: The op's name. The plan of a function that calls the op contains the actions of this launcher.
    """

    def __init__(self, launcher: Callable, op: str | None = None):
        self._launcher = launcher
        if op is not None:
            _launchers[op] = launcher
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
    """Return the cache key of a call (None if a tensor is of a subclass), and its tensors.

    The key holds everything that a launcher's actions depend on.
    """
    key: list[Any] = [device]
    tensors = []
    single = False
    for x in args:
        kind = type(x)
        if kind in _PLAIN:
            dtype = x.dtype
            # Triton specializes on addresses divisible by 16; attention also looks at smaller powers of two. PyTorch's
            # own zeros without memory have address 0, and become a tensor when they pass the dispatcher.
            address = x.data_ptr()
            key.append((x.shape, x.stride(), dtype, address & 15 if address else None))
            tensors.append(x)
            single = single or dtype is torch.float32
        elif kind is list and x and isinstance(x[0], Tensor):
            each, found = _key(len(x), tuple(x))
            if each is None:
                return None, tensors
            key.append(each)
            tensors += found
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
    """The recorded actions of a launcher, as a function of the tensors.

    Attributes:
        run: The function; its arguments are the device key and the tensors.
        source: The source of ``run``; it shows what an op does at a given shape.
    """

    run: Callable
    source: str


class _Unknown(Exception):
    """A launcher did something that a plan cannot repeat, such as using a tensor that is no argument or op result."""


class _Slot(NamedTuple):
    """Index of a tensor in a plan: the call's tensors come first, then the results of the steps."""

    index: int

    def __repr__(self) -> str:
        return f"t{self.index}"


class _Described(NamedTuple):
    """A tensor that a kernel takes by a descriptor, and the function that describes another one like it."""

    slot: _Slot
    describe: Callable[[Tensor], TensorDescriptor]


class _Step(NamedTuple):
    """One call made by a launcher; a :class:`_Slot` stands for each tensor, ``kept`` marks a call with side effects."""

    name: str
    call: Callable
    arguments: list[Any]
    options: dict[str, Any]
    results: _Slot | tuple[_Slot, ...] | None
    kept: bool

    @property
    def reads(self) -> set[int]:
        return _slots_in(self.arguments) | _slots_in(self.options)


_STREAM = object()


class _Writer:
    """Writes a plan's source; a value without a literal becomes a global variable."""

    def __init__(self):
        self.globals: dict[str, Any] = {"current_stream": current_stream}
        self.lines: list[str] = []
        self.launches = False

    def value(self, value: Any) -> str:
        if type(value) in (_Slot, int, bool, str, type(None)):
            return repr(value)
        if value is _STREAM:
            return "stream"
        if type(value) is _Described:
            return f"{self.name('tile', value.describe)}({value.slot!r})"
        if type(value) is list:
            return f"[{', '.join(map(self.value, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self.value(each)}, ' for each in value)})"
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
        call = f"{self.name(f'{step.name}_', step.call)}({', '.join(arguments)})"
        self.lines.append(call if step.results is None else f"{self.value(step.results)} = {call}")
        if spent:
            self.lines.append(f"del {', '.join(f't{slot}' for slot in sorted(spent))}")

    def plan(self, given: int, returned: _Slot | tuple[_Slot, ...]) -> Plan:
        head = f"def run({', '.join(['device', *(f't{slot}' for slot in range(given))])}):"
        source = "\n    ".join([head, *self.lines, f"return {self.value(returned)}"])
        exec(compile(source, "<a plan of vitkernels>", "exec"), self.globals)
        return Plan(self.globals["run"], source)


class _Watch(TorchDispatchMode):
    """Records what a launcher does."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self._tensors = list(tensors)  # by slot; kept alive, so that no id is reused
        self._slots = {id(t): i for i, t in enumerate(tensors)}
        self._given = len(tensors)
        self._known = True
        self._views: dict[int, int] = {}  # view's slot -> slot of its base at the same address
        self._steps: list[_Step] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            defaults = [argument.default_value for argument in func._schema.arguments[len(args) :]]
            with self:  # records what the op does instead of the op
                return _launchers[func._schema.name.partition("::")[2]](*args, *defaults)
        result = func(*args, **(kwargs or {}))
        try:
            self._add(func, list(args), dict(kwargs or {}), result)
        except _Unknown:
            self._known = False
        return result

    def kernel(self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Record a launch."""
        try:
            if compiled is None or grid is None:
                raise _Unknown
            ordered = [self._to_slots(arguments[name], through_views=True) for name in kernel.arg_names]
        except _Unknown:
            self._known = False
            return
        # The JIT's launch call without the hook arguments: no plan runs while launch hooks are set.
        launch = [*(*grid, 1, 1)[:3], _STREAM, compiled.function, compiled.packed_metadata, None, None, None, *ordered]
        self._steps.append(_Step(kernel.__name__, compiled.run, launch, {}, None, kept=True))

    def _add(self, func, args: list, kwargs: dict, result: Any) -> None:
        arguments, options = self._to_slots(args), self._to_slots(kwargs)
        if isinstance(result, Tensor):
            if func is _aten.detach.default:  # torch.empty() ends with it: a second handle of one tensor
                self._tensors.append(result)
                self._slots[id(result)] = self._slots[id(args[0])]
            if id(result) in self._slots and not func._schema.is_mutable:  # e.g. contiguous() returned its input
                return
            results = self._slot_of(result)
            if func.is_view and args[0].data_ptr() == result.data_ptr() and result.numel():
                self._views[results.index] = self._slots[id(args[0])]
        elif isinstance(result, (list, tuple)) and all(isinstance(t, Tensor) for t in result):
            results = tuple([self._slot_of(t) for t in result])
        else:
            raise _Unknown
        if func in _ALLOCATE:
            self._steps.append(self._allocation(result, results))
            return
        name, kept = func.overloadpacket.__name__, func._schema.is_mutable
        self._steps.append(_Step(name, _SHORTER.get(func, func), arguments, options, results, kept))

    def _allocation(self, made: Tensor, slot: _Slot) -> _Step:
        """Return the fastest call that allocates a tensor like ``made``, without the original call's arguments."""
        size, options = list(made.shape), {"dtype": made.dtype, "device": made.device}
        if made.stride() != torch.empty(made.shape, device="meta").stride():  # compares dims of size 1, too
            return _Step("empty", torch.empty_strided, [size, list(made.stride())], options, slot, kept=False)
        for i, given in enumerate(self._tensors[: self._given]):
            if given.dtype is made.dtype and given.device == made.device:
                return _Step("empty", Tensor.new_empty, [_Slot(i), size], {}, slot, kept=False)
        return _Step("empty", torch.empty, [size], options, slot, kept=False)

    def _slot_of(self, tensor: Tensor) -> _Slot:
        slot = self._slots.setdefault(id(tensor), len(self._tensors))
        if slot == len(self._tensors):
            self._tensors.append(tensor)
        return _Slot(slot)

    def _to_slots(self, value: Any, through_views: bool = False) -> Any:
        if isinstance(value, Tensor):
            slot = self._slots.get(id(value))
            if slot is None:
                raise _Unknown
            while through_views and slot in self._views:  # a kernel uses only the address
                slot = self._views[slot]
            return _Slot(slot)
        if isinstance(value, TensorDescriptor):
            return _Described(self._to_slots(value.base, through_views), at_another(value))
        if type(value) in (list, tuple):
            return type(value)([self._to_slots(each) for each in value])
        if type(value) is dict:
            return {name: self._to_slots(each) for name, each in value.items()}
        return value

    def plan(self, results: Any) -> Plan | None:
        """Return a plan that computes ``results``, or None if the recorded calls cannot be repeated."""
        outputs = (results,) if isinstance(results, Tensor) else tuple(results)
        if not self._known or not all(isinstance(t, Tensor) and id(t) in self._slots for t in outputs):
            return None
        returned = self._to_slots(outputs)
        needed, steps = _slots_in(returned), []
        for step in reversed(self._steps):
            made = _slots_in(step.results)
            if step.kept or needed & made:
                steps.append((step, {slot for slot in (step.reads | made) - needed if slot >= self._given}))
                needed |= step.reads
        writer = _Writer()
        for step, spent in reversed(steps):
            writer.step(step, spent)
        return writer.plan(self._given, returned[0] if isinstance(results, Tensor) else returned)


def _slots_in(value: Any) -> set[int]:
    if type(value) is _Slot:
        return {value.index}
    if type(value) is _Described:
        return {value.slot.index}
    parts: Iterable = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return set().union(*map(_slots_in, parts))
