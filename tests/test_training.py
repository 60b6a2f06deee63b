"""A few steps of the digits' training through the kernels."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vitkernels
from vitkernels.models import VisionTransformer
from vitkernels.ops import _triton
from vitkernels.testing import check
from vitkernels.tools.demo.digits import load_digits

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

BATCH = 4


@pytest.mark.skipif(not _triton.HAS_TRITON, reason="no Triton: there are no kernels to train through")
def test_three_steps_give_the_losses_of_torch(device):
    """Each sample's loss over three steps of AdamW; the limit is PyTorch's own distance from fp64."""
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_digits.py"))
    # Without DropPath: a GPU draws other masks in fp64.
    model = VisionTransformer(**{**recipe["CONFIG"], "drop_path_rate": 0.0}).to(device)
    model.load_state_dict(recipe["build_model"]().state_dict())
    digits, _ = load_digits()
    order = torch.randperm(len(digits.labels))[: 3 * BATCH].view(3, BATCH)
    images, labels = digits.images[order].to(device), digits.labels[order].to(device)

    def losses(backend, dtype):
        own = copy.deepcopy(model).to(dtype).train()
        rates = {"lr": recipe["LEARNING_RATE"], "weight_decay": recipe["WEIGHT_DECAY"]}
        optimizer = torch.optim.AdamW(own.parameters(), **rates)
        steps = []
        with vitkernels.use_backend(backend):
            for x, y in zip(images.to(dtype), labels, strict=True):
                loss = F.cross_entropy(own(x), y, reduction="none")
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
                steps.append(loss.detach())
        return torch.stack(steps)

    truth = losses("torch", torch.float64)
    plain = losses("torch", torch.float32)
    ours = losses("triton" if device.type == "cuda" else "emulated", torch.float32)
    verdict = check("losses", ours, plain, truth)
    assert verdict.passed, verdict.detail
    assert (ours != plain).any(), "the very bits of PyTorch: did the kernels run?"
    assert (truth[1:] - truth[:1]).abs().max() > 0.01, "the weights did not move"
