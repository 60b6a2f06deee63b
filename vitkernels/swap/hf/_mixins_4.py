"""Mixins for kinds of module that transformers 4.50 to 4.57 has but 5 does not; see the folder's ``__init__``.

Until 4.55 (CLIP: 4.57) a layer takes ``output_attentions`` and returns a tuple. If the caller wants attention weights
or masks heads, the original attention runs, inside a layer that still runs fused.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._rules import runs_fused
from vitkernels.swap.hf import _mixins as new
from vitkernels.swap.hf._mixins import Kind, Names, activation, attention_options, layer_options, mlp_options


class SelfAttention(new._Attention):
    """ViT's and DINOv2's attention since 4.56, without the output projection."""

    _takes = frozenset({"hidden_states", "head_mask"})
    _options = attention_options("query", "key", "value")
    _names = Names(None, "scaling", "dropout_prob", ("query", "key", "value"), "attention_head_size")
    _products = None  # its output projection is another module's

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None):
        if head_mask is None and self._fuses(hidden_states, None, {}):
            return self._attend(hidden_states, None), None
        return super().forward(hidden_states, head_mask)


class TupleSelfAttention(SelfAttention):
    """:class:`SelfAttention` until 4.55, which returns a tuple."""

    _takes = SelfAttention._takes | {"output_attentions"}

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False):
        if head_mask is None and not output_attentions and self._fuses(hidden_states, None, {}):
            return (self._attend(hidden_states, None),)
        return super(SelfAttention, self).forward(hidden_states, head_mask, output_attentions)


class SelfOutput(Kind):
    """The attention's output projection; the layer adds the residual."""

    _takes = frozenset({"hidden_states", "input_tensor"})
    _options: ClassVar = {"bypassed": {"dense": (nn.Linear,), "dropout": (nn.Dropout,)}}

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, input_tensor)
        projected = fused.linear(records.linear(self.dense), hidden_states)
        return F.dropout(projected, self.dropout.p, self.dropout.training)


class Intermediate(Kind):
    """``act(dense(x))``: an MLP's first half."""

    _takes = frozenset({"hidden_states"})
    _options = mlp_options("intermediate_act_fn", "dense")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states)
        return fused.linear(records.linear(self.dense), hidden_states, activation=activation(self))


class Output(Kind):
    """``residual + dense(x)``: an MLP's second half."""

    _takes = SelfOutput._takes
    _options = SelfOutput._options

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, input_tensor)
        dense, drop = records.linear(self.dense), records.dropout(self.dropout)
        if drop:
            return F.dropout(fused.linear(dense, hidden_states), drop) + input_tensor
        return fused.linear(dense, hidden_states, residual=input_tensor)


class SizedPatchEmbeddings(Kind):
    """ViT's and ViT-MAE's: accepts images of another size only with ``interpolate_pos_encoding``."""

    _takes = frozenset({"pixel_values", "interpolate_pos_encoding"})
    _options = new.PatchEmbeddings._options

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        fits = interpolate_pos_encoding or tuple(pixel_values.shape[2:]) == tuple(self.image_size)
        # For another size or number of channels the original raises.
        if not (fits and runs_fused(self._rule, self, pixel_values) and new.has_patches(self.projection, pixel_values)):
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return new.patches(self.projection, pixel_values)


class Dinov2Mlp(new.Mlp):
    """DINOv2's MLP, whose argument is ``hidden_state``."""

    _takes = frozenset({"hidden_state"})
    _options = mlp_options("activation", "fc1", "fc2")

    def forward(self, hidden_state: Tensor) -> Tensor:
        return super().forward(hidden_state)


class PackedGatedMlp(Dinov2Mlp):
    """DINOv2's gated MLP, gate and value packed: ``weights_out(silu(gate) · value)``."""

    _options: ClassVar = {"bypassed": {"weights_in": (nn.Linear,), "weights_out": (nn.Linear,)}}


class ViTLayer(Kind):
    """ViT's layer, whose MLP is two modules."""

    _takes = TupleSelfAttention._takes
    _options = layer_options("layernorm_after", "layernorm_before", "attention")
    _parts: ClassVar = {"intermediate": Intermediate, "output": Output}

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        attended = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        branch, *weights = attended if isinstance(attended, tuple) else (attended,)
        normed, x = fused.add_norm(records.norm(self.layernorm_after), branch, hidden_states)
        out = fused.mlp(cut_mlp(self), normed, residual=x)
        return (out, *weights) if isinstance(attended, tuple) else out


class Dinov2Layer(new.Dinov2Layer):
    """DINOv2's layer, whose attention may return a tuple."""

    _takes = TupleSelfAttention._takes

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not runs_fused(self._rule, self, hidden_states):
            return super(new.Dinov2Layer, self).forward(hidden_states, *args, **kwargs)
        attended = self.attention(self.norm1(hidden_states), *args, **kwargs)
        if not isinstance(attended, tuple):
            return self._behind_attention(attended, hidden_states)
        return (self._behind_attention(attended[0], hidden_states), *attended[1:])


class SiglipAttention(new._Attention):
    """SigLIP's attention until 4.53."""

    _takes = frozenset({"hidden_states", "attention_mask", "output_attentions"})
    _options = new.SiglipAttention._options
    _names = new.SiglipAttention._names

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False):
        if not output_attentions and self._fuses(hidden_states, attention_mask, {}):
            return self._attend(hidden_states, attention_mask), None
        return super().forward(hidden_states, attention_mask, output_attentions)


class CLIPAttention(new._Attention):
    """CLIP's attention, which adds its two masks."""

    _takes = SiglipAttention._takes | {"causal_attention_mask"}
    _options = new.CLIPAttention._options
    _names = new.CLIPAttention._names

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ):
        masks = [mask for mask in (attention_mask, causal_attention_mask) if mask is not None]
        if not output_attentions and all(self._fuses(hidden_states, mask, {}) for mask in masks or (None,)):
            mask = masks[0] + masks[1] if len(masks) == 2 else next(iter(masks), None)
            # Until 4.51 the class has no attribute is_causal.
            return self._attend(hidden_states, mask, getattr(self, "is_causal", False)), None
        return super().forward(hidden_states, attention_mask, causal_attention_mask, output_attentions)


class SiglipLayer(new.CLIPLayer):
    """SigLIP's layer until 4.56."""

    _takes = SiglipAttention._takes

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, output_attentions: bool = False):
        if not runs_fused(self._rule, self, hidden_states):
            return super(new.CLIPLayer, self).forward(hidden_states, attention_mask, output_attentions)
        out = self._layer(hidden_states, attention_mask=attention_mask, output_attentions=output_attentions)
        return out if output_attentions else out[:1]


class CLIPLayer(new.CLIPLayer):
    """CLIP's layer, which takes two masks."""

    _takes = CLIPAttention._takes

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        causal_attention_mask: Tensor | None,
        output_attentions: bool = False,
    ):
        if not runs_fused(self._rule, self, hidden_states):
            return super(new.CLIPLayer, self).forward(
                hidden_states, attention_mask, causal_attention_mask, output_attentions
            )
        out = self._layer(
            hidden_states,
            attention_mask=attention_mask,
            causal_attention_mask=causal_attention_mask,
            output_attentions=output_attentions,
        )
        return out if output_attentions else out[:1]


def cut_children(own: dict[str, type[nn.Module]], prefix: str, inner: str) -> dict[str, tuple[type[nn.Module], ...]]:
    """Return the bypassed children of a layer whose attention and MLP are cut into parts; ``inner`` attends."""
    linears = {f"attention.{inner}.{name}": (nn.Linear,) for name in ("query", "key", "value")}
    return {
        "attention": (own[f"{prefix}Attention"],),
        f"attention.{inner}": (own[f"{prefix}SelfAttention"],),
        **linears,
        f"attention.{inner}.dropout": (nn.Dropout,),
        "attention.output": (own[f"{prefix}SelfOutput"],),
        "attention.output.dense": (nn.Linear,),
        "attention.output.dropout": (nn.Dropout,),
        "output": (own[f"{prefix}Output"],),
        "output.dense": (nn.Linear,),
        "output.dropout": (nn.Dropout,),
    }


def cut_attention(attention: nn.Module, inner: str) -> records.Attention:
    """Read the attention of such a layer, with the three projections packed."""
    attn, output = attention._modules[inner], attention.output
    return records.Attention(
        new.packed(*map(records.linear, (attn.query, attn.key, attn.value))),
        records.linear(output.dense),
        attn.num_attention_heads,
        attn.attention_head_size,
        attn_drop=records.dropout(attn.dropout),
        proj_drop=records.dropout(output.dropout),
    )


def cut_mlp(layer: nn.Module) -> records.Mlp:
    """Read the MLP of such a layer."""
    return records.Mlp(
        records.linear(layer.intermediate.dense),
        records.linear(layer.output.dense),
        activation(layer.intermediate),
        drop2=records.dropout(layer.output.dropout),
    )
