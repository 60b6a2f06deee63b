"""A gradient penalty of an accelerated model, as of WGAN-GP, raises: it is never dropped."""

import copy

import pytest
import torch
from parity import shake
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import vitkernels

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, embed_dim=32, num_heads=2)


def timm_eva() -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 16, "depth": 1, "num_classes": 5, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("eva02_tiny_patch14_224", **options)


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models.vision_transformer")
    return models.VisionTransformer(32, 16, 1, 2, 32, 128, num_classes=5)


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="4.50")
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=128, image_size=32, patch_size=16,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def own_vit() -> nn.Module:
    return vitkernels.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2)


MODELS = [timm_vit, timm_eva, torchvision_vit, hf_vit, own_vit]


def penalised(model: nn.Module, images: Tensor) -> Tensor:
    """The loss and ten times the squared gradient by the images; returns the norm of the parameters' gradient."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    out = model(images)
    out = getattr(out, "logits", out)
    (g,) = torch.autograd.grad(out, images, torch.ones_like(out), create_graph=True)
    (out.mean() + 10 * g.pow(2).sum()).backward()
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


@pytest.mark.parametrize("build", MODELS)
def test_gradient_penalty(build, device):
    model = shake(build()).to(device).eval()
    images = torch.randn(2, 3, 32, 32, device=device)
    with sdpa_kernel(SDPBackend.MATH), vitkernels.use_backend("torch"):
        expected = penalised(model, images)
    vitkernels.accelerate(model)
    with pytest.raises(NotImplementedError, match='use_backend\\("torch"\\)'):
        penalised(model, images)
    with sdpa_kernel(SDPBackend.MATH), vitkernels.use_backend("torch"):  # as the error says
        torch.testing.assert_close(penalised(model, images), expected)


def test_gradient_penalty_under_checkpointing(device):
    model = timm_vit().to(device)
    vitkernels.accelerate(model)
    model.set_grad_checkpointing()
    with pytest.raises(NotImplementedError, match="differentiated again"):
        penalised(model, torch.randn(2, 3, 32, 32, device=device))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_penalty_by_parameters(checkpointed, device):
    model = timm_vit().to(device)
    vitkernels.accelerate(model)
    images = torch.randn(2, 3, 32, 32, device=device)
    out = checkpoint(model, images, use_reentrant=False) if checkpointed else model(images)
    grads = torch.autograd.grad(out.sum(), list(model.parameters()), create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated again"):
        torch.stack([g.pow(2).sum() for g in grads]).sum().backward()


def test_a_graph_that_nobody_differentiates(device):
    model, images = timm_vit().to(device), torch.randn(2, 3, 32, 32, device=device)
    vitkernels.accelerate(model)
    twin = copy.deepcopy(model)
    model(images).mean().backward(create_graph=True)
    twin(images).mean().backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)
    model.zero_grad()
