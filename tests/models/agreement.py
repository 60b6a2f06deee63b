"""A model of this package against timm's: output and every gradient, by the error rule."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.testing import check
from vitkernels.testing.sums import summed_alike

KERNELS = "triton" if torch.cuda.is_available() else "emulated"


def images_for(model: nn.Module, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    weight = model.patch_embed.proj.weight
    size = size or model.patch_embed.img_size
    return torch.randn(batch, weight.shape[1], *size, device=weight.device, dtype=weight.dtype)


def make_pair(
    ours_class: type[nn.Module], theirs_class: type[nn.Module], device="cpu", **kwargs
) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's with the same arguments and weights, none of them at a value that hides a mistake."""
    theirs = theirs_class(**kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = ours_class(**kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(device).eval(), theirs.to(device).eval()


def outputs_and_gradients(model, images, upstream=None, run=None):
    images = images.detach().clone().requires_grad_()
    output = (run or model)(images)
    upstream = torch.randn_like(output) if upstream is None else upstream
    names, parameters = zip(*model.named_parameters(), strict=True)
    # Under "token" pooling without a norm, say, a parameter may not matter at all.
    grads = torch.autograd.grad(output, [images, *parameters], upstream, materialize_grads=True)
    return {"output": output, "images": grads[0], **dict(zip(names, grads[1:], strict=True))}, upstream


def assert_agree(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    actual, upstream = outputs_and_gradients(ours, images)
    with summed_alike(images), vitkernels.use_backend("torch"):
        yardstick, _ = outputs_and_gradients(theirs, images, upstream)
    with vitkernels.use_backend("torch"):
        truth, _ = outputs_and_gradients(copy.deepcopy(theirs).double(), images.double(), upstream.double())
    assert actual.keys() == truth.keys()
    verdicts = [check(name, actual[name], yardstick[name], truth[name]) for name in truth]
    failed = [v for v in verdicts if not v.passed]
    assert not failed, "\n".join(f"{v.name}: {v.detail}" for v in failed)


def assert_follows_the_seed(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    """Fail unless both drop the same in training, and something."""
    upstream, results = None, []
    for model, training in ((ours, True), (theirs, True), (ours, False)):
        model.train(training)
        torch.manual_seed(5)
        result, upstream = outputs_and_gradients(model, images, upstream)
        results.append(result)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(results[0]["output"], results[2]["output"])


def assert_weights_start_alike(ours: nn.Module, theirs: nn.Module, means: float = math.inf) -> None:
    """Fail unless the weights' means are within four of their deviations and ``means`` of the weights', and their
    spreads within 0.1 or 0.3."""
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        tolerance, spread = 0.3 if mine.numel() < 1000 else 0.1, other.std().item()
        assert mine.std().item() == pytest.approx(spread, rel=tolerance, abs=1e-12), name
        of_means = spread * (2 / mine.numel()) ** 0.5
        assert mine.mean().item() == pytest.approx(
            other.mean().item(), abs=max(min(4 * of_means, means * spread), 1e-12)
        ), name
