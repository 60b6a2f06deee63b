"""What is swapped of transformers: the layers of its Vision Transformers, and what those are made of.

transformers writes every model out in full: DeiT's classes are ViT's under other names. So each kind of module has its
fused forward here once, as a mixin in front of the original class, and a table tells which classes are of which kind.
A class whose forward takes other arguments than its kind's, as in another release, is not of that kind and not swapped.

A fused layer calls its attention as ever, so that hooks which collect attention weights and adapters in the attention
cost the layer nothing. Queries, keys and values stay three products, because packing the three weights would copy
them at every step.

Imported only where transformers' models have been.
"""

from __future__ import annotations

import importlib
import inspect
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import activations

from vitkernels import ops
from vitkernels.layers import fused
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap._views import head_dim_limit, patches_limit

# The attention implementations that the kernels stand in for; eager's callers count on the weights it returns.
IMPLEMENTATIONS = ("sdpa", "vitkernels")

# What may be told to the attention without changing what it computes.
_HARMLESS = frozenset({"is_causal", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"})

# By name, as releases differ in which of them there are.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    getattr(activations, cls): name
    for cls, name in {
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "SiLUActivation": "silu",
    }.items()
    if hasattr(activations, cls)
}


def _has_patches(conv: nn.Conv2d, images: Tensor) -> bool:
    if images.ndim != 4 or images.shape[1] != conv.in_channels:
        return False
    return images.shape[2] >= conv.kernel_size[0] and images.shape[3] >= conv.kernel_size[1]


def _whole_patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Drop what fills no patch at the right and the bottom, as the convolution does: 384 by patches of 14, say."""
    height, width = (size // patch * patch for size, patch in zip(images.shape[2:], conv.kernel_size, strict=True))
    return images[:, :, :height, :width]


def _attention_limit(attn: nn.Module) -> str | None:
    implementation = attn.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        wanted = " or ".join(IMPLEMENTATIONS)
        return f"its attention implementation is {implementation}, which the kernels do not stand in for; set {wanted}"
    return head_dim_limit(attn.head_dim)


def _mlp_limit(mlp: nn.Module) -> str | None:
    gate, up = mlp._modules.get("gate_proj"), mlp._modules.get("up_proj")
    if gate is not None and (gate.bias is None) != (up.bias is None):
        return "one of gate_proj and up_proj has a bias, the other has none"
    return None


def _patches_limit(embed: nn.Module) -> str | None:
    conv = next(child for child in embed.children() if isinstance(child, nn.Conv2d))
    size = getattr(embed, "patch_size", None) or embed.config.patch_size
    return patches_limit(conv, (size, size) if isinstance(size, int) else tuple(size))


def _attention_options(out: str) -> dict[str, object]:
    return {
        "bypassed": dict.fromkeys(("q_proj", "k_proj", "v_proj", out), (nn.Linear,)),
        "attributes": frozenset(
            {
                "attention_dropout", "config", "dropout", "embed_dim", "head_dim", "is_causal", "num_attention_heads",
                "num_heads", "scale", "scaling",
            }
        ),
        "limit": _attention_limit,
    }  # fmt: skip


def _mlp_options(act: str, *linears: str) -> dict[str, object]:
    return {
        "bypassed": {act: (nn.GELU, nn.SiLU, *_ACTIVATIONS), **dict.fromkeys(linears, (nn.Linear,))},
        "attributes": frozenset({"config", "hidden_size", "intermediate_size"}),
        "limit": _mlp_limit,
    }


def _embeddings_options(conv: str, **options: frozenset[str]) -> dict[str, object]:
    attributes = {"config", "embed_dim", "image_size", "num_channels", "num_patches", "num_positions", "patch_size"}
    return {"bypassed": {conv: (nn.Conv2d,)}, "attributes": frozenset(attributes), "limit": _patches_limit, **options}


def _layer_options(norm: str, *called: str) -> dict[str, object]:
    return {
        "bypassed": {norm: (nn.LayerNorm,)},
        "called": frozenset(called),
        "attributes": frozenset({"embed_dim", "gradient_checkpointing"}),
    }


class _Kind:
    """A mixin in front of a class of transformers.

    Attributes:
        _takes: The arguments that the class's forward may have.
        _options: What the rules of all classes of the kind have in common.
        _rule: The rule of the one class.
    """

    _takes: ClassVar[frozenset[str]]
    _options: ClassVar[dict[str, object]]
    _rule: ClassVar[Rule]


class _Attention(_Kind):
    """Self-attention with three projections in front and one behind."""

    _takes = frozenset({"hidden_states", "attention_mask", "kwargs"})
    _options = _attention_options("o_proj")
    _names: ClassVar[tuple[str, str, str]] = ("o_proj", "scaling", "dropout")

    def _fuses(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, object]) -> bool:
        if not isinstance(x, Tensor) or x.ndim != 3:
            return False
        if any(value is not None and value is not False for name, value in kwargs.items() if name not in _HARMLESS):
            return False
        # Flash attention's masks have two dims, flex attention's are no tensors.
        return (mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)) and runs_fused(self._rule, self, x)

    def _attend(
        self, x: Tensor, mask: Tensor | None, is_causal: bool | None = None, **rope: object
    ) -> tuple[Tensor, None]:
        q, k, v = (
            ops.linear(x, proj.weight, proj.bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, scale, dropout = (getattr(self, name) for name in self._names)
        is_causal = self.is_causal if is_causal is None else is_causal
        o = ops.attention(
            q,
            k,
            v,
            attn_mask=mask,
            scale=scale,
            is_causal=is_causal and mask is None,  # as transformers' sdpa: a mask holds the causal part as well
            dropout_p=dropout if self.training else 0.0,
            **rope,
        )
        return ops.linear(o.transpose(1, 2).flatten(2), out.weight, out.bias), None


class Attention(_Attention):
    """ViT's and CLIP's."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if self._fuses(hidden_states, attention_mask, kwargs):
            return self._attend(hidden_states, attention_mask, kwargs.get("is_causal"))
        return super().forward(hidden_states, attention_mask, **kwargs)


class ViTAttention(Attention):
    """ViT's."""

    _names = ("o_proj", "scaling", "attention_dropout")


class CLIPAttention(Attention):
    """CLIP's, of images and of texts."""

    _options = _attention_options("out_proj")
    _names = ("out_proj", "scale", "dropout")


class SiglipAttention(_Attention):
    """SigLIP's, which tells its attention nothing of what it is told itself."""

    _options = _attention_options("out_proj")
    _names = ("out_proj", "scale", "dropout")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if self._fuses(hidden_states, attention_mask, {}):
            return self._attend(hidden_states, attention_mask)
        return super().forward(hidden_states, attention_mask, **kwargs)


class RopeAttention(_Attention):
    """DINOv3's: rotary positions in the half layout, on the patches alone."""

    _takes = _Attention._takes | {"position_embeddings"}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ):
        if position_embeddings is not None and self._fuses(hidden_states, attention_mask, kwargs):
            rope = ops.Rope(*position_embeddings)
            prefix = hidden_states.shape[1] - rope.cos.shape[-2]
            return self._attend(
                hidden_states, attention_mask, kwargs.get("is_causal"), rope=rope, num_prefix_tokens=prefix
            )
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)


class Mlp(_Kind):
    """``fc2(act(fc1(x)))``."""

    _takes = frozenset({"hidden_states"})
    _options = _mlp_options("activation_fn", "fc1", "fc2")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if runs_fused(self._rule, self, hidden_states):
            return _mlp(self, hidden_states)
        return super().forward(hidden_states)


class UpDownMlp(Mlp):
    """The same under DINOv3's names."""

    _takes = frozenset({"x"})
    _options = _mlp_options("act_fn", "up_proj", "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GatedMlp(UpDownMlp):
    """``down_proj(act(gate_proj(x)) · up_proj(x))``."""

    _options = _mlp_options("act_fn", "gate_proj", "up_proj", "down_proj")


class PatchEmbeddings(_Kind):
    """A convolution that cuts images into patches, whatever their size."""

    _takes = frozenset({"pixel_values"})
    _options = _embeddings_options("projection")

    def forward(self, pixel_values: Tensor) -> Tensor:
        conv = self.projection
        # Other channels are the original's business: it raises.
        if not (runs_fused(self._rule, self, pixel_values) and _has_patches(conv, pixel_values)):
            return super().forward(pixel_values)
        return fused.patch_embed(conv, _whole_patches(conv, pixel_values))


class CastingPatchEmbeddings(PatchEmbeddings):
    """The same for images of any dtype."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values.to(self.projection.weight.dtype))


class VisionEmbeddings(_Kind):
    """SigLIP's patches and positions."""

    _takes = frozenset({"pixel_values", "interpolate_pos_encoding"})
    _options = _embeddings_options("patch_embedding", called=frozenset({"position_embedding"}))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        conv = self.patch_embedding
        # Only for other sizes do the originals interpolate positions, or raise.
        if (
            not runs_fused(self._rule, self, pixel_values)
            or not _has_patches(conv, pixel_values)
            or tuple(pixel_values.shape[2:]) != (self.image_size, self.image_size)
        ):
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        cls = getattr(self, "class_embedding", None)
        return fused.patch_embed(
            conv,
            _whole_patches(conv, pixel_values.to(conv.weight.dtype)),
            pos_embed=self.position_embedding(self.position_ids),
            prefix_tokens=None if cls is None else cls[None],
        )


class ClassVisionEmbeddings(VisionEmbeddings):
    """CLIP's, which have a class token in front."""

    _options = VisionEmbeddings._options | {"parameters": frozenset({"class_embedding"})}


class Dinov3Embeddings(_Kind):
    """Patches behind class and register tokens, without positions."""

    _takes = frozenset({"pixel_values", "bool_masked_pos"})
    _options = _embeddings_options(
        "patch_embeddings", parameters=frozenset({"cls_token", "mask_token", "register_tokens"})
    )

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        conv = self.patch_embeddings
        if (
            bool_masked_pos is not None
            or not runs_fused(self._rule, self, pixel_values)
            or not _has_patches(conv, pixel_values)
        ):
            return super().forward(pixel_values, bool_masked_pos)
        return fused.patch_embed(
            conv,
            _whole_patches(conv, pixel_values.to(conv.weight.dtype)),
            prefix_tokens=torch.cat((self.cls_token, self.register_tokens), dim=1),
        )


class _Layer(_Kind):
    """A pre-norm layer: attention, which is called, then an MLP, which is not."""


class ViTLayer(_Layer):
    """With dropout behind both branches."""

    _takes = frozenset({"hidden_states", "attention_mask", "kwargs"})
    _options = _layer_options("layernorm_after", "layernorm_before", "attention", "dropout")

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        branch, _ = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        normed, hidden_states = _add_norm(self.layernorm_after, self.dropout(branch), hidden_states)
        if self.dropout.training and self.dropout.p:
            return self.dropout(_mlp(self.mlp, normed)) + hidden_states
        return _mlp(self.mlp, normed, residual=hidden_states)


class CLIPLayer(_Layer):
    """CLIP's and SigLIP's, with nothing else."""

    _takes = frozenset({"hidden_states", "attention_mask", "kwargs"})
    _options = _layer_options("layer_norm2", "layer_norm1", "self_attn")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        normed = self.layer_norm1(hidden_states)
        branch, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        normed, hidden_states = _add_norm(self.layer_norm2, branch, hidden_states)
        return _mlp(self.mlp, normed, residual=hidden_states)


class Dinov2Layer(_Layer):
    """DINOv2's and DINOv3's, with LayerScale and DropPath on both branches."""

    _takes = frozenset({"hidden_states", "attention_mask", "position_embeddings", "kwargs"})
    _options = _layer_options("norm2", "norm1", "attention")

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        branch, _ = self.attention(self.norm1(hidden_states), *args, **kwargs)
        gamma1, gamma2 = self.layer_scale1.lambda1, self.layer_scale2.lambda1
        keep = 1.0 - getattr(self.drop_path, "drop_prob", 0.0) if self.drop_path.training else 1.0
        if keep == 1.0:
            normed, hidden_states = _add_norm(self.norm2, branch, hidden_states, layer_scale=gamma1)
            return _mlp(self.mlp, normed, residual=hidden_states, layer_scale=gamma2)
        kept = _draw(keep, branch, gamma1)
        # 1 / keep rounded to bf16 and multiplied with 0 or 1 would scale every branch wrongly.
        normed, hidden_states = _add_norm(
            self.norm2, branch / keep, hidden_states, layer_scale=gamma1, drop_path_scale=kept
        )
        branch = _mlp(self.mlp, normed, layer_scale=gamma2)
        return torch.addcmul(hidden_states, branch, _draw(keep, branch, gamma2).reshape(-1, 1, 1), value=1 / keep)


def _add_norm(norm: nn.LayerNorm, branch: Tensor, residual: Tensor, **scales: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, **scales)


def _draw(keep: float, branch: Tensor, gamma: Tensor) -> Tensor:
    """Draw 1 for each sample (B,) whose branch is kept, 0 for the others, just as transformers draws them."""
    dtype = torch.promote_types(branch.dtype, gamma.dtype)
    return torch.floor(torch.rand((branch.shape[0], 1, 1), dtype=dtype, device=branch.device) + keep).reshape(-1)


def _mlp(mlp: nn.Module, x: Tensor, *, residual: Tensor | None = None, layer_scale: Tensor | None = None) -> Tensor:
    """``residual + layer_scale · mlp(x)`` for the children of any MLP here."""
    children = mlp._modules
    first, last = (children[name] for name in (("fc1", "fc2") if "fc1" in children else ("up_proj", "down_proj")))
    epilogue = {"activation": _activation(mlp), "residual": residual, "layer_scale": layer_scale}
    gate = children.get("gate_proj")
    if gate is None:
        return ops.mlp(x, first.weight, first.bias, last.weight, last.bias, **epilogue)
    biases = None if first.bias is None else (gate.bias, first.bias)
    return ops.swiglu_mlp(x, (gate.weight, first.weight), biases, last.weight, last.bias, **epilogue)


def _activation(mlp: nn.Module) -> str | None:
    act = mlp._modules.get("activation_fn") or mlp._modules.get("act_fn")
    return _ACTIVATIONS.get(type(act)) or fused.activation_name(act)


# Which class is of which kind, by what its name ends with behind the family's prefix.
_VIT = {"Attention": ViTAttention, "MLP": Mlp, "PatchEmbeddings": PatchEmbeddings, "Layer": ViTLayer}
_DINOV2 = {
    "Attention": ViTAttention,
    "MLP": Mlp,
    "SwiGLUFFN": GatedMlp,
    "PatchEmbeddings": CastingPatchEmbeddings,
    "Layer": Dinov2Layer,
}
_DINOV3 = {
    "Attention": RopeAttention,
    "MLP": UpDownMlp,
    "GatedMLP": GatedMlp,
    "Embeddings": Dinov3Embeddings,
    "Layer": Dinov2Layer,
}
_SIGLIP = {"Attention": SiglipAttention, "MLP": Mlp, "VisionEmbeddings": VisionEmbeddings, "EncoderLayer": CLIPLayer}
_CLIP = _SIGLIP | {"Attention": CLIPAttention, "VisionEmbeddings": ClassVisionEmbeddings}

# The folder in transformers.models, the prefix of the classes there, and their kinds.
_FAMILIES = (
    ("vit", "ViT", _VIT),
    ("deit", "DeiT", _VIT),
    ("vit_mae", "ViTMAE", _VIT),
    ("dinov2", "Dinov2", _DINOV2),
    ("dinov2_with_registers", "Dinov2WithRegisters", _DINOV2),
    ("dinov3_vit", "DINOv3ViT", _DINOV3),
    ("siglip", "Siglip", _SIGLIP),
    ("siglip2", "Siglip2", _SIGLIP),
    ("clip", "CLIP", _CLIP),
)


def _add_family(folder: str, prefix: str, kinds: dict[str, type[_Kind]]) -> None:
    """Make a fused class of each class of a family that this release has, and its rule known."""
    try:
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ImportError:  # an older release, without this model
        return
    classes = {getattr(modeling, prefix + end, None): kind for end, kind in kinds.items()}
    classes = {cls: kind for cls, kind in classes.items() if cls is not None and _takes_what(kind, cls)}
    mlps = tuple(cls for cls, kind in classes.items() if issubclass(kind, Mlp))
    own = [cls for cls in vars(modeling).values() if isinstance(cls, type) and cls.__module__ == modeling.__name__]
    scales = tuple(cls for cls in own if cls.__name__.endswith("LayerScale"))
    paths = tuple(cls for cls in own if cls.__name__.endswith("DropPath"))
    PARAMETERS.update(dict.fromkeys(scales, frozenset({"lambda1"})))
    for cls, kind in classes.items():
        options = dict(kind._options)
        if issubclass(kind, _Layer):
            options["bypassed"] = options["bypassed"] | {"mlp": mlps}
        if kind is Dinov2Layer:
            options["bypassed"] |= {"layer_scale1": scales, "layer_scale2": scales, "drop_path": (nn.Identity, *paths)}
        name = f"Fused{cls.__name__}"
        body = {"__module__": __name__, "__doc__": f"transformers' {cls.__name__} on the kernels."}
        fused_cls = type(name, (kind, cls), body)
        fused_cls._rule = Rule(cls, fused_cls, **options)
        globals()[name] = fused_cls  # where pickle looks for a class
        add(fused_cls._rule)


def _takes_what(kind: type[_Kind], cls: type[nn.Module]) -> bool:
    return set(inspect.signature(cls.forward).parameters) - {"self"} <= kind._takes


for _family in _FAMILIES:
    _add_family(*_family)
