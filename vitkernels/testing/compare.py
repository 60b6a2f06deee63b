"""The error rule: the truth is fp64, the yardstick is PyTorch's own error in the same dtype.

fp32 and fp64: max error ≤ 2 × PyTorch's + 2 · max(|truth + 0.3 − 0.3 − truth|, eps · |truth|), where each term is the
largest over the tensor.

fp16 and bf16: RMS error ≤ 1.5 × PyTorch's, worst row ≤ 10 × PyTorch's, and gain |⟨err, truth⟩ / ⟨truth, truth⟩| ≤
max(eps / 32, 1e-6, noise, PyTorch's gain). Without the limit on the gain, bf16's large errors would hide a result that
is wrong by a constant factor. In RMS and worst row "PyTorch's error" is at least the error of rounding the truth to the
dtype, because no implementation can be more exact.

fp64: the truth is PyTorch's own result, so "PyTorch's error" is its error in fp32, scaled by the ratio of the two eps.

On a CPU that emulates a GPU, PyTorch's fp32 products are summed as a GPU sums them (:mod:`vitkernels.testing.sums`).
There the largest of a few errors depends much on luck: of attention's tensors of 150 tokens and 24 channels one in 30
failed. So a result that fails is judged again, by PyTorch's largest error over :data:`ORDERS` orders of its sums.

If all terms of a gradient cancel, as in dq of one token, PyTorch may happen to get exactly 0; it does on some CPUs
only. Then "PyTorch's error" is at least what rounding the saved tensors leaves of those terms.

The terms for noise matter in small tensors:

- eps · |truth|: a bias gradient of 100 rows and 36 features can be summed as γ · Σ dy or as Σ γ · dy, equally exact
  (RMS 9.2e-7 and 9.4e-7 over 300 seeds). Without the term each fails against twice the other's error in 4 of 100
  seeds; with it, in none.
- The gain's noise: four standard deviations of the gain that random roundings cause, estimated from PyTorch's errors,
  our errors without their gain, and the spacing of the dtype's numbers. Over 150 seeds of a bf16 MLP (100 rows,
  36 → 72 → 36 features) the gain on dW2 deviates by 3.4e-4 for PyTorch and 2.0e-4 for ours, while eps / 32 is 2.4e-4.
  Over 12 seeds of attention with a learned bias, which PyTorch computes in fp32, the gain of our dk deviates by 1.9e-4
  around 0, and our RMS error is 1.4 times PyTorch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitkernels.testing.sums import summed_alike, sums_alike

ORDERS = 5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of the error rule for one tensor.

    Attributes:
        name: The output or gradient.
        passed: Whether every limit of the rule holds.
        ratio: Our error divided by PyTorch's (max in fp32 and fp64, RMS in fp16 and bf16), to compare runs.
        detail: Each figure with its limit, for a person.
    """

    name: str
    passed: bool
    ratio: float
    detail: str


def check(
    name: str,
    actual: Tensor,
    yardstick: Tensor,
    truth: Tensor,
    *,
    gain_counts: bool = True,
    noise: Tensor | None = None,
) -> Verdict:
    """Judge ``actual`` against the fp64 ``truth``, with PyTorch's ``yardstick`` in ``actual``'s dtype.

    Shape, dtype and the positions of NaN and ±Inf must agree as well.

    ``gain_counts=False`` ignores the gain. In a whole network one rounding changes all of a gradient, so the gain of a
    single run depends on luck, for PyTorch too; judge it over several runs.

    ``noise`` is what intermediate roundings to ``actual``'s dtype may leave of terms that cancel. It is used only if
    all terms cancel, that is, if ``truth`` is no larger than such a remainder in fp64.
    """
    if actual.shape != truth.shape:
        return Verdict(name, False, float("inf"), f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if actual.dtype != yardstick.dtype:
        return Verdict(name, False, float("inf"), f"dtype {actual.dtype}, PyTorch gives {yardstick.dtype}")
    dtype = actual.dtype
    got, torch_got, want = (t.detach().double() for t in (actual, yardstick, truth))
    finite = want.isfinite() & torch_got.isfinite()
    bad = got.isfinite() != finite
    bad |= got.isnan() & ~(want.isnan() | torch_got.isnan()) | ~got.isnan() & want.isnan() & torch_got.isnan()
    bad |= got.isinf() & want.isinf() & (got.sign() != want.sign())
    if bad.any():
        worst = tuple(bad.nonzero()[0].tolist())
        return Verdict(
            name,
            False,
            float("inf"),
            f"{int(bad.sum())} elements not NaN, infinite or finite alike, first at {worst}: "
            f"got {got[worst]:.6g}, expected {want[worst]:.6g}",
        )
    got, torch_got, want = (t.where(finite, 0.0) for t in (got, torch_got, want))
    if got.numel() == 0:
        return Verdict(name, True, 0.0, "empty")
    rounding = (want.to(dtype).double() - want).abs()
    rounding = rounding.where(rounding.isfinite(), 0.0)
    error, torch_error = (got - want).abs(), (torch_got - want).abs()
    if noise is not None:
        in_fp64 = noise.max() * (torch.finfo(torch.float64).eps / torch.finfo(dtype).eps)
        if want.abs().max() <= 8 * in_fp64:
            torch_error = torch_error.maximum(noise)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))

    if dtype in (torch.float32, torch.float64):
        shifted = want.to(dtype) + 0.3 - 0.3
        floor = 2.0 * (shifted.double() - want.to(dtype).double()).abs().max().item()
        floor = max(floor, 2.0 * torch.finfo(dtype).eps * want.abs().max().item())
        limit = 2.0 * torch_error.max().item() + floor
        passed = error.max().item() <= limit
        ratio = error.max().item() / max(torch_error.max().item(), rounding.max().item(), 1e-300)
        detail = f"max error {error.max():.3g} at {worst}, limit {limit:.3g} (PyTorch's {torch_error.max():.3g})"
        return Verdict(name, passed, ratio, detail)

    rms, torch_rms = _rms(error), max(_rms(torch_error), _rms(rounding))
    row, torch_row = _worst_row(error), max(_worst_row(torch_error), _worst_row(rounding))
    power = (want * want).sum().item()
    gain = ((got - want) * want).sum().item() / power if power else 0.0
    torch_gain = abs(((torch_got - want) * want).sum().item()) / power if power else 0.0
    spacing = torch.finfo(dtype).eps * torch.exp2(want.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor())
    errors = (torch_got - want, got - want - gain * want, spacing * 12**-0.5)
    noise = 4.0 * max(_gain_deviation(e, want) for e in errors)
    gain_limit = max(torch.finfo(dtype).eps / 32, 1e-6, noise, torch_gain)
    passed = rms <= 1.5 * torch_rms and row <= 10.0 * torch_row and (abs(gain) <= gain_limit or not gain_counts)
    detail = (
        f"RMS error {rms:.3g} (limit {1.5 * torch_rms:.3g}), worst row {row:.3g} (limit {10 * torch_row:.3g}), "
        f"gain {abs(gain):.2g} (limit {gain_limit:.2g}), max at {worst}"
    )
    return Verdict(name, passed, rms / max(torch_rms, 1e-300), detail)


def check_op(
    function: Callable,
    reference: Callable,
    tensors: Mapping[str, Tensor | None],
    *,
    options: Mapping[str, object] | None = None,
    upstream: Callable[[Tensor], Tensor] = torch.randn_like,
) -> list[Verdict]:
    """Judge every output of ``function(**tensors, **options)`` and the gradient of each tensor that requires one.

    Args:
        function: The op under test.
        reference: The same in PyTorch: the truth in fp64, the yardstick in the tensors' dtype.
        tensors: Inputs by argument name; the gradients of those that require one are checked. Strides are kept.
        options: Further arguments by name.
        upstream: Makes the upstream gradient for an output, with any strides.

    Raises:
        AssertionError: An output or gradient breaks the rule, or ``function`` changed an input.
    """
    verdicts = judge_op(function, reference, tensors, options=options, upstream=upstream)
    failed = [v for v in verdicts if not v.passed]
    assert not failed, "\n".join(f"{v.name}: {v.detail}" for v in failed)
    return verdicts


def judge_op(
    function: Callable,
    reference: Callable,
    tensors: Mapping[str, Tensor | None],
    *,
    options: Mapping[str, object] | None = None,
    upstream: Callable[[Tensor], Tensor] = torch.randn_like,
    gain_counts: bool = True,
) -> list[Verdict]:
    """Return the verdicts of :func:`check_op`, passed or failed; an input that ``function`` changed is a failed one.

    ``gain_counts`` as for :func:`check`.
    """
    options = dict(options or {})
    before = {name: t.detach().clone() for name, t in tensors.items() if t is not None}
    outputs, grads, upstreams = _run(function, tensors, options, None, upstream)
    changed = [name for name, t in before.items() if not _same(tensors[name].detach(), t)]
    results = _named(outputs, grads)
    truth = _truth(reference, tensors, options, upstreams)
    yardstick = _yardstick(reference, tensors, options, upstreams, truth)

    def judged(noise: Mapping[str, Tensor]) -> list[Verdict]:
        return [
            check(name, result, yardstick[name], truth[name], gain_counts=gain_counts, noise=noise.get(name))
            for name, result in results.items()
        ]

    verdicts = judged({})
    if not all(v.passed for v in verdicts):
        verdicts = judged(_cancellation(reference, tensors, options, upstreams, truth))
    # Another order of its sums alone can make PyTorch's error several times larger or smaller.
    if not all(v.passed for v in verdicts) and _sums_in_any_order(tensors):
        for order in range(1, ORDERS):
            other = _yardstick(reference, tensors, options, upstreams, truth, order)
            yardstick = {
                name: max(one, other[name], key=lambda y, name=name: _largest(y.double() - truth[name]))
                for name, one in yardstick.items()
            }
        verdicts = judged(_cancellation(reference, tensors, options, upstreams, truth))
    return verdicts + [Verdict(name, False, float("inf"), f"the input {name} was changed") for name in changed]


def widened(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return ``tensors`` with floating-point ones in fp64; ``requires_grad`` is kept."""
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }


def _named(outputs, grads):
    return {f"output {i}": o for i, o in enumerate(outputs)} | {f"d{name}": g for name, g in grads.items()}


def _truth(reference, tensors, options, upstreams) -> dict[str, Tensor]:
    """Return outputs and gradients of ``reference`` in fp64."""
    outputs, grads, _ = _run(reference, widened(tensors), options, [u.double() for u in upstreams], None)
    return _named(outputs, grads)


def _cancellation(reference, tensors, options, upstreams, truth) -> dict[str, Tensor]:
    """Return how far each gradient in fp64 moves if the saved tensors are off by the eps of its tensor's dtype."""
    generator = torch.Generator().manual_seed(0)
    trained = [name for name in tensors if f"d{name}" in truth]
    left = {}
    for eps in {torch.finfo(tensors[name].dtype).eps for name in trained}:

        def rounded(t, eps=eps):
            if not t.is_floating_point():
                return t
            signs = torch.randint(2, t.shape, generator=generator).to(t.device, t.dtype) * 2 - 1
            return t * (1 + eps * signs)

        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, rounded):
            moved = _truth(reference, tensors, options, upstreams)
        for name in trained:
            if torch.finfo(tensors[name].dtype).eps == eps:
                left[f"d{name}"] = (moved[f"d{name}"] - truth[f"d{name}"]).abs()
    return left


def _yardstick(reference, tensors, options, upstreams, truth, order: int = 0) -> dict[str, Tensor]:
    """Return PyTorch's outputs and gradients, summed in ``order``; for fp64 those of :func:`_yardstick_in_fp64`."""
    with summed_alike(*_floating(tensors), order=order):
        outputs, grads, _ = _run(reference, tensors, options, upstreams, None)
    results = _named(outputs, grads)
    if any(t.dtype == torch.float64 for t in results.values()):
        results = _yardstick_in_fp64(reference, tensors, options, upstreams, results, truth, order)
    return results


def _yardstick_in_fp64(reference, tensors, options, upstreams, results, truth, order) -> dict[str, Tensor]:
    """Return PyTorch's ``results``, with those in fp64 replaced by the truth plus a typical error of PyTorch.

    In fp64 the truth is PyTorch's own result, so its error would be 0. Instead its error in fp32 is used, on inputs
    rounded to fp32, scaled by the ratio of the two eps.
    """
    narrow = _narrowed(tensors)
    narrow_upstreams = [u.float() if u.dtype == torch.float64 else u for u in upstreams]
    with summed_alike(*_floating(narrow), order=order):
        outputs, grads, _ = _run(reference, narrow, options, narrow_upstreams, None)
    narrow_results = _named(outputs, grads)
    narrow_truth = _truth(reference, narrow, options, narrow_upstreams)
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {
        name: truth[name] + scale * (narrow_results[name].double() - narrow_truth[name])
        if result.dtype == torch.float64
        else result
        for name, result in results.items()
    }


def _narrowed(tensors):
    return {
        name: t.detach().float().requires_grad_(t.requires_grad) if t is not None and t.dtype == torch.float64 else t
        for name, t in tensors.items()
    }


def _sums_in_any_order(tensors) -> bool:
    return sums_alike(*_floating(_narrowed(tensors)))


def _largest(error: Tensor) -> float:
    error = error.detach().abs()
    return error.where(error.isfinite(), 0.0).max().item() if error.numel() else 0.0


def _floating(tensors: Mapping[str, Tensor | None]) -> list[Tensor]:
    return [t for t in tensors.values() if t is not None and t.is_floating_point()]


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same values; NaN equals NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _run(function, tensors, options, upstreams, make_upstream):
    leaves = {name: None if t is None else t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    if upstreams is None:
        upstreams = [make_upstream(o.detach()) for o in outputs]
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstreams) if wanted else ()
    return outputs, dict(zip(wanted, grads, strict=True)), upstreams


def _gain_deviation(error: Tensor, truth: Tensor) -> float:
    """Return the gain's standard deviation if errors are equal within a slice and independent between slices.

    This is the largest over slices along each dim and single elements: a rounded weight causes the same error in every
    row, a rounded row in every column.
    """
    power = truth.square().sum().item()
    if not power:
        return 0.0
    parts = error * truth
    slices = [parts.sum([d for d in range(parts.ndim) if d != dim]) for dim in range(parts.ndim)] or [parts]
    return max(s.square().sum().sqrt().item() for s in [*slices, parts]) / power


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _worst_row(x: Tensor) -> float:
    return x.reshape(-1, x.shape[-1]).square().mean(-1).sqrt().max().item() if x.ndim else x.abs().item()
