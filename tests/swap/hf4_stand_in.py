"""The layers of transformers 4.50 to 4.57 under its names, where no such release is installed.

Written anew for these tests: the parts, their names, what the forwards take and return, and the arithmetic are those
of modeling_vit, modeling_dinov2, modeling_clip and modeling_siglip; nothing else is there. By prefix:

    ViT, Dinov2             4.56 and 4.57: tensors are returned
    EarlyViT, EarlyDinov2   4.50 to 4.55: ``output_attentions`` is taken, and tuples are returned
    CLIP                    4.52 to 4.57: two masks, ``output_attentions``, tuples
    Siglip                  4.51 to 4.53: ``output_attentions``, tuples
"""

import types

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


def config(implementation: str = "sdpa", dropout: float = 0.0, drop_path: float = 0.0, swiglu: bool = False):
    return types.SimpleNamespace(
        _attn_implementation=implementation, size=32, heads=2, mlp=128, dropout=dropout, drop_path=drop_path,
        swiglu=swiglu, image=32, patch=16,
    )  # fmt: skip


def attend(module, q, k, v, mask, scaling, dropout, is_causal=False, output_attentions=False):
    """What the interface does: sdpa without weights, or the plain arithmetic with them."""
    if module.config._attn_implementation == "sdpa" and not output_attentions:
        o = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scaling)
        return o.transpose(1, 2), None
    scores = q @ k.transpose(-1, -2) * scaling
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return (weights @ v).transpose(1, 2), weights


class ViTSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.heads
        self.attention_head_size = config.size // config.heads
        self.all_head_size = config.size
        self.dropout_prob = 0.0
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = False
        self.query, self.key, self.value = (nn.Linear(config.size, config.size) for _ in range(3))

    def forward(self, hidden_states, head_mask=None):
        return self.compute(hidden_states, head_mask)

    def compute(self, x, head_mask, output_attentions=False):
        shape = (*x.shape[:-1], -1, self.attention_head_size)
        q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in (self.query, self.key, self.value))
        dropout = self.dropout_prob if self.training else 0.0
        o, weights = attend(self, q, k, v, head_mask, self.scaling, dropout, self.is_causal, output_attentions)
        return o.reshape(*x.shape[:-1], self.all_head_size), weights


class ViTSelfOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.size, config.size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states))


class ViTAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = ViTSelfAttention(config)
        self.output = ViTSelfOutput(config)
        self.pruned_heads = set()

    def forward(self, hidden_states, head_mask=None):
        context, _ = self.attention(hidden_states, head_mask)
        return self.output(context, hidden_states)


class ViTIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.size, config.mlp)
        self.intermediate_act_fn = ACT2FN["gelu"]

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class ViTOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.mlp, config.size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states)) + input_tensor


class ViTLayer(nn.Module):
    attention_class = ViTAttention

    def __init__(self, config):
        super().__init__()
        self.chunk_size_feed_forward = 0
        self.seq_len_dim = 1
        self.attention = self.attention_class(config)
        self.intermediate = ViTIntermediate(config)
        self.output = ViTOutput(config)
        self.layernorm_before = nn.LayerNorm(config.size)
        self.layernorm_after = nn.LayerNorm(config.size)

    def forward(self, hidden_states, head_mask=None):
        return self.behind_attention(self.attention(self.layernorm_before(hidden_states), head_mask), hidden_states)

    def behind_attention(self, attended, x):
        x = attended + x
        return self.output(self.intermediate(self.layernorm_after(x)), x)


class ViTPatchEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image_size, self.patch_size = (config.image, config.image), (config.patch, config.patch)
        self.num_channels, self.num_patches = 3, (config.image // config.patch) ** 2
        self.projection = nn.Conv2d(3, config.size, config.patch, config.patch)

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError("the channels do not match")
        if not interpolate_pos_encoding and tuple(pixel_values.shape[2:]) != self.image_size:
            raise ValueError("the image size doesn't match")
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class Dinov2LayerScale(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.size,), 0.7))

    def forward(self, hidden_state):
        return hidden_state * self.lambda1


class Dinov2DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states):
        if not self.training:
            return hidden_states
        keep = 1 - self.drop_prob
        drawn = keep + torch.rand((len(hidden_states), 1, 1), dtype=hidden_states.dtype, device=hidden_states.device)
        return hidden_states.div(keep) * drawn.floor()


class Dinov2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.size, config.mlp)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(config.mlp, config.size)

    def forward(self, hidden_state):
        return self.fc2(self.activation(self.fc1(hidden_state)))


class Dinov2SwiGLUFFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weights_in = nn.Linear(config.size, 2 * config.mlp)
        self.weights_out = nn.Linear(config.mlp, config.size)

    def forward(self, hidden_state):
        gate, value = self.weights_in(hidden_state).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * value)


class Dinov2SelfAttention(ViTSelfAttention):
    pass


class Dinov2Attention(ViTAttention):
    def __init__(self, config):
        super().__init__(config)
        self.attention = Dinov2SelfAttention(config)
        self.output = Dinov2SelfOutput(config)


class Dinov2SelfOutput(ViTSelfOutput):
    pass


class Dinov2Layer(nn.Module):
    attention_class = Dinov2Attention

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.size)
        self.attention = self.attention_class(config)
        self.layer_scale1 = Dinov2LayerScale(config)
        self.drop_path = Dinov2DropPath(config.drop_path) if config.drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(config.size)
        self.mlp = Dinov2SwiGLUFFN(config) if config.swiglu else Dinov2MLP(config)
        self.layer_scale2 = Dinov2LayerScale(config)

    def forward(self, hidden_states, head_mask=None):
        return self.behind_attention(self.attention(self.norm1(hidden_states), head_mask), hidden_states)

    def behind_attention(self, attended, x):
        x = self.drop_path(self.layer_scale1(attended)) + x
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(x)))) + x


class EarlyViTSelfAttention(ViTSelfAttention):
    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        context, weights = self.compute(hidden_states, head_mask, output_attentions)
        return (context, weights) if output_attentions else (context,)


class EarlyViTAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = EarlyViTSelfAttention(config)
        self.output = EarlyViTSelfOutput(config)
        self.pruned_heads = set()

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        context, *weights = self.attention(hidden_states, head_mask, output_attentions)
        return (self.output(context, hidden_states), *weights)


class EarlyViTSelfOutput(ViTSelfOutput):
    pass


class EarlyViTLayer(ViTLayer):
    attention_class = EarlyViTAttention

    def __init__(self, config):
        super().__init__(config)
        self.intermediate, self.output = EarlyViTIntermediate(config), EarlyViTOutput(config)

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        normed = self.layernorm_before(hidden_states)
        attended, *weights = self.attention(normed, head_mask, output_attentions=output_attentions)
        return (self.behind_attention(attended, hidden_states), *weights)


class EarlyViTIntermediate(ViTIntermediate):
    pass


class EarlyViTOutput(ViTOutput):
    pass


class EarlyDinov2SelfAttention(EarlyViTSelfAttention):
    pass


class EarlyDinov2SelfOutput(ViTSelfOutput):
    pass


class EarlyDinov2Attention(EarlyViTAttention):
    def __init__(self, config):
        super().__init__(config)
        self.attention, self.output = EarlyDinov2SelfAttention(config), EarlyDinov2SelfOutput(config)


class EarlyDinov2MLP(Dinov2MLP):
    pass


class EarlyDinov2Layer(Dinov2Layer):
    attention_class = EarlyDinov2Attention

    def __init__(self, config):
        super().__init__(config)
        self.mlp = EarlyDinov2MLP(config)

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        normed = self.norm1(hidden_states)
        attended, *weights = self.attention(normed, head_mask, output_attentions=output_attentions)
        return (self.behind_attention(attended, hidden_states), *weights)


class SiglipAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_dim, self.num_heads, self.head_dim = config.size, config.heads, config.size // config.heads
        self.scale = self.head_dim**-0.5
        self.dropout = 0.0
        self.is_causal = False
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(config.size, config.size) for _ in range(4))

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        return self.compute(hidden_states, attention_mask, output_attentions)

    def compute(self, x, mask, output_attentions):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        o, weights = attend(self, q, k, v, mask, self.scale, dropout, self.is_causal, output_attentions)
        return self.out_proj(o.flatten(2)), weights if output_attentions else None


class CLIPAttention(SiglipAttention):
    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        if attention_mask is not None and causal_attention_mask is not None:
            attention_mask = attention_mask + causal_attention_mask
        elif causal_attention_mask is not None:
            attention_mask = causal_attention_mask
        return self.compute(hidden_states, attention_mask, output_attentions)


class SiglipMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_fn = ACT2FN["gelu_pytorch_tanh"]
        self.fc1, self.fc2 = nn.Linear(config.size, config.mlp), nn.Linear(config.mlp, config.size)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CLIPMLP(SiglipMLP):
    def __init__(self, config):
        super().__init__(config)
        self.activation_fn = ACT2FN["quick_gelu"]


class SiglipEncoderLayer(nn.Module):
    parts = (SiglipAttention, SiglipMLP)

    def __init__(self, config):
        super().__init__()
        attention, mlp = self.parts
        self.embed_dim = config.size
        self.self_attn, self.mlp = attention(config), mlp(config)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.size), nn.LayerNorm(config.size)

    def forward(self, hidden_states, attention_mask, output_attentions=False):
        return self.compute(hidden_states, output_attentions, attention_mask=attention_mask)

    def compute(self, x, output_attentions, **masks):
        normed = self.layer_norm1(x)
        attended, weights = self.self_attn(hidden_states=normed, output_attentions=output_attentions, **masks)
        x = x + attended
        x = x + self.mlp(self.layer_norm2(x))
        return (x, weights) if output_attentions else (x,)


class CLIPEncoderLayer(SiglipEncoderLayer):
    parts = (CLIPAttention, CLIPMLP)

    def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        masks = {"attention_mask": attention_mask, "causal_attention_mask": causal_attention_mask}
        return self.compute(hidden_states, output_attentions, **masks)
