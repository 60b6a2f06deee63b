"""Registration of ops with PyTorch's dispatcher: one opaque torch op for the forward, one for the backward.

CUDA (and ROCm) and XPU run the launcher; the CPU runs the reference, or the launcher on an emulated GPU. Autograd is
not registered here: each op's own file has an ``autograd.Function`` that calls the torch ops.
Such a call costs 2.7 µs; ``torch.library.custom_op`` costs 10 µs. No other way that was tried works with fake tensors,
export, fullgraph compilation and opcheck, also with emulated kernels. The dispatcher also resolves lazy negation, and
lets modes and profilers see the op. Below the dispatcher, plans (``_plan.py``) repeat a launcher's actions for tensors
of the same layout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vitkernels import runtime
from vitkernels.ops import _triton
from vitkernels.ops._plan import NAMESPACE, Plans

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclasses.dataclass(frozen=True)
class Implementations:
    """The three implementations of an op: Triton kernels, plain PyTorch, and shapes only.

    ``kernels`` maps a device type to the function that the dispatcher calls for it; ``work`` is as for
    :func:`register`.
    """

    launcher: Callable
    reference: Callable
    fake: Callable
    kernels: dict[str, Callable]
    work: str | None


# What a forward op does. A pass reads and writes its tensors once, and costs as much to compute again as to keep.
WORK = ("attention", "linear", "mlp", "pass")
OPS: dict[str, Implementations] = {}
PLANNED: list[Callable] = []  # what planned() decorated


def register(schema: str, *, launcher: Callable, reference: Callable, fake: Callable, work: str | None = None):
    """Define ``vitkernels::<schema>`` and return it as a callable.

    Args:
        schema: The op's signature. The first argument is a tensor; the op mutates no input, and no output aliases an
            input. Once released, an op whose arguments change needs a new name: saved exports call the old signature,
            and the keys of Inductor's disk cache leave out arguments that have their default values.
        launcher: Runs the Triton kernels.
        reference: Computes the same in PyTorch, for CPUs.
        fake: Returns empty outputs of the right shape, stride and dtype.
        work: Of :data:`WORK`, by which selective checkpointing keeps results; None for a backward, whose name ends in
            ``_bwd``.

    Raises:
        ValueError: A forward op has no ``work``, or a backward has one.
    """
    if schema.partition("(")[0].endswith("_bwd") != (work is None) or work not in (None, *WORK):
        raise ValueError(f"{schema}: work is {work!r}; expected one of {', '.join(WORK)}, or None for a backward, _bwd")
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

    kernels = _kernels(Plans(launcher, name), reference)
    for kind, implementation in kernels.items():
        _LIBRARY.impl(name, implementation, kind.upper())
    OPS[name] = Implementations(launcher, reference, fake, kernels, work)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def planned(function: Callable) -> Callable:
    """Decorate a function of tensors, the first one never None, that calls registered ops and PyTorch's.

    It gets plans of its own, so that a call looks up one plan and passes the dispatcher for PyTorch's ops only. That
    hides the registered ops; so where somebody may look at them (a mode, a profiler, a compiler, a transform of
    torch.func), and for tensors with a pending negation, which the dispatcher would resolve, the function itself runs.
    ``kernels`` of the result maps a device type to what is called for it.
    """
    kernels = _kernels(Plans(function), function)

    @functools.wraps(function)
    def run(x, *args):
        if (
            is_compiling()
            or is_in_torch_dispatch_mode()
            or profiler._is_profiler_enabled
            or torch._C._are_functorch_transforms_active()
        ):
            return function(x, *args)
        for t in (x, *args):
            if isinstance(t, torch.Tensor) and t.is_neg():
                return function(x, *args)
        kernel = kernels.get(runtime.device_type(x))
        return function(x, *args) if kernel is None else kernel(x, *args)

    run.kernels = kernels
    PLANNED.append(run)
    return run


def _kernels(plans: Plans, reference: Callable) -> dict[str, Callable]:
    on_gpu = _on_its_device(plans)
    return {"cuda": on_gpu, "xpu": on_gpu, "cpu": _on_emulated_gpu(plans, reference)}


def _on_its_device(plans: Plans) -> Callable:
    def launch(x, *args):
        with runtime.device_guard(x):
            device = x.get_device()
            try:
                return plans(device, x, *args)
            except OSError as error:
                if not _triton.is_of_the_cache(error):
                    raise
                # Triton also compiles its driver into the cache, before any kernel.
                with _triton.another_cache(error):
                    return plans(device, x, *args)

    return launch


def _on_emulated_gpu(plans: Plans, reference: Callable) -> Callable:
    def launch(x, *args):
        arch = runtime.emulated_arch()
        if arch is None:
            return reference(x, *args)
        from vitkernels.emulator.launch import emulating  # imports Triton, which is installed if this runs

        with emulating(arch):
            return plans(arch, x, *args)

    return launch


def uses_kernels(x: torch.Tensor) -> bool:
    """Tell whether an op on ``x`` runs the Triton kernels under the backend of :func:`vitkernels.backend`.

    Under ``torch.jit.trace`` (also used by the older ONNX export) no op does: sizes are tensors there, and the traced
    model must run without vitkernels.

    Raises:
        RuntimeError: The backend or the device requires the kernels, but they cannot run: Triton is missing, or the
            backend is ``triton`` and ``x`` is on a CPU. A GPU never falls back to PyTorch silently.
    """
    asked = runtime.backend()
    if asked == "torch" or torch.jit.is_tracing():
        return False
    kind = runtime.device_type(x)
    emulated = kind == "cpu" and asked.startswith("emulated")
    if emulated or kind in ("cuda", "xpu"):
        if not _triton.HAS_TRITON:
            where = "the CPU is to emulate a GPU" if emulated else f"tensors are on {x.device}"
            raise RuntimeError(
                f"{where}, but Triton cannot be used ({_triton.MISSING}); install it, "
                "or set VITKERNELS_BACKEND=torch to run plain PyTorch"
            )
        return True
    if kind == "cpu":
        if asked == "triton":
            raise RuntimeError(
                "the triton backend is asked for on CPU tensors, and takes a GPU; VITKERNELS_BACKEND=emulated runs the "
                "kernels on an emulated one"
            )
        return False
    return kind == "meta" and _triton.HAS_TRITON


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Tell whether an op on ``tensors`` must go through its ``autograd.Function``.

    It must also under torch.func's transforms: there the ``autograd.Function`` raises an error, but the torch op alone
    would silently return zeros.

    Raises:
        NotImplementedError: A tensor is a dual tensor of forward-mode differentiation, which no op supports.
    """
    if not is_compiling():
        if torch._C._are_functorch_transforms_active():
            return True
        if forward_ad._current_level >= 0 and any(
            t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
        ):
            raise NotImplementedError(
                "forward-mode differentiation (jvp) of a vitkernels op; expected reverse mode: backward"
            )
    if torch.is_grad_enabled():
        for t in tensors:  # any() with a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


def reference_gradients(
    function: Callable, inputs: Sequence[torch.Tensor | None], upstream: Sequence[torch.Tensor], needed: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """Differentiate ``function(*inputs)`` with PyTorch's autograd: the CPU implementation of a registered backward.

    Returns one tensor per input; it is empty if that gradient is not needed.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [leaf for leaf, n in zip(leaves, needed, strict=True) if n]
        grads = iter(torch.autograd.grad(outputs, wanted, upstream) if wanted else ())
    return tuple(next(grads).contiguous() if n else upstream[0].new_empty(0) for n in needed)
