"""Mixins for data2vec-vision, whose layers release 5 still cuts as BEiT's were cut before."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._rules import runs_fused
from vitkernels.swap.hf import _mixins as new
from vitkernels.swap.hf import _mixins_4 as old


class SelfAttention(new._Attention):
    """The attention without its output projection, with its own bias read from the table, or one mask with a shared."""

    _takes = frozenset(
        {"hidden_states", "output_attentions", "relative_position_bias", "interpolate_pos_encoding", "resolution"}
    )
    _options = new.attention_options("query", "key", "value")
    _options = _options | {
        "bypassed": {**_options["bypassed"], "dropout": (nn.Dropout,)},
        "attributes": _options["attributes"] | {"has_relative_position_bias"},
    }
    _products = None  # its output projection is another module's
    _children = staticmethod(new.BeitLayer._children)

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ):
        mask = relative_position_bias
        if output_attentions or not self._fuses(hidden_states, mask, {}):
            return super().forward(hidden_states, output_attentions, mask, interpolate_pos_encoding, resolution)
        if self.has_relative_position_bias:
            window = tuple(size // self.config.patch_size for size in resolution)
            mask = new.relative_bias(self, hidden_states, mask, window, interpolate_pos_encoding, reads=True)
        children, drop = self._modules, self.config.attention_probs_dropout_prob
        attn = records.Attention(
            tuple(records.linear(children[name]) for name in ("query", "key", "value")),
            None,
            self.num_attention_heads,
            self.attention_head_size,
            attn_drop=drop if self.training else 0.0,
        )
        return new.attend(attn, hidden_states, mask), None


class Output(new.Kind):
    """``dropout(dense(x))``, an MLP's second half; the layer adds the residual."""

    _takes = frozenset({"hidden_states"})
    _options: ClassVar = old.SelfOutput._options

    def forward(self, hidden_states: Tensor, *unused) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states, *unused)
        projected = fused.linear(records.linear(self.dense), hidden_states)
        return F.dropout(projected, self.dropout.p, self.dropout.training)


class SelfOutput(Output):
    """The attention's output projection, which ignores its further arguments."""

    _takes = frozenset({"hidden_states", "input_tensor", "gamma"})

    def forward(self, hidden_states: Tensor, input_tensor: Tensor, gamma: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states, input_tensor, gamma)


class PatchEmbeddings(new.Kind):
    """The patch embedding, which also returns the numbers of rows and columns."""

    _takes = frozenset({"pixel_values"})
    _options = new.embeddings_options("projection")
    _options = _options | {"attributes": _options["attributes"] | {"patch_shape"}}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        conv = self.projection
        # For another number of channels the original raises.
        if not (runs_fused(self._rule, self, pixel_values) and new.has_patches(conv, pixel_values)):
            return super().forward(pixel_values)
        size = tuple(n // patch for n, patch in zip(pixel_values.shape[2:], conv.kernel_size, strict=True))
        return new.patches(conv, pixel_values.to(conv.weight.dtype)), size


class Layer(new.BeitLayer):
    """The layer, whose MLP is two modules and whose attention returns a tuple."""

    _takes = SelfAttention._takes
    _options = new.gamma_options("layernorm_before", "attention")
    _parts: ClassVar = {"intermediate": old.Intermediate, "output": Output}
    _products = None
    _children = staticmethod(new.Kind._children)

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not runs_fused(self._rule, self, hidden_states):
            return super(new.BeitLayer, self).forward(hidden_states, *args, **kwargs)
        branch, *weights = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        mlp = records.Mlp(
            records.linear(self.intermediate.dense),
            records.linear(self.output.dense),
            new.activation(self.intermediate),
            drop2=records.dropout(self.output.dropout),
        )
        gammas = self._parameters.get("lambda_1"), self._parameters.get("lambda_2")
        norm = records.norm(self.layernorm_after)
        return (new.behind_attention(branch, hidden_states, norm, mlp, gammas, self.drop_path), *weights)
