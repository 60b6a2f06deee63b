"""Check properties of an op other than its errors: layouts, memory, NaN and infinities, reruns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels.testing.compare import widened
from vitkernels.tools.verify.accuracy import judge, seeded
from vitkernels.tools.verify.memory import GuardedMemory, amid_nan, differing, outputs_and_gradients
from vitkernels.tools.verify.problems import Problem
from vitkernels.tools.verify.results import Result

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other element": lambda x: torch.stack([x, x], -1)[..., 0],
    "sliced from wider": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one for all": lambda x: x[:1].expand_as(x),
}


def check_layouts(
    id: str, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int, *, every: bool
) -> Iterator[Result]:
    """Pass the op's inputs and the upstream gradient in other layouts, and judge the results by the error rule.

    Without ``every``, three layouts are used: strides in another order, rows apart, and stride 0.
    """
    for layout in LAYOUTS if every else ("transposed", "sliced from wider", "one for all"):
        if layout == "one for all" and problem.op == "attention_varlen":
            continue  # its first dim is tokens, and gradients vanish if all tokens are equal
        strided = LAYOUTS[layout]

        def as_laid_out(t: Tensor, strided=strided) -> Tensor:
            return strided(t.detach()).requires_grad_(t.requires_grad) if t.ndim > 1 else t

        verdicts = judge(
            problem, dtype, device, seed, lay_out=as_laid_out, upstream=lambda o: as_laid_out(torch.randn_like(o))
        )
        failed = [v for v in verdicts if not v.passed]
        yield Result(
            id,
            layout,
            "failed" if failed else "passed",
            "; ".join(f"{v.name}: {v.detail}" for v in failed),
            max(v.ratio for v in verdicts),
        )


def check_memory(id: str, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Result]:
    """Run the op in poisoned memory; it must not write to guard bands, and no result and no input may change."""
    with seeded(seed, device):
        tensors = problem.draw(dtype, device)
    plain = outputs_and_gradients(problem.function, tensors, torch.ones_like)
    surrounded = {name: amid_nan(t) for name, t in tensors.items()}
    before = {name: t.detach().clone() for name, t in surrounded.items()}
    with GuardedMemory() as memory:
        guarded = outputs_and_gradients(problem.function, surrounded, torch.ones_like)
    if not memory.launched:
        yield Result(id, "guard bands", "broken", "nothing was guarded: the op did not reach its launcher")
        return
    trampled = memory.trampled()
    yield Result(
        id, "guard bands", "failed" if trampled else "passed",
        f"{trampled} bytes written astray" if trampled else f"{memory.allocations} allocations",
    )  # fmt: skip
    unlike = list(differing(plain, guarded))
    yield Result(id, "poisoned memory", "failed" if unlike else "passed", "; ".join(unlike))
    changed = list(differing({n: t.detach() for n, t in surrounded.items()}, before))
    yield Result(id, "inputs unchanged", "failed" if changed else "passed", "; ".join(changed))


def check_reach(id: str, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Result]:
    """Spread the first input's rows, images or (for attention) tokens over 2³¹ elements; no result may change.

    An offset that overflows 32 bits would be the address of another tensor, or of nothing. Runs on a CPU only.
    """
    with seeded(seed, device):
        tensors = problem.draw(dtype, device)
    name, x = next(iter(tensors.items()))
    if x.ndim == 3:
        # Once spread, the input could not be viewed as rows, so it is made rows here. There are 17, because the last
        # one must be the first row of a program, whose offset is a product.
        x = x.detach().flatten(0, 1)[:17].requires_grad_(x.requires_grad)
    far = _spread(x, 2 if problem.op == "attention" else 0)
    plain = outputs_and_gradients(problem.function, tensors | {name: x}, torch.ones_like)
    try:
        spread = outputs_and_gradients(problem.function, tensors | {name: far}, torch.ones_like)
    except MemoryError as error:
        yield Result(id, "rows far apart", "skipped", f"of address space this takes 40 GiB: {error}")
        return
    unlike = list(differing(plain, spread))
    yield Result(id, "rows far apart", "failed" if unlike else "passed", "; ".join(unlike))


def _spread(x: Tensor, dim: int) -> Tensor:
    """Copy ``x`` into a sparse file, spread over 2³¹ elements along ``dim``; only pages with data take memory."""
    strides = list(x.contiguous().stride())
    strides[dim] = 2**31 // (x.shape[dim] - 1) + 8
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(size * x.element_size())
        storage = torch.from_file(file.name, size=size, dtype=x.dtype)  # the mapping keeps the deleted file alive
    return storage.as_strided(x.shape, strides).copy_(x.detach()).requires_grad_(x.requires_grad)


def check_nonfinite(
    id: str, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int, *, every: bool
) -> Iterator[Result]:
    """Put NaN and infinities into each floating-point input in turn; they must reach the same elements as in fp64.

    In an output, NaN and each infinity must be where fp64, or PyTorch in the same dtype, has them. In a gradient the
    order of the sums decides which of the three results, so there only finite and non-finite elements must agree.

    Without ``every``, only a NaN in the first input is tried.
    """
    with seeded(seed, device):
        tensors = problem.draw(dtype, device)
    names = [name for name, t in tensors.items() if t.is_floating_point()]
    for name in names if every else names[:1]:
        for value in (float("nan"), float("inf"), -float("inf")) if every else (float("nan"),):
            poisoned = tensors[name].detach().clone()
            poisoned[tuple(size // 2 for size in poisoned.shape)] = value
            given = tensors | {name: poisoned.requires_grad_(tensors[name].requires_grad)}
            wrong = list(_gone_astray(problem, given))
            yield Result(id, f"{value} in {name}", "failed" if wrong else "passed", "; ".join(wrong))


def _gone_astray(problem: Problem, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Describe each output and gradient whose kinds of values are wrong: how many elements, and the first."""
    wide = widened(tensors)
    ours = outputs_and_gradients(problem.function, tensors, torch.ones_like)
    theirs = outputs_and_gradients(problem.reference, tensors, torch.ones_like)
    truth = outputs_and_gradients(problem.reference, wide, torch.ones_like)
    for name, got in ours.items():
        kind = _kind if name.startswith("output") else torch.isfinite
        astray = (kind(got) != kind(truth[name])) & (kind(got) != kind(theirs[name]))
        if astray.any():
            at = tuple(astray.nonzero()[0].tolist())
            yield f"{name}: {int(astray.sum())} elements, first at {at}: got {got[at]:.6g}, fp64 {truth[name][at]:.6g}"


def _kind(x: Tensor) -> Tensor:
    """Return 0 for finite elements of ``x``, ±1 for infinite ones, 2 for NaN."""
    return x.isnan() * 2 + x.isinf() * x.nan_to_num(0.0).sign()


def check_reruns(
    id: str, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int, times: int
) -> Iterator[Result]:
    """Run the op ``times`` times; all results must be equal."""
    with seeded(seed, device):
        tensors = problem.draw(dtype, device)
    first = outputs_and_gradients(problem.function, tensors, torch.ones_like)
    for i in range(1, times):
        unlike = list(differing(first, outputs_and_gradients(problem.function, tensors, torch.ones_like)))
        if unlike:
            yield Result(id, f"rerun {i} of {times}", "failed", "; ".join(unlike))
            return
    yield Result(id, f"{times} runs bit-equal", "passed")
