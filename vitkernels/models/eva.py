"""EVA (arXiv 2211.07636) and EVA-02 (arXiv 2303.11331), with timm's arguments and keys.

Checkpoints load with ``strict=True`` in both directions between this and a timm ``Eva`` with the same arguments.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import rope2d
from vitkernels.models import convert
from vitkernels.models._arguments import refuse
from vitkernels.models.beit import Beit

# Arguments of timm that have no counterpart here, with the value that has no effect.
_UNSUPPORTED = {
    "num_kv_heads": None,
    "qkv_fused": True,
    "qk_norm": False,
    "swiglu_align_to": 0,
    "scale_attn_inner": False,
    "attn_type": "eva",
    "patch_drop_rate": 0.0,
    "attn_only_layer_scale": False,
    "class_token": True,
    "num_reg_tokens": 0,
    "no_embed_class": False,
    "rope_type": "cat",
    "rope_grid_offset": 0.0,
    "rope_grid_indexing": "ij",
    "rope_rotate_half": False,
    "rope_shift_coords": None,
    "rope_jitter_coords": None,
    "rope_rescale_coords": None,
    "rope_mrope_section": None,
    "use_post_norm": False,
    "use_pre_transformer_norm": False,
    "use_post_transformer_norm": None,
    "attn_pool_num_heads": None,
    "attn_pool_mlp_ratio": None,
    "dynamic_img_size": False,
    "dynamic_img_pad": False,
}
_OF_BEIT = ("use_rel_pos_bias", "use_shared_rel_pos_bias")


class Eva(Beit):
    """Vision Transformer with rotary positions, from images (B, I, Y, X) to logits (B, num_classes).

    Attention rotates queries and keys inside its kernels.

    Args:
        img_size, patch_size, in_chans, num_classes, global_pool, embed_dim, depth, num_heads: As for :class:`Beit`.
        use_rot_pos_emb: Whether patches have rotary positions (:func:`vitkernels.layers.rope2d`).
        rope_temperature: Their slowest frequency is about the reciprocal of this, in radians a patch.
        ref_feat_shape: Rows and columns of patches, or one number for both, that positions are scaled to, whatever the
            size of the image; None leaves them as they are.
        options: Those of :class:`Beit`, but for the tables of biases. With ``swiglu_mlp`` and without ``scale_mlp`` the
            MLPs are :class:`vitkernels.layers.SwiGLUPacked`.

    Raises:
        ValueError, NotImplementedError, TypeError: As for ``VisionTransformer``.
    """

    _packs_mlp = True
    _config = staticmethod(convert.eva_config)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        use_rot_pos_emb: bool = False,
        rope_temperature: float = 10000.0,
        ref_feat_shape: int | tuple[int, int] | None = None,
        **options,
    ) -> None:
        refused = {name: value for name, value in options.items() if name in (*_UNSUPPORTED, *_OF_BEIT)}
        refuse(type(self), refused, _UNSUPPORTED)
        own = {name: value for name, value in options.items() if name not in refused}
        super().__init__(img_size, patch_size, in_chans, num_classes, global_pool, embed_dim, depth, num_heads, **own)
        self.use_rot_pos_emb = use_rot_pos_emb
        self.rope_temperature = rope_temperature
        self.ref_feat_shape = (ref_feat_shape,) * 2 if isinstance(ref_feat_shape, int) else ref_feat_shape
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Make what no state dict holds: the tables of the rotary positions."""
        cos = sin = None
        if self.use_rot_pos_emb:
            like, head_dim = self.patch_embed.proj.weight, self.blocks[0].attn.head_dim
            options = {"temperature": self.rope_temperature, "reference": self.ref_feat_shape}
            cos, sin, _ = rope2d(self.patch_embed.grid_size, head_dim, **options, device=like.device, dtype=like.dtype)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @classmethod
    def from_torchvision(cls, source: object, **options: object) -> Eva:
        """Raise NotImplementedError: torchvision has no EVA."""
        raise NotImplementedError("torchvision has no EVA")

    @classmethod
    def from_hf(cls, source: object, **options: object) -> Eva:
        """Raise NotImplementedError: transformers has no EVA."""
        raise NotImplementedError("transformers has no EVA; from_timm reads timm's")

    @staticmethod
    def _timm_class() -> type[nn.Module]:
        from timm.models.eva import Eva as TimmEva

        return TimmEva

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        super().set_input_size(img_size, patch_size)
        self.init_non_persistent_buffers()

    def _embed(self, images: Tensor, mask: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        if visible is not None and self.use_rot_pos_emb:
            raise ValueError("visible is given, but rotary positions need all patches; give a mask instead")
        return super()._embed(images, mask, visible)

    def _beside_tokens(self) -> tuple[ops.Rope, ...]:
        return (ops.Rope(self.rope_cos, self.rope_sin, interleaved=True),) if self.use_rot_pos_emb else ()
