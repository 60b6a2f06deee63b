"""What a precision costs in accuracy: a model's blocks and outputs in it, beside those in the model's own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitkernels import swap


@dataclasses.dataclass(frozen=True)
class PrecisionReport:
    """The outcome of :func:`compare_precision`.

    Attributes:
        precision: The precision that was compared with the model's own.
        modules: ‖difference‖ / ‖output‖ of each module in that precision, by its path, in the order of the calls. The
            errors of all modules before it are in it.
        outputs: The same of the model's output.
        agreement: The share of rows of the output whose largest element is at the same place, 0 to 1.
        rows: The number of rows.
    """

    precision: str
    modules: dict[str, float]
    outputs: float
    agreement: float
    rows: int

    def __str__(self) -> str:
        width = max(map(len, [*self.modules, "output"]))
        lines = [f"  {path:<{width}}  {100 * error:6.2f} %" for path, error in self.modules.items()]
        title = f"{self.precision} beside the model's own precision: relative error of what comes out"
        last = f"  {'output':<{width}}  {100 * self.outputs:6.2f} %"
        return "\n".join([title, *lines, last, f"top-1 agreement {self.agreement:.2%} of {self.rows}"])


def compare_precision(
    model: nn.Module, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], precision: str = "fp8"
) -> PrecisionReport:
    """Run ``model`` and a copy accelerated with ``precision`` on the same inputs, and compare what comes out.

    It runs on any device: on a CPU PyTorch computes what the kernels compute. The model is not changed, and both run in
    evaluation mode without gradients. On random inputs the share of equal top-1 classes says little of a trained model:
    use real images.

    Args:
        model: A model that ``accelerate`` takes, with tensors or outputs of transformers (logits, else the last hidden
            state) as its result.
        inputs: Inputs of the model: images, a sequence of positional arguments, or a mapping of keyword arguments.
        precision: As for :func:`vitkernels.accelerate`.

    Returns:
        Relative errors and the agreement; print it.

    Raises:
        ValueError: The precision is unknown or None, or no module of the model can run in it: see
            ``vitkernels.explain(model, precision=precision)``.
        TypeError: The model returns no tensor.
        NotImplementedError: The GPU has no FP8 products.
    """
    if precision is None:
        raise ValueError("compare_precision: precision is None; expected 'fp8'")
    ours, other = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    swap.accelerate(ours)
    report = swap.accelerate(other, precision=precision)
    paths = [entry.module for entry in report.swapped if entry.precision is not None]
    if not paths:
        raise ValueError(f"compare_precision: no module can run in {precision}:\n{report.rows()}")
    try:
        (want, wanted), (got, given) = (_run(each, paths, inputs) for each in (ours, other))
    finally:
        swap.restore(other)  # frees the quantized weights
    errors = {path: _relative(given[path], wanted[path]) for path in given}
    agreement = (got.argmax(-1) == want.argmax(-1)).double().mean().item()
    return PrecisionReport(precision, errors, _relative(got, want), agreement, want.shape[:-1].numel())


def _run(model: nn.Module, paths: Sequence[str], inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the model's output and those of its modules at ``paths``."""
    seen: dict[str, Tensor] = {}

    def keep(path: str):
        return model.get_submodule(path).register_forward_hook(lambda m, i, out: seen.update({path: _tensor(out)}))

    hooks = [keep(path) for path in paths]
    try:
        with torch.inference_mode():
            if isinstance(inputs, Tensor):
                out = model(inputs)
            else:
                out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return _tensor(out), seen


def _tensor(out: object) -> Tensor:
    """Return the tensor of a module's output: itself, transformers' logits or last hidden state, or a tuple's first."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(out, name, None)
        out = out if found is None else found
    out = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(out, Tensor):
        raise TypeError(f"compare_precision: a module returns a {type(out).__name__}; expected a tensor")
    return out


def _relative(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return ((got.double() - want).norm() / want.norm()).item()
