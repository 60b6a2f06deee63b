"""An accelerated model against itself as it was: output and every gradient, by the error rule."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from vitkernels import Report, accelerate
from vitkernels.testing.compare import check


def shake(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Add noise to every parameter: biases of zero and a LayerScale of 1e-5 would hide what they do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return model


def run(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor | None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the output and the gradient of each parameter that gets one."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(x)
    out.backward(torch.ones_like(out) if upstream is None else upstream.to(out.dtype))
    grads = {f"d{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **grads}


def assert_parity(model: nn.Module, x: torch.Tensor, *, gain_counts: bool = True) -> Report:
    """Accelerate ``model`` and judge what it computes on ``x`` against PyTorch in the same dtype and in fp64."""
    upstream = torch.randn_like(model(x))
    truth = run(copy.deepcopy(model).double(), x.double(), upstream)
    yardstick = run(model, x, upstream)
    report = accelerate(model)
    actual = run(model, x, upstream)
    assert actual.keys() == truth.keys()
    verdicts = [check(key, actual[key], yardstick[key], truth[key], gain_counts=gain_counts) for key in truth]
    failed = [f"{v.name}: {v.detail}" for v in verdicts if not v.passed]
    assert not failed, "\n".join(failed)
    return report


@contextlib.contextmanager
def no_call_of(function: Callable) -> Iterator[None]:
    """Fail where ``function``, an original forward, runs; to replace it would be to have it run (test_replaced.py)."""
    called = []
    sys.setprofile(lambda frame, event, _: called.append(event) if frame.f_code is function.__code__ else None)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert not called, f"{function.__qualname__} runs"
