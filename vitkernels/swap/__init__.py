"""Swap the kernels into a model that exists, in place, and out again.

A module is swapped by setting its class to a subclass with another forward: parameters, state-dict keys, optimizer
references, copies, pickles and hooks on the module stay what they were. On a CPU the subclass runs the very forward
that it had. The swap may come before or after ``torch.compile``, ``DistributedDataParallel`` and the like; compiled
code is guarded on the classes of its modules and is compiled anew.
"""

from __future__ import annotations

import importlib
import sys
import warnings
import weakref
from collections.abc import Iterator

from torch import nn

from vitkernels.layers import _own
from vitkernels.swap import _rules
from vitkernels.swap._parts import part_of
from vitkernels.swap.estimate import Estimate, estimate_time
from vitkernels.swap.report import Kept, Report, Swapped

__all__ = ["Kept", "Report", "Swapped", "accelerate", "explain", "restore"]

# The file here that knows a library's modules. Without the library in sys.modules there are no such modules.
_FILES = {
    "torch": "torch_nn",
    "timm": "timm",
    "torchvision": "torchvision",
    "open_clip": "open_clip",
    "dinov2": "dinov2",
    "dinov3": "dinov3",
    "transformers.modeling_utils": "hf",  # transformers itself is a lazy module: this one comes with any model
}

_LIBRARY_PRODUCTS = {
    nn.Linear: "a plain Linear: already one library product",
    nn.Conv2d: "a plain convolution: already one library product",
    nn.Embedding: "a plain Embedding: a lookup, nothing to fuse",
}


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Let every module of ``model`` that has a fused forward run it, in place.

    Calling it again is the same as calling it once; a module that may no longer be fused goes back to its own class.

    Args:
        model: Any module; what it is made of is looked at module by module.
        strict: Raise where a module of a class that is known cannot be swapped, where a part of a transformer is of a
            class that is not (attention, a LayerNorm or RMSNorm, an MLP, a patch embedding: see :class:`Kept`), or
            where nothing is swapped at all. What else a model is made of may stay: a Linear that classifies,
            convolutions, embeddings, BatchNorm, pooling, dropout. Of a model with another one inside, accelerate the
            tower that is meant.

    Returns:
        What was swapped, and what was not and why.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        NotImplementedError: With ``strict``; the model is as it was.
    """
    plan = list(_plan(model))
    report = _report(plan, model)
    if strict:
        left = Report((), tuple(k for k in report.kept if k.known or k.part is not None))
        if left.kept:
            raise NotImplementedError(
                f"accelerate: strict, and {len(left.kept)} modules cannot be swapped:\n{left.rows()}"
            )
        if not report.swapped:
            raise NotImplementedError(f"accelerate: strict, and no module of {type(model).__name__} can be swapped")
    for module, entry in plan:
        rule = _rules.RULES.get(type(module))
        if rule is not None:
            _rules.become(module, rule.fused if isinstance(entry, Swapped) else rule.original)
    return report


def explain(model: nn.Module) -> Report:
    """Return the report that :func:`accelerate` would, and touch nothing.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    return _report(list(_plan(model)), model)


def restore(model: nn.Module) -> Report:
    """Give every module of ``model`` that :func:`accelerate` swapped its own class back, in place.

    Returns:
        What was swapped back (``was`` is the fused class), and what could not be.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check(model)
    entries: list[Swapped | Kept] = []
    for path, module in model.named_modules():
        rule = _rule(module)
        if rule is None or not isinstance(module, rule.fused):
            continue
        name = rule.fused.__qualname__ if type(module) is rule.fused else type(module).__name__
        if _rules.hides_forward(module):
            reason = "a forward is bound to the instance, which may call this class's: undo that first"
            entries.append(Kept(path, name, reason, known=True))
        elif type(module) is rule.fused:
            _rules.become(module, rule.original)
            entries.append(Swapped(path, name, rule.original.__name__))
        else:
            reason = f"something made it a subclass of {rule.fused.__qualname__}: undo that first"
            entries.append(Kept(path, name, reason, known=True))
    return _report([(None, entry) for entry in entries])


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got a {type(model).__name__}")
    for library, file in _FILES.items():
        if library not in sys.modules:
            continue
        try:
            importlib.import_module(f"{__name__}.{file}")
        except ImportError as error:  # an older release: this model may not even be of that library
            version = getattr(sys.modules[library], "__version__", "of unknown version")
            warnings.warn(f"the modules of {library} {version} are not known here: {error}", stacklevel=4)


def _rule(module: nn.Module) -> _rules.Rule | None:
    """Return the rule of ``module``'s class, also where FSDP or a parametrization made a subclass of a fused one."""
    exact = _rules.RULES.get(type(module))
    return exact or next((r for r in _rules.RULES.values() if isinstance(module, r.fused)), None)


def _plan(model: nn.Module) -> Iterator[tuple[nn.Module, Swapped | Kept]]:
    """Yield the modules that the report names, each with what is to become of it."""
    _check(model)
    _own.note_again()
    bypassed: set[nn.Module] = set()  # read by a swapped parent
    parts: set[str] = set()  # the paths of the parts of a transformer that are left
    for path, module in model.named_modules():
        cls = type(module)
        rule = _rule(module)
        reason = None if rule is None else _rules.why_not_swap(rule, module)
        if reason is not None and reason.endswith(_rules.SHARDED) and isinstance(module, rule.fused):
            reason = None  # swapped before it was sharded: every call judges for itself
        if rule is not None and reason is None:
            bypassed.update(_rules.descendant(module, path) for path in rule.bypassed)
            subclassed = cls not in (rule.original, rule.fused)
            now = cls.__name__ if subclassed else rule.fused.__qualname__
            yield module, Swapped(path, rule.original.__name__, now)
        elif rule is not None:
            yield module, Kept(path, rule.original.__name__, reason, known=True)
        elif module not in bypassed:
            part = part_of(module)
            if part == "a patch embedding" and path.rpartition(".")[0] in parts:
                part = None  # its convolution
            if part is not None:
                parts.add(path)
            reason = _reason(module, part)
            if reason is not None:
                yield module, Kept(path, cls.__name__, reason, known=False, part=part)


def _reason(module: nn.Module, part: str | None) -> str | None:
    """Return why a module of a class that is not swapped runs as it did, or None where there is nothing to tell."""
    base = next((r.original for r in _rules.RULES.values() if isinstance(module, r.original)), None)
    if base is not None:
        return f"a subclass of {base.__name__}, which may compute something else"
    if part is not None:
        return f"{part} of a class that is not known here"
    if type(module) in _LIBRARY_PRODUCTS:
        return _LIBRARY_PRODUCTS[type(module)]
    own = sorted(name for name, _ in module.named_parameters(recurse=False))
    if not own:
        return None
    if any(True for _ in module.children()):
        return f"its own forward runs and holds {', '.join(own)}; see its children"
    return "no fused forward for this class"


def _report(plan: list[tuple[nn.Module | None, Swapped | Kept]], model: nn.Module | None = None) -> Report:
    entries = [entry for _, entry in plan]
    swapped = tuple(e for e in entries if isinstance(e, Swapped))
    kept = tuple(e for e in entries if isinstance(e, Kept))
    if model is None:
        return Report(swapped, kept)
    alive, paths = weakref.ref(model), dict.fromkeys(entry.module for entry in swapped)

    def estimated() -> Estimate | None:
        return None if alive() is None else estimate_time(alive(), paths)

    return Report(swapped, kept, estimated)
