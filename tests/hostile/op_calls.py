"""Every public op on tiny valid tensors, for all of this folder: an input is made hostile by one change.

Of an op's workloads (:mod:`vitkernels.testing.workloads`) each call is the one with most tensors; a new op joins them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from vitkernels.models import VisionTransformer
from vitkernels.testing import check_op
from vitkernels.testing.cases import Case
from vitkernels.testing.workloads import WORKLOADS, Input, Workload, call_op, call_reference, shape_of, sizes

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# By the workloads' letters: no two tokens, channels or sides of an image are alike.
SIZES = {"B": 2, "N": 5, "C": 16, "H": 2, "D": 8, "F": 12, "I": 3, "P": 4, "Y": 8, "X": 12, "R": 1}


@dataclasses.dataclass(frozen=True)
class Op:
    """A public op as a function of named tensors, and what it is held against.

    Attributes:
        tensors: What it takes, by name.
        inputs: Which of them are activations, with a sample along the first dim; the others are parameters.
        optional: Which may be None.
        normed: Whether it takes ``eps``.
        options: Further arguments, of a case.
    """

    function: Callable
    reference: Callable
    tensors: dict[str, Input]
    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    normed: bool
    options: Callable[[Case], dict]


@dataclasses.dataclass(frozen=True)
class Call:
    """An op with its arguments."""

    op: Op
    tensors: dict[str, Tensor | None]
    options: dict

    def __call__(self, **changed):
        return self.op.function(**{**self.tensors, **self.options, **changed})

    def outputs(self, **changed) -> tuple[Tensor, ...]:
        result = self(**changed)
        return result if isinstance(result, tuple) else (result,)

    def changed(self, **tensors: Tensor | None) -> Call:
        return dataclasses.replace(self, tensors={**self.tensors, **tensors})

    def map(self, change: Callable[[Tensor], Tensor], names: Iterable[str]) -> Call:
        """With ``change`` applied to the tensors of these names, which stay leaves of autograd."""
        given = {n: self.tensors[n] for n in names if self.tensors[n] is not None}
        return self.changed(**{n: change(t.detach()).requires_grad_(t.requires_grad) for n, t in given.items()})

    def check(self, **more) -> None:
        """Hold outputs and gradients against fp64 by the error rule."""
        check_op(self.op.function, self.op.reference, self.tensors, options=self.options, **more)


def call(name: str, *, dtype=torch.float32, device="cpu", grad=True, **changed: int) -> Call:
    """Make a call of the op ``name`` on random tensors, with other sizes where they are given."""
    op, given = OPS[name], SIZES | changed
    B, N = given["B"], given["N"]
    activation = "silu" if name == "swiglu_mlp" else "gelu"
    side = math.isqrt(N)  # of the largest square of tokens; a prefix makes up the rest
    case = Case(
        "tiny", B, side, 1, N - side**2, given["C"], given["H"], given["F"], activation, layer_scale=True, mlp_norm=True
    )
    letters = sizes(case) | given | {"T": B * N}
    if name == "patch_embed":
        letters["N"] = given["R"] + (given["Y"] // given["P"]) * (given["X"] // given["P"])
    tensors = {
        n: (0.5 * torch.randn(shape_of(t.shape, letters), dtype=torch.float64)).to(device, dtype)
        for n, t in op.tensors.items()
    }
    for n, t in tensors.items():
        t.requires_grad_(grad and op.tensors[n].grad)
    options = op.options(case)
    if name == "attention_varlen":
        options["cu_seqlens"] = torch.arange(B + 1, dtype=torch.int32, device=device) * N
    return Call(op, tensors, options)


def tiny_model(device="cpu", **more) -> VisionTransformer:
    """A ViT of one block for images of 16 × 16 pixels."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**sizes, **more}, device=device)


def parameters(name: str) -> list[str]:
    """The tensors of an op that are no activations."""
    return [n for n in OPS[name].tensors if n not in OPS[name].inputs]


def each_op(names: Iterable[str] | None = None, **having):
    """Run a test once an op: of all, of ``names``, or of those whose attributes are as given."""
    chosen = [n for n in names or OPS if all(getattr(OPS[n], key) == value for key, value in having.items())]
    return pytest.mark.parametrize("op", chosen)


LESS = ("residual", "separate weights")  # as many tensors, but no activation, or weights that go in pairs


def _op(name: str) -> Op:
    mine = [w for w in WORKLOADS if w.op == name and not (w.variant or "").startswith(LESS)]
    fullest: Workload = max(mine, key=lambda w: (not w.attention, len(w.inputs)))
    tensors = {n: t for n, t in fullest.inputs.items() if n != "cu_seqlens"}  # it is no floating-point tensor
    if name == "linear":
        tensors["residual"] = Input("B N F", optional=True)
    return Op(
        *(functools.partial(_with_eps, function, name) for function in (call_op, call_reference)),
        tensors,
        tuple(n for n, t in tensors.items() if t.shape[:2] in ("B ", "T ")),
        tuple(n for n, t in tensors.items() if t.optional),
        "norm" in name or any("norm" in n for n in tensors),
        fullest.options,
    )


def _with_eps(function: Callable, op: str, /, **arguments):
    if op == "block" and "eps" in arguments:
        arguments["eps"] = (arguments["eps"],) * 2
    return function(op, **arguments)


OPS = {name: _op(name) for name in dict.fromkeys(w.op for w in WORKLOADS)}
ATTENTION = ("attention", "attention_qkvpacked", "attention_varlen")
WINDOWS = ("window_attention", "relative_attention", "decomposed_attention")
ROWS = (
    *("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"),
    *("linear", "mlp", "lora_linear", "lora_mlp", "swiglu_mlp"),
)
