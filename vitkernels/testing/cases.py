"""The shapes for benchmarks, compilation and tuning: vision transformers in common use, by name."""

from __future__ import annotations

import dataclasses

import torch

# Dtypes by their names in commands and reports.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model's block and patch embedding at one image size and batch size.

    Attributes:
        name: A unique name; in :data:`CASES` timm's name of the model, with the image size.
        batch: Number of images.
        image: Side of an image in pixels.
        patch: Side of a patch in pixels.
        prefix: Number of class and register tokens.
        channels: Channels of a token.
        heads: Number of attention heads.
        hidden: Hidden features of the MLP; with a gate, of each half.
        activation: The ops' name of the MLP's activation.
        layer_scale: Whether both branches have a LayerScale.
        norm: ``layer_norm`` or ``rms_norm``.
        mlp: ``mlp``; or ``packed`` or ``separate``, for ``swiglu_mlp`` with such weights.
        mlp_norm: Whether there is a LayerNorm before the MLP's last layer.
        attention: Further variants of attention to run: ``biased`` (a learned bias per head), ``key_bias`` (of merged
            tokens), ``key_mask``, ``pair_mask``, ``causal``, ``dropout``, ``varlen`` (packed images), ``windows`` (49
            tokens, head dim 32, as in Swin), ``visible`` (the 50 tokens that the encoder of a masked autoencoder sees,
            and patch embedding with masks), ``swin`` (windows of 7, shifted), ``swin_cosine`` (of 8, with Swin V2's
            cosine attention), ``swin_wide`` (of 12), ``swin_dropout``, ``swin_grid`` (MaxViT's grid attention),
            ``relative`` (a table of relative positions over the image, as in BEiT), ``decomposed`` and
            ``decomposed_windows`` (SAM's positions), ``rope_half`` and ``rope_interleaved`` (with QK-norm), and
            ``frozen_queries`` (queries without a gradient).
    """

    name: str
    batch: int
    image: int
    patch: int
    prefix: int
    channels: int
    heads: int
    hidden: int
    activation: str = "gelu"
    layer_scale: bool = False
    norm: str = "layer_norm"
    mlp: str = "mlp"
    mlp_norm: bool = False
    attention: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens per image, with prefix tokens; pixels that fill no patch are dropped."""
        return self.prefix + (self.image // self.patch) ** 2

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.channels // self.heads


# Sources: timm 1.0.31's model definitions. In inference every batch fits well into a GPU of 80 GB.
CASES = {
    case.name: case
    for case in (
        Case("vit_tiny_patch16_224", 256, 224, 16, 1, 192, 3, 768, attention=("windows", "frozen_queries")),
        Case("vit_small_patch16_224", 256, 224, 16, 1, 384, 6, 1536),
        Case(
            "vit_base_patch16_224",
            32,
            224,
            16,
            1,
            768,
            12,
            3072,
            attention=(
                "biased",
                "key_bias",
                "key_mask",
                "pair_mask",
                "causal",
                "dropout",
                "windows",
                "visible",
                "swin",
                "swin_cosine",
                "swin_wide",
                "relative",
                "decomposed",
                "decomposed_windows",
                "lora",
            ),
        ),
        Case("vit_large_patch16_224", 64, 224, 16, 1, 1024, 16, 4096),
        Case("deit3_base_patch16_224", 64, 224, 16, 1, 768, 12, 3072, layer_scale=True),
        Case("vit_large_patch14_reg4_dinov2_518", 8, 518, 14, 5, 1024, 16, 4096, layer_scale=True),
        Case(
            "vit_so400m_patch14_siglip_378",
            32,
            378,
            14,
            0,
            1152,
            16,
            4304,
            "gelu_tanh",
            attention=("key_bias", "key_mask", "varlen"),
        ),
        Case("vit_large_patch14_clip_336", 32, 336, 14, 1, 1024, 16, 4096, "quick_gelu"),
        Case("vit_huge_patch14_clip_224", 32, 224, 14, 1, 1280, 16, 5120),
        Case(
            "vit_giant_patch14_reg4_dinov2_518", 8, 518, 14, 5, 1536, 24, 4096, "silu", layer_scale=True, mlp="packed"
        ),
        Case(
            "vit_huge_plus_patch16_dinov3_256",
            32,
            256,
            16,
            5,
            1280,
            20,
            5120,
            "silu",
            layer_scale=True,
            mlp="separate",
            attention=("rope_half",),
        ),
        Case(
            "eva02_large_patch14_448",
            16,
            448,
            14,
            1,
            1024,
            16,
            2730,
            "silu",
            mlp="separate",
            mlp_norm=True,
            attention=("rope_interleaved", "biased"),
        ),
        Case("aimv2_large_patch14_224", 64, 224, 14, 0, 1024, 8, 2816, "silu", norm="rms_norm", mlp="separate"),
    )
}
