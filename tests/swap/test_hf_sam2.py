"""transformers' vision encoder of SAM 2, accelerated: whole blocks, in windows and over the image, some pooling."""

import copy
import inspect

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import Tensor, nn

from vitkernels import accelerate, explain, restore
from vitkernels.swap import _hieradet

transformers = pytest.importorskip("transformers", minversion="4.56")

# The second and third stage pool their queries, the fourth widens alone; the last block of the third attends over the
# image. 64 pixels are 16 rows, 8 and 4, all whole windows; of 48 pixels' 12, 6 and 3 the last two are padded.
BACKBONE = {
    "hidden_size": 16, "num_attention_heads": 1, "embed_dim_per_stage": [16, 32, 48, 64],
    "num_attention_heads_per_stage": [1, 2, 3, 4], "blocks_per_stage": [1, 2, 2, 1],
    "window_size_per_stage": [4, 4, 2, 2], "num_query_pool_stages": 2, "global_attention_blocks": [4],
    "window_positional_embedding_background_size": [4, 4], "mlp_ratio": 2.0,
}  # fmt: skip


class Pyramid(nn.Module):
    """The encoder's features of all levels in one tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([level.flatten(1) for level in self.inner(images).fpn_hidden_states], dim=1)


class Masks(nn.Module):
    """The masks of each image for a point, and for a box."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        points, boxes = images.new_tensor([20.0, 30.0]), images.new_tensor([5.0, 9.0, 50.0, 40.0])
        prompts = {"input_points": points.repeat(len(images), 1, 1, 1), "input_boxes": boxes.repeat(len(images), 1, 1)}
        return self.inner(pixel_values=images, **prompts, multimask_output=True).pred_masks


def config(levels: int) -> "transformers.Sam2VisionConfig":
    return transformers.Sam2VisionConfig(
        backbone_config=transformers.Sam2HieraDetConfig(**BACKBONE), backbone_channel_list=[64, 48, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=16, fpn_top_down_levels=[0, 1],
        num_feature_levels=levels,
    )  # fmt: skip


def build() -> nn.Module:
    return shake(Pyramid(transformers.Sam2VisionModel(config(levels=4)))).eval()


def whole() -> nn.Module:
    prompts = transformers.Sam2PromptEncoderConfig(hidden_size=16, image_size=64)
    decoder = transformers.Sam2MaskDecoderConfig(
        hidden_size=16, num_attention_heads=2, mlp_dim=32, iou_head_hidden_dim=16
    )
    parts = {"vision_config": config(levels=3), "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    return shake(Masks(transformers.Sam2Model(transformers.Sam2Config(**parts)))).eval()


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def attend_eagerly(attn: nn.Module) -> None:
    attn.config = copy.deepcopy(attn.config)
    attn.config._attn_implementation = "eager"


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.inner.backbone.blocks)


@pytest.mark.parametrize("image", [64, 48], ids=["whole", "padded"])
def test_fp32(image, device):
    model = build().to(device)
    keys, original = list(model.state_dict()), type(blocks(model)[0])
    images = torch.randn(2, 3, image, image, device=device)
    report = assert_parity(model, images)
    assert list(model.state_dict()) == keys
    assert len([entry for entry in report.swapped if entry.was == "Sam2MultiScaleBlock"]) == len(blocks(model))
    assert not [k for k in report.kept if k.known]
    with torch.no_grad(), no_call_of(inspect.unwrap(original.forward)):
        model(images)
    restore(model)
    assert {type(block) for block in blocks(model)} == {original}


def test_with_prompts(device):
    """The masks of the whole model, whose decoder is frozen: its biases of keys have no gradient but rounding."""
    model = whole().to(device)
    model.inner.mask_decoder.requires_grad_(False)
    report = assert_parity(model, torch.randn(2, 3, 64, 64, device=device), inputs=4)
    assert len([entry for entry in report.swapped if entry.was == "Sam2MultiScaleBlock"]) == 6
    assert {k.reason.split(",")[0] for k in report.kept if k.cls == "Sam2FeedForward"} == {"activation is a ReLU"}


@pytest.mark.usefixtures("computed_by_pytorch")
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def test_eager_attention_stays(self):
        model = build()
        model.inner.set_attn_implementation("eager")
        report = accelerate(model)
        assert {entry.was for entry in report.swapped} == {"LayerNorm", "Sam2FeedForward"}
        assert [k for k in report.kept if k.cls == "Sam2MultiScaleBlock" and "attn: its attention" in k.reason]

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_hidden_states_and_attention_weights_are_transformers(self, implementation, device):
        plain = build().to(device)
        plain.inner.set_attn_implementation(implementation)
        model, images = copy.deepcopy(plain), torch.randn(1, 3, 48, 48, device=device)
        accelerate(model)
        for name in ("hidden_states", "attentions"):
            with torch.no_grad():
                mine, wanted = (
                    each.inner.backbone(images, **{f"output_{name}": True})[name] for each in (model, plain)
                )
            assert len(wanted) >= len(blocks(plain))
            close(mine, wanted)

    def test_the_attention_alone(self, device):
        """Whole windows as the original cuts them, with and without pooled queries, and another scale."""
        plain = build().to(device)
        for block in blocks(plain):
            attn = copy.deepcopy(block.attn)
            attn.scale = 0.4
            x = torch.randn(3, 4, 4, block.dim, device=device)
            expected, forward = attn(x), type(attn).forward
            assert accelerate(attn).swapped
            with no_call_of(inspect.unwrap(forward)):
                close(attn(x), expected)

    def test_checkpointed(self, device, monkeypatch):
        model, x, called = build().to(device).train(), torch.randn(2, 3, 48, 48, device=device), []
        accelerate(model)
        run = _hieradet.block
        monkeypatch.setattr(_hieradet, "block", lambda *args: called.append(1) or run(*args))
        model(x).square().sum().backward()
        expected, times = [p.grad.clone() for p in model.parameters()], len(called)
        model.zero_grad()
        model.inner.supports_gradient_checkpointing = True  # as its blocks do; transformers does not say so yet
        model.inner.gradient_checkpointing_enable()
        model(x).square().sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)
        assert len(called) == 3 * times > 0

    def test_a_hook_on_any_module_within_keeps_the_block(self):
        for block in blocks(build()):
            for path, child in block.named_modules():
                handle = child.register_forward_hook(lambda *_: None)
                assert ("" in {k.module for k in explain(block).kept}) is (path != ""), path
                handle.remove()

    @pytest.mark.parametrize(
        "change",
        [
            lambda block: setattr(block.attn, "is_causal", True),
            lambda block: block.mlp.layers.append(nn.Linear(64, 64)),
            lambda block: setattr(block.mlp, "sigmoid_output", True),
            lambda block: setattr(block.mlp, "activation", nn.ReLU()),
            lambda block: attend_eagerly(block.attn),
        ],
        ids=["causal", "three layers", "sigmoid", "ReLU", "eager"],
    )
    def test_a_block_that_changes_afterwards(self, change, device):
        plain = blocks(build())[2].to(device)
        model, x = copy.deepcopy(plain), torch.randn(2, 6, 6, 32, device=device)
        accelerate(model)
        close(model(x), plain(x))
        for block in (model, plain):
            torch.manual_seed(0)
            change(block)
        with torch.no_grad():
            close(model(x), plain(x))
        assert "" in {k.module for k in explain(plain).kept}

    def test_another_is_causal_is_transformers_to_refuse(self, device):
        block = blocks(build())[0].to(device)
        accelerate(block)
        with pytest.raises(TypeError, match="is_causal"):
            block(torch.randn(1, 4, 4, 16, device=device), is_causal=True)
