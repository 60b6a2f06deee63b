"""Argument checks of attention, made before any launch."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vitkernels.ops._attention.prepare import QKNorm, Rope
from vitkernels.ops._checks import (
    FLOATING,
    check_integer,
    check_like,
    check_number,
    check_shape,
    dtypes_and_devices_match,
)

MAX_HEAD_DIM = 256


def unexpanded(x: Tensor, dims: int = 4) -> Tensor:
    strides = x.stride()
    if 0 in strides:
        for i, stride in enumerate(strides[:dims]):
            if stride == 0 and x.shape[i] > 1:
                x = x.narrow(i, 0, 1)
    return x


def check_operands(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """Check (B, H, N, D) of all three; return B, H, N_q, N_kv and D."""
    shape = q.shape
    if len(shape) != 4:
        raise ValueError(f"{op}: q has shape {tuple(shape)}; expected (B, H, N, D)")
    check_like_q(op, q, k, v)
    keys_shape = k.shape
    if len(keys_shape) != 4:
        raise ValueError(f"{op}: k has shape {tuple(keys_shape)}; expected (B, H, N, D)")
    B, H, N_q, D = shape
    N_kv = keys_shape[2]
    check_shape(op, "k", k, (B, H, N_kv, D), "q's but for the number of tokens")
    check_shape(op, "v", v, keys_shape, "k's shape")
    check_sizes(op, "q", q, N_q, D)
    if N_kv == 0:
        check_sizes(op, "k", k, N_kv, D)
    return B, H, N_q, N_kv, D


def check_like_q(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if k is None or v is None or not dtypes_and_devices_match(q, k, v):
        check_like(op, "k", k, "q", q)
        check_like(op, "v", v, "q", q)


def check_sizes(op: str, name: str, x: Tensor, tokens: int, D: int) -> None:
    if tokens == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, no tokens; expected at least one")
    if D == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected at least one channel in the last dim")
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(f"{op}: {name} has head dim {D}; expected {MAX_HEAD_DIM} at most")


def check_dropout(op: str, dropout_p: float) -> float:
    dropout_p = check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; expected 0 to 1")
    return dropout_p


def check_mask(op: str, mask: Tensor | None, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Check ``mask`` and return it with four dims; expanded dims get size 1."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: attn_mask is a {type(mask).__name__}; expected a torch.Tensor or None")
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise TypeError(f"{op}: attn_mask has dtype {mask.dtype}; expected bool (True: look) or a floating dtype")
    if mask.is_nested or mask.layout != torch.strided:
        raise NotImplementedError(f"{op}: attn_mask is nested or sparse; expected a dense tensor")
    if mask.device != q.device:
        raise ValueError(f"{op}: attn_mask is on {mask.device}, q on {q.device}; expected one device")
    sizes = mask.shape
    if len(sizes) < 4:
        sizes = (1,) * (4 - len(sizes)) + tuple(sizes)
    fits = len(sizes) == 4
    if fits:
        (b, h, m, n), (B, H, N_q, N_kv) = sizes, shape
        # Test for 1 first: torch.export cannot decide whether 1 equals an unbacked size, such as B.
        fits = (b == 1 or b == B) and (h == 1 or h == H) and (m == 1 or m == N_q) and (n == 1 or n == N_kv)
    if not fits:
        raise ValueError(
            f"{op}: attn_mask has shape {tuple(mask.shape)}; expected one that broadcasts to {shape}, (B, H, N_q, N_kv)"
        )
    # For a non-leaf, the op that expanded it sums the gradient. An expanded leaf needs a gradient for each element.
    if mask.requires_grad and mask.is_leaf:
        return mask.reshape(sizes) if mask.ndim < 4 else mask
    return four_dims(mask)


def check_key_bias(op: str, key_bias: Tensor | None, q: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Require ``key_bias`` to be None, or floating and of ``shape``, which the error calls ``letters``."""
    if key_bias is None:
        return
    check_like(op, "key_bias", key_bias, "q", q, dtype=False)
    check_shape(op, "key_bias", key_bias, shape, letters)


def four_dims(mask: Tensor | None) -> Tensor | None:
    """Return ``mask`` with four dims; expanded dims get size 1."""
    if mask is None:
        return None
    return unexpanded(mask.reshape((1,) * (4 - mask.ndim) + mask.shape) if mask.ndim < 4 else mask)


def int32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 else x.to(torch.int32)


def check_prepared(
    op: str, q: Tensor, shape: tuple[int, int, int, int], N_kv: int, rope, prefix: int, q_norm, k_norm
) -> tuple[Rope | None, QKNorm | None, QKNorm | None, int]:
    """Check RoPE and QK-norms for q and k of ``shape`` (B, H, N, D); return ``(rope, q_norm, k_norm, prefix)``."""
    prefix = check_integer(op, "num_prefix_tokens", prefix)
    if rope is None and q_norm is None and k_norm is None and not prefix:
        return None, None, None, 0
    B, H, N, D = shape
    norms = []
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            norm = QKNorm(*norm)
            if norm.rms and norm.bias is not None:
                raise ValueError(f"{op}: {name} is an RMSNorm with a bias; expected none")
            eps = check_number(op, f"{name}.eps", norm.eps)
            if not (math.isfinite(eps) and eps >= 0):
                raise ValueError(f"{op}: {name}.eps is {eps}; expected a finite number, 0 at least")
            norm = norm._replace(eps=eps, rms=bool(norm.rms))
            for part, t in (("weight", norm.weight), ("bias", norm.bias)):
                if t is not None:
                    check_like(op, f"{name}.{part}", t, "q", q, dtype=False)
                    check_shape(op, f"{name}.{part}", t, (D,), "the head dim")
        norms.append(norm)
    if rope is None:
        if prefix:
            raise ValueError(f"{op}: num_prefix_tokens is {prefix} without rope; expected 0")
        return None, *norms, 0
    rope = Rope(*rope)
    rope = rope._replace(interleaved=bool(rope.interleaved))
    if N_kv != N:
        raise ValueError(f"{op}: rope needs as many keys as queries; got {N} queries and {N_kv} keys")
    if D % 2:
        raise ValueError(f"{op}: rope needs an even head dim; got {D}")
    if not 0 <= prefix <= N:
        raise ValueError(f"{op}: num_prefix_tokens is {prefix}; expected 0 to {N}, the tokens")
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        check_like(op, f"rope.{name}", table, "q", q, dtype=False)
        sizes = (1,) * (4 - table.ndim) + tuple(table.shape)
        expected = (B, H, N - prefix, D)
        if table.ndim < 2 or table.ndim > 4 or sizes[2:] != expected[2:] or any(
            n not in (1, whole) for n, whole in zip(sizes[:2], expected[:2], strict=True)
        ):  # fmt: skip
            raise ValueError(
                f"{op}: rope.{name} has shape {tuple(table.shape)}; expected one that broadcasts to (B, H, "
                f"N − num_prefix_tokens, D) = {expected}, its last two dims in full"
            )
    check_shape(op, "rope.sin", rope.sin, rope.cos.shape, "rope.cos's shape")
    return rope, *norms, prefix


def check_images(op: str, q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """Check ``cu_seqlens`` and ``max_seqlen``; return ``max_seqlen``, at least 1."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens is {got}; expected an int32 or int64 tensor")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (images + 1,), one at least")
    if cu_seqlens.layout != torch.strided:
        raise NotImplementedError(f"{op}: cu_seqlens is {cu_seqlens.layout}; expected a dense (strided) tensor")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, q on {q.device}; expected one device")
    max_seqlen = check_integer(op, "max_seqlen", max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}; expected 0 at least")
    if q.is_cpu and not torch.compiler.is_compiling() and not isinstance(cu_seqlens, FakeTensor):
        check_bounds(op, q, cu_seqlens, max_seqlen)
    return max_seqlen or 1  # with only empty images: a grid needs at least one program


def check_bounds(op: str, q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Check the values of ``cu_seqlens``; on a GPU, reading them would synchronize."""
    bounds = cu_seqlens.tolist()
    fits = bounds[0] == 0 and bounds[-1] <= q.shape[0]
    for start, end in itertools.pairwise(bounds):
        fits &= 0 <= end - start <= max_seqlen
    if not fits:
        raise ValueError(
            f"{op}: cu_seqlens is {bounds}; expected rising values, the first 0, the last {q.shape[0]} at most, the "
            f"tokens, {max_seqlen}, max_seqlen, at most apart"
        )
