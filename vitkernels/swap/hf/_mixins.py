"""Mixins with fused forwards, one for each kind of module in transformers' Vision Transformers.

A mixin stands in front of the class of transformers whose forward it replaces; see the folder's ``__init__``. Kinds
that only releases 4.5x have are in ``_mixins_4``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitkernels import ops
from vitkernels.layers import fused, records, sharded
from vitkernels.swap._limits import head_dim_limit, patches_limit
from vitkernels.swap._rules import PARAMETERS, Rule, runs_fused

# The attention implementations that the kernels replace. Not eager: its callers rely on the weights that it returns.
IMPLEMENTATIONS = ("sdpa", "vitkernels")

# Keyword arguments that the fused attention accepts: it supports is_causal, and the others do not affect attention.
_HARMLESS = frozenset({"is_causal", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"})

# Listed by name, because not every release has all of them.
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


def are_harmless(kwargs: dict[str, object]) -> bool:
    """Tell whether the keyword arguments of an attention, beside ``is_causal``, leave it as it is."""
    return all(value is None or value is False or name in _HARMLESS for name, value in kwargs.items())


def has_patches(conv: nn.Conv2d, images: Tensor) -> bool:
    """Tell whether ``conv`` can cut at least one patch out of ``images``."""
    if images.ndim != 4 or images.shape[1] != conv.in_channels:
        return False
    return images.shape[2] >= conv.kernel_size[0] and images.shape[3] >= conv.kernel_size[1]


def patches(conv: nn.Conv2d, images: Tensor, **tokens: Tensor | None) -> Tensor:
    """Embed the whole patches of ``images``; the rest is dropped, as in the convolution (384 pixels, patches of 14)."""
    height, width = (size // patch * patch for size, patch in zip(images.shape[2:], conv.kernel_size, strict=True))
    return fused.patch_embed(conv, images[:, :, :height, :width], **tokens)


def implementation_limit(attn: nn.Module) -> str | None:
    """The implementation of attention that the config of ``attn`` names is none that the kernels stand in for."""
    implementation = attn.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        wanted = " or ".join(IMPLEMENTATIONS)
        return f"its attention implementation is {implementation}, which the kernels do not stand in for; set {wanted}"
    if implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS[implementation] is not sdpa_attention_forward:
        return "sdpa is not transformers' own: another function is registered under its name"
    return None


def _attention_limit(attn: nn.Module) -> str | None:
    return implementation_limit(attn) or head_dim_limit(getattr(attn, "head_dim", None) or attn.attention_head_size)


def _mlp_limit(mlp: nn.Module) -> str | None:
    gate, up = mlp._modules.get("gate_proj"), mlp._modules.get("up_proj")
    if gate is not None and (gate.bias is None) != (up.bias is None):
        return "one of gate_proj and up_proj has a bias, the other has none"
    return None


def _patches_limit(embed: nn.Module) -> str | None:
    conv = next(child for child in embed.children() if isinstance(child, nn.Conv2d))
    size = getattr(embed, "patch_size", None) or embed.config.patch_size
    return patches_limit(conv, (size, size) if isinstance(size, int) else tuple(size))


def attention_options(*linears: str) -> dict[str, object]:
    """Return the rule's options for an attention with the projections ``linears``."""
    return {
        "bypassed": dict.fromkeys(linears, (nn.Linear,)),
        "attributes": frozenset(
            {
                "all_head_size", "attention_dropout", "attention_head_size", "config", "dropout", "dropout_prob",
                "embed_dim", "head_dim", "is_causal", "num_attention_heads", "num_heads", "scale", "scaling",
            }
        ),
        "limit": _attention_limit,
        "shards": sharded.Layers(linears[:3], linears[3]) if len(linears) == 4 else None,
    }  # fmt: skip


def mlp_options(act: str, *linears: str) -> dict[str, object]:
    """Return the rule's options for an MLP with the activation ``act`` and the layers ``linears``."""
    return {
        "bypassed": {act: (nn.GELU, nn.SiLU, *_ACTIVATIONS), **dict.fromkeys(linears, (nn.Linear,))},
        "attributes": frozenset({"config", "hidden_size", "intermediate_size"}),
        "limit": _mlp_limit,
        "shards": sharded.Layers(linears[:-1], linears[-1]) if len(linears) > 1 else None,
    }


def embeddings_options(conv: str, **options: frozenset[str]) -> dict[str, object]:
    """Return the rule's options for embeddings that cut images into patches with ``conv``."""
    attributes = {"config", "embed_dim", "image_size", "num_channels", "num_patches", "num_positions", "patch_size"}
    return {"bypassed": {conv: (nn.Conv2d,)}, "attributes": frozenset(attributes), "limit": _patches_limit, **options}


def layer_options(norm: str, *called: str, **bypassed: tuple[type[nn.Module], ...]) -> dict[str, object]:
    """Return the rule's options for a layer whose second norm is ``norm`` and that calls the children ``called``."""
    return {
        "bypassed": {norm: (nn.LayerNorm,), **bypassed},
        "called": frozenset(called),
        "attributes": frozenset({"chunk_size_feed_forward", "embed_dim", "gradient_checkpointing", "seq_len_dim"}),
    }


def _gammas_limit(layer: nn.Module) -> str | None:
    """``lambda_1`` and ``lambda_2`` are parameters, or numbers that change nothing."""
    numbers = (vars(layer).get(name) for name in ("lambda_1", "lambda_2"))
    return next((f"its LayerScale is {n}" for n in numbers if n not in (None, 1.0)), None)


def gamma_options(*called: str, **bypassed: tuple[type[nn.Module], ...]) -> dict[str, object]:
    """Return :func:`layer_options` of a layer that holds its LayerScales itself, as BEiT's does."""
    options = layer_options("layernorm_after", *called, **bypassed)
    return options | {
        "optional_parameters": frozenset({"lambda_1", "lambda_2"}),
        "attributes": options["attributes"] | {"patch_size", "lambda_1", "lambda_2"},
        "limit": _gammas_limit,
    }


class Kind:
    """A mixin in front of a class of transformers.

    Attributes:
        _takes: The arguments that the class's forward may have.
        _options: The options that the rules of all classes of the kind share.
        _parts: The bypassed children that are of a kind themselves.
        _products: Reads the record of the module whose products can run in FP8, if they can.
        _arguments: The names of the arguments of the original's forward.
        _rule: The rule of the fused class.
    """

    _takes: ClassVar[frozenset[str]]
    _options: ClassVar[dict[str, object]]
    _parts: ClassVar[dict[str, type[Kind]]] = {}
    _products: ClassVar[Callable[[nn.Module], records.Attention | records.Mlp] | None] = None
    _arguments: ClassVar[tuple[str, ...]]
    _rule: ClassVar[Rule]

    @classmethod
    def _children(cls, own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        """Return further bypassed children, from the family's classes by name and their prefix."""
        return {}


class Names(NamedTuple):
    """Names of projections and attributes; ``out`` is None if the parent has the output projection."""

    out: str | None = "o_proj"
    scale: str = "scaling"
    dropout: str = "dropout"
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    head_dim: str = "head_dim"


class _Attention(Kind):
    """Self-attention with three input projections."""

    _takes = frozenset({"hidden_states", "attention_mask", "kwargs"})
    _options = attention_options("q_proj", "k_proj", "v_proj", "o_proj")
    _names: ClassVar[Names] = Names()

    @classmethod
    def _record(cls, attn: nn.Module, num_prefix_tokens: int = 0) -> records.Attention:
        """Read ``attn``, of this kind or of its original class."""
        children, names = attn._modules, cls._names
        qkv = tuple(records.linear(children[name]) for name in names.projections)
        head_dim = getattr(attn, names.head_dim)
        return records.Attention(
            qkv,
            records.linear(children[names.out]) if names.out else None,
            qkv[0].weight.shape[0] // head_dim,
            head_dim,
            getattr(attn, names.scale),
            attn_drop=getattr(attn, names.dropout) if attn.training else 0.0,
            num_prefix_tokens=num_prefix_tokens,
            fp8=records.runs_fp8(attn),
        )

    _products = _record

    def _fuses(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, object]) -> bool:
        if x.ndim != 3:
            return False
        if not are_harmless(kwargs):
            return False
        # The kernels need four dims: flash attention's masks have two, flex attention's are no tensors.
        takes = mask is None or isinstance(mask, records.Relative) or (isinstance(mask, Tensor) and mask.ndim == 4)
        return takes and runs_fused(self._rule, self, x)

    def _attend(
        self,
        x: Tensor,
        mask: Tensor | records.Relative | None,
        is_causal: bool | None = None,
        rope: ops.Rope | None = None,
        num_prefix_tokens: int = 0,
    ) -> Tensor:
        attn = self._record(self, num_prefix_tokens)
        is_causal = self.is_causal if is_causal is None else is_causal
        # As in transformers' sdpa: a mask includes the causal part.
        return attend(attn, x, mask, is_causal=bool(is_causal) and mask is None, rope=rope)


def attend(attn: records.Attention, x: Tensor, mask: Tensor | records.Relative | None, **options: object) -> Tensor:
    """Attend with three input projections and a mask, or a bias by relative position in its place."""
    if isinstance(mask, records.Relative):
        return fused.attention(attn._replace(qkv=packed(*attn.qkv), positions=mask), x)
    return fused.attention(attn, x, attn_mask=mask, **options)


def packed(*layers: records.Linear) -> records.Linear | tuple[records.Linear, ...]:
    """Pack the projections of queries, keys and values, of which some may have no bias; not those with an adapter."""
    if any(layer.lora is not None for layer in layers):
        return layers
    weights, biases = zip(*(layer.plain for layer in layers), strict=True)
    if all(bias is None for bias in biases):
        return records.Linear(torch.cat(weights))
    filled = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    return records.Linear(torch.cat(weights), torch.cat(filled))


def relative_bias(
    module: nn.Module, x: Tensor, mask: Tensor | None, window: tuple[int, int], interpolates: bool, *, reads: bool
) -> Tensor | records.Relative:
    """Return the bias of ``module.relative_position_bias``, which is BEiT's, and a mask for x (B, 1 + Y · X, C).

    Args:
        module: Who has the bias.
        x: The tokens.
        mask: A further bias, or None.
        window: Rows and columns of the image's patches.
        interpolates: Whether the bias of all pairs is to be resized.
        reads: Whether the attention takes a table in place of a mask.
    """
    bias = module.relative_position_bias
    if not reads or mask is not None or interpolates or x.shape[1] != 1 + window[0] * window[1]:
        dense = bias(window, interpolates, dim_size=x.shape[1])
        return dense if mask is None else dense + mask
    table, own = records.parameter(bias, "relative_position_bias_table"), tuple(bias.window_size)
    # Of a window with more rows than columns transformers resizes the columns as rows, even to their own number.
    if own != window or own[0] != own[1]:
        rows, columns = (2 * n - 1 for n in window)
        positions = table[:-3].reshape(1, 2 * own[1] - 1, 2 * own[0] - 1, -1).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, size=(rows, columns), mode="bilinear")
        table = torch.cat((positions.permute(0, 2, 3, 1).reshape(rows * columns, -1), table[-3:]))
    return records.Relative(window, table, 1)


class Attention(_Attention):
    """ViT's and CLIP's attention."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if self._fuses(hidden_states, attention_mask, kwargs):
            return self._attend(hidden_states, attention_mask, kwargs.get("is_causal")), None
        return super().forward(hidden_states, attention_mask, **kwargs)


class ViTAttention(Attention):
    """ViT's attention."""

    _names = Names(dropout="attention_dropout")


class CLIPAttention(Attention):
    """CLIP's attention, in both towers."""

    _options = attention_options("q_proj", "k_proj", "v_proj", "out_proj")
    _names = Names("out_proj", "scale")


class SiglipAttention(_Attention):
    """SigLIP's attention, which does not pass its keyword arguments on."""

    _options = attention_options("q_proj", "k_proj", "v_proj", "out_proj")
    _names = Names("out_proj", "scale")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if self._fuses(hidden_states, attention_mask, {}):
            return self._attend(hidden_states, attention_mask), None
        return super().forward(hidden_states, attention_mask, **kwargs)


class RopeAttention(_Attention):
    """DINOv3's attention: RoPE in the half layout, on the patches only."""

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
            return self._attend(hidden_states, attention_mask, kwargs.get("is_causal"), rope, prefix), None
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)


class Mlp(Kind):
    """``fc2(act(fc1(x)))``."""

    _takes = frozenset({"hidden_states"})
    _options = mlp_options("activation_fn", "fc1", "fc2")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if runs_fused(self._rule, self, hidden_states):
            return fused.mlp(_mlp(self), hidden_states)
        return super().forward(hidden_states)


class UpDownMlp(Mlp):
    """:class:`Mlp` under DINOv3's names."""

    _takes = frozenset({"x"})
    _options = mlp_options("act_fn", "up_proj", "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GatedMlp(UpDownMlp):
    """``down_proj(act(gate_proj(x)) · up_proj(x))``."""

    _options = mlp_options("act_fn", "gate_proj", "up_proj", "down_proj")


class PatchEmbeddings(Kind):
    """A convolution that cuts images of any size into patches."""

    _takes = frozenset({"pixel_values"})
    _options = embeddings_options("projection")

    def forward(self, pixel_values: Tensor) -> Tensor:
        conv = self.projection
        # For another number of channels the original raises.
        if not (runs_fused(self._rule, self, pixel_values) and has_patches(conv, pixel_values)):
            return super().forward(pixel_values)
        return patches(conv, pixel_values)


class CastingPatchEmbeddings(PatchEmbeddings):
    """:class:`PatchEmbeddings` for images of any dtype, cast to the weight's."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values.to(self.projection.weight.dtype))


class VisionEmbeddings(Kind):
    """SigLIP's patch and position embeddings."""

    _takes = frozenset({"pixel_values", "interpolate_pos_encoding"})
    _options = embeddings_options("patch_embedding", called=frozenset({"position_embedding"}))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        conv = self.patch_embedding
        # For any other image size the originals interpolate positions or raise.
        if (
            not runs_fused(self._rule, self, pixel_values)
            or not has_patches(conv, pixel_values)
            or tuple(pixel_values.shape[2:]) != (self.image_size, self.image_size)
        ):
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        cls = getattr(self, "class_embedding", None)
        return patches(
            conv,
            pixel_values.to(conv.weight.dtype),
            pos_embed=self.position_embedding(self.position_ids),
            prefix_tokens=None if cls is None else cls[None],
        )


class ClassVisionEmbeddings(VisionEmbeddings):
    """CLIP's embeddings, with a class token in front."""

    _options = VisionEmbeddings._options | {"parameters": frozenset({"class_embedding"})}


class Dinov3Embeddings(Kind):
    """DINOv3's embeddings: class and register tokens, then patches, without positions."""

    _takes = frozenset({"pixel_values", "bool_masked_pos"})
    _options = embeddings_options(
        "patch_embeddings", parameters=frozenset({"cls_token", "mask_token", "register_tokens"})
    )

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        conv = self.patch_embeddings
        if (
            bool_masked_pos is not None
            or not runs_fused(self._rule, self, pixel_values)
            or not has_patches(conv, pixel_values)
        ):
            return super().forward(pixel_values, bool_masked_pos)
        return patches(
            conv,
            pixel_values.to(conv.weight.dtype),
            prefix_tokens=torch.cat((self.cls_token, self.register_tokens), dim=1),
        )


class _Layer(Kind):
    """A pre-norm layer that calls its attention and reads its MLP."""

    _parts: ClassVar[dict[str, type[Kind]]] = {"mlp": Mlp}

    @staticmethod
    def _products(layer: nn.Module) -> records.Mlp:
        return _mlp(layer.mlp)

    def _mlp(self) -> records.Mlp:
        return _mlp(self.mlp)._replace(fp8=records.runs_fp8(self))


class ViTLayer(_Layer):
    """ViT's layer, with dropout after both branches."""

    _takes = frozenset({"hidden_states", "attention_mask", "kwargs"})
    # Bypassed, because the fused forward does not call the second dropout if it drops nothing.
    _options = layer_options("layernorm_after", "layernorm_before", "attention", dropout=(nn.Dropout,))

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        branch, _ = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        normed, hidden_states = fused.add_norm(records.norm(self.layernorm_after), self.dropout(branch), hidden_states)
        mlp = self._mlp()._replace(drop2=records.dropout(self.dropout))
        return fused.mlp(mlp, normed, residual=hidden_states)


class CLIPLayer(_Layer):
    """CLIP's and SigLIP's layer, without dropout or LayerScale."""

    _takes = frozenset({"hidden_states", "attention_mask", "kwargs"})
    _options = layer_options("layer_norm2", "layer_norm1", "self_attn")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self._layer(hidden_states, attention_mask=attention_mask, **kwargs)[0]

    def _layer(self, x: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Run the layer, pass ``kwargs`` to its attention, and return the output and the attention weights."""
        branch, weights = self.self_attn(hidden_states=self.layer_norm1(x), **kwargs)
        normed, x = fused.add_norm(records.norm(self.layer_norm2), branch, x)
        return fused.mlp(self._mlp(), normed, residual=x), weights


class Dinov2Layer(_Layer):
    """DINOv2's and DINOv3's layer, with LayerScale and DropPath on both branches."""

    _takes = frozenset({"hidden_states", "attention_mask", "position_embeddings", "kwargs"})
    _options = layer_options("norm2", "norm1", "attention")

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        branch, _ = self.attention(self.norm1(hidden_states), *args, **kwargs)
        return self._behind_attention(branch, hidden_states)

    def _behind_attention(self, branch: Tensor, x: Tensor) -> Tensor:
        gammas = self.layer_scale1.lambda1, self.layer_scale2.lambda1
        return behind_attention(branch, x, records.norm(self.norm2), self._mlp(), gammas, self.drop_path)


class BeitLayer(_Layer):
    """BEiT's layer. The attention that it calls gets the table of its bias by relative position, or the bias as a mask.

    With a table the three projections are one, whose weights are packed at each call, as Swin's are.
    """

    _takes = frozenset({"hidden_states", "attention_mask", "interpolate_pos_encoding", "resolution", "kwargs"})
    # The dropout is bypassed for ViTLayer's reason.
    _options = gamma_options("layernorm_before", "attention", dropout=(nn.Dropout,))

    @staticmethod
    def _children(own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        bias = own[f"{prefix}RelativePositionBias"]
        PARAMETERS[bias] = frozenset({"relative_position_bias_table"})
        return {"relative_position_bias": (bias, type(None))}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs,
    ) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, attention_mask, interpolate_pos_encoding, resolution, **kwargs)
        if self.relative_position_bias is not None:
            attn, window = self.attention, tuple(size // self.patch_size for size in resolution)
            reads = isinstance(attn, _Attention) and attn._fuses(hidden_states, None, kwargs)
            reads = reads and not (records.runs_fp8(attn) or kwargs.get("is_causal"))
            attention_mask = relative_bias(
                self, hidden_states, attention_mask, window, interpolate_pos_encoding, reads=reads
            )
        branch, _ = self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask, **kwargs)
        mlp = self._mlp()._replace(drop2=records.dropout(self.dropout))
        gammas = self._parameters.get("lambda_1"), self._parameters.get("lambda_2")
        return behind_attention(
            self.dropout(branch), hidden_states, records.norm(self.layernorm_after), mlp, gammas, self.drop_path
        )


def behind_attention(
    branch: Tensor,
    x: Tensor,
    norm: records.Norm,
    mlp: records.Mlp,
    gammas: tuple[Tensor | None, Tensor | None],
    drop_path: nn.Module,
) -> Tensor:
    """What is behind the attention of a layer with LayerScales and transformers' DropPath."""
    gamma1, gamma2 = gammas
    keep = 1.0 - getattr(drop_path, "drop_prob", 0.0) if drop_path.training else 1.0
    if keep == 1.0:
        normed, x = fused.add_norm(norm, branch, x, layer_scale=gamma1)
        return fused.mlp(mlp, normed, residual=x, layer_scale=gamma2)
    kept = _draw(keep, branch, gamma1)
    # A drop_path_scale of 1 / keep, rounded to bf16, would scale every branch wrongly. So the scale is 0 or 1 here,
    # and the branch is divided by keep.
    normed, x = fused.add_norm(norm, branch / keep, x, layer_scale=gamma1, drop_path_scale=kept)
    branch = fused.mlp(mlp, normed, layer_scale=gamma2)
    return torch.addcmul(x, branch, _draw(keep, branch, gamma2).reshape(-1, 1, 1), value=1 / keep)


def _draw(keep: float, branch: Tensor, gamma: Tensor | None) -> Tensor:
    """Draw 1 for each sample (B,) whose branch is kept and 0 for the others, with transformers' own random draws."""
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    return torch.floor(torch.rand((branch.shape[0], 1, 1), dtype=dtype, device=branch.device) + keep).reshape(-1)


def _mlp(mlp: nn.Module) -> records.Mlp:
    """Read an MLP of any kind in this folder."""
    children = mlp._modules
    if "weights_in" in children:  # gate and value packed, the gate first
        first, last = (records.linear(children[name]) for name in ("weights_in", "weights_out"))
        return records.Mlp(first, last, "silu", gated=True)
    names = ("fc1", "fc2") if "fc1" in children else ("up_proj", "down_proj")
    first, last = (records.linear(children[name]) for name in names)
    gate = children.get("gate_proj")
    if gate is None:
        return records.Mlp(first, last, activation(mlp))
    return records.Mlp((records.linear(gate), first), last, activation(mlp), gated=True)


def activation(mlp: nn.Module) -> str | None:
    """Return the ops' name of the activation of ``mlp``, or None if they have none."""
    names = ("activation_fn", "act_fn", "activation", "intermediate_act_fn", "act")
    act = next(mlp._modules[name] for name in names if name in mlp._modules)
    return _ACTIVATIONS.get(type(act)) or records.activation_name(act)
