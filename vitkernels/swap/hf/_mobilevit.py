"""Mixins for transformers' MobileViT: the layer of its Transformer, and the block around the Transformer; see
``__init__``. The convolutions stay.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vitkernels.layers import _own, fused, records
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._mobilevit import between_patches
from vitkernels.swap._rules import RULES, runs_fused
from vitkernels.swap.hf import _mixins_4 as old
from vitkernels.swap.hf._mixins import Kind


class TransformerLayer(Kind):
    """A pre-norm layer on (places in a patch of all images, patches, C)."""

    _takes = frozenset({"hidden_states"})
    _options: ClassVar = {
        "bypassed": {"layernorm_before": (nn.LayerNorm,), "layernorm_after": (nn.LayerNorm,)},
        "limit": lambda layer: head_dim_limit(layer.attention.attention.attention_head_size),
    }
    _parts: ClassVar = {"intermediate": old.Intermediate}

    @staticmethod
    def _children(own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        return old.cut_children(own, prefix, "attention")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states)
        return fused.block(_read(self), hidden_states)


class MobileViTLayer(Kind):
    """The block: convolutions around a Transformer, which reads the image as it lies, neither unfolded nor folded."""

    _takes = frozenset({"features"})
    _options: ClassVar = {
        "bypassed": {},
        "called": frozenset(
            {"downsampling_layer", "conv_kxk", "conv_1x1", "transformer", "layernorm", "conv_projection", "fusion"}
        ),
        "attributes": frozenset({"patch_width", "patch_height", "gradient_checkpointing"}),
        "limit": lambda block: _limit(block),
    }

    def forward(self, features: Tensor) -> Tensor:
        layers = self.transformer.layer
        fuses = runs_fused(self._rule, self, features) and features.ndim == 4
        if not fuses or any(map(_own.has_hooks, self.transformer.modules())):
            return super().forward(features)
        if not all(isinstance(each, TransformerLayer) and runs_fused(each._rule, each, features) for each in layers):
            return super().forward(features)
        if self.downsampling_layer:
            features = self.downsampling_layer(features)
        x = self.conv_1x1(self.conv_kxk(features))
        x = between_patches(map(_read, layers), self.layernorm, x, (self.patch_height, self.patch_width))
        return self.fusion(torch.cat((features, self.conv_projection(x)), dim=1))


def _read(layer: nn.Module) -> records.Block:
    return records.Block(
        records.norm(layer.layernorm_before),
        old.cut_attention(layer.attention, "attention"),
        records.norm(layer.layernorm_after),
        old.cut_mlp(layer),
    )


def _limit(block: nn.Module) -> str | None:
    rules = [RULES.get(type(each)) for each in block.transformer.layer]
    if all(rule is not None and issubclass(rule.fused, TransformerLayer) for rule in rules):
        return None
    return "its Transformer holds another layer than transformers' own"
