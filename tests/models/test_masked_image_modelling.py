"""Models as BEiT and MAE train them: masks, mask tokens, and visible patches alone."""

import copy

import pytest
import torch
from agreement import KERNELS, images_for, outputs_and_gradients
from torch import nn

import vitkernels
from vitkernels.layers import PatchEmbed, blockwise_mask, random_mask
from vitkernels.models import Beit, VisionTransformer
from vitkernels.testing import check
from vitkernels.testing.sums import summed_alike

timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
SMALL |= {"global_pool": "", "use_mask_token": True}
MODELS = {
    "vit": (VisionTransformer, {"reg_tokens": 1}),
    "vit, positions of patches": (VisionTransformer, {"reg_tokens": 1, "no_embed_class": True}),
    "mae": (VisionTransformer, {"pos_embed": "sincos2d"}),
    "beit": (Beit, {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1, "use_fc_norm": False}),
}


def make(name, **more):
    cls, options = MODELS[name]
    model = cls(**SMALL | options | more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def masked_by_hand(model, images, mask=None, visible=None):
    """``forward_features`` of masked images, in the words of BEiT's and MAE's published code."""
    tokens = model.patch_embed(images)
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), model.mask_token, tokens)
    prefix = torch.cat([t for t in (model.cls_token, model.reg_token) if t is not None], 1)
    R = prefix.shape[1]
    if model.pos_embed is not None:
        tokens = tokens + model.pos_embed[:, 0 if model.no_embed_class else R :]
        prefix = prefix if model.no_embed_class else prefix + model.pos_embed[:, :R]
    if visible is not None:
        tokens = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    x = torch.cat([prefix.expand(len(images), -1, -1), tokens], 1)
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


@pytest.mark.parametrize("backend", ["torch", KERNELS])
@pytest.mark.parametrize(
    ("name", "kind"), [("vit", "mask"), ("vit, positions of patches", "visible"), ("mae", "visible"), ("beit", "mask")]
)
def test_masked_features_and_gradients(name, kind, backend, device):
    """Against the published code on PyTorch: output and every gradient, by the error rule."""
    if backend == KERNELS:
        pytest.importorskip("triton")
    model = make(name, depth=1).to(device)
    images = images_for(model)
    drawn = random_mask(2, 16, 0.5, device=device)
    options = {"mask": drawn.mask} if kind == "mask" else {"visible": drawn.visible}
    with vitkernels.use_backend(backend):
        actual, upstream = outputs_and_gradients(model, images, run=lambda x: model.forward_features(x, **options))
    with vitkernels.use_backend("torch"):
        with summed_alike(images):
            by_hand = lambda x: masked_by_hand(model, x, **options)  # noqa: E731
            yardstick, _ = outputs_and_gradients(model, images, upstream, run=by_hand)
        wide = copy.deepcopy(model).double()
        by_hand = lambda x: masked_by_hand(wide, x, **options)  # noqa: E731
        truth, _ = outputs_and_gradients(wide, images.double(), upstream.double(), run=by_hand)
    verdicts = [check(name, actual[name], yardstick[name], truth[name]) for name in truth]
    assert not [f"{v.name}: {v.detail}" for v in verdicts if not v.passed]
    if kind == "mask":
        assert truth["mask_token"].any()


@pytest.mark.parametrize("backend", ["torch", KERNELS])
@pytest.mark.parametrize("name", ["vit", "vit, positions of patches"])
def test_packed_features_and_gradients(name, backend, device):
    """Visible patches of different numbers, packed: against the published code on one image after the other."""
    if backend == KERNELS:
        pytest.importorskip("triton")
    model = make(name, depth=1).to(device)
    images, counts = images_for(model), [3, 7]
    visible = random_mask(2, 16, 0.5, device=device).visible

    def one_by_one(model, images):
        pairs = [(images[i : i + 1], visible[i : i + 1, :n]) for i, n in enumerate(counts)]
        return torch.cat([masked_by_hand(model, image, visible=seen)[0] for image, seen in pairs])

    def packed(images):
        return model.forward_features(images, visible=visible, num_visible=torch.tensor(counts, device=device))

    with vitkernels.use_backend(backend):
        actual, upstream = outputs_and_gradients(model, images, run=packed)
    with vitkernels.use_backend("torch"):
        with summed_alike(images):
            yardstick, _ = outputs_and_gradients(model, images, upstream, run=lambda x: one_by_one(model, x))
        wide = copy.deepcopy(model).double()
        truth, _ = outputs_and_gradients(wide, images.double(), upstream.double(), run=lambda x: one_by_one(wide, x))
    verdicts = [check(name, actual[name], yardstick[name], truth[name]) for name in truth]
    assert not [f"{v.name}: {v.detail}" for v in verdicts if not v.passed]
    R = model.num_prefix_tokens
    assert actual["output"].shape == (2 * R + 10, 32)


@pytest.fixture
def by_pytorch():
    with vitkernels.use_backend("torch"):
        yield


@pytest.mark.usefixtures("by_pytorch")
class TestModels:
    def test_an_encoder_and_a_decoder_train_as_mae(self):
        """A step on the loss over hidden patches lowers it, and ``restore`` puts tokens in the image's order."""
        torch.manual_seed(0)
        encoder = VisionTransformer(**SMALL | {"use_mask_token": False}, pos_embed="sincos2d")
        decoder, mask_token = nn.Linear(32, 3 * 8 * 8), nn.Parameter(torch.zeros(1, 1, 32))
        images = torch.randn(4, 3, 32, 32)
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        visible, mask, restore = random_mask(4, 16, 0.75, generator=torch.Generator().manual_seed(1))
        parameters = [*encoder.parameters(), *decoder.parameters(), mask_token]
        optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
        for _ in range(4):
            tokens = encoder.forward_features(images, visible=visible)[:, 1:]
            assert tokens.shape == (4, 4, 32)
            tokens = torch.cat([tokens, mask_token.expand(4, 12, -1)], 1)
            tokens = tokens.gather(1, restore.unsqueeze(-1).expand(-1, -1, 32))
            loss = (decoder(tokens) - patches).square().mean(-1)[mask].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with torch.no_grad():  # behind restore, the decoder's input has the mask token just where a patch is hidden
            marked = torch.cat([torch.zeros(4, 4), torch.ones(4, 12)], 1).gather(1, restore)
        assert torch.equal(marked.bool(), mask)

    @pytest.mark.parametrize("name", ["vit", "beit"])
    def test_mask_tokens_are_drawn_and_not_decayed(self, name):
        cls, options = MODELS[name]
        model, without = cls(**SMALL | options), cls(**SMALL | options | {"use_mask_token": False})
        assert 0.01 < model.mask_token.std().item() < 0.03
        assert "mask_token" in model.no_weight_decay() and "mask_token" not in without.no_weight_decay()
        assert "mask_token" in model.group_matcher()["stem"]
        assert model.state_dict().keys() - without.state_dict().keys() == {"mask_token"}
        with pytest.raises(NotImplementedError, match="no mask token"):
            model.to_timm()
        without.to_timm()

    def test_what_does_not_fit_is_refused(self):
        model, images = make("beit"), torch.zeros(2, 3, 32, 32)
        drawn = random_mask(2, 16)
        with pytest.raises(ValueError, match="mask and visible are given"):
            model.forward_features(images, mask=drawn.mask, visible=drawn.visible)
        with pytest.raises(ValueError, match="relative_attention: qkv has 5 tokens"):
            model.forward_features(images, visible=drawn.visible)
        with pytest.raises(ValueError, match="no mask token; make it with use_mask_token=True"):
            make("vit", use_mask_token=False).forward_features(images, mask=drawn.mask)
        counts = torch.tensor([1, 2])
        with pytest.raises(NotImplementedError, match="Beit takes no packed images"):
            model.forward_features(images, visible=drawn.visible, num_visible=counts)
        vit = make("vit")
        with pytest.raises(ValueError, match="num_visible is given without visible"):
            vit.forward_features(images, num_visible=counts)
        with pytest.raises(ValueError, match=r"num_visible has shape \(1,\); expected \(2,\), the images"):
            vit.forward_features(images, visible=drawn.visible, num_visible=counts[:1])
        for wrong in (counts > 1, counts / 2, [1, 2]):  # as the mask of the visible patches, or a ratio
            with pytest.raises(TypeError, match=r"num_visible is a .*; expected a tensor of int32 or int64"):
                vit.forward_features(images, visible=drawn.visible, num_visible=wrong)
        with pytest.raises(ValueError, match="patch_drop_rate drops some"):
            make("vit", patch_drop_rate=0.5).forward_features(images, visible=drawn.visible, num_visible=counts)
        vit.blocks[0].norm1.register_forward_hook(lambda *args: None)
        with pytest.raises(NotImplementedError, match="has a hook or an adapter, which takes no packed images"):
            vit.forward_features(images, visible=drawn.visible, num_visible=counts)
        embed = PatchEmbed(32, 8, norm_layer=nn.LayerNorm)
        with pytest.raises(ValueError, match="beside a norm"):
            embed(images, mask=drawn.mask, mask_token=torch.zeros(768))


class TestRandomMask:
    def test_it_is_maes(self):
        visible, mask, restore = random_mask(8, 49, 0.75, generator=torch.Generator().manual_seed(3))
        assert visible.shape == (8, 12) and mask.shape == restore.shape == (8, 49)
        order = torch.rand(8, 49, generator=torch.Generator().manual_seed(3)).argsort(1)
        expected = torch.ones(8, 49)
        expected[:, :12] = 0
        expected = expected.gather(1, order.argsort(1))
        assert torch.equal(visible, order[:, :12]) and torch.equal(mask.float(), expected)
        assert not mask.gather(1, visible).any() and mask.sum() == 8 * 37
        hidden = torch.stack([row.nonzero().flatten() for row in mask])
        both = torch.cat([visible, hidden], 1).sort(1).values
        assert torch.equal(both, torch.arange(49).expand(8, -1))
        # What is in the order of the draw comes back into the image's.
        assert torch.equal(order.gather(1, restore), torch.arange(49).expand(8, -1))

    def test_the_generator_decides(self):
        draws = [random_mask(2, 30, generator=torch.Generator().manual_seed(seed)).visible for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])

    def test_every_patch_is_hidden_as_often(self):
        shares = random_mask(4000, 16, 0.75, generator=torch.Generator().manual_seed(0)).mask.float().mean(0)
        assert (shares - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5

    def test_ends_of_the_range(self):
        assert not random_mask(2, 9, 0.0).mask.any()
        assert random_mask(2, 9, 0.99).visible.shape == (2, 1)
        assert random_mask(0, 9).visible.shape == (0, 2)
        for ratio in (-0.1, 1.0):
            with pytest.raises(ValueError, match="expected a share"):
                random_mask(2, 9, ratio)
        with pytest.raises(ValueError, match="num_patches is 0"):
            random_mask(2, 0)


class TestBlockwiseMask:
    def test_blocks_hide_about_as_many_as_asked_and_no_more(self):
        masks = blockwise_mask(200, (14, 14), 75, generator=torch.Generator().manual_seed(0))
        assert masks.shape == (200, 196) and masks.dtype == torch.bool
        counts = masks.sum(1)
        assert counts.max() <= 75 and counts.float().mean() > 70
        assert len(torch.unique(masks, dim=0)) == 200

    def test_hidden_patches_lie_together(self):
        """A hidden patch's neighbour to the right is hidden far more often than one of as many hidden at random."""
        masks = blockwise_mask(200, (14, 14), 75, generator=torch.Generator().manual_seed(0)).view(-1, 14, 14)
        together = masks[:, :, 1:][masks[:, :, :-1]].float().mean()
        assert together > 0.7 > masks.float().mean() + 0.2

    def test_one_block_is_a_rectangle_of_the_area_and_shape_asked_for(self):
        generator = torch.Generator().manual_seed(0)
        tall = 0
        for _ in range(100):
            # No second rectangle of 16 patches or more fits into what the first leaves of the 20.
            (mask,) = blockwise_mask(1, (14, 14), 20, min_block=16, max_block=20, generator=generator).view(1, 14, 14)
            rows, columns = mask.any(1).sum().item(), mask.any(0).sum().item()
            tall += rows > columns
            if mask.sum() == rows * columns:
                assert 0.2 < rows / columns < 5.0
        assert 20 < tall < 80

    def test_the_generator_decides(self):
        draws = [blockwise_mask(2, (8, 6), 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])

    def test_ends_of_the_range(self):
        assert not blockwise_mask(2, (4, 4), 0).any()
        assert blockwise_mask(0, (4, 4), 4).shape == (0, 16)
        assert blockwise_mask(1, (1, 3), 2).shape == (1, 3)  # no rectangle fits
        for options, message in (
            ({"num_masked": 17}, "num_masked is 17; expected 0 to 4 · 4"),
            ({"num_masked": -1}, "num_masked is -1"),
            ({"num_masked": 4, "min_block": 0}, "min_block is 0"),
            ({"num_masked": 4, "min_aspect": 0.0}, "min_aspect is 0.0"),
            ({"num_masked": 4, "min_aspect": 2.0}, "min_aspect is 2.0"),
        ):
            with pytest.raises(ValueError, match=message):
                blockwise_mask(1, (4, 4), **options)
