"""Guards: functions that ask at every call, within a few µs, what :func:`vitkernels.swap._rules.why_not` asks.

``why_not`` walks a module's tree by its rule, which takes longer than a kernel runs. So a module that it found fit
gets a guard: straight-line Python, written for the classes, parameters and dtype that the module had, which reads the
same things in the same objects. A guard keeps no module and no tensor; one guard serves all blocks of a model. Where
it finds anything else, it says so, and ``why_not`` decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from vitkernels.layers import _lora, _own, sharded

_MISSING = object()

Guard = Callable[[nn.Module], bool]


class Guards:
    """The guards of one rule: one for each structure in which its modules have run.

    At most :attr:`MOST` are written, because a structure that no guard can tell would cost a new one at each call.
    """

    MOST = 16

    def __init__(self) -> None:
        self._written = 0
        self._guards: list[Guard] = []

    def any(self, module: nn.Module) -> bool:
        """Tell whether a guard finds ``module`` fit."""
        return any(guard(module) for guard in self._guards)

    def add(self, rule, module: nn.Module, rules: dict) -> None:
        """Write a guard for the structure of ``module``, which is fit; ``rules`` holds the rules by class."""
        if self._written == self.MOST:
            return
        self._written += 1
        guard = _Writer(rules).write(rule, module)
        if guard is not None and guard(module):
            self._guards.append(guard)


class _Writer:
    """Writes the guard of one module; ``rules`` holds the rules by class."""

    def __init__(self, rules: dict) -> None:
        self.rules = rules
        self.lines: list[str] = []
        self.constants: dict[str, object] = {
            "any_global_hook": torch_module._has_any_global_hook,
            "Module": nn.Module,
            "Parameter": nn.Parameter,
            "missing": _MISSING,
        }
        self.classes: dict[type, None] = {}
        self.dtype: torch.dtype | None = None
        self.count = 0

    def write(self, rule, module: nn.Module) -> Guard | None:
        """Return the guard of ``module``, which is fit; None if no guard can tell."""
        if rule.bypassed:
            call = self._constant(nn.Module.__call__)
            self._unless(f"any_global_hook() or Module.__call__ is not {call}")
        self.classes[rule.original] = None
        self.lines.append("d0 = m.__dict__")
        if not self._node(rule, module, "d0"):
            return None
        for cls in self.classes:
            for name, method in _own.noted(cls):
                self._unless(f"{self._constant(cls)}.{name} is not {self._constant(method)}")
        body = "".join(f"        {line}\n" for line in self.lines)
        source = f"def guard(m):\n    try:\n{body}        return True\n    except KeyError:\n        return False\n"
        exec(compile(source, f"<guard of {rule.original.__qualname__}>", "exec"), self.constants)
        return self.constants["guard"]

    def _node(self, rule, module: nn.Module, d: str) -> bool:
        """Ask what ``_rules._blocked`` asks of ``module``, whose ``__dict__`` has the name ``d``."""
        if not self._parameters(module, d):
            return False
        children = {name for name, child in module._modules.items() if child is not None}
        if not children <= rule.bypassed.keys() | rule.called:
            return False
        known = self._constant(frozenset(rule.bypassed) | rule.called)
        named = {"": (module, f"{d}m")}
        self.lines.append(f"{d}m = {d}['_modules']")
        self._unless(f"not {d}m.keys() <= {known}")
        for path in rule.bypassed:
            parent, _, name = path.rpartition(".")
            if parent not in named:
                return False
            above, modules = named[parent]
            child = above._modules.get(name)
            if child is None:
                self._unless(f"{modules}.get({name!r}) is not None")
                continue
            own = self._child(child, f"{modules}[{name!r}]")
            if own is not None and rule.takes_lora(path, child):
                self._unless(f"{self._constant(_lora.why_not)}(c{own[1:]}) is not None")
                child = child._modules["base_layer"]
                own = self._child(child, f"{own}['_modules']['base_layer']")
            if own is None:
                return False
            inner = self.rules.get(type(child))
            if inner is None:
                if not self._parameters(child, own):
                    return False
                if child._modules:
                    named[path] = (child, f"{own}m")
                    self.lines.append(f"{own}m = {own}['_modules']")
            elif not self._node(inner, child, own):
                return False
        return self._values(rule, module, d)

    def _child(self, child: nn.Module, expression: str) -> str | None:
        """Ask that a child has its class and neither a hook nor a forward of its own; return its dict's name."""
        cls = type(child)
        self.classes[self.rules[cls].original if cls in self.rules else cls] = None
        if "forward" in vars(child):
            return None
        self.count += 1
        c, d = f"c{self.count}", f"d{self.count}"
        self.lines += [f"{c} = {expression}", f"{d} = {c}.__dict__"]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._unless(f"type({c}) is not {self._constant(cls)} or 'forward' in {d}")
        self._unless(" or ".join(f"{d}[{name!r}]" for name in hooks))
        return d

    def _parameters(self, module: nn.Module, d: str) -> bool:
        own = module._parameters
        if not own:
            self._unless(f"{d}['_parameters']")
            return True
        self.lines.append(f"p = {d}['_parameters']")
        self._unless(f"len(p) != {len(own)}")
        for name, parameter in own.items():
            if parameter is None:
                self._unless(f"p[{name!r}] is not None")
                continue
            is_shard = sharded.MARK in vars(module)
            if not (type(parameter) is nn.Parameter or is_shard) or self.dtype not in (None, parameter.dtype):
                return False
            if is_shard:
                self._unless(f"{sharded.MARK!r} not in {d}")
            self.dtype = parameter.dtype
            self.lines.append(f"t = p[{name!r}]")
            self._unless(
                f"type(t) is not {self._constant(type(parameter))} or t.dtype is not {self._constant(self.dtype)}"
            )
        return True

    def _values(self, rule, module: nn.Module, d: str) -> bool:
        """Ask that all that the rule's limit reads is as it was."""
        if rule.limit is not None and rule.limited_by is None:
            limit = self._constant(rule.limit)
            self.lines.append(f"x = {limit}(m)" if d == "d0" else f"x = {limit}(c{d[1:]})")
            self._unless("x is not None")
            return True
        for path in rule.limited_by or ():
            *parents, name = path.split(".")
            expression, owner = d, module
            for parent in parents:
                owner = owner._modules.get(parent)
                expression += f"['_modules'][{parent!r}].__dict__"
            value = vars(owner).get(name, _MISSING)
            same = "is not" if value is _MISSING or value is None or isinstance(value, bool) else "!="
            self._unless(f"{expression}.get({name!r}, missing) {same} {self._constant(value)}")
        return True

    def _unless(self, condition: str) -> None:
        self.lines.append(f"if {condition}: return False")

    def _constant(self, value: object) -> str:
        name = next((name for name, known in self.constants.items() if known is value), None)
        if name is None:
            name = f"k{len(self.constants)}"
            self.constants[name] = value
        return name
