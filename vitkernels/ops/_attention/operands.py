"""Arguments of the attention kernels for tensors, masks and dropout. No kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._triton import tl

LOG2_E = 1.4426950408889634
# Dims of images, tokens and heads in each layout (channels are last). Packed images have no dim of their own.
TOKENS_FIRST, HEADS_FIRST, PACKED = (0, 1, 2), (0, 2, 1), (None, 0, 1)
MAX_INT32_REACH = 2**31 - 2**16  # elements from a head's first row to its last; leaves room for the last row


class Options(NamedTuple):
    """Options of attention besides queries, keys and values, which are (B, N, H, D) by default.

    Attributes:
        scale: Factor of the scores.
        heads_first: q, k, v and o are (B, H, N, D); in memory o is still (B, N, H, D).
        mask: (B or 1, H or 1, N_q or 1, N_kv or 1), bool (True: attend) or floating (added to the scores).
        seed: (1,) int64, seed of the dropout.
        is_causal: Whether query i attends only to keys 0 to i.
        dropout_p: Probability of dropping a weight.
        starts: (images + 1,) int32, the first token of each packed image and the end; q, k and v are then
            (all tokens, H, D).
        max_seqlen: Number of tokens of the longest packed image.
        key_bias: (B, N_kv), or (all tokens,) of packed images, floating; added to the scores of all heads and queries.
    """

    scale: float
    heads_first: bool = False
    mask: Tensor | None = None
    seed: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    starts: Tensor | None = None
    max_seqlen: int = 0
    key_bias: Tensor | None = None

    @property
    def dims(self) -> tuple[int | None, int, int]:
        """Dims of images, tokens and heads in q, k, v and o."""
        return PACKED if self.starts is not None else HEADS_FIRST if self.heads_first else TOKENS_FIRST

    def sizes(self, q: Tensor) -> tuple[int, int, int, int]:
        """Return B, N_q, H and D; B is 1 for packed images."""
        b, n, h = self.dims
        return 1 if b is None else q.shape[b], q.shape[n], q.shape[h], q.shape[-1]

    def tokens_first(self, *tensors: Tensor) -> list[Tensor]:
        """View tensors as (B, N, H, D)."""
        if self.starts is not None:
            return [x.unsqueeze(0) for x in tensors]
        return [x.transpose(1, 2) for x in tensors] if self.heads_first else list(tensors)

    @property
    def shares_mask(self) -> bool:
        """Whether all images share one mask."""
        return self.mask is None or self.mask.shape[0] == 1

    @property
    def mask_kind(self) -> str:
        """The kernels' kind of mask: ``bool``, ``float`` (added to the scores), or ``""`` for none.

        A bool mask with one row for all queries is converted to ``float``: see ``_aligned``."""
        if self.mask is None:
            return ""
        return "bool" if self.mask.dtype == torch.bool and not _is_row(self.mask) else "float"

    def rows(self, B: int, N_q: int, N_kv: int) -> tuple[int, int, int]:
        """Return the number of images, and the largest number of queries and of keys in an image."""
        if self.starts is None:
            return B, N_q, N_kv
        return self.starts.shape[0] - 1, self.max_seqlen, self.max_seqlen

    def arguments(self, q: Tensor) -> dict[str, object]:
        """Return the kernels' arguments for scores, mask, bias of keys and dropout."""
        mask, kind = None if self.mask is None else _aligned(self.mask, q.dtype), self.mask_kind
        placeholder = q
        shape = (1, 1, 1, 1) if mask is None else mask.shape
        strides = (0,) * 4 if mask is None else [0 if n == 1 else s for n, s in zip(shape, mask.stride(), strict=True)]
        key_bias = None if self.key_bias is None else _key_bias_rows(self.key_bias)
        return {
            "key_bias_ptr": placeholder if key_bias is None else key_bias,
            "stride_key_bias_b": 0 if key_bias is None else key_bias.stride(0),
            "KEY_BIAS": key_bias is not None,
            "mask_ptr": placeholder if mask is None else mask,
            "seed_ptr": placeholder if self.seed is None else self.seed,
            "stride_mask_b": strides[0],
            "stride_mask_h": strides[1],
            "stride_mask_m": strides[2],
            "score_scale": self.scale if kind == "float" else self.scale * LOG2_E,
            "mask_width": shape[3],
            "MASK": kind,
            "MASK_M": shape[2] > 1,
            "MASK_N": shape[3] > 1,
            "IS_CAUSAL": self.is_causal,
            # Threshold for a 31-bit random number.
            "DROPOUT": round(self.dropout_p * 2**31),
            "ACC": _tile.accumulator(q.dtype),
            "PRECISION": runtime.dot_precision(q.device),
        }


class AttentionWanted(NamedTuple):
    """Which gradients of attention are wanted; those of k and v come together."""

    dq: bool
    dkv: bool
    dmask: bool


def _is_row(mask: Tensor) -> bool:
    """Tell whether all queries share one row of the mask."""
    return mask.shape[2] == 1 and mask.shape[3] > 1


def _key_bias_rows(key_bias: Tensor) -> Tensor:
    """View a bias of keys as (B, N_kv), (1, all tokens) if packed, with unit stride; 16 bits are widened to 32, as the
    loads of single keys are as many, and beside an fp64 product nothing narrower compiles (see :func:`_aligned`)."""
    key_bias = key_bias if key_bias.ndim == 2 else key_bias.unsqueeze(0)
    return runtime.unit_stride(key_bias.to(runtime.wide_dtype(key_bias.dtype)))


def _aligned(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``mask`` (bool as bytes) with rows that vector loads can read; copy it only if its layout needs that.

    Rows of 197 keys are not aligned and would be loaded one element at a time, so rows are padded with zeros to a
    multiple of 16. A row shared by all queries is loaded key by key, so it becomes fp32 (fp64 for fp64). For fp64
    scores (``dtype``), a narrow mask is widened to 32 bits: Triton 3.7.1 cannot compile an fp64 product beside a load
    of a narrower type.
    """
    if _is_row(mask):
        if mask.dtype == torch.bool:
            mask = torch.log(mask.to(torch.float32))  # of 1 and 0: gives 0 and -inf, to be added to the scores
        return mask.to(runtime.wide_dtype(mask.dtype)).contiguous()
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if dtype == torch.float64 and mask.dtype.itemsize < 4:
        mask = mask.to(torch.float32 if mask.is_floating_point() else torch.int32)
    N = mask.shape[-1]
    steps = [step for n, step in zip(mask.shape[:-1], mask.stride(), strict=False) if n > 1]
    if N == 1 or (mask.stride(-1) == 1 and all(x % 16 == 0 for x in (mask.data_ptr(), N, *steps))):
        return mask
    return torch.constant_pad_nd(mask, (0, -N % 16)).contiguous()


def strides(name: str, x: Tensor, dims: tuple[int | None, int, int] = TOKENS_FIRST) -> dict[str, int]:
    """Return the strides of ``x`` under the kernels' argument names; ``dims`` are images, tokens and heads."""
    return {f"stride_{name}_{letter}": 0 if i is None else x.stride(i) for letter, i in zip("bnh", dims, strict=True)}


def alignment(*tensors: Tensor) -> int:
    """Return the largest power of two, at most 16, that divides the byte address of every row of every head.

    It determines the width of loads. Triton itself only recognizes strides divisible by 16 elements, and would load
    heads of 72 channels element by element.
    """
    bits = 16
    for x in tensors:
        bits |= x.data_ptr()
        for stride in x.stride()[:-1]:
            bits |= stride * x.element_size()
    return bits & -bits


def addressing(*tensors: Tensor, tokens: int = 1, mask_reach: int = 0) -> dict[str, object]:
    """Return the kernels' arguments ``ALIGN`` and ``INDEX``, the integer type of offsets within a head.

    int64 offsets cost up to 70 registers per thread, so INDEX is int32 if offsets fit. ``tokens`` is the dim of tokens;
    ``mask_reach`` is the offset from the first row of a head's mask to the last.
    """
    reach = max(mask_reach, *(x.shape[tokens] * x.stride(tokens) for x in tensors))
    return {"ALIGN": alignment(*tensors), "INDEX": tl.int32 if reach < MAX_INT32_REACH else tl.int64}


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Draw the seed of a dropout, (1,), from the generator of ``x``'s device; None without dropout."""
    return torch.randint(2**62, (1,), device=x.device) if dropout_p else None


def cast_operands(*tensors: Tensor) -> Sequence[Tensor]:
    """Cast ``tensors`` to autocast's dtype, if it is on; everything except fp64, like PyTorch's own attention."""
    dtype = runtime.autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return [
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]
