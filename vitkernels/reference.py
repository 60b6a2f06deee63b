"""Reference implementation of every op in plain PyTorch.

On fp64 inputs it gives the exact results for tests of the kernels; on inputs of the kernels' dtype it gives the error
to compare theirs with. On a CPU the ops run it. Shape letters: B batch, N tokens, C channels, H heads, D head dim,
F hidden features, P patch size, I image channels.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")

E4M3_LARGEST = 448.0
E4M3_SMALLEST_ROW = 2.0**-100  # a row of smaller magnitudes is taken for one of this: the scale's inverse stays finite
E4M3_GROUP = 128  # channels that share a scale where a row has several


def activate(z: Tensor, activation: str | None) -> Tensor:
    """Apply an activation elementwise: GELU with erf or tanh (arXiv 1606.08415), x·σ(1.702 x), SiLU, or none."""
    if activation is None:
        return z
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    if activation == "silu":
        return F.silu(z)
    raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)} or None")


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias over the last dim (arXiv 1607.06450)."""
    weight, bias = _beside(x, weight, bias)
    if weight is None and _mixed(x, bias):  # PyTorch's backward rejects a bias of another dtype without a weight
        weight = torch.ones_like(bias, requires_grad=False)
    if _mixed(x, weight, bias) and not x.is_cpu:  # PyTorch takes half inputs with fp32 parameters only on a CPU
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = residual + drop_path_scale[b] · layer_scale · x``; returns ``(layer_norm(r), r)``."""
    new_residual = _add_branch(x, residual, layer_scale, drop_path_scale)
    return layer_norm(new_residual, weight, bias, eps), new_residual


def merge_patches(x: Tensor) -> Tensor:
    """Put 2 × 2 neighbours of x (B, Y, X, C) side by side, (B, ⌈Y/2⌉, ⌈X/2⌉, 4C); zeros lie beside an odd image."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return torch.cat([x[:, down::2, right::2] for right in (0, 1) for down in (0, 1)], -1)


def patch_merging(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_last: bool = False,
) -> Tensor:
    """A linear layer on the LayerNorm of :func:`merge_patches` (arXiv 2103.14030); with ``norm_last`` the LayerNorm of
    a linear layer on them (2111.09883)."""
    x = merge_patches(x)
    if norm_last:
        return layer_norm(linear(x, weight, bias), norm_weight, norm_bias, eps)
    return linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-6) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dim (arXiv 1910.07467)."""
    (weight,) = _beside(x, weight)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y.to(x.dtype) if _mixed(x, weight) else y


def _beside(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Return a norm's parameters in a dtype that PyTorch accepts: that of ``x``, or fp32 for a half-precision ``x``."""
    if not _mixed(x, *parameters):
        return list(parameters)
    dtype = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    return [None if p is None else p.to(dtype) for p in parameters]


def _mixed(x: Tensor, *parameters: Tensor | None) -> bool:
    """Tell whether a norm's parameters have another dtype than ``x`` and autocast does not cast them."""
    autocast = (x.is_cuda or x.is_xpu) and torch.is_autocast_enabled(x.device.type)
    return not autocast and any(p is not None and p.dtype != x.dtype for p in parameters)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = residual + drop_path_scale[b] · layer_scale · x``; returns ``(rms_norm(r), r)``."""
    new_residual = _add_branch(x, residual, layer_scale, drop_path_scale)
    return rms_norm(new_residual, weight, eps), new_residual


def _add_branch(
    x: Tensor, residual: Tensor | None, layer_scale: Tensor | None, drop_path_scale: Tensor | None
) -> Tensor:
    if layer_scale is not None:
        x = x * layer_scale
    if drop_path_scale is not None:
        x = scale_samples(x, drop_path_scale)
    return x if residual is None else residual + x


def scale_samples(x: Tensor, scale: Tensor) -> Tensor:
    """Scale each sample of x (B, ...) by its number in ``scale`` (B,), as DropPath does (arXiv 1603.09382)."""
    return x * scale.reshape(-1, *[1] * (x.ndim - 1))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """``residual + layer_scale · activation(x Wᵀ + bias)``."""
    y = activate(F.linear(x, weight, bias), activation)
    if layer_scale is not None:
        y = y * layer_scale
    return y if residual is None else residual + y


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> Tensor:
    """``residual + drop_path_scale[b] · layer_scale · (activation(x W1ᵀ + b1) W2ᵀ + b2)``, W1 (F, C), W2 (C', F)."""
    y = linear(linear(x, w1, b1, activation=activation), w2, b2)
    return _add_branch(y, residual, layer_scale, drop_path_scale)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    lora_x: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """``residual + layer_scale · activation(x Wᵀ + bias + x Aᵀ Bᵀ)`` (arXiv 2106.09685), A of ``lora_x`` if given."""
    z = F.linear(x, weight, bias) + F.linear(F.linear(x if lora_x is None else lora_x, lora_a), lora_b)
    y = activate(z, activation)
    if layer_scale is not None:
        y = y * layer_scale
    return y if residual is None else residual + y


def lora_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    lora1: tuple[Tensor, Tensor] | None = None,
    lora2: tuple[Tensor, Tensor] | None = None,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> Tensor:
    """:func:`mlp` with LoRA's A and B (arXiv 2106.09685) beside its first layer, its second, or both."""
    for w, b, lora, act in ((w1, b1, lora1, activation), (w2, b2, lora2, None)):
        x = linear(x, w, b, activation=act) if lora is None else lora_linear(x, w, b, *lora, activation=act)
    return _add_branch(x, residual, layer_scale, drop_path_scale)


def swiglu_mlp(
    x: Tensor,
    w12: Tensor | tuple[Tensor, Tensor],
    b12: Tensor | tuple[Tensor | None, Tensor | None] | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    activation: str | None = "silu",
    gate_last: bool = False,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """``residual + layer_scale · (norm(activation(g) · v) W3ᵀ + b3)`` with ``g, v = x W12ᵀ + b12`` (arXiv 2002.05202).

    W12 (2F, C) holds the gate's rows, then the value's (``gate_last``: the other way round), or is a pair of (F, C);
    W3 is (C', F); ``norm`` is LayerNorm's weight, bias and eps.
    """
    if isinstance(w12, Tensor):
        gate, value = linear(x, w12, b12).chunk(2, dim=-1)
    else:
        gate, value = (linear(x, w, b) for w, b in zip(w12, b12 or (None, None), strict=True))
    if gate_last:
        gate, value = value, gate
    hidden = activate(gate, activation) * value
    if norm is not None:
        hidden = layer_norm(hidden, *norm)
    return linear(hidden, w3, b3, residual=residual, layer_scale=layer_scale)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, num_prefix_tokens: int = 0) -> Tensor:
    """``x · cos + rot(x) · sin`` on (B, H, N, D), except on the prefix tokens (arXiv 2104.09864).

    rot maps the pair (a, b) to (−b, a); channels 2j and 2j + 1 are a pair if ``interleaved``, else j and j + D/2.
    """
    prefix, x = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    rotated = torch.stack([-pairs[..., 1], pairs[..., 0]], -1)
    rotated = rotated.flatten(-2) if interleaved else rotated.transpose(-1, -2).flatten(-2)
    return torch.cat([prefix, (x * cos + rotated * sin).to(x.dtype)], dim=2)


def qk_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """LayerNorm (``kind`` "layer") or RMSNorm ("rms", arXiv 1910.07467) of each head's channels, the last dim."""
    return rms_norm(x, weight, eps) if kind == "rms" else layer_norm(x, weight, bias, eps)


def prepare_qk(
    q: Tensor, k: Tensor, rope_tables: tuple | None, num_prefix_tokens: int, q_norm: tuple | None, k_norm: tuple | None
) -> tuple[Tensor, Tensor]:
    """Apply QK-norms ``(weight, bias, eps, rms)`` and :func:`rope` to queries and keys (B, H, N, D)."""
    prepared = []
    for x, norm in ((q, q_norm), (k, k_norm)):
        if norm is not None:
            x = qk_norm(x, norm[0], norm[1], norm[2], "rms" if norm[3] else "layer")
        if rope_tables is not None:
            x = rope(x, *rope_tables, num_prefix_tokens=num_prefix_tokens)
        prepared.append(x)
    return prepared[0], prepared[1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope: tuple | None = None,
    num_prefix_tokens: int = 0,
    q_norm: tuple | None = None,
    k_norm: tuple | None = None,
    dropout_scale: Tensor | None = None,
) -> Tensor:
    """``softmax(scale · q kᵀ + mask + key_bias) v`` over (B, H, N, D); scale is 1/√D unless given (arXiv 1706.03762).

    ``key_bias`` (B, N) is added to the scores of all heads and queries (arXiv 2210.09461). Masks and causality are as
    in PyTorch; a query that attends to no key gives 0. ``rope`` is ``(cos, sin, interleaved)``, a norm
    ``(weight, bias, eps, rms)``. ``dropout_scale`` (B, H, N, N) holds the factors that a dropout has drawn, and
    replaces ``dropout_p``.
    """
    q, k = prepare_qk(q, k, rope, num_prefix_tokens, q_norm, k_norm)
    if key_bias is not None:
        attn_mask = biased_mask(attn_mask, key_bias)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * max(0, 2 - attn_mask.ndim)]  # PyTorch accepts no mask with one dim
        if attn_mask.is_floating_point() and attn_mask.dtype != q.dtype:
            attn_mask = added_mask(attn_mask, torch.promote_types(q.dtype, torch.float32))
    if is_causal and attn_mask is not None:
        behind = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if attn_mask.is_floating_point():
            attn_mask = attn_mask.masked_fill(~behind, float("-inf"))
        else:
            attn_mask = attn_mask & behind
        is_causal = False
    if dropout_scale is None:
        # Autocast would cast an fp32 mask to half precision, which turns its finfo.min into -inf.
        wider = attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype)
        with torch.autocast(q.device.type, enabled=False) if wider else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, scale=scale, is_causal=is_causal, dropout_p=dropout_p
            )
    weights = attention_weights(q, k, attn_mask=attn_mask, scale=scale, is_causal=is_causal)
    return (weights * dropout_scale.to(q.dtype)).to(v.dtype) @ v


def biased_mask(mask: Tensor | None, key_bias: Tensor) -> Tensor:
    """Return a floating mask, at least fp32 beside another, that adds ``key_bias`` (B, N) besides ``mask``."""
    bias = key_bias[:, None, None]
    if mask is None:
        return bias
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating ``mask`` to ``dtype``; finite values stay finite, unlike finfo(fp64).min in a plain cast."""
    limits = torch.finfo(dtype)
    if torch.finfo(mask.dtype).max <= limits.max:
        return mask.to(dtype)
    constant = mask.detach()
    nearest = mask - constant + constant.clamp(limits.min, limits.max)  # clamps, but passes gradients unchanged
    return torch.where(constant.isinf(), mask, nearest).to(dtype)


def attention_weights(
    q: Tensor, k: Tensor, *, attn_mask: Tensor | None = None, key_bias: Tensor | None = None,
    scale: float | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """``softmax(scale · q kᵀ + mask + key_bias)``, (B, H, N, N); the row of a query that attends to no key is 0."""
    if key_bias is not None:
        attn_mask = biased_mask(attn_mask, key_bias)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        behind = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~behind, float("-inf"))
    if attn_mask is not None:
        if attn_mask.is_floating_point():
            wide = torch.promote_types(q.dtype, torch.float32)  # fp16 sums with finfo.min overflow
            scores = scores.to(wide) + added_mask(attn_mask, wide)
        else:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    was_widened = attn_mask is not None and attn_mask.is_floating_point()
    return weights.to(q.dtype) if was_widened else weights


def attention_qkvpacked(qkv: Tensor, **options) -> Tensor:
    """:func:`attention` on the output of a qkv projection, (B, N, 3, H, D); returns (B, N, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q, k, v, **options).transpose(1, 2)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, key_bias: Tensor | None = None, **options
) -> Tensor:
    """:func:`attention` within each packed image of (T, H, D): tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.

    ``key_bias`` is (T,). Tokens of no image give 0.
    """
    bounds = cu_seqlens.tolist()
    out = []
    for start, end in itertools.pairwise(bounds):
        image = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        bias = None if key_bias is None else key_bias[None, start:end]
        out.append(attention(*image, key_bias=bias, **options).squeeze(0).transpose(0, 1))
    dtype = out[0].dtype if out else q.dtype  # under autocast it differs from q's
    return torch.cat([q[: bounds[0]].to(dtype) * 0, *out, q[bounds[-1] :].to(dtype) * 0])


def dropout_scale(seed: int, shape: tuple[int, int, int, int], p: float) -> Tensor:
    """Return the attention kernels' dropout factors (B, H, N_q, N_kv), fp64: 1/(1 − p), or 0 with probability p.

    Philox4x32-10 (Salmon et al., SC 2011) with ``seed`` as key on the counter (key, query, image · H + head, 0).
    """
    low = 0xFFFFFFFF
    B, H, N_q, N_kv = shape

    def multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
        # A product of 32 by 32 bits would overflow int64, so multiply in parts of 16 bits.
        lower, upper = (a & 0xFFFF) * constant, (a >> 16) * constant
        carried = (lower >> 16) + upper
        return carried >> 16, ((carried & 0xFFFF) << 16) | (lower & 0xFFFF)

    c0 = torch.arange(N_kv).expand(shape)
    c1 = torch.arange(N_q)[:, None].expand(shape)
    c2 = torch.arange(B * H).view(B, H, 1, 1).expand(shape)
    c3 = torch.zeros(shape, dtype=torch.int64)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high2, low2 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    threshold = round(p * 2**31)
    stays = (c0 >> 1) >= threshold
    return (
        stays.double() * (2**31 / (2**31 - threshold)) if threshold < 2**31 else torch.zeros(shape, dtype=torch.float64)
    )


def window_index(
    image: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    prefix: int = 0,
    grid: bool = False,
    roll_padded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut an image of Y · X tokens into windows, as Swin does by padding, rolling and partitioning (arXiv 2103.14030).

    The image is padded behind to whole windows and rolled back by ``shift``; the roll comes first unless
    ``roll_padded``. With ``grid`` a window's tokens lie as far apart as there are windows (arXiv 2204.01697). Tokens
    of a prefix come before those of the image, in the first window.

    Returns:
        For each window and place in it, (windows, tokens): the token's row, −1 where there is none; the region that
        the shift brought it from, 0 to 8; and (tokens, tokens) the entry of a relative position table for each query
        and key, with BEiT's three behind (prefix to token, token to prefix, prefix to prefix).
    """
    places, regions = [], []
    for size, width, step in zip(image, window, shift, strict=True):
        count = -(-size // width)
        position = torch.arange(count * width)
        region = (position >= count * width - width).long() + (position >= count * width - step).long() * (step > 0)
        extent = count * width if roll_padded else size
        rolled = torch.where(position < extent, (position + step) % extent, position)
        rolled = torch.where(rolled < size, rolled, -1)
        cut = (lambda x, w=width, c=count: x.view(w, c).t()) if grid else (lambda x, w=width: x.view(-1, w))
        places.append(cut(rolled))
        regions.append(cut(region if step else region * 0))
    y, x = places[0][:, None, :, None], places[1][None, :, None, :]
    row = torch.where((y >= 0) & (x >= 0), prefix + y * image[1] + x, -1)
    region = regions[0][:, None, :, None] * 3 + regions[1][None, :, None, :] + 0 * row
    row, region = (t.reshape(-1, window[0] * window[1]) for t in (row, region))
    place = torch.cartesian_prod(*map(torch.arange, window)).view(-1, 2)
    apart = place[:, None] - place[None, :] + torch.tensor(window) - 1
    entry = apart[..., 0] * (2 * window[1] - 1) + apart[..., 1]
    if prefix:
        if row.shape[0] != 1:
            raise ValueError(f"an image of {image} has {row.shape[0]} windows of {window}; a prefix needs one")
        last = (2 * window[0] - 1) * (2 * window[1] - 1)
        row = torch.cat([torch.arange(prefix)[None], row], dim=1)
        region = F.pad(region, (prefix, 0))
        entry = F.pad(F.pad(entry, (prefix, 0), value=last + 1), (0, 0, prefix, 0), value=last)
        entry[:prefix, :prefix] = last + 2
    return row, region, entry


def window_attention(
    qkv: Tensor,
    image: tuple[int, int],
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    num_prefix_tokens: int = 0,
    grid: bool = False,
    roll_padded: bool = False,
    mask_value: float = -100.0,
    bias_table: Tensor | None = None,
    rel_pos: tuple[Tensor, Tensor] | None = None,
    padding: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_scale: Tensor | None = None,
) -> Tensor:
    """Attention within the windows of :func:`window_index` (arXiv 2103.14030, 2111.09883); returns (B, N, H, D).

    ``qkv`` is (B, N, 3, H, D), the prefix tokens and then the image's Y · X. ``bias_table`` (entries, H) is added to
    the scores; so are ``mask_value`` between regions, and with ``rel_pos``, tables (2 · rows − 1, D) and
    (2 · columns − 1, D), each query's product with their rows for where the key lies (arXiv 2112.01526). Padded tokens
    have the queries, keys and values ``padding`` (3, H, D), or no query attends to them. With ``logit_scale`` (H,)
    queries and keys are divided by their norms, and it replaces ``scale``. ``dropout_scale``
    (B · windows, H, tokens, tokens) replaces ``dropout_p``, as in :func:`attention`. Each step rounds to the dtype, as
    in the published code of Swin.
    """
    B, N, _, H, D = qkv.shape
    row, region, entry = window_index(image, window, shift, num_prefix_tokens, grid, roll_padded)
    windows, tokens = row.shape
    missing = row < 0
    incomplete = any(n % w for n, w in zip(image, window, strict=True))  # known to torch.compile, unlike missing
    place = row.masked_fill(missing, N).flatten().argsort()[:N]  # on the CPU, as a tensor on meta has no values
    row, region, entry, missing, place = (t.to(qkv.device) for t in (row, region, entry, missing, place))
    x = qkv[:, row.clamp_min(0)]
    if incomplete:
        # Hidden keys are ones: in fp16 F.normalize makes NaN of zeros.
        filled = qkv.new_ones(qkv.shape[2:]) if padding is None else padding.to(qkv.dtype)
        x = torch.where(missing[None, :, :, None, None, None], filled, x)
    q, k, v = x.flatten(0, 1).permute(2, 0, 3, 1, 4)
    if logit_scale is not None:
        q = F.normalize(q, dim=-1) * logit_scale.to(q.dtype)[:, None, None]
        k, scale = F.normalize(k, dim=-1), 1.0
    padded = missing.repeat(B, 1)[:, None, :, None] if incomplete else None
    if padded is not None:  # what a padded query attends to is nobody's output: no NaN may come back from there
        q = q.masked_fill(padded, 0.0)
    scores = (q * (D**-0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if bias_table is not None:
        scores = scores + bias_table[entry].permute(2, 0, 1)
    if rel_pos is not None:
        apart = (torch.arange(n)[:, None] - torch.arange(n) + n - 1 for n in window)
        along_y, along_x = (table.to(q.dtype)[a.to(q.device)] for table, a in zip(rel_pos, apart, strict=True))
        placed = q.unflatten(2, window)
        bias = torch.einsum("bhyxd,ykd->bhyxk", placed, along_y)[..., :, None]
        bias = bias + torch.einsum("bhyxd,xkd->bhyxk", placed, along_x)[..., None, :]
        scores = scores + bias.reshape(scores.shape)
    of_windows = torch.zeros(windows, 1, tokens, tokens, dtype=qkv.dtype, device=qkv.device)
    if any(shift):
        of_windows = of_windows + mask_value * (region[:, None, :, None] != region[:, None, None, :])
    if padding is None:
        of_windows = of_windows.masked_fill(missing[:, None, None, :], float("-inf"))
    if any(shift) or (padding is None and incomplete):
        scores = (scores.unflatten(0, (-1, windows)) + of_windows).flatten(0, 1)
    if padded is not None:
        scores = scores.masked_fill(padded, 0.0)
    weights = scores.softmax(-1)
    if dropout_scale is not None:
        weights = weights * dropout_scale.to(weights.dtype)
    elif dropout_p:
        weights = F.dropout(weights, dropout_p)
    o = weights.to(v.dtype) @ v
    o = o.transpose(1, 2).reshape(B, windows * tokens, H, D)
    return o[:, place]


def block(
    x: Tensor,
    *,
    norm1: tuple[Tensor | None, Tensor | None],
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    norm2: tuple[Tensor | None, Tensor | None],
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    layer_scale: tuple[Tensor | None, Tensor | None] = (None, None),
    drop_path_scale: tuple[Tensor | None, Tensor | None] = (None, None),
    num_heads: int,
    scale: float | None = None,
    eps: tuple[float, float] = (1e-6, 1e-6),
    activation: str | None = "gelu",
) -> Tensor:
    """``r = x + layer_scale[0] · proj(attention(qkv(norm1(x))))``, then ``r + layer_scale[1] · mlp(norm2(r))``
    (arXiv 2010.11929); each branch of a sample is also scaled by its number in ``drop_path_scale`` (1603.09382)."""
    h = linear(layer_norm(x, *norm1, eps[0]), *qkv)
    h = attention_qkvpacked(h.unflatten(-1, (3, num_heads, -1)), scale=scale).flatten(2)
    r = _add_branch(linear(h, *proj), x, layer_scale[0], drop_path_scale[0])
    h = layer_norm(r, *norm2, eps[1])
    scales = {"layer_scale": layer_scale[1], "drop_path_scale": drop_path_scale[1]}
    return mlp(h, *fc1, *fc2, activation=activation, residual=r, **scales)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    pos_embed_prefix: bool = True,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Map images (B, I, Y, X) to tokens (B, R + N, C): R prefix tokens, then one token per P×P patch.

    Patches are in row-major order; the weight is as in Conv2d, (C, I, P, P). ``pos_embed`` (1, R + N, C) is added to
    all tokens; with ``pos_embed_prefix=False`` it is (1, N, C) and added only to the patches (arXiv 2010.11929).
    ``normalize`` is (mean, std), one number per channel, for pixels of 0..255 in uint8 or 0..1 in floating point.
    Where ``mask`` (B, N) is true, ``mask_token`` (C,) takes the place of a patch's projection (BEiT, arXiv 2106.08254).
    With ``visible`` (B, V), indices of patches, these alone become tokens, in this order (MAE, arXiv 2111.06377). The
    pixels of the other patches, or of masked ones, are not read: a NaN among them reaches nothing.
    """
    hidden = mask
    if visible is not None:
        patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
        hidden = torch.ones(len(images), patches, dtype=torch.bool, device=images.device)
        hidden = hidden.scatter(1, visible.long(), False)
    if hidden is not None:
        (PY, PX), columns = weight.shape[2:], images.shape[3] // weight.shape[3]
        pixels = hidden.unflatten(1, (-1, columns)).repeat_interleave(PY, 1).repeat_interleave(PX, 2)
        images = images.masked_fill(pixels[:, None], 0)
    if normalize is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        mean, std = (torch.tensor(v, dtype=wide, device=images.device).view(-1, 1, 1) for v in normalize)
        pixels = images.to(wide) if images.is_floating_point() else images.to(wide) / 255
        images = ((pixels - mean) / std).to(weight.dtype)
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), mask_token.view(-1), tokens)
    if pos_embed is not None and not pos_embed_prefix:
        tokens = tokens + pos_embed
    if prefix_tokens is not None:
        prefix = prefix_tokens.reshape(1, -1, tokens.shape[-1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([prefix, tokens], dim=1)
    if pos_embed is not None and pos_embed_prefix:
        tokens = tokens + pos_embed
    if visible is not None:
        R = 0 if prefix_tokens is None else prefix_tokens.shape[-2]
        kept = tokens[:, R:].gather(1, visible.long().unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :R], kept], dim=1)
    return tokens


def quantize_fp8(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3, by one scale a row or one for each ``group`` channels of it, so that the largest gives 448.

    A row with a NaN or an infinity gets NaN; a row of zeros stays zero.

    Returns:
        Values (..., C) in float8_e4m3fn, and scales (groups, ...) in the dtype of ``x``, fp32 or wider.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    C = x.shape[-1]
    group = C if group is None else group
    parts = F.pad(x, (0, -C % group)).unflatten(-1, (-1, group))
    largest = parts.abs().amax(-1).clamp_min(E4M3_SMALLEST_ROW)
    # Between a tensor and a number PyTorch may multiply by an inverse; between tensors it divides.
    whole = torch.full_like(largest, E4M3_LARGEST)
    values = parts * (whole / largest).unsqueeze(-1)
    values = values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)  # the conversion alone does not saturate
    return values.flatten(-2)[..., :C].contiguous(), (largest / whole).movedim(-1, 0).clone(
        memory_format=torch.contiguous_format
    )


def dequantize_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Return ``values · scale`` in the dtype of ``scale``; scales (groups, ...) as of :func:`quantize_fp8`."""
    scale = scale.movedim(0, -1)
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(E4M3_GROUP, -1)[..., : values.shape[-1]]
    return values.to(scale.dtype) * scale


def linear_fp8(
    x: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """:func:`linear` of operands in e4m3, each a pair of values and scales, in the dtype of the scales."""
    x, weight = dequantize_fp8(*x), dequantize_fp8(*weight)
    bias, residual, layer_scale = (None if t is None else t.to(x.dtype) for t in (bias, residual, layer_scale))
    return linear(x, weight, bias, activation=activation, residual=residual, layer_scale=layer_scale)
