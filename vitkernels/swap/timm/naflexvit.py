"""timm's NaFlexVit: images of different sizes in one batch, packed into one row of tokens without padding or mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from vitkernels.layers import _own, fused
from vitkernels.swap._rules import RULES, Rule, add, runs_fused
from vitkernels.swap.timm.eva import FusedEvaBlock
from vitkernels.swap.timm.vision_transformer import FusedBlock


class _Images(NamedTuple):
    """Images packed into one row of tokens.

    Attributes:
        tokens: (1, T, C), the input of the blocks: the valid tokens of all images, including prefix tokens.
        options: Further arguments of the blocks.
        patch_valid: (B, N − R): which patches are valid, after patch dropout.
        index: (T,): the position of each token among the B · N padded ones.
        shape: B and N.
    """

    tokens: Tensor
    options: dict[str, object]
    patch_valid: Tensor
    index: Tensor
    shape: tuple[int, int]

    def padded(self, tokens: Tensor) -> Tensor:
        """Unpack tokens (1, T, C) into (B, N, C), with 0 in the places of padding."""
        B, N = self.shape
        C = tokens.shape[2]
        return tokens.new_zeros(B * N, C).index_copy(0, self.index, tokens[0]).view(B, N, C)


class FusedNaFlexVit(NaFlexVit):
    """timm's NaFlexVit, whose blocks compute only the valid tokens of all images.

    Images are packed if ``patch_valid`` is the only mask, every block runs fused, no block has hooks (which would see
    packed tokens), and positions are not learned per layer (``rope_type="mixed"``). Then nothing is computed in the
    places of padding: features and intermediates are 0 there.

    Otherwise the kernels get timm's dense mask; also under ``torch.compile``, because only the device knows how many
    tokens are valid. The places of padding then hold timm's values, which depend on the length of the padding; timm's
    pools skip them by ``patch_valid``.
    """

    def forward_features(
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        packed = self._pack(patches, patch_coord, patch_valid, attn_mask)
        if packed is None:
            return super().forward_features(patches, patch_coord, patch_valid, attn_mask)
        tokens = packed.tokens
        for block in self.blocks:
            tokens = self._run(block, tokens, packed.options)
        return {"patches": packed.padded(self.norm(tokens)), "patch_valid": packed.patch_valid}

    def forward_intermediates(
        self,
        x: Tensor | dict[str, Tensor],
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> list | tuple[Tensor, list] | dict[str, object]:
        images = {"patches": x, "patch_coord": patch_coord, "patch_valid": patch_valid, "attn_mask": attn_mask}
        if isinstance(x, dict):
            images |= x
        # In two cases the original raises: for NCHW maps, because images of different sizes have none, and if patch
        # dropout changes the mask, because only a dictionary returns it.
        refused = output_fmt != "NLC" or (self.training and self.patch_drop is not None and not output_dict)
        packed = None if refused else self._pack(**images)
        if packed is None:
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict,
                patch_coord, patch_valid, attn_mask,
            )  # fmt: skip
        wanted, last = feature_take_indices(len(self.blocks), indices)
        tokens, kept = packed.tokens, []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = self._run(block, tokens, packed.options)
            if i in wanted:
                kept.append(packed.padded(self.norm(tokens) if norm else tokens))
        R = self.num_prefix_tokens
        intermediates, prefixes = [x[:, R:] for x in kept], [x[:, :R] for x in kept]
        features = None if intermediates_only else packed.padded(self.norm(tokens))
        with_prefixes = return_prefix_tokens and R > 0
        if output_dict:
            found = {"image_intermediates": intermediates, "patch_valid": packed.patch_valid}
            if with_prefixes:
                found["image_intermediates_prefix"] = prefixes
            return found if features is None else found | {"image_features": features}
        if with_prefixes:
            intermediates = list(zip(intermediates, prefixes, strict=True))
        return intermediates if features is None else (features, intermediates)

    def _run(self, block: nn.Module, tokens: Tensor, options: dict[str, object]) -> Tensor:
        return checkpoint(block, tokens, **options) if self.grad_checkpointing else block(tokens, **options)

    def _pack(
        self, patches: Tensor, patch_coord: Tensor | None, patch_valid: Tensor | None, attn_mask: Tensor | None, **_
    ) -> _Images | None:
        """Embed images and remove their padding; return None if the blocks must take the padded tokens."""
        if patch_coord is None or patch_valid is None or attn_mask is not None or not self._packs(patches):
            return None
        # Without a mask timm would make a dense one, (B, 1, N, N). Any tensor prevents that; timm does not read it.
        embeds = self._forward_embeds(patches, patch_coord, patch_valid, attn_mask=patch_valid)
        x, patch_valid = embeds["patches"], embeds["patch_valid"]
        valid = F.pad(patch_valid.bool(), (self.num_prefix_tokens, 0), value=True)  # (B, N)
        tokens, packed, index = fused.pack(x, valid)
        options = {"attn_mask": packed}
        if embeds["rope_embeds"] is not None:
            options["rope"] = self._with_prefix(embeds["rope_embeds"]).flatten(0, 1)[index]
        return _Images(tokens, options, patch_valid, index, x.shape[:2])

    def _packs(self, patches: Tensor) -> bool:
        if torch.compiler.is_compiling() or self.rope_is_mixed or not runs_fused(NAFLEX_VIT, self, patches):
            return False
        for block in self.blocks:
            if type(block) not in (FusedBlock, FusedEvaBlock) or any(map(_own.has_hooks, block.modules())):
                return False
            if not runs_fused(RULES[type(block)], block, patches):
                return False
        return True

    def _with_prefix(self, rope: Tensor) -> Tensor:
        """Prepend identity rotations for the prefix tokens to the tables (B, 1, N, 2D); return (B, R + N, 2D)."""
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
