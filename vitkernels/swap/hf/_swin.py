"""Mixins for the layers and patch merging of transformers' Swin Transformers; see the folder's ``__init__``.

Unlike the other layers, these read their attention, too: only then need no window be rolled, padded, cut or masked in
memory. The weights of the three projections are packed at each call, because the windows are read from packed queries,
keys and values, and there are more tokens than channels.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers.windows import continuous_bias, cosine_scale
from vitkernels.swap import _patch_merging
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import PARAMETERS, runs_fused
from vitkernels.swap._windows import is_shift
from vitkernels.swap.hf import _mixins as new
from vitkernels.swap.hf import _mixins_4 as old
from vitkernels.swap.hf._mixins import Kind

Pair = tuple[int, int]


class _Layer(Kind):
    """A layer within windows.

    Attributes:
        _resizes: Whether it fits its windows to each image, unless it is told to ``always_partition``.
        _behind: What it returns behind its output.
    """

    _resizes: ClassVar = True
    _behind: ClassVar = ()

    _options: ClassVar = {
        "bypassed": {"layernorm_before": (nn.LayerNorm,), "layernorm_after": (nn.LayerNorm,)},
        "called": frozenset({"drop_path"}),
        "attributes": frozenset(
            {"window_size", "shift_size", "input_resolution", "chunk_size_feed_forward", "gradient_checkpointing"}
        ),
    }

    def forward(self, hidden_states: Tensor, input_dimensions: Pair, *args, **kwargs):
        given, attn = dict(zip(self._arguments[2:], args, strict=False)) | kwargs, None
        if self._fuses(hidden_states, given):
            if self._resizes and not given.get("always_partition"):
                self.set_shift_and_window_size(input_dimensions)
            attn = self._attention(hidden_states, input_dimensions)
        if attn is None:
            return super().forward(hidden_states, input_dimensions, *args, **kwargs)
        return self._run(hidden_states, attn), *self._behind

    def _run(self, x: Tensor, attn: records.Attention) -> Tensor:
        """Run a pre-norm layer, which drops paths of its attention alone."""
        branch = fused.attention(attn, fused.norm(records.norm(self.layernorm_before), x))
        normed, x = fused.add_norm(records.norm(self.layernorm_after), self.drop_path(branch), x)
        return fused.mlp(self._mlp()._replace(fp8=records.runs_fp8(self)), normed, residual=x)

    def _fuses(self, x: Tensor, given: dict[str, object]) -> bool:
        harmless = new._HARMLESS | {"always_partition"}
        if any(value is not None and value is not False for name, value in given.items() if name not in harmless):
            return False
        return x.ndim == 3 and runs_fused(self._rule, self, x)

    def _within(
        self, attn: records.Attention, x: Tensor, image: Pair, window: Pair, **more: Tensor | int
    ) -> records.Attention:
        """Return ``attn`` within windows of ``image``; None for what transformers would refuse."""
        size, shift = (self.window_size,) * 2, (self.shift_size,) * 2
        table = more["bias_table"]
        fits = size == tuple(window) and is_shift(shift, size) and image[0] * image[1] == x.shape[1]
        if not fits or table.shape[1] != attn.num_heads:
            return None
        return attn._replace(positions=records.Windows(tuple(image), size, shift, roll_padded=True, **more))


class SwinLayer(_Layer):
    """Swin's layer, whose attention has one of transformers' implementations, and which returns a pair."""

    _takes = frozenset({"hidden_states", "input_dimensions", "always_partition", "kwargs"})
    _options: ClassVar = _Layer._options | {
        "bypassed": _Layer._options["bypassed"] | {"dropout": (nn.Dropout,)},
        "limit": lambda layer: new._attention_limit(layer.attention),
    }
    _parts: ClassVar = {"mlp": new.Mlp}
    _behind: ClassVar = (None,)

    @staticmethod
    def _children(own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        bias = own[f"{prefix}RelativePositionBias"]
        PARAMETERS[bias] = frozenset({"relative_position_bias_table"})
        linears = {f"attention.{name}_proj": (nn.Linear,) for name in "qkvo"}
        return {"attention": (own[f"{prefix}Attention"],), **linears, "attention.relative_position_bias": (bias,)}

    @staticmethod
    def _products(layer: nn.Module) -> records.Mlp:
        return new._mlp(layer.mlp)

    def _mlp(self) -> records.Mlp:
        return new._mlp(self.mlp)._replace(drop2=records.dropout(self.dropout))

    def _attention(self, x: Tensor, image: Pair) -> records.Attention | None:
        attn, bias = self.attention, self.attention.relative_position_bias
        read = records.Attention(
            new.packed(*map(records.linear, (attn.q_proj, attn.k_proj, attn.v_proj))),
            records.linear(attn.o_proj),
            attn.num_attention_heads,
            attn.head_dim,
            attn.scaling,
            attn_drop=attn.attention_dropout if attn.training else 0.0,
            proj_drop=records.dropout(self.dropout),
        )
        return self._within(read, x, image, bias.window_size, bias_table=bias.relative_position_bias_table)


class TupleSwinLayer(_Layer):
    """Donut's layer, and until 4.57 Swin's, which return a tuple and cut their attention and MLP into parts."""

    _takes = frozenset({"hidden_states", "input_dimensions", "head_mask", "output_attentions", "always_partition"})
    _options: ClassVar = _Layer._options | {
        "limit": lambda layer: head_dim_limit(layer.attention.self.attention_head_size),
    }
    _parts: ClassVar = {"intermediate": old.Intermediate}
    _parameters_of_attention: ClassVar = frozenset({"relative_position_bias_table"})

    @classmethod
    def _children(cls, own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        PARAMETERS[own[f"{prefix}SelfAttention"]] = cls._parameters_of_attention
        return old.cut_children(own, prefix, "self")

    @staticmethod
    def _products(layer: nn.Module) -> records.Mlp:
        return old.cut_mlp(layer)

    def _mlp(self) -> records.Mlp:
        return old.cut_mlp(self)

    def _attention(self, x: Tensor, image: Pair) -> records.Attention | None:
        attn = self.attention.self
        table = attn.relative_position_bias_table
        return self._within(self._read(), x, image, attn.window_size, bias_table=table)

    def _read(self) -> records.Attention:
        return old.cut_attention(self.attention, "self")


class MaskFormerSwinLayer(TupleSwinLayer):
    """MaskFormer's layer, whose windows are as large as they were made."""

    _takes = frozenset({"hidden_states", "input_dimensions", "head_mask", "output_attentions"})
    _resizes: ClassVar = False


class Swinv2Layer(TupleSwinLayer):
    """Swin V2's layer, with norms after the branches, cosine attention, and a bias that an MLP makes."""

    _takes = MaskFormerSwinLayer._takes
    _resizes: ClassVar = False
    _parameters_of_attention = frozenset({"logit_scale"})
    _products = None

    @classmethod
    def _children(cls, own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        # The MLP is called, but for the report it belongs to the attention.
        return super()._children(own, prefix) | {"attention.self.continuous_position_bias_mlp": (nn.Sequential,)}

    def _run(self, x: Tensor, attn: records.Attention) -> Tensor:
        x = x + self.drop_path(fused.norm(records.norm(self.layernorm_before), fused.attention(attn, x)))
        return x + self.drop_path(fused.norm(records.norm(self.layernorm_after), fused.mlp(self._mlp(), x)))

    def _attention(self, x: Tensor, image: Pair) -> records.Attention | None:
        attn = self.attention.self
        table = continuous_bias(attn.continuous_position_bias_mlp, attn.relative_coords_table, attn.num_attention_heads)
        scale = cosine_scale(attn.logit_scale)
        more = {"bias_table": table, "logit_scale": scale, "mask_value": -200}  # transformers adds its −100 twice
        return self._within(self._read(), x, image, attn.window_size, **more)


class PatchMerging(Kind):
    """Swin's patch merging."""

    _takes = frozenset({"input_feature", "input_dimensions"})
    _options: ClassVar = {
        "bypassed": _patch_merging.CHILDREN,
        "adapts": False,
        "attributes": frozenset({"input_resolution", "dim"}),
    }
    _norm_last: ClassVar = False

    def forward(self, input_feature: Tensor, input_dimensions: Pair) -> Tensor:
        x, (Y, X) = input_feature, input_dimensions
        if runs_fused(self._rule, self, x) and x.ndim == 3 and x.shape[1] == Y * X:
            image = x.unflatten(1, (Y, X))
            if _patch_merging.has_patches(self, image):
                return _patch_merging.merge(self, image, norm_last=self._norm_last).flatten(1, 2)
        return super().forward(input_feature, input_dimensions)


class PatchMergingV2(PatchMerging):
    """Swin V2's patch merging, with its norm behind the product."""

    _norm_last: ClassVar = True


class PatchEmbeddings(Kind):
    """Swin's patch embeddings, which pad an image and return its rows and columns of patches, too."""

    _takes = frozenset({"pixel_values"})
    _options = new.embeddings_options("projection")
    _options["attributes"] |= {"grid_size"}

    def forward(self, pixel_values: Tensor):
        conv = self.projection
        if not (runs_fused(self._rule, self, pixel_values) and new.has_patches(conv, pixel_values)):
            return super().forward(pixel_values)
        pixel_values = self.maybe_pad(pixel_values, *pixel_values.shape[2:])
        image = tuple(n // patch for n, patch in zip(pixel_values.shape[2:], conv.kernel_size, strict=True))
        return new.patches(conv, pixel_values), image
