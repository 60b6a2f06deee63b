"""transformers' vision encoder of SAM 2, accelerated: whole blocks, in windows and over the image, with pooled queries."""

import inspect

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import Tensor, nn

from vitkernels import accelerate, restore

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


def config(**more) -> "transformers.Sam2VisionConfig":
    return transformers.Sam2VisionConfig(
        backbone_config=transformers.Sam2HieraDetConfig(**BACKBONE | more), backbone_channel_list=[64, 48, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=16, fpn_top_down_levels=[0, 1],
        num_feature_levels=4,
    )  # fmt: skip


def build(**more) -> nn.Module:
    return shake(Pyramid(transformers.Sam2VisionModel(config(**more)))).eval()


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
