"""When a module may run fused: checked when it is swapped in, and again at every call (compiled: when it is traced).

A fused forward reads the parameters of a module's children and never calls them. So whatever makes a child more
than its class (a LoRA adapter, a hook, a parametrization, a quantized weight) would be ignored without a word, and so
would another forward that is set on the class (``layers/_own.py``).
Everything here fails closed: what is not known exactly keeps its own forward, with a reason for the report.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

from vitkernels import ops
from vitkernels.layers import _own
from vitkernels.layers._plain import has_hooks
from vitkernels.ops._checks import FLOATING

# The parameters of the classes that a fused forward may read instead of calling; the others have none.
PARAMETERS: dict[type[nn.Module], frozenset[str]] = {
    nn.Conv2d: frozenset({"weight", "bias"}),
    nn.Linear: frozenset({"weight", "bias"}),
}

# torch.export puts fakes in the place of parameters.
PLAIN = (nn.Parameter, FakeTensor)

# How a reason ends where FSDP2 has sharded a parameter: while the module runs, it is whole and plain again.
SHARDED = "is a DTensor, not a plain Parameter"


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one class is swapped.

    Attributes:
        original: The class, matched exactly: a subclass may compute something else.
        fused: Its subclass with a fused forward and no state of its own.
        bypassed: The children that the fused forward reads and does not call: their allowed classes by name. Those of
            a child that has no rule are named by their path, ``"mlp.c_fc"``. With ``NoneType`` it may be absent.
        called: The children that it calls as ever.
        parameters: The names of the module's own parameters.
        optional_parameters: Those that it may lack.
        attributes: The public attributes that are known; another one may switch on something unknown.
        limit: What else rules a module out: its reason, or None.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    bypassed: Mapping[str, tuple[type[nn.Module], ...]] = dataclasses.field(default_factory=dict)
    called: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    optional_parameters: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    limit: Callable[[nn.Module], str | None] = lambda module: None


def runs_fused(rule: Rule, module: nn.Module, x: Tensor) -> bool:
    """Tell whether ``module`` runs its fused forward on ``x`` in this call."""
    return ops.uses_kernels(x) and why_not(rule, module) is None


def why_not(rule: Rule, module: nn.Module) -> str | None:
    """Return why ``module`` cannot run fused as it is now, or None where it can."""
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
    """Return why ``module`` is not swapped: :func:`why_not`, or something that the class swap itself cannot cover."""
    if hides_forward(module):
        return "its forward is bound to the instance, which hides that of any class"
    return _strange_attribute(rule, module) or why_not(rule, module)


def hides_forward(module: nn.Module) -> bool:
    """Tell whether a forward bound to ``module`` hides its class's; transformers 4.56 and 4.57 bind that very one."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    own = getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
    return not own


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Set the class of ``module``, unless a forward is bound to it that may call a method of the present class."""
    if not hides_forward(module):
        vars(module).pop("forward", None)
        module.__class__ = cls


def _strange_attribute(rule: Rule, module: nn.Module) -> str | None:
    for name, value in vars(module).items():
        known = name[0] == "_" or name in ("training", "forward") or name in rule.attributes
        if not known and value is not None and value is not False:
            return f"it has an attribute {name!r} that is unknown here and may change what it computes"
    for name in rule.bypassed:
        child = descendant(module, name)
        inner = RULES.get(type(child))
        reason = None if inner is None else _strange_attribute(inner, child)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _blocked(rule: Rule, module: nn.Module, dtypes: set[torch.dtype], read: dict[type[nn.Module], None]) -> str | None:
    """Return what rules ``module`` out, and add its parameters' dtypes and the classes that are read, not called."""
    reason = _strange_parameters(module, rule.parameters, dtypes, rule.optional_parameters)
    if reason is not None:
        return reason
    for name, child in module._modules.items():
        if child is not None and name not in rule.bypassed and name not in rule.called:
            return f"it has a child {name!r} ({type(child).__name__}) that is unknown here"
    for name, classes in rule.bypassed.items():
        child = descendant(module, name)
        inner = RULES.get(type(child))
        original = type(child) if inner is None else inner.original
        if original not in classes:
            names = [cls.__name__ for cls in classes]
            got = original.__name__
            got = f"{original.__module__}.{got}" if got in names else got  # PEFT calls its own a Linear too
            return f"{name} is a {got}, not exactly {' or '.join(names)}"
        if child is None:
            continue
        read[original] = None
        if has_hooks(child):
            return f"a hook on {name}, which fusion would not call"
        if hides_forward(child):
            return f"the forward of {name} is bound to the instance, and fusion would not call it"
        if inner is None:
            reason = _strange_parameters(child, PARAMETERS.get(original, frozenset()), dtypes)
        else:
            reason = _blocked(inner, child, dtypes, read)
        if reason is not None:
            return f"{name}: {reason}"
    return rule.limit(module)


def descendant(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at ``path`` below ``module``, or None where there is none."""
    if "." not in path:
        return module._modules.get(path)
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _strange_parameters(
    module: nn.Module, names: frozenset[str], dtypes: set[torch.dtype], optional: frozenset[str] = frozenset()
) -> str | None:
    found = module._parameters
    if not found and not names:  # of most children, at every call
        return None
    if not names <= found.keys() <= names | optional:
        return f"its parameters are {sorted(found)}, not {sorted(names)}"
    for name, parameter in found.items():
        if parameter is None:
            continue
        if type(parameter) not in PLAIN:
            return f"{name} is a {type(parameter).__name__}, not a plain Parameter"
        if parameter.dtype not in FLOATING:
            return f"{name} has dtype {str(parameter.dtype).removeprefix('torch.')}"
        dtypes.add(parameter.dtype)
    return None


# By class, the original's and the fused one's; each library's file adds its own.
RULES: dict[type[nn.Module], Rule] = {}


def add(*rules: Rule) -> None:
    """Make ``rules`` known, and their fused classes stand in for the originals.

    A fused class goes by the original's name, as tools find layers by it: FSDP's policies, device maps, quantizers.
    Its ``__qualname__``, by which pickle finds a class, is its own.
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
        # What a library does to the methods of a subclass, it does to these: a layer of transformers checkpoints in
        # the forward of its very class.
        rule.fused.__init_subclass__()
        RULES[rule.original] = RULES[rule.fused] = rule


def _overridden(rule: Rule) -> list[str]:
    """Return the names of the original's methods that the fused class has its own of."""
    own = rule.fused.__mro__[: rule.fused.__mro__.index(rule.original)]
    names = {name for cls in own for name, value in vars(cls).items() if isinstance(value, types.FunctionType)}
    return sorted(name for name in names if hasattr(rule.original, name))


def _prepare_scriptable(module: nn.Module) -> nn.Module:
    """Return what ``torch.jit.script`` is to compile in the place of ``module``: the same, whose source is known."""
    reason = _own.replaced(RULES[type(module)].original) if type(module) in RULES else None
    if reason is not None:
        raise NotImplementedError(f"torch.jit.script: {reason}; call vitkernels.restore(model) before")
    return module


def _unless_traced(rule: Rule, name: str) -> Callable:
    """Return the fused method ``name``, or rather what runs the original where a tracer looks.

    torch.fx calls a module with its proxies, ``torch.jit.trace`` (the older ONNX export, too) with sizes that are
    tensors: neither can follow a launch. ``torch.jit.script`` compiles a method's source, among the names that its
    function sees: ``__wrapped__`` leads it to the original's source, and the function made here sees what that sees.
    It uses no name of this module but those it closes over.
    """
    fused, original, cls = inspect.unwrap(getattr(rule.fused, name)), getattr(rule.original, name), rule.original
    first = list(inspect.signature(fused).parameters)[1]
    # NaFlexVit's images come in a dictionary, too.
    inputs, is_tracing = (Tensor, dict), torch.jit.is_tracing

    def method(self, *args, **kwargs):
        x = args[0] if args else kwargs.get(first)
        if isinstance(x, inputs) and not is_tracing():
            return fused(self, *args, **kwargs)
        return getattr(cls, name)(self, *args, **kwargs)

    seen = getattr(original, "__globals__", globals())
    return functools.wraps(original)(types.FunctionType(method.__code__, seen, name, None, method.__closure__))
