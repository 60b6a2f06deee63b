"""How an op reaches its kernels: one opaque torch op forward, one backward, by dispatch key.

CUDA (ROCm too) and XPU run the launcher; the CPU runs the reference, or the launcher on the GPU that it emulates.
The differentiation is an ``autograd.Function`` outside, in the op's own file.
This route costs 2.7 µs a call, against 10 µs for ``torch.library.custom_op``, and alone passes fake
tensors, export, fullgraph compilation and opcheck with emulated kernels too. The dispatcher also
negates what is negated lazily, and shows an op to modes and profilers. Below it the launcher is remembered
(``_plan.py``): what it did is repeated for tensors that lie alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from vitkernels import runtime
from vitkernels.ops import _triton
from vitkernels.ops._plan import Plans

_LIBRARY = torch.library.Library("vitkernels", "DEF")


@dataclasses.dataclass(frozen=True)
class Implementations:
    """An op's three: on Triton kernels, in PyTorch, and on shapes alone.

    ``kernels`` is, by device type, what the dispatcher calls there, where that runs the launcher.
    """

    launcher: Callable
    reference: Callable
    fake: Callable
    kernels: dict[str, Callable]


OPS: dict[str, Implementations] = {}


def register(schema: str, *, launcher: Callable, reference: Callable, fake: Callable):
    """Define ``vitkernels::<schema>`` and return it as a callable.

    Args:
        schema: The op's signature, a tensor first; no input is mutated and no output aliases an input. Behind a
            release an op whose arguments change needs a new name: saved exports call the old ones, and Inductor's cache
            on disk keeps compiled calls under a key that leaves out arguments at their defaults.
        launcher: Runs the Triton kernels.
        reference: The same in PyTorch, for CPUs.
        fake: The same on shapes alone: gives empty outputs of the right shape, stride and dtype.
    """
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

    plans = Plans(launcher)
    on_gpu = _on_its_device(plans)
    kernels = {"cuda": on_gpu, "xpu": on_gpu, "cpu": _on_emulated_gpu(plans, reference)}
    for kind, implementation in kernels.items():
        _LIBRARY.impl(name, implementation, kind.upper())
    OPS[name] = Implementations(launcher, reference, fake, kernels)
    torch.library.register_fake(f"vitkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vitkernels, name).default


def _on_its_device(plans: Plans) -> Callable:
    def launch(x, *args):
        with runtime.device_guard(x):
            device = x.get_device()
            try:
                return plans(device, x, *args)
            except OSError as error:
                if not _triton.is_of_the_cache(error):
                    raise
                # Triton's driver, too, is compiled into the cache, before any kernel.
                with _triton.another_cache(error):
                    return plans(device, x, *args)

    return launch


def _on_emulated_gpu(plans: Plans, reference: Callable) -> Callable:
    def launch(x, *args):
        arch = runtime.emulated_arch()
        if arch is None:
            return reference(x, *args)
        from vitkernels.emulator.launch import emulating  # asks for Triton, which is there by now

        with emulating(arch):
            return plans(arch, x, *args)

    return launch


def uses_kernels(x: torch.Tensor) -> bool:
    """Tell whether an op on ``x`` runs the Triton kernels, under the backend of :func:`vitkernels.backend`.

    Under ``torch.jit.trace`` (the older ONNX export, too) none does: sizes are tensors there, and what is recorded is
    to run without vitkernels.

    Raises:
        RuntimeError: The kernels are asked for, or are due on this device, and cannot run: Triton is missing, or
            ``triton`` is asked for on a CPU. There is no silent fallback on a GPU.
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
    """Tell whether autograd must see an op on ``tensors``.

    torch.func's transforms must too: an autograd.Function refuses them with an error, where a bare op would silently
    return zeros.

    Raises:
        NotImplementedError: One is a dual number of forward-mode differentiation, of which there is none here.
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
        for t in tensors:  # any() of a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


def reference_gradients(
    function: Callable, inputs: Sequence[torch.Tensor | None], upstream: Sequence[torch.Tensor], needed: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """Differentiate ``function(*inputs)`` with PyTorch: the CPU side of a registered backward.

    Returns one tensor an input, empty where the gradient is not needed.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [leaf for leaf, n in zip(leaves, needed, strict=True) if n]
        grads = iter(torch.autograd.grad(outputs, wanted, upstream) if wanted else ())
    return tuple(next(grads).contiguous() if n else upstream[0].new_empty(0) for n in needed)
