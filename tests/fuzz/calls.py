"""A drawn call of a public function: what Hypothesis shrinks, what a failure prints, and how it is judged.

Hypothesis draws shapes, dtypes, layouts and options. Values come from a torch seed: what it shrinks is a call that a
person can read, and paste back: ``judge(Call(...))``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitkernels.runtime import use_backend
from vitkernels.testing import Verdict, fp8, judge_op
from vitkernels.testing.workloads import WORKLOADS, call_op, call_reference

REDRAWS = 8


def _gapped(x: Tensor) -> Tensor:
    gaps = torch.full_like(x, math.nan if x.is_floating_point() else 1)
    return torch.stack([x, gaps], -1).flatten(-2)[..., ::2]


def _reversed(x: Tensor) -> Tensor:
    order = tuple(range(x.ndim))[::-1]
    return x.permute(order).contiguous().permute(order)


# How a tensor lies in memory. What lies around it is NaN: who reads past the edge shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "reversed": _reversed,  # of a matrix, the transpose
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 2 else _reversed(x),
    "gapped": lambda x: _gapped(x) if x.ndim else x,
    "sliced": lambda x: (
        torch.constant_pad_nd(x, (1, 2), math.nan if x.is_floating_point() else 1)[..., 1:-2] if x.ndim else x
    ),
    "misaligned": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x) if x.ndim > 1 else x,
    "expanded_last": lambda x: x[..., :1].expand_as(x) if x.ndim else x,
    "odd_unit_strides": lambda x: x.contiguous().as_strided(
        x.shape, [7 if n == 1 else s for n, s in zip(x.shape, x.contiguous().stride(), strict=True)]
    ),
}


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor of a call.

    Attributes:
        shape: Its shape.
        kind: What its values are, a name in :data:`KINDS`, or ``below N`` for distinct indices along the last dim; or
            ``none``, ``text``, ``sparse``, for bad calls.
        dtype: Its dtype; the call's if None.
        layout: A name in :data:`LAYOUTS`.
        grad: Whether it requires a gradient.
        device: Its device.
    """

    shape: tuple[int, ...]
    kind: str = "normal"
    dtype: torch.dtype | None = None
    layout: str = "contiguous"
    grad: bool = False
    device: str = "cpu"

    def make(self, dtype: torch.dtype, generator: torch.Generator, device: torch.device):
        """Return the tensor, or what stands in its place."""
        if self.kind in ("none", "text"):
            return None if self.kind == "none" else "tensor"
        if self.kind.startswith("below "):
            x = _indices(self.shape, int(self.kind[6:]), generator).to(self.dtype or torch.int64)
        else:
            x = KINDS.get(self.kind, _normal)(self.shape, generator).to(self.dtype or KIND_DTYPES.get(self.kind, dtype))
        if self.kind == "sparse":
            return x.to_sparse()
        if self.layout != "contiguous":
            x = LAYOUTS[self.layout](x)
        x = x.to("meta" if self.device == "meta" else device)
        return x.requires_grad_(self.grad) if x.is_floating_point() or x.is_complex() else x


def _normal(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _indices(shape, below, generator):
    return _uniform((*shape[:-1], below), generator).argsort(-1)[..., : shape[-1]]


KINDS = {
    "normal": _normal,
    "weight": lambda shape, g: _normal(shape, g) / max(1, math.prod(shape[1:])) ** 0.5,
    "keep": lambda shape, g: _uniform(shape, g) < 0.8,
    "holes": lambda shape, g: _normal(shape, g).masked_fill(_uniform(shape, g) < 0.2, -math.inf),
    "drop_path": lambda shape, g: (_uniform(shape, g) < 0.75).double() / 0.75,
    "unit": _uniform,
    "pixels": lambda shape, g: (_uniform(shape, g) * 256).floor(),
    "factor": lambda shape, g: 10 * _uniform(shape, g),
}
KIND_DTYPES = {"keep": torch.bool, "pixels": torch.uint8}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the public function ``op``; its tensors by name, as those of a workload.

    Attributes:
        op: The function's name.
        dtype: That of inputs which name none.
        inputs: Its tensors.
        options: Its other arguments.
        upstream: How the upstream gradients lie in memory, a name in :data:`LAYOUTS`.
        seed: Of all values.
        backend: ``torch``, which must know the same dtypes and options; None for the kernels.
    """

    op: str
    dtype: torch.dtype
    inputs: Mapping[str, Input]
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    upstream: str = "contiguous"
    seed: int = 0
    backend: str | None = None

    def draw(self, seed: int, device: torch.device) -> tuple[dict[str, Tensor | None], Callable[[Tensor], Tensor]]:
        """Return the tensors, and what makes the upstream gradients."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: x.make(self.dtype, generator, device) for name, x in self.inputs.items()}

        def upstream(out: Tensor) -> Tensor:
            return LAYOUTS[self.upstream](_normal(out.shape, generator).to(out.dtype)).to(out.device)

        return tensors, upstream


def judge(call: Call, function: Callable | None = None, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
    """Hold every output and gradient of ``call`` against the reference, by the rule of :mod:`vitkernels.testing`.

    On tensors of a few elements that rule is at the mercy of the draw. What breaks it is drawn eight times more, with
    other values, and must break it in six of them. What no luck explains (a NaN where none belongs, a wrong shape or
    dtype, an input that was changed, an exception) counts at once.

    Args:
        call: The call.
        function: In place of the public function.
        device: Where to run it.

    Raises:
        AssertionError: It differs from the reference.
    """
    spec = OPS[call.op]
    function = function or spec.function

    def failures(seed: int) -> dict[str, Verdict]:
        tensors, upstream = call.draw(seed, device)
        seeded = [functools.partial(_run, f, call.backend, seed) for f in (function, spec.reference)]
        if call.dtype == torch.float64:
            assert_same_in_fp64(*seeded, tensors, call.options, upstream)
            return {}
        verdicts = judge_op(*seeded, tensors, options=call.options, upstream=upstream)
        failed = {v.name: v for v in verdicts if not v.passed}
        certain = [f"{v.name}: {v.detail}" for v in failed.values() if math.isinf(v.ratio)]
        assert not certain, "\n".join(certain)
        return failed

    first = failures(call.seed)
    if first:
        counts, enough = collections.Counter(), 0.75 * REDRAWS
        for redraws in range(1, REDRAWS + 1):
            counts.update(failures(call.seed + redraws).keys())
            most = max(counts[name] for name in first)
            if most >= enough or most + REDRAWS - redraws < enough:
                break  # what is left cannot change it
        lost = [
            f"{name}, in {counts[name]} of {redraws} more draws: {v.detail}"
            for name, v in first.items()
            if counts[name] >= enough
        ]
        assert not lost, "\n".join(lost)


def assert_same_in_fp64(
    function: Callable, spec: Callable, tensors: Mapping[str, Tensor | None], options: Mapping, upstream: Callable
) -> None:
    """Hold ``function`` against ``spec``, both in fp64, where no wider truth says how much of it is rounding.

    1e-10 of the largest element lies far above that of a few hundred terms, and far below what any defect does.
    """
    runs = []
    for f in (function, spec):
        outputs = f(**tensors, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not runs:
            upstreams = [upstream(o.detach()) for o in outputs]
        trained = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad}
        grads = torch.autograd.grad(outputs, list(trained.values()), upstreams) if trained else ()
        results = {f"output {i}": o for i, o in enumerate(outputs)}
        runs.append(results | {f"d{n}": g for n, g in zip(trained, grads, strict=True)})
    for name, want in runs[1].items():
        largest = want.detach().abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(
            runs[0][name], want, rtol=0, atol=1e-10 * max(1.0, largest), msg=lambda m, name=name: f"{name}: {m}"
        )


def on(backend: str | None) -> contextlib.AbstractContextManager:
    """Whatever the backend of all tests is, or this one."""
    return use_backend(backend) if backend else contextlib.nullcontext()


def _run(function, backend, seed, **arguments):
    torch.manual_seed(seed)  # of dropout
    with on(backend):
        return function(**arguments)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A public function and its reference, both of named tensors."""

    function: Callable
    reference: Callable


def _run_op(run: Callable, op: str, /, **arguments):
    """Call an op or its reference with what is drawn here in another form than a workload has."""
    if "starts" in arguments:  # of packed images: numbers, which a failure prints
        dtype, device = arguments.pop("starts_dtype", torch.int32), getattr(arguments["q"], "device", None)
        arguments["cu_seqlens"] = torch.tensor(arguments.pop("starts"), dtype=dtype, device=device)
    if op == "block":  # not all of the three have a gradient worth a look
        biases = [arguments.pop(f"{name}_bias", None) for name in "qkv"]
        if biases[0] is not None:
            arguments["qkv_bias"] = torch.cat(biases)
    return run(op, **arguments)


# The shapes, layouts, dtypes and options that strategies.py draws are those of no network: of the workloads these calls
# have the functions alone.
OPS = {
    op: Spec(*(functools.partial(_run_op, run, op) for run in (call_op, call_reference)))
    for op in dict.fromkeys(workload.op for workload in WORKLOADS)
} | {op: Spec(*(functools.partial(run, op) for run in (fp8.call_op, fp8.call_reference))) for op in fp8.NAMES}
