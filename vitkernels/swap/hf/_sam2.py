"""Mixins for the vision encoder of transformers' SAM 2; see ``__init__``. The convolution that cuts patches stays, as
its patches overlap.

As in SAM's layer, a block reads its attention: only then need no window be padded or cut in memory.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap import _hieradet
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import runs_fused
from vitkernels.swap.hf import _mixins as new
from vitkernels.swap.hf import _sam as sam
from vitkernels.swap.hf._mixins import Kind


class MultiScaleAttention(Kind):
    """Attention over an image or a window (B, Y, X, C), with queries that may be pooled."""

    _takes = frozenset({"hidden_states", "kwargs"})
    _options: ClassVar = {
        "bypassed": {"qkv": (nn.Linear,), "proj": (nn.Linear,)},
        "attributes": frozenset(
            {"config", "dim", "dim_out", "is_causal", "num_attention_heads", "query_stride", "scale"}
        ),
        "limit": lambda attn: _attention_limit(attn),
    }

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        if not _fuses(self, hidden_states, kwargs):
            return super().forward(hidden_states, **kwargs)
        pooling = _pooling(self.query_stride)
        return _hieradet.attention(_attention(self), hidden_states, None if pooling is None else pooling.queries)


class FeedForward(Kind):
    """``proj_out(activation(proj_in(x)))``. Those with more layers or a sigmoid, the mask decoder's, stay."""

    _takes = frozenset({"hidden_states"})
    _options: ClassVar = new.mlp_options("activation", "proj_in", "proj_out")
    _options["bypassed"]["layers"] = (nn.ModuleList,)
    _options |= {"attributes": frozenset({"num_layers", "sigmoid_output"}), "limit": lambda mlp: _mlp_limit(mlp)}

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not runs_fused(self._rule, self, hidden_states):
            return super().forward(hidden_states)
        return fused.mlp(_mlp(self), hidden_states)


class MultiScaleBlock(Kind):
    """A pre-norm block on (B, Y, X, C), in windows or over the whole image; the first of a stage may pool."""

    _takes = frozenset({"hidden_states", "kwargs"})
    _options: ClassVar = {
        "bypassed": {
            "layer_norm1": (nn.LayerNorm,),
            "layer_norm2": (nn.LayerNorm,),
            "proj": (nn.Linear, type(None)),
        },
        "attributes": frozenset({"window_size", "dim", "dim_out", "query_stride", "gradient_checkpointing"}),
    }
    _parts: ClassVar = {"attn": MultiScaleAttention, "mlp": FeedForward}

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        if not _fuses(self, hidden_states, kwargs):
            return super().forward(hidden_states, **kwargs)
        block = records.Block(
            records.norm(self.layer_norm1), _attention(self.attn), records.norm(self.layer_norm2), _mlp(self.mlp)
        )
        window = (self.window_size,) * 2 if self.window_size else None
        widening = None if self.dim == self.dim_out else records.linear(self.proj)
        return _hieradet.block(block, hidden_states, window, widening, _pooling(self.query_stride))


def _fuses(module: Kind, x: Tensor, kwargs: dict[str, object]) -> bool:
    # Beside its own is_causal the original takes no other, and raises.
    harmless = new.are_harmless(kwargs) and "is_causal" not in kwargs
    return harmless and x.ndim == 4 and runs_fused(module._rule, module, x)


def _attention(attn: nn.Module) -> records.Attention:
    return sam.read_attention(attn, attn.num_attention_heads, None, attn.scale)


def _attention_limit(attn: nn.Module) -> str | None:
    if attn.is_causal:
        return "its attention is causal"
    return new.implementation_limit(attn) or head_dim_limit(attn.dim_out // attn.num_attention_heads)


def _pooling(stride: tuple[int, int] | None) -> _hieradet.Pooling | None:
    if not stride:
        return None

    def pool(image: Tensor) -> Tensor:
        return F.max_pool2d(image, kernel_size=stride, stride=stride)

    return _hieradet.Pooling(stride, queries=pool, shortcut=pool)


def _mlp(mlp: nn.Module) -> records.Mlp:
    return records.Mlp(records.linear(mlp.proj_in), records.linear(mlp.proj_out), new.activation(mlp))


def _mlp_limit(mlp: nn.Module) -> str | None:
    if len(mlp.layers):
        return f"it has {2 + len(mlp.layers)} layers; the kernels take 2"
    return "a sigmoid follows it" if mlp.sigmoid_output else None
