"""Rules for torchvision's MaxViT: its layers of partition and attention. Its convolutions stay."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.maxvit import (
    PartitionAttentionLayer,
    RelativePositionalMultiHeadAttention,
    SwapAxes,
    WindowDepartition,
    WindowPartition,
)
from torchvision.ops import StochasticDepth

from vitkernels.layers import fused, records
from vitkernels.swap._images import channels_first, tokens_of_channels_first
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.torchvision import drop_path, drop_path_limit


class FusedRelativePositionalMultiHeadAttention(RelativePositionalMultiHeadAttention):
    """torchvision's RelativePositionalMultiHeadAttention on (B, windows, tokens, C), with a table of biases."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(ATTENTION, self, x) and x.ndim == 4 and x.shape[2] == self.size**2 == self.max_seq_len:
            table = records.parameter(self, "relative_position_bias_table")
            attn = _attention(self)._replace(positions=records.Relative((self.size, self.size), table))
            return fused.attention(attn, x.flatten(0, 1)).view(x.shape)
        return super().forward(x)


class FusedPartitionAttentionLayer(PartitionAttentionLayer):
    """torchvision's PartitionAttentionLayer, a pre-norm block with attention in windows or over a grid."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(LAYER, self, x) and _fits(self, x):
            image = tuple(x.shape[2:])
            return channels_first(fused.block(_block(self, image), tokens_of_channels_first(x)), image)
        return super().forward(x)


def _fits(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether x consists of windows of the size that the bias is for; else the original mixes up or raises."""
    size, p = layer.attn_layer[1].size, layer.p
    if x.ndim != 4 or tuple(x.shape[2:]) != tuple(layer.grid_size) or any(n % p for n in layer.grid_size):
        return False
    windows = [n // p for n in layer.grid_size] if layer.partition_type == "grid" else [p, p]
    return windows == [size, size]


def _attention(attn: nn.Module) -> records.Attention:
    children = attn._modules
    qkv, proj = records.linear(children["to_qkv"]), records.linear(children["merge"])
    return records.Attention(qkv, proj, attn.n_heads, attn.head_dim, attn.scale_factor)


def _block(layer: nn.Module, image: tuple[int, int]) -> records.Block:
    children = layer._modules
    norm1, attn, drop = children["attn_layer"]._modules.values()
    norm2, fc1, act, fc2, drop2 = children["mlp_layer"]._modules.values()
    table = records.parameter(attn, "relative_position_bias_table")
    windows = records.Windows(image, (attn.size, attn.size), bias_table=table, grid=layer.partition_type == "grid")
    mlp = records.Mlp(
        records.linear(fc1), records.linear(fc2), records.activation_name(act), drop2=records.dropout(drop2)
    )
    path = drop_path(children["stochastic_dropout"])
    return records.Block(
        records.norm(norm1),
        _attention(attn)._replace(proj_drop=records.dropout(drop), positions=windows),
        records.norm(norm2),
        mlp,
        drop_path1=path,
        drop_path2=path,
    )


def _attention_limit(attn: nn.Module) -> str | None:
    return head_dim_limit(attn.head_dim)


def _layer_limit(layer: nn.Module) -> str | None:
    return drop_path_limit(layer.stochastic_dropout)


ATTENTION = Rule(
    RelativePositionalMultiHeadAttention,
    FusedRelativePositionalMultiHeadAttention,
    bypassed={"to_qkv": (nn.Linear,), "merge": (nn.Linear,)},
    parameters=frozenset({"relative_position_bias_table"}),
    attributes=frozenset({"n_heads", "head_dim", "size", "max_seq_len", "scale_factor"}),
    limit=_attention_limit,
    limited_by=("head_dim",),
)
LAYER = Rule(
    PartitionAttentionLayer,
    FusedPartitionAttentionLayer,
    bypassed={
        "partition_op": (WindowPartition,),
        "departition_op": (WindowDepartition,),
        "partition_swap": (nn.Identity, SwapAxes),
        "departition_swap": (nn.Identity, SwapAxes),
        "attn_layer": (nn.Sequential,),
        "attn_layer.0": (nn.LayerNorm,),
        "attn_layer.1": (RelativePositionalMultiHeadAttention,),
        "attn_layer.2": (nn.Dropout,),
        "mlp_layer": (nn.Sequential,),
        "mlp_layer.0": (nn.LayerNorm,),
        "mlp_layer.1": (nn.Linear,),
        "mlp_layer.2": (nn.GELU,),
        "mlp_layer.3": (nn.Linear,),
        "mlp_layer.4": (nn.Dropout,),
        "stochastic_dropout": (StochasticDepth,),
    },
    attributes=frozenset({"n_heads", "head_dim", "n_partitions", "partition_type", "grid_size", "p", "g"}),
    limit=_layer_limit,
    limited_by=("stochastic_dropout.mode",),
)
add(ATTENTION, LAYER)
