"""An accelerated model against itself as it was: output and every gradient, by the error rule."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vitkernels import Report, accelerate
from vitkernels.testing.compare import Verdict, check
from vitkernels.testing.sums import summed_alike
from vitkernels.tools.verify.accuracy import settled


def shake(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Add noise to every parameter: biases of zero and a LayerScale of 1e-5 would hide what they do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return model


class Features(nn.Module):
    """A model that returns its features alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)[0]


def judge(draw: Callable[[int], tuple[dict[str, Tensor], ...]], **options) -> None:
    """Fail where a tensor breaks the error rule in most of three draws: through a network that of one may be bad luck.

    A bias on keys alone changes nothing: its gradient is 0, of terms of the size of the weight's that all cancel. Each
    is rounded twice, as the gradient of a score and as that of a key.

    Args:
        draw: Returns, from a seed, what is judged, what PyTorch gives in the same dtype, and the truth in fp64.
        options: For :func:`check`.
    """

    def verdicts(seed: int) -> list[Verdict]:
        actual, yardstick, truth = draw(seed)
        assert actual.keys() == yardstick.keys() == truth.keys()
        found = []
        for name, wanted in truth.items():
            terms = truth.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
            noise = None if terms is None else wanted.new_full(wanted.shape, 2 * terms.abs().max() * eps(actual[name]))
            found.append(check(name, actual[name], yardstick[name], wanted, noise=noise, **options))
        return found

    failed = [f"{v.name}: {v.detail}" for v in settled(verdicts, 0) if not v.passed]
    assert not failed, "\n".join(failed)


def eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def run(model: nn.Module, x: Tensor, upstream: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the output and the gradient of each parameter that gets one."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(x)
    out.backward(upstream.to(out.dtype))
    grads = {f"d{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **grads}


def assert_parity(model: nn.Module, x: Tensor, *, gain_counts: bool = True, inputs: int = 1) -> Report:
    """Accelerate ``model`` and judge what it computes on the like of ``x`` against PyTorch in its dtype and in fp64.

    With ``inputs`` a tensor is judged over that many inputs together: the error of a gradient of a few numbers, or of
    a small MLP whose features go together, is otherwise a matter of luck.
    """
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    upstream = torch.randn_like(model(x))
    report = accelerate(model)

    def once(seed: int) -> tuple[dict, dict, dict]:
        given = torch.randn_like(x)
        with summed_alike(x):
            yardstick = run(plain, given, upstream, seed)
        return run(model, given, upstream, seed), yardstick, run(wide, given.double(), upstream, seed)

    def draw(seed: int) -> list[dict]:
        runs = [once(seed) for _ in range(inputs)]
        return [{k: torch.stack([each[k] for each in same]) for k in same[0]} for same in zip(*runs, strict=True)]

    judge(draw, gain_counts=gain_counts)
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
