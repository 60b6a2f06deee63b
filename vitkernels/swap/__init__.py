"""Swap the kernels into an existing model in place, and out again.

The swap sets a module's class to a subclass with a fused forward. Parameters, state-dict keys, optimizer references,
copies, pickles and hooks on the module do not change. On a CPU that emulates no GPU the subclass runs the original
forward. The swap may come before or after ``torch.compile``, ``DistributedDataParallel`` and the like: compiled code
has guards on the classes of its modules, so torch.compile compiles it again.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import warnings
import weakref
from collections.abc import Iterator

from torch import nn

from vitkernels import ops
from vitkernels.layers import _own, fp8, records, sharded
from vitkernels.ops._fp8.rows import arch_limit
from vitkernels.swap import _rules
from vitkernels.swap._parts import part_of
from vitkernels.swap.estimate import Estimate, estimate_time
from vitkernels.swap.report import Kept, Report, Swapped

__all__ = ["Kept", "Report", "Swapped", "accelerate", "explain", "restore"]

# The file in this folder that knows each library's modules. It is imported only if the library is in sys.modules:
# otherwise the model can have no such modules.
_FILES = {
    "torch": "torch_nn",
    "timm": "timm",
    "torchvision": "torchvision",
    "torchvision.models.maxvit": "torchvision_maxvit",
    "torchvision.models.swin_transformer": "torchvision_swin",
    "open_clip": "open_clip",
    "dinov2": "dinov2",
    "dinov3": "dinov3",
    "models.swin_transformer": "microsoft_swin",
    "models.swin_transformer_v2": "microsoft_swin_v2",
    "transformers.modeling_utils": "hf",  # transformers itself imports lazily; any model of it imports this
}

_LIBRARY_PRODUCTS = {
    nn.Linear: "a plain Linear: already one library product",
    nn.Conv2d: "a plain convolution: already one library product",
    nn.Embedding: "a plain Embedding: a lookup, nothing to fuse",
}


PRECISIONS = (None, "fp8")


def accelerate(model: nn.Module, *, strict: bool = False, precision: str | None = None) -> Report:
    """Swap every module of ``model`` that has a fused forward, in place.

    It is safe to call this again: a module that can no longer be fused then gets its original class back.

    Args:
        model: Any module; each of its submodules is examined by itself.
        strict: Raise if a module of a known class cannot be swapped, if a part of a transformer has an unknown class
            (attention, a LayerNorm or RMSNorm, an MLP, a patch embedding: see :class:`Kept`), or if nothing is
            swapped. Other modules may stay: a classifier's Linear, convolutions, embeddings, BatchNorm, pooling,
            dropout. If the model contains several towers, call this on the tower that you mean.
        precision: None keeps the model's. ``fp8``, for inference on sm_89 and later, multiplies by e4m3: weights with
            one scale for each output channel, quantized now and after each change in place; activations with scales
            taken from themselves, without calibration. Everything else, attention too, keeps the model's precision. On
            a CPU PyTorch computes the same. A module that cannot runs as with None, and the report gives the reason;
            with ``strict`` that raises, too. See :func:`vitkernels.compare_precision`.

    Returns:
        Which modules were swapped, and which were not and why.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: The precision is unknown.
        NotImplementedError: With ``strict``, in the cases above; or the model is on a GPU that has no FP8 products
            (before sm_89, AMD's). The model is unchanged.
    """
    plan = list(_plan(model, precision))
    report = _report(plan, model)
    if strict:
        left = Report((), tuple(k for k in report.kept if k.known or k.part is not None))
        if left.kept:
            raise NotImplementedError(
                f"accelerate: strict, and {len(left.kept)} modules cannot be swapped:\n{left.rows()}"
            )
        if not report.swapped:
            raise NotImplementedError(f"accelerate: strict, and no module of {type(model).__name__} can be swapped")
        left = Report(tuple(s for s in report.swapped if s.reason is not None), ())
        if left.swapped:
            raise NotImplementedError(
                f"accelerate: strict, and {len(left.swapped)} modules cannot run in {precision}:\n{left.rows()}"
            )
    for module, entry in plan:
        rule = _rules.RULES.get(type(module))
        if rule is not None:
            fuses = isinstance(entry, Swapped) or sharded.MARK in vars(module)  # which has no other forward
            _rules.become(module, rule.fused if fuses else rule.original)
        _set_precision(module, entry)
    return report


def _set_precision(module: nn.Module, entry: Swapped | Kept) -> None:
    if isinstance(entry, Swapped) and entry.precision is not None:
        fp8.forget(module)  # of parameters that were written through their data
        vars(module)[records.PRECISION] = entry.precision
        for layer in records.linears(_rule(module).products(module)):
            fp8.weight(layer.weight)
    elif vars(module).pop(records.PRECISION, None) is not None:
        fp8.forget(module)


def explain(model: nn.Module, *, precision: str | None = None) -> Report:
    """Return the report that :func:`accelerate` would return, without changing ``model``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: The precision is unknown.
        NotImplementedError: The model is on a GPU that has no FP8 products.
    """
    return _report(list(_plan(model, precision)), model)


def restore(model: nn.Module) -> Report:
    """Undo :func:`accelerate`: give every swapped module of ``model`` its original class back, in place.

    It undoes :func:`vitkernels.parallelize`, too, which all processes of the mesh must do together.

    Returns:
        Which modules were swapped back (``was`` is the fused class), and which could not be.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    _check(model)
    for module in [m for m in model.modules() if sharded.MARK in vars(m)]:
        importlib.import_module(f"{__name__}.parallelize").make_whole(module)
    entries: list[Swapped | Kept] = []
    for path, module in model.named_modules():
        rule = _rule(module)
        if rule is None or not isinstance(module, rule.fused):
            continue
        name = rule.fused.__qualname__ if type(module) is rule.fused else type(module).__name__
        if _own.hides_forward(module):
            reason = "a forward is bound to the instance, which may call this class's: undo that first"
            entries.append(Kept(path, name, reason, known=True))
        elif type(module) is rule.fused:
            _rules.become(module, rule.original)
            if vars(module).pop(records.PRECISION, None) is not None:
                fp8.forget(module)
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
        except ImportError as error:  # an older release, and this model may not use that library at all
            version = getattr(sys.modules[library], "__version__", "of unknown version")
            warnings.warn(f"the modules of {library} {version} are not known here: {error}", stacklevel=4)


def _rule(module: nn.Module) -> _rules.Rule | None:
    """Return the rule of ``module``'s class, even if FSDP or a parametrization made a subclass of the fused class."""
    exact = _rules.RULES.get(type(module))
    return exact or next((r for r in _rules.RULES.values() if isinstance(module, r.fused)), None)


def _plan(model: nn.Module, precision: str | None) -> Iterator[tuple[nn.Module, Swapped | Kept]]:
    """Yield each module that the report names, with its entry in the report."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}")
    _check(model)
    if precision is not None:
        _check_devices(model, precision)
    _own.note_again()
    in_fp8: set[nn.Module] = set()  # modules within one whose products run in FP8
    bypassed: set[nn.Module] = set()  # a swapped parent reads these without calling them
    parts: set[str] = set()  # the paths of transformer parts that are not swapped
    for path, module in model.named_modules():
        cls = type(module)
        rule = _rule(module)
        reason = None if rule is None else _rules.why_not_swap(rule, module)
        if reason is not None and reason.endswith(_rules.SHARDED) and isinstance(module, rule.fused):
            reason = None  # swapped before FSDP2 sharded it: each call checks again
        if rule is not None and reason is None:
            bypassed.update(_bypassed(rule, module))
            subclassed = cls not in (rule.original, rule.fused)
            now = cls.__name__ if subclassed else rule.fused.__qualname__
            entry = Swapped(path, rule.original.__name__, now)
            if precision is not None and module not in in_fp8:
                entry = _in_fp8(entry, rule, module)
                if entry.precision is not None:
                    in_fp8.update(_bypassed(rule, module))
            yield module, entry
        elif rule is not None:
            yield module, Kept(path, rule.original.__name__, reason, known=True)
        elif module not in bypassed:
            part = part_of(module)
            if part == "a patch embedding" and path.rpartition(".")[0] in parts:
                part = None  # the convolution of a patch embedding that is reported already
            if part is not None:
                parts.add(path)
            reason = _reason(module, part)
            if reason is not None:
                yield module, Kept(path, cls.__name__, reason, known=False, part=part)


def _bypassed(rule: _rules.Rule, module: nn.Module) -> Iterator[nn.Module]:
    """Yield what the fused forward of ``module`` reads and does not call; of an adapted Linear all its parts."""
    for path in rule.bypassed:
        child = _rules.descendant(module, path)
        if child is not None:
            yield from child.modules() if rule.takes_lora(path, child) else (child,)


def _check_devices(model: nn.Module, precision: str) -> None:
    """Raise an error if ``model`` has parameters on a GPU, or an emulated one, without FP8 products."""
    for parameter in {p.device: p for p in model.parameters() if not p.is_meta}.values():
        reason = arch_limit(parameter.device) if ops.uses_kernels(parameter) else None
        if reason is not None:
            raise NotImplementedError(f"accelerate: precision is {precision!r}, and {reason}")


def _in_fp8(entry: Swapped, rule: _rules.Rule, module: nn.Module) -> Swapped:
    """Return ``entry`` with the precision fp8, or with the reason why the module's own products cannot have it."""
    if rule.products is not None:
        reason = fp8.limit(rule.products(module))
        if reason is None:
            return dataclasses.replace(entry, precision="fp8")
        return dataclasses.replace(entry, reason=reason)
    multiplies = any(nn.Linear in classes or nn.MultiheadAttention in classes for classes in rule.bypassed.values())
    return dataclasses.replace(entry, reason="fp8 is not offered for this class") if multiplies else entry


def _reason(module: nn.Module, part: str | None) -> str | None:
    """Return why a module of a class without a rule is not swapped, or None if the report should not list it."""
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
