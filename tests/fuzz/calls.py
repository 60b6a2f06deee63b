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

from vitkernels import ops, reference
from vitkernels.runtime import use_backend
from vitkernels.testing import Verdict, judge_op

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
        kind: What its values are, a name in :data:`KINDS`; or ``none``, ``text``, ``sparse``, for bad calls.
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


KINDS = {
    "normal": _normal,
    "weight": lambda shape, g: _normal(shape, g) / max(1, math.prod(shape[1:])) ** 0.5,
    "keep": lambda shape, g: _uniform(shape, g) < 0.8,
    "holes": lambda shape, g: _normal(shape, g).masked_fill(_uniform(shape, g) < 0.2, -math.inf),
    "drop_path": lambda shape, g: (_uniform(shape, g) < 0.75).double() / 0.75,
    "unit": _uniform,
    "pixels": lambda shape, g: (_uniform(shape, g) * 256).floor(),
}
KIND_DTYPES = {"keep": torch.bool, "pixels": torch.uint8}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the public function ``op``; its tensors by name, some of which :data:`OPS` puts in pairs and tuples.

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


def _norm(function, dtype_of):
    """The reference, whose PyTorch takes no fp32 parameters beside half inputs."""

    def call(weight=None, bias=None, **arguments):
        dtype = functools.reduce(torch.promote_types, (arguments[n].dtype for n in dtype_of if n in arguments))
        parameters = {"weight": weight} if "rms" in function.__name__ else {"weight": weight, "bias": bias}
        return function(**arguments, **{n: None if t is None else t.to(dtype) for n, t in parameters.items()})

    return call


def _mlp_reference(recompute=False, **arguments):
    return reference.mlp(**arguments)


def _swiglu(function, *, is_reference=False):
    def call(
        x, w12=None, b12=None, gate=None, value=None, gate_bias=None, value_bias=None, norm_weight=None, norm_bias=None,
        eps=None, recompute=False, **arguments,
    ):  # fmt: skip
        if w12 is None:
            w12, b12 = (gate, value), None if gate_bias is None else (gate_bias, value_bias)
        if is_reference:
            norm_weight, norm_bias = (None if t is None else t.to(x.dtype) for t in (norm_weight, norm_bias))
        else:
            arguments["recompute"] = recompute
        norm = None if eps is None else (norm_weight, norm_bias, eps)
        return function(x, w12, b12, norm=norm, **arguments)

    return call


def _prepared(arguments: dict) -> dict:
    """The arguments of attention, with those that prepare q and k put together."""
    cos, sin, interleaved = (arguments.pop(n, None) for n in ("cos", "sin", "interleaved"))
    if cos is not None or sin is not None:
        arguments["rope"] = (cos, sin, interleaved)
    for name in ("q", "k"):
        kind, eps, weight, bias = (arguments.pop(f"{name}_{n}", None) for n in ("kind", "eps", "weight", "bias"))
        if kind is not None:
            arguments[f"{name}_norm"] = (weight, bias, eps, kind == "rms")
    return arguments


def _attention(function):
    return lambda **arguments: function(**_prepared(arguments))


def _attention_reference(function, *, packed=False):
    def call(**arguments):
        arguments = _prepared(arguments)
        p = arguments.pop("dropout_p", 0.0)
        if p:
            if packed:
                B, N, _, H, _ = arguments["qkv"].shape
                shape, device = (B, H, N, N), arguments["qkv"].device
            else:
                q, k = arguments["q"], arguments["k"]
                shape, device = (*q.shape[:3], k.shape[2]), q.device
            seed = int(torch.randint(2**62, (1,), device=device))  # as the op draws its own
            arguments["dropout_scale"] = reference.dropout_scale(seed, shape, p).to(device)
        return function(**arguments)

    return call


def _varlen(starts, q, starts_dtype=torch.int32, **arguments):
    starts = torch.tensor(starts, dtype=starts_dtype, device=getattr(q, "device", None))
    return ops.attention_varlen(q=q, cu_seqlens=starts, **_prepared(arguments))


def _varlen_reference(starts, max_seqlen, q, k, v, starts_dtype=None, **arguments):
    arguments = _prepared(arguments)
    prepare = [arguments.pop(n, default) for n, default in (("rope", None), ("q_norm", None), ("k_norm", None))]
    q, k = (x.transpose(0, 1)[None] for x in (q, k))
    q, k = reference.prepare_qk(q, k, prepare[0], 0, *prepare[1:])
    q, k = (x[0].transpose(0, 1) for x in (q, k))
    return reference.attention_varlen(q, k, v, torch.tensor(starts), **arguments)


def _block(function, *, is_reference=False):
    layers = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")

    def call(x, q_bias=None, k_bias=None, v_bias=None, gamma1=None, gamma2=None, recompute=False, **arguments):
        pairs = {n: (arguments.pop(f"{n}_weight", None), arguments.pop(f"{n}_bias", None)) for n in layers}
        if q_bias is not None:
            pairs["qkv"] = pairs["qkv"][0], torch.cat([q_bias, k_bias, v_bias])
        if is_reference:
            pairs |= {n: tuple(None if t is None else t.to(x.dtype) for t in pairs[n]) for n in ("norm1", "norm2")}
        else:
            arguments["recompute"] = recompute
        return function(x, **pairs, layer_scale=(gamma1, gamma2), **arguments)

    return call


OPS = {
    "layer_norm": Spec(ops.layer_norm, _norm(reference.layer_norm, ("x",))),
    "rms_norm": Spec(ops.rms_norm, _norm(reference.rms_norm, ("x",))),
    "add_layer_norm": Spec(
        ops.add_layer_norm, _norm(reference.add_layer_norm, ("x", "residual", "layer_scale", "drop_path_scale"))
    ),
    "add_rms_norm": Spec(
        ops.add_rms_norm, _norm(reference.add_rms_norm, ("x", "residual", "layer_scale", "drop_path_scale"))
    ),
    "linear": Spec(ops.linear, reference.linear),
    "mlp": Spec(ops.mlp, _mlp_reference),
    "swiglu_mlp": Spec(_swiglu(ops.swiglu_mlp), _swiglu(reference.swiglu_mlp, is_reference=True)),
    "attention": Spec(_attention(ops.attention), _attention_reference(reference.attention)),
    "attention_qkvpacked": Spec(
        _attention(ops.attention_qkvpacked), _attention_reference(reference.attention_qkvpacked, packed=True)
    ),
    "attention_varlen": Spec(_varlen, _varlen_reference),
    "block": Spec(_block(ops.block), _block(reference.block, is_reference=True)),
    "patch_embed": Spec(ops.patch_embed, reference.patch_embed),
}
