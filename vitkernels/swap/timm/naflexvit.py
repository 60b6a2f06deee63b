"""timm's NaFlexVit: images of different size in one batch, packed in one row of tokens, with no padding or mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models._manipulate import checkpoint
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from vitkernels.layers import fused
from vitkernels.layers._plain import has_hooks
from vitkernels.swap._rules import RULES, Rule, add, runs_fused
from vitkernels.swap.timm.eva import FusedEvaBlock
from vitkernels.swap.timm.vision_transformer import FusedBlock


class FusedNaFlexVit(NaFlexVit):
    """timm's NaFlexVit, whose blocks work on the valid tokens of all images alone.

    Packed where ``patch_valid`` is all there is to mask, every block runs fused, no hook on a block would see packed
    tokens, and positions are not learned per layer (``rope_type="mixed"``). Else, in ``forward_intermediates``, and
    under ``torch.compile``, as how many tokens are valid is known on the device alone, timm's dense mask goes to the
    kernels. What timm leaves in the places of padding is undefined; here it is 0.
    """

    def forward_features(
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        if patch_coord is None or patch_valid is None or attn_mask is not None or not self._packs(patches):
            return super().forward_features(patches, patch_coord, patch_valid, attn_mask)
        # timm makes no dense mask, (B, 1, N, N), where it is given one; any will do, as it is not looked at.
        embeds = self._forward_embeds(patches, patch_coord, patch_valid, attn_mask=patch_valid)
        x, patch_valid = embeds["patches"], embeds["patch_valid"]
        B, N, C = x.shape
        valid = F.pad(patch_valid.bool(), (self.num_prefix_tokens, 0), value=True)  # (B, N)
        index = valid.flatten().nonzero()[:, 0]  # (T,)
        options = {"attn_mask": fused.Packed(F.pad(valid.sum(1).cumsum(0), (1, 0)).int(), N)}
        if embeds["rope_embeds"] is not None:
            options["rope"] = self._with_prefix(embeds["rope_embeds"]).flatten(0, 1)[index]
        tokens = x.flatten(0, 1)[index][None]  # (1, T, C)
        for block in self.blocks:
            tokens = checkpoint(block, tokens, **options) if self.grad_checkpointing else block(tokens, **options)
        tokens = self.norm(tokens)[0]
        x = tokens.new_zeros(B * N, C).index_copy(0, index, tokens).view(B, N, C)
        return {"patches": x, "patch_valid": patch_valid}

    def _packs(self, patches: Tensor) -> bool:
        if torch.compiler.is_compiling() or self.rope_is_mixed or not runs_fused(NAFLEX_VIT, self, patches):
            return False
        for block in self.blocks:
            if type(block) not in (FusedBlock, FusedEvaBlock) or any(map(has_hooks, block.modules())):
                return False
            if not runs_fused(RULES[type(block)], block, patches):
                return False
        return True

    def _with_prefix(self, rope: Tensor) -> Tensor:
        """Put rows that turn nothing, for the prefix tokens, before the tables (B, 1, N, 2D): (B, R + N, 2D)."""
        rope = rope[:, 0]
        sin, cos = rope.new_zeros(rope.shape[-1] // 2), rope.new_ones(rope.shape[-1] // 2)
        return torch.cat([torch.cat([sin, cos]).expand(rope.shape[0], self.num_prefix_tokens, -1), rope], dim=1)


NAFLEX_VIT = Rule(
    NaFlexVit,
    FusedNaFlexVit,
    called=frozenset(
        {"embeds", "rope", "patch_drop", "norm_pre", "blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head"}
    ),
    attributes=frozenset(
        {
            "num_classes",
            "in_chans",
            "global_pool",
            "num_features",
            "head_hidden_size",
            "embed_dim",
            "num_prefix_tokens",
            "num_reg_tokens",
            "has_class_token",
            "pool_include_prefix",
            "use_key_only_attn_mask",
            "grad_checkpointing",
            "supports_patch_interpolation",
            "rope_is_mixed",
            "feature_info",
            "weight_init_mode",
            "fix_init",
            "pretrained_cfg",
            "pretrained_model_args",
            "default_cfg",
        }
    ),
)
add(NAFLEX_VIT)
