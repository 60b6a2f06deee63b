"""pytest plugin: test in a few lines that a user's model on the kernels agrees with PyTorch.

    def test_kernels_agree(vitkernels_verify):
        model = timm.create_model("test_vit")
        vitkernels_verify(model, torch.randn(1, 3, 160, 160))

The plugin does not import torch before the fixture is used, and does not change the process. Without a GPU the kernels
run on an emulated one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    import torch

    from vitkernels.swap import Report
    from vitkernels.tools.verify.results import Result

STEPS = 5
SECONDS = 30.0  # for a model on an emulated GPU; if that is too short, fewer of its blocks run on the kernels
SHOWN = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitkernels", "vitkernels")
    group.addoption(
        "--vitkernels-strict",
        action="store_true",
        help="vitkernels_verify: fail where it would skip (no Triton, no GPU, nothing swapped), and where a module "
        "of a transformer was left out",
    )


@pytest.fixture
def vitkernels_verify(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """Compare an accelerated copy of a model with the model, and return the report of what was swapped.

    ``vitkernels_verify(model, *inputs, dtype=None, steps=5, seed=0, **named_inputs)`` judges the outputs, the gradient
    of every parameter and the losses of ``steps`` steps of AdamW (0 for none) by the error rule: fp64 is the truth,
    PyTorch's error in the same dtype the yardstick. ``dtype`` is the model's own by default. The copy is on the model's
    device; if the model is on the CPU and there is a GPU, the copy is on the GPU. The model itself is not changed.

    Without a GPU the kernels run on an emulated H100 (``VITKERNELS_BACKEND=emulated:sm_80`` selects another GPU). That
    is slow, so it prints its progress and aims at half a minute: PyTorch runs on one thread, only the first few of
    equal modules may run on the kernels, and there may be fewer steps.

    Raises:
        AssertionError: The copy does not agree; the message names the worst tensors, each with its error and its worst
            index.

    The test is skipped if no kernel can run, or none runs in this model; with ``--vitkernels-strict`` it fails then.
    """
    strict = request.config.getoption("--vitkernels-strict")

    def unverified(reason: str) -> NoReturn:
        (pytest.fail if strict else pytest.skip)(f"vitkernels_verify: {reason}")

    def verify(
        model: torch.nn.Module,
        *inputs: Any,
        dtype: torch.dtype | None = None,
        steps: int = STEPS,
        seed: int = 0,
        **named_inputs: Any,
    ) -> Report:
        __tracebackhide__ = True
        from vitkernels import runtime, swap

        report = swap.explain(model)
        device = _device(model)
        emulated = device.type == "cpu" and runtime.backend() == "auto"
        with runtime.use_backend("emulated") if emulated else contextlib.nullcontext():
            on_kernels(model, (inputs, named_inputs), device, dtype, steps, seed, report)
        return report

    def on_kernels(model, given, device, dtype, steps, seed, report) -> None:
        __tracebackhide__ = True
        from vitkernels.tools.demo.measure import why_no_kernels
        from vitkernels.tools.verify.model import Inputs, Unreached, check_model

        reason = why_no_kernels(device)
        if reason is not None:
            unverified(reason)
        left = [f"  {k.module or '(the model)'} ({k.cls}): {k.reason}" for k in report.kept if k.known or k.part]
        if strict and left:
            unverified("\n".join([f"{len(left)} modules were left out:", *left]))
        slow = device.type == "cpu"
        tell = _teller(request.config) if slow else lambda line: None
        tell(f"vitkernels_verify: {type(model).__name__} on an emulated GPU, about {SECONDS:.0f} s or more")
        results, begun = [], time.perf_counter()
        try:
            with _one_thread() if slow else contextlib.nullcontext():
                for result in check_model(
                    "model", model, Inputs(*given), dtype, device, seed, steps=steps, seconds=SECONDS,
                    announce=lambda part: tell(f"  {part} …"),
                ):  # fmt: skip
                    results.append(result)
                    if result.status == "passed":  # failures are in the AssertionError
                        tell(f"  {result.name}: passed, {time.perf_counter() - begun:.0f} s; {result.detail}")
        except Unreached as error:
            raise AssertionError(f"vitkernels_verify: {error}") from None
        if results[-1].name == "swapped" and results[-1].status == "skipped":
            unverified(results[-1].detail)
        failed = [r for r in results if r.status in ("failed", "broken")]
        if failed:
            raise AssertionError(_told(model, device, dtype, seed, failed, request.node.nodeid))

    return verify


def _teller(config: pytest.Config) -> Callable[[str], None]:
    """Return a function that prints a line at once, past pytest's capture; in an xdist worker it prints nothing."""
    terminal = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")

    def tell(line: str) -> None:
        if terminal is not None:
            with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
                terminal.ensure_newline()
                terminal.write_line(line)

    return tell


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread: between the emulator's small steps other threads would only spin on a core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _device(model: torch.nn.Module) -> torch.device:
    import torch

    from vitkernels.tools.demo.measure import pick_device

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return pick_device() if device.type == "cpu" else device


def _told(
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
    seed: int,
    failed: list[Result],
    nodeid: str,
) -> str:
    worst = sorted(failed, key=lambda r: -(r.ratio or 0.0))
    dtype = dtype or next((p.dtype for p in model.parameters()), None)
    where = f"{device}, {str(dtype).removeprefix('torch.')}, seed {seed}"
    lines = [f"vitkernels_verify: {type(model).__name__} on the kernels does not agree with PyTorch ({where})"]
    lines += [f"  {r.name}: {_ratio(r)}{r.detail}" for r in worst[:SHOWN]]
    lines += [f"  and {len(worst) - SHOWN} more"] if len(worst) > SHOWN else []
    lines += [f"Reproduce: python -m pytest '{nodeid}'", "Compare the ops alone: vitkernels verify"]
    return "\n".join(lines)


def _ratio(result: Result) -> str:
    return "" if result.ratio is None else f"{result.ratio:.3g} times PyTorch's error; "
