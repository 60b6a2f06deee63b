"""Compare an accelerated copy of a model with the model: outputs, every gradient, and the loss curve.

The truth is the model in fp64, the yardstick the model in the dtype under test, both on PyTorch only. All three have
the same parameters, with noise added: biases of zero and a LayerScale of 1e-5 would hide errors. The user's own model
is not changed.

The loss curve is chaotic: two correct implementations drift apart, and luck decides which is nearer to fp64. So its
yardstick is the worst of several runs of PyTorch, whose initial parameters differ by one rounding each: this is how far
roundings take PyTorch itself from fp64. Over 10 seeds of a small ViT (5 tokens, 16 channels, 2 blocks, fp32, 20 steps;
CPU, torch 2.13.0, Triton 3.7.1, 2026-11-21) the accelerated curve was 0.19 to 0.77 times as far as the yardstick.
With a defect it was much farther: 4,800 times with scores wrong by 0.1 % (one seed), 3,300 times with a branch wrong by
0.1 %, 16,600 times without the gradients of two biases per block.

On an emulated GPU a model of real size takes minutes. If time is short, only the first few of equal modules (same class
and shapes) run on the kernels and the others on PyTorch, and the curve may have fewer steps. The result says so.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitkernels import runtime, swap
from vitkernels.swap import _rules
from vitkernels.testing.cases import DTYPES
from vitkernels.testing.compare import Verdict, check
from vitkernels.testing.sums import summed_in_a_chain
from vitkernels.tools.console import UserError, busy
from vitkernels.tools.verify.accuracy import check_accuracy, seeded, settled
from vitkernels.tools.verify.model.load import Inputs, load
from vitkernels.tools.verify.model.shapes import op_calls, recorded_calls, shapes
from vitkernels.tools.verify.problems import problems
from vitkernels.tools.verify.results import Check, Result

STEPS = 20
NEIGHBOURS = 4  # runs of PyTorch from parameters that are one rounding off
CURVE_LIMIT = 3.0  # times the largest distance of PyTorch's runs
SECONDS = {"quick": 160.0, "full": 540.0}  # for a model on an emulated GPU
PASSES = 4.5  # time of an emulated training step, PyTorch's comparison runs included, in forward passes


class Unreached(Exception):
    """Raised by a check that did not reach what it should check."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        model: The user's model; never changed.
        inputs: The arguments of its call.
        dtype: Dtype of the copies; None for the model's own.
        device: Device of the copies.
    """

    model: nn.Module
    inputs: Inputs
    dtype: torch.dtype | None
    device: torch.device

    @functools.cached_property
    def largest_group(self) -> int:
        """The size of the largest group of equal modules among those that are swapped."""
        plain = _plain_copy(self.model)
        return max(map(len, _groups(swap.explain(plain), plain)), default=0)

    @functools.cached_property
    def pass_seconds(self) -> float:
        """CPU seconds of a forward pass with one module of each group on the kernels."""
        trio = _trio(self, 0, 1, training=False)
        start = time.process_time()  # CPU time: a busy machine must not verify less
        with torch.no_grad():
            trio.fast(*trio.inputs.args, **trio.inputs.kwargs)
        return time.process_time() - start


@dataclasses.dataclass
class Trio:
    """Three models with the same parameters: on the kernels, on PyTorch in the same dtype, and in fp64."""

    fast: nn.Module
    plain: nn.Module
    truth: nn.Module
    inputs: Inputs
    wide_inputs: Inputs
    dtype: torch.dtype


def model_checks(
    spec: str, device: torch.device, seed: int, *, full: bool = False, dtypes: Sequence[str] = ()
) -> Iterator[Check]:
    """Yield the checks of the model that ``spec`` names, and of the ops at its shapes.

    Args:
        spec: A model in the form that :func:`vitkernels.tools.verify.model.load` accepts.
        device: Where the kernels run.
        seed: Seed of all random draws.
        full: Take more time.
        dtypes: Names among fp32, fp16 and bf16; empty for the default of the level.

    Raises:
        UserError: There is no such model, it does not run, or it calls no op.
    """
    with busy(f"Loading {spec}"):
        batch = 1 if device.type == "cpu" else 2
        model, inputs, words = load(spec, batch)
        cases = shapes(model, inputs, batch)
    # An emulated GPU has time for one dtype of the model; other checks run the ops in further dtypes.
    dtypes = dtypes or (("fp32",) if device.type == "cpu" else ("fp32", "bf16", "fp16") if full else ("fp32", "bf16"))
    seconds = SECONDS["full" if full else "quick"] / len(dtypes) if device.type == "cpu" else None
    yield _check(f"model/{spec}/swapped", "", lambda id: check_swapped(id, model, inputs, words))
    for name in dtypes:
        subject = Subject(model, inputs, DTYPES[name], device)
        for part, function, share in PARTS:
            allowed = None if seconds is None else share * seconds

            def run(id: str, subject=subject, function=function, allowed=allowed) -> Iterator[Result]:
                return function(id, subject, seed, allowed)

            yield _check(f"model/{spec}/{part}/{name}", name, run)
        for problem in (p for case in cases for p in problems(case)):

            def run_op(id: str, problem=problem, dtype=DTYPES[name]) -> Iterator[Result]:
                return check_accuracy(id, problem, dtype, device, seed)

            yield _check(f"model/{spec}/ops/{problem.id}/{name}", name, run_op)


def check_model(
    id: str,
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int,
    *,
    steps: int = STEPS,
    seconds: float | None = None,
    announce: Callable[[str], None] = lambda part: None,
) -> Iterator[Result]:
    """Yield what is swapped, and the verdicts on outputs, gradients and loss curve.

    Args:
        id: Id of the check in the results.
        model: Any module; it is not changed.
        inputs: The arguments of its call, in any dtype, on any device.
        dtype: Dtype to verify in; None for the model's own.
        device: Device to verify on.
        seed: Seed of the noise and the upstream gradients.
        steps: Steps of the loss curve; 0 for no curve.
        seconds: Approximate time limit on an emulated GPU; None for no limit.
        announce: Called with the name of each part before it runs.

    Raises:
        UserError: The model does not run on ``inputs``.
        Unreached: No kernel ran.
    """
    for result in check_swapped(id, model, inputs):
        yield result
        if result.status != "passed":
            return
    subject = Subject(model, inputs, dtype, device)
    for part, function, share in PARTS:
        allowed = None if seconds is None else share * seconds
        if part == "loss curve":
            if not steps:
                continue
            function = functools.partial(function, steps=steps)
        announce(part)
        yield from function(id, subject, seed, allowed)


def check_swapped(id: str, model: nn.Module, inputs: Inputs, words: str = "") -> Iterator[Result]:
    """Yield which modules of ``model`` are swapped; the result is not ``passed`` if the model calls no op."""
    report = swap.explain(_plain_copy(model))
    classes = sorted({f"{s.was} → {s.now}" for s in report.swapped})
    known = [f"{k.module or k.cls}: {k.reason}" for k in report.kept if k.known]
    parts = [words, f"{len(report.swapped)} modules ({', '.join(classes)})" if classes else ""]
    parts += [f"{len(known)} kept, as {known[0]}" if known else ""]
    if op_calls(model, inputs):
        yield Result(id, "swapped", "passed", "; ".join(filter(None, parts)))
        return
    if report.swapped:
        text = f"{len(report.swapped)} modules are swapped, and none calls a kernel (backend {runtime.backend()})"
        yield Result(id, "swapped", "broken", text)
        return
    reasons = known or [f"{k.module or k.cls}: {k.reason}" for k in report.kept]
    why = f" ({reasons[0]})" if reasons else ""
    yield Result(id, "swapped", "skipped", f"no module of {type(model).__name__} runs on the kernels{why}")


def check_outputs(id: str, subject: Subject, seed: int, seconds: float | None = None) -> Iterator[Result]:
    """Yield a verdict on each output, in evaluation mode."""
    depth, note, _ = _depth(subject, seconds, 1.0)

    def draw(seed: int) -> list[Verdict]:
        trio = _trio(subject, seed, depth, training=False)
        with torch.no_grad():
            with recorded_calls() as seen:
                fast = _outputs(trio.fast, trio.inputs)
            truth = _on_torch(trio.truth, trio.wide_inputs)
        _require(seen, "_fwd", "the forward pass")

        def judge() -> list[Verdict]:
            with torch.no_grad():
                plain = _on_torch(trio.plain, trio.inputs)
            return [check(name, fast[name], plain[name], truth[name], gain_counts=False) for name in truth]

        return _by_either_order(judge, trio)

    for v in settled(draw, seed):
        yield Result(id, v.name, "passed" if v.passed else "failed", _join(v.detail, note), v.ratio)


def check_gradients(id: str, subject: Subject, seed: int, seconds: float | None = None) -> Iterator[Result]:
    """Yield one verdict on the gradients of all parameters, in training mode with all dropout rates at 0.

    If gradients fail, yield a verdict for each of these instead.
    """
    if not any(p.requires_grad for p in subject.model.parameters()):
        yield Result(id, "gradients", "skipped", "no parameter requires a gradient")
        return
    depth, note, _ = _depth(subject, seconds, PASSES)

    def draw(seed: int) -> list[Verdict]:
        trio = _trio(subject, seed, depth)
        with recorded_calls() as seen:
            fast = _gradients(trio.fast, trio.inputs, trio.dtype, seed)
        _require(seen, "_bwd", "the backward pass")
        with runtime.use_backend("torch"):
            truth = _gradients(trio.truth, trio.wide_inputs, trio.dtype, seed)

        def judge() -> list[Verdict]:
            with runtime.use_backend("torch"):
                plain = _gradients(trio.plain, trio.inputs, trio.dtype, seed)
            return [_judge_gradient(name, fast[name], plain[name], truth[name]) for name in truth]

        return _by_either_order(judge, trio)

    verdicts = settled(draw, seed)
    failed = [v for v in verdicts if not v.passed]
    for v in failed:
        yield Result(id, v.name, "failed", _join(v.detail, note), v.ratio)
    if not failed:
        worst = max(verdicts, key=lambda v: v.ratio)
        text = f"{len(verdicts)} parameters, worst {worst.name}: {worst.detail}"
        yield Result(id, "gradients", "passed", _join(text, note), worst.ratio)


def check_curve(
    id: str, subject: Subject, seed: int, seconds: float | None = None, steps: int = STEPS
) -> Iterator[Result]:
    """Yield a verdict on the losses of ``steps`` steps of AdamW on one batch, with all dropout rates at 0."""
    if not any(p.requires_grad for p in subject.model.parameters()):
        yield Result(id, "loss curve", "skipped", "no parameter requires a gradient")
        return
    depth, note, affordable = _depth(subject, seconds, PASSES * steps)
    if affordable < 1.0:
        fewer = max(3, int(affordable * steps))
        note = _join(note, f"{fewer} of {steps} steps")
        steps = min(fewer, steps)

    def draw(seed: int) -> list[Verdict]:
        trio = _trio(subject, seed, depth)
        with runtime.use_backend("torch"):
            truth = _losses(trio.truth, trio.wide_inputs, seed, steps)
            starts = [_one_rounding_off(trio.plain, seed + i, subject.device) for i in range(NEIGHBOURS)]
            own = [_losses(m, trio.inputs, seed, steps) for m in (trio.plain, *starts)]
        with recorded_calls() as seen:
            fast = _losses(trio.fast, trio.inputs, seed, steps)
        _require(seen, "_bwd", "training")
        return [judge_curve(fast, own, truth, torch.finfo(trio.dtype).eps)]

    for v in settled(draw, seed):
        yield Result(id, v.name, "passed" if v.passed else "failed", _join(v.detail, note), v.ratio)


# The parts of a model's check: name, function, and share of the time.
PARTS: tuple[tuple[str, Callable[..., Iterator[Result]], float], ...] = (
    ("outputs", check_outputs, 0.2),
    ("gradients", check_gradients, 0.3),
    ("loss curve", check_curve, 0.5),
)


def judge_curve(fast: Tensor, own: Sequence[Tensor], truth: Tensor, eps: float) -> Verdict:
    """Judge the losses ``fast`` (steps,) by the distance of PyTorch's ``own`` curves from the ``truth``.

    The distance is the root mean square over the steps. The limit is ``CURVE_LIMIT`` times the largest of PyTorch's
    distances, plus one rounding of the loss by ``eps``.
    """
    distance, *torch_own = ((curve - truth).square().mean().sqrt().item() for curve in (fast, *own))
    limit = CURVE_LIMIT * max(torch_own) + eps * truth.abs().max().item()
    passed = distance <= limit  # False for NaN
    ratio = distance / max(*torch_own, 1e-300) if distance == distance else float("inf")
    gap = (fast - truth).abs()
    step = int(gap.nan_to_num(torch.inf).argmax())
    detail = (
        f"loss {truth[0]:.4g} → {truth[-1]:.4g} in {len(truth)} steps, distance to fp64 {distance:.3g} (limit "
        f"{limit:.3g}, PyTorch's {min(torch_own):.3g} to {max(torch_own):.3g}), largest at step {step}"
    )
    return Verdict("loss curve", passed, ratio, detail)


def _check(id: str, dtype: str, function: Callable[[str], Iterator[Result]]) -> Check:
    def run() -> Iterator[Result]:
        try:
            for result in function(id):
                yield dataclasses.replace(result, dtype=dtype)
        except Unreached as error:
            yield Result(id, "kernels reached", "broken", str(error), dtype=dtype)

    return Check(id, run)


def _plain_copy(model: nn.Module) -> nn.Module:
    try:
        plain = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"the model cannot be copied: {type(error).__name__}: {error}") from error
    swap.restore(plain)
    return plain


def _trio(subject: Subject, seed: int, depth: int | None, *, training: bool = True) -> Trio:
    plain = _plain_copy(subject.model).to(subject.device, subject.dtype).train(training)
    _drop_nothing(plain)
    with seeded(seed, subject.device):
        _shake(plain)
    fast = copy.deepcopy(plain)
    report = swap.accelerate(fast)
    if depth is not None:
        for path in _beyond(report, fast, depth):
            module = fast.get_submodule(path)
            module.__class__ = _rules.RULES[type(module)].original
    dtype = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
    inputs = subject.inputs.to(subject.device, dtype)
    return Trio(fast, plain, copy.deepcopy(plain).double(), inputs, inputs.to(subject.device, torch.float64), dtype)


def _drop_nothing(model: nn.Module) -> None:
    """Set every dropout rate of ``model`` to 0: dropout layers, DropPath, and attention."""
    for module in model.modules():
        is_drop = "drop" in type(module).__name__.lower()
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (is_drop and name in ("p", "prob"))):
                setattr(module, name, 0.0)


def _shake(model: nn.Module) -> None:
    """Add noise, drawn on the CPU, to every parameter, so that each affects the outputs.

    A trained matrix gets a tenth of its RMS. One with an RMS below 1/√fan-in, as before training, gets enough to reach
    that: otherwise features would be small and attention weights uniform. Vectors and embeddings get 0.1: their values
    are of the order of 1, or start at 0.
    """
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.is_floating_point() and p.numel()):
            size = 0.1
            if p.ndim in (2, 4):
                own = p.double().square().mean().item()
                size = max(0.01 * own, 1.0 / p[0].numel() - own) ** 0.5
            p.add_((torch.randn(p.shape, dtype=torch.float64) * size).to(p))


def _one_rounding_off(model: nn.Module, seed: int, device: torch.device) -> nn.Module:
    moved = copy.deepcopy(model)
    with torch.no_grad(), seeded(seed, device):
        for p in (p for p in moved.parameters() if p.is_floating_point()):
            p.mul_(1.0 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape).to(p))
    return moved


def _outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    leaves = tree_leaves(model(*inputs.args, **inputs.kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise UserError(f"{type(model).__name__} returns no floating-point tensor to compare")
    return {"output" if len(tensors) == 1 else f"output {i}": t for i, t in enumerate(tensors)}


def _by_either_order(judge: Callable[[], list[Verdict]], trio: Trio) -> list[Verdict]:
    """Judge by plain PyTorch; if that fails on an emulated GPU, by fp32 products summed as on a GPU, which is slow."""
    verdicts = judge()
    emulated = runtime.emulated_arch() is not None and all(p.is_cpu for p in trio.plain.parameters())
    if all(v.passed for v in verdicts) or not emulated or trio.dtype != torch.float32:
        return verdicts
    with summed_in_a_chain():
        return judge()


def _on_torch(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with runtime.use_backend("torch"):
        return _outputs(model, inputs)


def _gradients(model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    """Return the gradient of every parameter, for an upstream gradient that is exact in ``dtype``."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs = [t for t in _outputs(model, inputs).values() if t.requires_grad]
    draws = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(t.shape, generator=draws, dtype=torch.float64).to(dtype).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    return dict(zip(wanted, grads, strict=True))


def _judge_gradient(name: str, fast: Tensor | None, plain: Tensor | None, truth: Tensor | None) -> Verdict:
    label = f"gradient of {name}"
    if fast is None or truth is None:
        agree = fast is None and truth is None
        return Verdict(label, agree, 0.0 if agree else float("inf"), f"{'no' if fast is None else 'a'} gradient")
    return check(label, fast, plain, truth, gain_counts=False)


def _losses(model: nn.Module, inputs: Inputs, seed: int, steps: int) -> Tensor:
    """Return the loss before each of ``steps`` steps: the mean square distance of the outputs to random targets.

    AdamW updates master copies in at least fp32, as in mixed precision: squares of small gradients are 0 in fp16.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().to(runtime.wide_dtype(p.dtype), copy=True) for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    losses = []
    for _ in range(steps):
        outputs = [t for t in _outputs(model, inputs).values() if t.requires_grad]
        draws = torch.Generator().manual_seed(seed)
        targets = [torch.randn(t.shape, generator=draws, dtype=torch.float64).to(t.device) for t in outputs]
        loss = sum((t.double() - goal).square().mean() for t, goal in zip(outputs, targets, strict=True))
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for master, grad in zip(masters, grads, strict=True):
            master.grad = None if grad is None else grad.to(master.dtype)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(parameters, masters, strict=True):
                p.copy_(master)
    return torch.tensor(losses, dtype=torch.float64)


def _require(seen: list, ending: str, what: str) -> None:
    if not any(op.endswith(ending) for op, _ in seen):
        raise Unreached(f"{what} of the accelerated model called no kernel, so that nothing was compared")


def _beyond(report: swap.Report, model: nn.Module, depth: int) -> list[str]:
    """Return the paths of the swapped modules after the first ``depth`` of each group of equal ones."""
    return [path for group in _groups(report, model) for path in group[depth:]]


def _groups(report: swap.Report, model: nn.Module) -> list[list[str]]:
    """Group the paths of swapped modules of the same class and shapes whose paths differ only in numbers."""
    groups: dict[object, list[str]] = {}
    for entry in report.swapped:
        shapes = tuple(tuple(p.shape) for p in model.get_submodule(entry.module).parameters())
        pattern = re.sub(r"(?<![^._])\d+(?![^.])", "*", entry.module)
        groups.setdefault((pattern, entry.was, shapes), []).append(entry.module)
    return list(groups.values())


def _depth(subject: Subject, seconds: float | None, passes: float) -> tuple[int | None, str, float]:
    """Return how many modules of each group of equal ones can run on the kernels in ``seconds``.

    Returns:
        That number, None for all; a note for the result; and how often ``passes`` forward passes with one module of
        each group on the kernels fit into ``seconds``.
    """
    if seconds is None or subject.largest_group < 2:
        return None, "", 1.0
    affordable = seconds / (passes * subject.pass_seconds)
    depth = max(1, int(affordable))
    if depth >= subject.largest_group:
        return None, "", affordable
    note = f"kernels in the first {depth} of {subject.largest_group} modules alike, PyTorch in the others"
    return depth, note, affordable


def _join(*texts: str) -> str:
    return "; ".join(filter(None, texts))
