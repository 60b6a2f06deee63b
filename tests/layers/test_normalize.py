"""Decoded images straight into a layer and a model."""

import pytest
import torch

from vitkernels.layers import PatchEmbed
from vitkernels.models import VisionTransformer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def decoded(device):
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=device)


def normalized(images):
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("as_float", [False, True])
def test_a_model_takes_what_a_decoder_gives(as_float, decoded, device, computed_by_pytorch):
    plain = VisionTransformer(**SMALL, device=device)
    model = VisionTransformer(**SMALL, normalize=(MEAN, STD), device=device)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    out = model(decoded / 255 if as_float else decoded)
    expected = plain(normalized(decoded))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for m, y in ((model, out), (plain, expected)):
        y.square().sum().backward()
        assert m.patch_embed.proj.weight.grad.abs().max() > 0
    torch.testing.assert_close(
        model.patch_embed.proj.weight.grad, plain.patch_embed.proj.weight.grad, rtol=1e-4, atol=1e-4
    )


def test_images_of_a_dtype_that_the_layer_does_not_take(decoded):
    kind = {"img_size": 32, "patch_size": 16, "embed_dim": 4}
    with pytest.raises(TypeError, match=r"images are torch.uint8; expected .*normalize=\(mean, std\)"):
        PatchEmbed(**kind)(decoded)
    with pytest.raises(TypeError, match=r"images are torch.int64; expected .*0 to 1, or uint8"):
        PatchEmbed(**kind, normalize=(MEAN, STD))(decoded.long())
    with pytest.raises(ValueError, match="2 means and 3 standard deviations"):
        PatchEmbed(**kind, normalize=(MEAN[:2], STD)).to(decoded.device)(decoded)
