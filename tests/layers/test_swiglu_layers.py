"""The gated MLPs beyond their agreement with timm, which test_layers.py holds."""

import pytest
import torch
from torch import nn

from vitkernels import layers, use_backend

MAKE = {
    "separate": lambda **kwargs: layers.SwiGLU(32, 85, norm_layer=layers.LayerNorm, **kwargs),
    "packed": lambda **kwargs: layers.SwiGLUPacked(32, 170, **kwargs),
}


@pytest.mark.parametrize("form", MAKE)
def test_an_adapter_or_a_hook_runs(form, device):
    x = torch.randn(2, 5, 32, device=device)
    for name in ("fc1_g" if form == "separate" else "fc1", "norm", "drop1", "act", "fc2"):
        mlp = MAKE[form]().to(device)
        assert mlp.fuses()
        seen = []
        mlp.get_submodule(name).register_forward_hook(lambda *args, seen=seen: seen.append(1))
        assert not mlp.fuses()
        mlp(x)
        assert seen == [1], name
    mlp.fc2 = nn.Sequential(mlp.fc2)
    assert not mlp.fuses()


@pytest.mark.parametrize("form", MAKE)
def test_unfused_is_the_same(form, device):
    mlp, x = MAKE[form]().to(device), torch.randn(2, 5, 32, device=device)
    fused = mlp(x)
    mlp.act.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(mlp(x), fused)


@pytest.mark.parametrize("form", MAKE)
def test_dropout_draws_as_layer_by_layer(form, device):
    mlp, x = MAKE[form](drop=0.3).to(device), torch.randn(2, 5, 32, device=device)
    torch.testing.assert_close(mlp.eval()(x), mlp(x), rtol=0, atol=0)
    mlp.train()
    torch.manual_seed(0)
    got = mlp(x)
    torch.manual_seed(0)
    with use_backend("torch"):
        torch.testing.assert_close(mlp(x), got)
    assert not torch.equal(mlp(x), got)


def test_hidden_features():
    assert layers.SwiGLU(16, 43, align_to=8).fc2.in_features == 48
    assert layers.SwiGLUPacked(16, 60).fc2.in_features == 30
    with pytest.raises(ValueError, match="hidden_features is 31; expected an even number"):
        layers.SwiGLUPacked(16, 31)
