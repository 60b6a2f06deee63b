"""What the attention kernels are told about tensors, masks and dropout. No kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._triton import tl

LOG2_E = 1.4426950408889634
# Which dims of a tensor are images, tokens and heads; its last are channels. Packed images are no dim.
TOKENS_FIRST, HEADS_FIRST, PACKED = (0, 1, 2), (0, 2, 1), (None, 0, 1)
MAX_INT32_REACH = 2**31 - 2**16  # elements between a head's first row and its last; the rest is the row itself


class Options(NamedTuple):
    """What attention is told beside queries, keys and values, which are (B, N, H, D) unless it says otherwise.

    Attributes:
        scale: Factor of the scores.
        heads_first: q, k and v are (B, H, N, D), as is o, which lies in memory as (B, N, H, D) all the same.
        mask: (B or 1, H or 1, N_q or 1, N_kv or 1), bool (True: look) or floating (added to the scores).
        seed: (1,) int64, of the dropout.
        is_causal: Whether query i looks at keys 0 to i alone.
        dropout_p: The share of weights that are dropped.
        starts: (images + 1,) int32, the first token of each packed image and the end; q, k and v are then
            (all tokens, H, D).
        max_seqlen: Tokens of the longest packed image.
    """

    scale: float
    heads_first: bool = False
    mask: Tensor | None = None
    seed: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    starts: Tensor | None = None
    max_seqlen: int = 0

    @property
    def dims(self) -> tuple[int | None, int, int]:
        """Which dims of q, k, v and o are images, tokens and heads."""
        return PACKED if self.starts is not None else HEADS_FIRST if self.heads_first else TOKENS_FIRST

    def sizes(self, q: Tensor) -> tuple[int, int, int, int]:
        """B, N_q, H and D; B is 1 where images are packed."""
        b, n, h = self.dims
        return 1 if b is None else q.shape[b], q.shape[n], q.shape[h], q.shape[-1]

    def tokens_first(self, *tensors: Tensor) -> list[Tensor]:
        """View tensors as (B, N, H, D)."""
        if self.starts is not None:
            return [x.unsqueeze(0) for x in tensors]
        return [x.transpose(1, 2) for x in tensors] if self.heads_first else list(tensors)

    @property
    def shares_mask(self) -> bool:
        """Whether one mask serves all images."""
        return self.mask is None or self.mask.shape[0] == 1

    @property
    def mask_kind(self) -> str:
        """How the kernels take the mask: ``bool``, ``float`` (added to the scores), or ``""`` where there is none.

        A bool one with one row for all queries is added, as it is loaded key by key."""
        if self.mask is None:
            return ""
        return "bool" if self.mask.dtype == torch.bool and not _is_row(self.mask) else "float"

    def rows(self, B: int, N_q: int, N_kv: int) -> tuple[int, int, int]:
        """Images, and the most queries and keys that one has."""
        if self.starts is None:
            return B, N_q, N_kv
        return self.starts.shape[0] - 1, self.max_seqlen, self.max_seqlen

    def arguments(self, q: Tensor) -> dict[str, object]:
        """The kernels' arguments that tell of scores, mask and dropout."""
        mask, kind = None if self.mask is None else _aligned(self.mask, q.dtype), self.mask_kind
        placeholder = q
        shape = (1, 1, 1, 1) if mask is None else mask.shape
        strides = (0,) * 4 if mask is None else [0 if n == 1 else s for n, s in zip(shape, mask.stride(), strict=True)]
        return {
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
            # The threshold of a 31-bit random number.
            "DROPOUT": round(self.dropout_p * 2**31),
            "ACC": _tile.accumulator(q.dtype),
            "PRECISION": runtime.dot_precision(q.device),
        }


def _is_row(mask: Tensor) -> bool:
    """Whether one row serves all queries."""
    return mask.shape[2] == 1 and mask.shape[3] > 1


def _aligned(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask``, bytes for bool, in rows that vector loads can read: copied only where it lies otherwise.

    A row of 197 keys starts at any element and ends at any, and would be loaded one element at a time: rows get a
    multiple of 16, zeros behind. One row for all queries is loaded key by key, and is so in fp32. So is what is to meet
    scores in fp64 (``dtype``): of what is loaded narrower Triton 3.7.1 compiles no fp64 product.
    """
    if _is_row(mask):
        if mask.dtype == torch.bool:
            mask = torch.log(mask.to(torch.float32))  # of 1 and 0: what is added to the scores
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
    """Name the strides of ``x`` as the kernels do, where ``dims`` are images, tokens and heads."""
    return {f"stride_{name}_{letter}": 0 if i is None else x.stride(i) for letter, i in zip("bnh", dims, strict=True)}


def alignment(*tensors: Tensor) -> int:
    """How many bytes, 16 at most, divide the address of every head's every row.

    The width of a load follows from it. Triton itself only tells strides divisible by 16 elements from others, and
    would load heads of 72 channels one by one.
    """
    bits = 16
    for x in tensors:
        bits |= x.data_ptr()
        for stride in x.stride()[:-1]:
            bits |= stride * x.element_size()
    return bits & -bits


def addressing(*tensors: Tensor, tokens: int = 1, mask_reach: int = 0) -> dict[str, object]:
    """Tell the kernels how tensors lie: ``ALIGN``, and ``INDEX``, the type of offsets within a head.

    int64 costs up to 70 registers a thread, so INDEX is int32 wherever that reaches; ``tokens`` is the dim of the
    tokens, and ``mask_reach`` how far the last row of a head's mask lies from its first.
    """
    reach = max(mask_reach, *(x.shape[tokens] * x.stride(tokens) for x in tensors))
    return {"ALIGN": alignment(*tensors), "INDEX": tl.int32 if reach < MAX_INT32_REACH else tl.int64}
