"""Mixins for the layers of transformers' ViTDet, and the vision layers of its SAM, SAM-HQ, GOT-OCR 2 and SLANeXt; see
``__init__``.

As Swin's, a layer reads its attention: only then need no window be padded or cut in memory.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._images import channels_first, tokens_of, tokens_of_channels_first
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import PARAMETERS, runs_fused
from vitkernels.swap._windows import sam_positions
from vitkernels.swap.hf import _mixins as new
from vitkernels.swap.hf._mixins import Kind


class VisionAttention(Kind):
    """Attention over an image or a window (B, Y, X, C), by PyTorch's SDPA; it drops no weights."""

    _takes = frozenset({"hidden_states", "output_attentions"})
    _options: ClassVar = {
        "bypassed": {"qkv": (nn.Linear,), "proj": (nn.Linear,)},
        "optional_parameters": frozenset({"rel_pos_h", "rel_pos_w"}),
        "attributes": frozenset({"num_attention_heads", "scale", "dropout", "use_rel_pos"}),
        "limit": lambda attn: _limit(attn),
    }

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False):
        if output_attentions or not runs_fused(self._rule, self, hidden_states) or hidden_states.ndim != 4:
            return super().forward(hidden_states, output_attentions)
        attn = _read(self, tuple(hidden_states.shape[1:3]), 0)
        return fused.attention(attn, tokens_of(hidden_states)).view(hidden_states.shape), None


class MlpBlock(Kind):
    """``lin2(act(lin1(x)))``."""

    _takes = frozenset({"hidden_states"})
    _options: ClassVar = new.mlp_options("act", "lin1", "lin2")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states)
        return fused.mlp(_mlp(self), hidden_states)


class VisionLayer(Kind):
    """A pre-norm layer on (B, Y, X, C), in windows or over the whole image."""

    _takes = frozenset({"hidden_states"})
    _options: ClassVar = {
        "bypassed": {"layer_norm1": (nn.LayerNorm,), "layer_norm2": (nn.LayerNorm,)},
        "attributes": frozenset({"window_size", "gradient_checkpointing"}),
    }
    _parts: ClassVar = {"attn": VisionAttention, "mlp": MlpBlock}

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states) or hidden_states.ndim != 4:
            return super().forward(hidden_states)
        return self._run(hidden_states)

    def _read_attention(self, image: tuple[int, int]) -> records.Attention:
        return _read(self.attn, image, self.window_size)

    def _run(self, x: Tensor) -> Tensor:
        block = records.Block(
            records.norm(self.layer_norm1),
            self._read_attention(tuple(x.shape[1:3])),
            records.norm(self.layer_norm2),
            _mlp(self.mlp),
        )
        return fused.block(block, tokens_of(x)).view(x.shape)


class TupleVisionLayer(VisionLayer):
    """:class:`VisionLayer` of early releases, which returns a tuple."""

    _takes = VisionLayer._takes | {"output_attentions"}

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False):
        if output_attentions or not runs_fused(self._rule, self, hidden_states) or hidden_states.ndim != 4:
            return super(VisionLayer, self).forward(hidden_states, output_attentions)
        return (self._run(hidden_states),)


class EagerVisionLayer(VisionLayer):
    """GOT-OCR 2's and SLANeXt's :class:`VisionLayer`, whose attention has no other implementation than eager.

    The layer does not use the weights that the attention returns. Who calls the attention gets them: it is not swapped.
    """

    _options: ClassVar = VisionLayer._options | {"limit": lambda layer: _limit(layer.attn)}
    _parts: ClassVar = {"mlp": MlpBlock}

    @staticmethod
    def _children(own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        attn = own[f"{prefix}VisionAttention"]
        PARAMETERS[attn] = frozenset({"rel_pos_h", "rel_pos_w"})
        return {"attn": (attn,), "attn.qkv": (nn.Linear,), "attn.proj": (nn.Linear,)}

    def _read_attention(self, image: tuple[int, int]) -> records.Attention:
        attn = self.attn
        drop = attn.dropout if attn.training else 0.0
        return super()._read_attention(image)._replace(scale=attn.scale, attn_drop=drop)


class TupleEagerVisionLayer(TupleVisionLayer, EagerVisionLayer):
    """:class:`EagerVisionLayer` of early releases, which returns a tuple."""


class VitDetAttention(Kind):
    """ViTDet's attention over an image or a window (B, Y, X, C)."""

    _takes = frozenset({"hidden_state", "output_attentions"})
    _options: ClassVar = {
        "bypassed": {"qkv": (nn.Linear,), "proj": (nn.Linear,)},
        "optional_parameters": frozenset({"rel_pos_h", "rel_pos_w"}),
        "attributes": frozenset({"num_heads", "scale", "use_relative_position_embeddings"}),
        "limit": lambda attn: head_dim_limit(attn.qkv.out_features // (3 * attn.num_heads)),
    }

    def forward(self, hidden_state: Tensor, output_attentions: bool = False):
        if output_attentions or not runs_fused(self._rule, self, hidden_state) or hidden_state.ndim != 4:
            return super().forward(hidden_state, output_attentions)
        attn = _read_vitdet(self, tuple(hidden_state.shape[1:3]), 0)
        return (fused.attention(attn, tokens_of(hidden_state)).view(hidden_state.shape),)


class VitDetMlp(new.Mlp):
    """ViTDet's MLP, with dropout behind both layers."""

    _takes = frozenset({"x"})
    _options: ClassVar = new.mlp_options("act", "fc1", "fc2")
    _options["bypassed"]["drop"] = (nn.Dropout,)

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, x):
            return super().forward(x)
        return fused.mlp(_vitdet_mlp(self), x)


class VitDetLayer(Kind):
    """ViTDet's pre-norm layer on (B, C, Y, X), in windows or over the whole image; its convolutions stay."""

    _takes = frozenset({"hidden_states", "head_mask", "output_attentions"})
    _options: ClassVar = {
        "bypassed": {"norm1": (nn.LayerNorm,), "norm2": (nn.LayerNorm,)},
        "called": frozenset({"residual"}),
        "attributes": frozenset({"window_size", "use_residual_block", "gradient_checkpointing"}),
    }
    _parts: ClassVar = {"attention": VitDetAttention, "mlp": VitDetMlp}

    @staticmethod
    def _children(own: dict[str, type[nn.Module]], prefix: str) -> dict[str, tuple[type[nn.Module], ...]]:
        return {"drop_path": (own[f"{prefix}DropPath"], nn.Identity)}

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        asked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        if asked or not runs_fused(self._rule, self, hidden_states) or hidden_states.ndim != 4:
            return super().forward(hidden_states, *args, **kwargs)
        image, x = tuple(hidden_states.shape[2:]), tokens_of_channels_first(hidden_states)
        attn = _read_vitdet(self.attention, image, self.window_size)
        branch = fused.attention(attn, fused.norm(records.norm(self.norm1), x))
        x = new.behind_attention(
            branch, x, records.norm(self.norm2), _vitdet_mlp(self.mlp), (None, None), self.drop_path
        )
        out = channels_first(x, image)
        return (self.residual(out) if self.use_residual_block else out,)


def _read_vitdet(attn: nn.Module, image: tuple[int, int], window_size: int) -> records.Attention:
    positions = sam_positions(attn, attn.use_relative_position_embeddings, image, window_size)
    return read_attention(attn, attn.num_heads, positions, attn.scale)


def _vitdet_mlp(mlp: nn.Module) -> records.Mlp:
    p = records.dropout(mlp.drop)
    return new._mlp(mlp)._replace(drop1=p, drop2=p)


def _read(attn: nn.Module, image: tuple[int, int], window_size: int) -> records.Attention:
    """Read ``attn`` in windows, or over the ``image``, for which its tables are resized."""
    # PyTorch's attention, which it calls, scales by 1/√D whatever ``scale`` is.
    return read_attention(attn, attn.num_attention_heads, sam_positions(attn, attn.use_rel_pos, image, window_size))


def read_attention(
    attn: nn.Module, heads: int, positions: records.Decomposed | records.Windows | None, scale: float | None = None
) -> records.Attention:
    """Read an attention that has ``qkv``, packed, and ``proj``."""
    qkv = records.linear(attn.qkv)
    head_dim = qkv.weight.shape[0] // (3 * heads)
    return records.Attention(qkv, records.linear(attn.proj), heads, head_dim, scale, positions=positions)


def _mlp(mlp: nn.Module) -> records.Mlp:
    return records.Mlp(records.linear(mlp.lin1), records.linear(mlp.lin2), new.activation(mlp))


def _limit(attn: nn.Module) -> str | None:
    return head_dim_limit(attn.qkv.out_features // (3 * attn.num_attention_heads))
