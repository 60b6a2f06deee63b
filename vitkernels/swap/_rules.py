"""Decide whether a module may run fused: at the swap, and again at every call (under torch.compile, when traced).

A fused forward reads the parameters of a module's children and never calls the children. So it would silently ignore
anything that was added to a child (a LoRA adapter, a hook, a parametrization, a quantized weight), and another forward
set on the child's class (``layers/_own.py``).
The checks fail closed: a module that is not known exactly keeps its own forward, and the report gives the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vitkernels import ops, runtime
from vitkernels.layers import _lora, _own, records, sharded
from vitkernels.ops._checks import FLOATING
from vitkernels.swap._guards import Guards

# The parameters of each class that a fused forward may read instead of calling. Classes not listed have none.
PARAMETERS: dict[type[nn.Module], frozenset[str]] = {
    nn.Conv2d: frozenset({"weight", "bias"}),
    nn.Linear: frozenset({"weight", "bias"}),
}

# Attributes that any module may have. PEFT leaves its configuration at the root of a model that has adapters.
_HARMLESS = frozenset({"training", "forward", "peft_config"})

# The end of the reason for a parameter that FSDP2 has sharded. FSDP2 makes it a plain Parameter while the module runs.
SHARDED = "is a DTensor, not a plain Parameter"


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one class is swapped.

    Attributes:
        original: The class, matched exactly: a subclass may compute something else.
        fused: Its subclass with a fused forward and no state of its own.
        bypassed: The children that the fused forward reads but does not call: the allowed classes of each by name. A
            grandchild whose parent has no rule is named by its path, ``"mlp.c_fc"``. With ``NoneType`` among the
            classes the child may be absent.
        adapts: Whether the fused forward computes PEFT's LoRA around these children that are a Linear. Not where the
            original reads the weight of one and does not call it: an adapter then does nothing.
        called: The children that the fused forward still calls.
        parameters: The names of the module's own parameters.
        optional_parameters: The names of further parameters that it may have or lack.
        attributes: The known public attributes; any other one may switch on unknown behaviour.
        limit: A further check of a module: returns the reason why it cannot run fused, or None.
        limited_by: The attributes, as paths below the module, from which alone ``limit`` follows. As long as they keep
            their values it is not called again; None: it is called each time.
        products: Reads the record of the module whose products can run in FP8; None if they cannot for this class.
        shards: The layers that :func:`vitkernels.parallelize` can shard, if the fused forward is that of
            :func:`fused.attention` or :func:`fused.mlp`.
        guards: See :mod:`vitkernels.swap._guards`.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    bypassed: Mapping[str, tuple[type[nn.Module], ...]] = dataclasses.field(default_factory=dict)
    adapts: bool = True
    called: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    optional_parameters: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    limit: Callable[[nn.Module], str | None] | None = None
    limited_by: tuple[str, ...] | None = None
    products: Callable[[nn.Module], records.Block | records.Attention | records.Mlp] | None = None
    shards: sharded.Layers | None = None
    guards: Guards = dataclasses.field(default_factory=Guards, repr=False, compare=False)

    def takes_lora(self, path: str, child: nn.Module | None) -> bool:
        """Tell whether ``child``, which is at ``path``, is PEFT's LoRA around a Linear that may have it."""
        return self.adapts and nn.Linear in self.bypassed[path] and _lora.is_lora(child)


def runs_fused(rule: Rule, module: nn.Module, x: Tensor) -> bool:
    """Tell whether ``module`` runs its fused forward on ``x`` in this call.

    Where no kernels run, a module in FP8 still does, so that its accuracy can be seen without a GPU; the backend
    ``torch`` alone asks for the original forward. A module whose layers are sharded has no other forward.

    Raises:
        RuntimeError: Such a module cannot run fused.
    """
    if sharded.MARK in module.__dict__:
        return _must_run_fused(rule, module)
    if not ops.uses_kernels(x) and not (records.runs_fp8(module) and runtime.backend() != "torch"):
        return False
    if torch.compiler.is_compiling():
        return why_not(rule, module) is None
    if rule.guards.any(module):
        return True
    if why_not(rule, module) is not None:
        return False
    rule.guards.add(rule, module, RULES)
    return True


def _must_run_fused(rule: Rule, module: nn.Module) -> bool:
    reason = why_not(rule, module)
    if reason is not None:
        raise sharded.no_other_forward(rule.original.__name__, reason)
    return True


def why_not(rule: Rule, module: nn.Module) -> str | None:
    """Return why ``module`` cannot run fused in its present state, or None if it can."""
    if rule.bypassed and torch_module._has_any_global_hook():
        return "a global module hook is registered, which must see every child called"
    if rule.bypassed and _own.sees_all_calls():
        return "torch.nn.Module.__call__ has been replaced, and what stands there must see every child called"
    dtypes: set[torch.dtype] = set()
    read: dict[type[nn.Module], None] = {rule.original: None}
    reason = _blocked(rule, module, dtypes, read)
    for cls in read:
        reason = reason or _own.replaced(cls)
    if reason is None and len(dtypes) > 1:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reason = f"its parameters are of mixed dtypes: {', '.join(names)}"
    return reason


def why_not_swap(rule: Rule, module: nn.Module) -> str | None:
    """Return why ``module`` is not swapped: the reason of :func:`why_not`, or one that rules out the class swap."""
    if _own.hides_forward(module):
        return "its forward is bound to the instance, which hides that of any class"
    return _strange_attribute(rule, module) or why_not(rule, module)


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Set the class of ``module``, unless a forward bound to the instance may call a method of its present class."""
    if not _own.hides_forward(module):
        vars(module).pop("forward", None)
        module.__class__ = cls


def _strange_attribute(rule: Rule, module: nn.Module) -> str | None:
    for name, value in vars(module).items():
        known = name[0] == "_" or name in _HARMLESS or name in rule.attributes
        if not known and value is not None and value is not False:
            return f"it has an attribute {name!r} that is unknown here and may change what it computes"
    for name in rule.bypassed:
        child = descendant(module, name)
        child_rule = RULES.get(type(child))
        reason = None if child_rule is None else _strange_attribute(child_rule, child)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _blocked(rule: Rule, module: nn.Module, dtypes: set[torch.dtype], read: dict[type[nn.Module], None]) -> str | None:
    """Return why ``module`` cannot run fused, or None; add its dtypes to ``dtypes``, the classes read to ``read``."""
    reason = _strange_parameters(module, rule.parameters, dtypes, rule.optional_parameters)
    if reason is not None:
        return reason
    for name, child in module._modules.items():
        if child is not None and name not in rule.bypassed and name not in rule.called:
            return f"it has a child {name!r} ({type(child).__name__}) that is unknown here"
    for name, classes in rule.bypassed.items():
        child = descendant(module, name)
        if rule.takes_lora(name, child):
            reason = _why_not_lora(child)
            if reason is not None:
                return f"{name}: {reason}"
            read[type(child)] = None
            child = child._modules["base_layer"]
        child_rule = RULES.get(type(child))
        original = type(child) if child_rule is None else child_rule.original
        if original not in classes:
            names = [cls.__name__ for cls in classes]
            got = original.__name__
            got = f"{original.__module__}.{got}" if got in names else got  # PEFT's own class is named Linear too
            return f"{name} is a {got}, not exactly {' or '.join(names)}"
        if child is None:
            continue
        read[original] = None
        if _own.has_hooks(child):
            return f"a hook on {name}, which fusion would not call"
        if _own.hides_forward(child):
            return f"the forward of {name} is bound to the instance, and fusion would not call it"
        if child_rule is None:
            reason = _strange_parameters(child, PARAMETERS.get(original, frozenset()), dtypes)
        else:
            reason = _blocked(child_rule, child, dtypes, read)
        if reason is not None:
            return f"{name}: {reason}"
    return None if rule.limit is None else rule.limit(module)


def _why_not_lora(child: nn.Module) -> str | None:
    if _own.has_hooks(child):
        return "a hook, which fusion would not call"
    if _own.hides_forward(child):
        return "its forward is bound to the instance, and fusion would not call it"
    return _lora.why_not(child)


def descendant(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at ``path`` below ``module``, or None if there is none."""
    if "." not in path:
        return module._modules.get(path)
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _strange_parameters(
    module: nn.Module, names: frozenset[str], dtypes: set[torch.dtype], optional: frozenset[str] = frozenset()
) -> str | None:
    found = module._parameters
    if not found and not names:  # most children take this fast path at every call
        return None
    if not names <= found.keys() <= names | optional:
        return f"its parameters are {sorted(found)}, not {sorted(names)}"
    for name, parameter in found.items():
        if parameter is None:
            continue
        if type(parameter) not in _own.PLAIN and sharded.MARK not in module.__dict__:
            return f"{name} is a {type(parameter).__name__}, not a plain Parameter"
        if parameter.dtype not in FLOATING:
            return f"{name} has dtype {str(parameter.dtype).removeprefix('torch.')}"
        dtypes.add(parameter.dtype)
    return None


# The rules by class, under both the original and the fused class. Each library's file adds its rules.
RULES: dict[type[nn.Module], Rule] = {}


def add(*rules: Rule) -> None:
    """Register ``rules``, and prepare their fused classes to replace the originals.

    A fused class gets the original's ``__name__``, because tools find layers by it: FSDP's policies, device maps,
    quantizers. It keeps its own ``__qualname__``, by which pickle finds a class.
    """
    for rule in rules:
        rule.fused.__name__ = rule.original.__name__
        overridden = _overridden(rule)
        _own.note(rule.original, overridden, [inspect.unwrap(getattr(rule.fused, name)) for name in overridden])
        for cls in {cls for classes in rule.bypassed.values() for cls in classes if issubclass(cls, nn.Module)}:
            _own.note(cls)
        for name in overridden:
            setattr(rule.fused, name, _unless_traced(rule, name))
        rule.fused.__prepare_scriptable__ = _prepare_scriptable
        # A library may wrap the methods of a subclass when it is created: a layer of transformers adds checkpointing
        # to the forward of each class. The methods set above need the same, so the hook runs again.
        rule.fused.__init_subclass__()
        RULES[rule.original] = RULES[rule.fused] = rule


def _overridden(rule: Rule) -> list[str]:
    """Return the names of the original's methods that the fused class overrides."""
    own = rule.fused.__mro__[: rule.fused.__mro__.index(rule.original)]
    names = {name for cls in own for name, value in vars(cls).items() if isinstance(value, types.FunctionType)}
    return sorted(name for name in names if hasattr(rule.original, name))


def _prepare_scriptable(module: nn.Module) -> nn.Module:
    """Return ``module`` for ``torch.jit.script``, which compiles the original's source; raise if it was replaced."""
    reason = _own.replaced(RULES[type(module)].original) if type(module) in RULES else None
    if reason is not None:
        raise NotImplementedError(f"torch.jit.script: {reason}; call vitkernels.restore(model) before")
    return module


def _unless_traced(rule: Rule, name: str) -> Callable:
    """Return a method that runs the fused method ``name``, but the original one under a tracer.

    torch.fx calls a module with proxies, and ``torch.jit.trace`` (also the older ONNX export) makes sizes tensors:
    neither can trace a kernel launch. ``torch.jit.script`` follows ``__wrapped__`` to the original's source, and looks
    up its names in this method's globals. So the method has the original's globals, and gets names of this module
    only through its closure.
    """
    fused, original, cls = inspect.unwrap(getattr(rule.fused, name)), getattr(rule.original, name), rule.original
    first = list(inspect.signature(fused).parameters)[1]
    # NaFlexVit also takes its images in a dictionary.
    inputs, is_tracing = (Tensor, dict), torch.jit.is_tracing

    def method(self, *args, **kwargs):
        x = args[0] if args else kwargs.get(first)
        if isinstance(x, inputs) and not is_tracing():
            return fused(self, *args, **kwargs)
        return getattr(cls, name)(self, *args, **kwargs)

    seen = getattr(original, "__globals__", globals())
    return functools.wraps(original)(types.FunctionType(method.__code__, seen, name, None, method.__closure__))
