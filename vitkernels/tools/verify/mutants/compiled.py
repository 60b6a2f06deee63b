"""Defects in compiled code: edits of a kernel's PTX, most of which on a GPU change values only sometimes or never.

An edit removes a barrier, wait or fence that is needed. A kernel also has barriers that are not needed: before the
first write to shared memory, or between two writes without a read between them, as in the windows' backward. So the
edit removes the first barrier after such a write or after the first wait for copies, and only in kernels that read
next: without it other warps read values that are not written yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from vitkernels import runtime
from vitkernels.testing.cases import Case
from vitkernels.tools.verify.problems import BLOCKS, GATED, GATED_APART, MANY, ROW, WINDOW


@dataclasses.dataclass(frozen=True)
class CompiledMutant:
    """One defect in a kernel's PTX.

    Attributes:
        name: What is wrong, for a person; unique.
        kernel: The name of the kernel.
        old, new: The edit of its PTX: a regular expression and the replacement of each match.
        op: The public op whose problems show the defect.
        variant, case: Variant and sizes of the problem that shows it.
        count: How many matches are edited; 0 for all.
        by: The group of checks that shows it.
        dtype: The dtype of the inputs.
    """

    name: str
    kernel: str
    old: str
    new: str
    op: str
    variant: str
    case: Case
    count: int = 0
    by: str = "accuracy"
    dtype: str = "fp32"

    @property
    def where(self) -> str:
        """The place of the defect, for a person, as in :class:`Mutant`."""
        return f"PTX of {self.kernel}"

    def edit(self, kernel) -> str:
        """Return the PTX to run for ``kernel``: the ``edit`` of :class:`~vitkernels.emulator.launch.Emulation`."""
        return re.sub(self.old, self.new, kernel.ptx, count=self.count) if kernel.name == self.kernel else kernel.ptx


@contextlib.contextmanager
def seeded_in_ptx(mutant: CompiledMutant) -> Iterator[None]:
    """Emulate with ``mutant``'s defect for a ``with`` block."""
    from vitkernels.emulator.launch import emulating  # which needs Triton

    with emulating(runtime.emulated_arch() or "sm_90", edit=mutant.edit):
        yield


@dataclasses.dataclass(frozen=True)
class _Site:
    """A kernel and the problem that launches it."""

    label: str
    kernel: str
    op: str
    variant: str
    case: Case
    dtype: str = "bf16"


_NORM = _Site("layer_norm", "_layer_norm_fwd_kernel", "layer_norm", "", WINDOW, "fp32")
_NORM_BACKWARD = _Site("layer_norm backward", "_layer_norm_bwd_kernel", "layer_norm", "", WINDOW, "fp32")
# Rows of at most 256 channels lie in one warp, which needs no barrier.
_WIDE_NORM_BACKWARD = dataclasses.replace(_NORM_BACKWARD, case=GATED)
_FAR_NORM = dataclasses.replace(_NORM, dtype="bf16")
_ADD_NORM = _Site("add_layer_norm", "_layer_norm_fwd_kernel", "add_layer_norm", "scaled", WINDOW)
_RMS_BACKWARD = _Site("rms_norm backward", "_layer_norm_bwd_kernel", "rms_norm", "", GATED_APART, "fp32")
_FMA_PRODUCT = _Site("product by fma", "_product_kernel", "linear", "residual", WINDOW, "fp32")
_PRODUCT = _Site("product by wgmma", "_product_kernel", "linear", "residual", WINDOW)
_DACT = _Site("product with the activation slope", "_product_dact_kernel", "mlp", "", WINDOW)
_ACTIVATION = _Site("activation backward", "_activation_bwd_kernel", "linear", "gelu", WINDOW, "fp32")
_GATED = _Site("gated product", "_glu_product_kernel", "swiglu_mlp", "packed weights", GATED)
_GATED_BACKWARD = _Site("gate backward", "_glu_bwd_kernel", "swiglu_mlp", "packed weights", GATED, "fp32")
_WINDOWS = _Site("attention by windows", "_attention_fwd_windows_kernel", "attention", "", WINDOW)
_WINDOWS_BACKWARD = _Site("attention backward by windows", "_attention_bwd_windows_kernel", "attention", "", WINDOW)
_FAR_ATTENTION = dataclasses.replace(_WINDOWS, label="attention by windows of far tokens")
_ROWS = _Site("attention by rows", "_attention_fwd_row_kernel", "attention", "", ROW)
_ROWS_BACKWARD = _Site("attention backward by rows", "_attention_bwd_row_kernel", "attention", "", MANY)
_VARLEN = _Site("attention by blocks", "_attention_fwd_blocks_kernel", "attention_varlen", "", WINDOW, "fp32")
_WIDE = _Site("attention by blocks, wide heads", "_attention_fwd_blocks_kernel", "attention", "", BLOCKS)
_DQ = _Site("gradient of the queries", "_attention_bwd_dq_kernel", "attention", "", ROW)
_DKV = _Site("gradient of the keys", "_attention_bwd_dkv_kernel", "attention", "", ROW)
_PREPARE = _Site("RoPE", "_prepare_fwd_kernel", "attention", "RoPE of halves, QK-norm", WINDOW)
_PREPARE_BACKWARD = _Site("RoPE backward", "_prepare_bwd_kernel", "attention", "RoPE of halves, QK-norm", WINDOW)
_EMBED = _Site("patch_embed", "_patch_embed_fwd_kernel", "patch_embed", "", WINDOW)
_FAR_EMBED = dataclasses.replace(_EMBED, label="patch_embed of far images")
_EMBED_WEIGHT = _Site("patch_embed backward, weight", "_patch_embed_bwd_weight_kernel", "patch_embed", "", WINDOW)
_EMBED_IMAGES = _Site("patch_embed backward, images", "_patch_embed_bwd_images_kernel", "patch_embed", "", WINDOW)

# What is wrong, the edit, how many matches (0: all), the check, and where.
_EDITS = (
    (
        "no barrier after the first write to shared memory",
        r"((?:st\.shared|cp\.async\.c)[\s\S]*?)bar\.sync\s+0;", r"\1", 1, "accuracy",
        (_NORM, _WIDE_NORM_BACKWARD, _PRODUCT, _DACT, _GATED, _GATED_BACKWARD, _WINDOWS, _ROWS, _ROWS_BACKWARD, _VARLEN,
         _DQ, _DKV, _PREPARE_BACKWARD, _EMBED),
    ),
    (
        "no barrier after the first cp.async.wait_group",
        r"(cp\.async\.wait_group\s+\d+;[\s\S]*?)bar\.sync\s+0;", r"\1", 1, "accuracy",
        (_FMA_PRODUCT, _EMBED_WEIGHT, _EMBED_IMAGES),
    ),
    (
        "cp.async not waited for", r"cp\.async\.wait_group\s+\d+;", "", 0, "accuracy",
        (_FMA_PRODUCT, _VARLEN, _WIDE, _DQ, _DKV, _EMBED, _EMBED_WEIGHT, _EMBED_IMAGES),
    ),
    (
        "no wgmma.fence before wgmma", r"wgmma\.fence\.sync\.aligned;", "", 0, "accuracy",
        (_PRODUCT, _ROWS, _ROWS_BACKWARD, _WIDE, _DQ, _DKV, _EMBED_WEIGHT),
    ),
    (
        "wgmma not waited for", r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", 0, "accuracy",
        (_PRODUCT, _ROWS, _DQ, _DKV, _EMBED_WEIGHT),
    ),
    (
        "wgmma not committed to a group", r"wgmma\.commit_group\.sync\.aligned;", "", 0, "accuracy",
        (_PRODUCT, _ROWS, _DQ, _DKV, _EMBED_WEIGHT),
    ),
    (
        "no fence between a store and the wgmma that reads it", r"fence\.proxy\.async[\w.:]*;", "", 0, "accuracy",
        (_PRODUCT, _ROWS, _ROWS_BACKWARD, _DQ, _DKV, _EMBED_WEIGHT),
    ),
    (
        "loads not masked", r"@%p\d+ (ld\.global)", r"\1", 0, "accuracy",
        (_NORM_BACKWARD, _FMA_PRODUCT, _PRODUCT, _ACTIVATION, _GATED, _WINDOWS, _DKV, _PREPARE, _EMBED),
    ),
    (
        "stores not masked", r"@%p\d+ (st\.global)", r"\1", 0, "accuracy",
        (_ADD_NORM, _RMS_BACKWARD, _FMA_PRODUCT, _GATED, _WINDOWS_BACKWARD, _VARLEN, _EMBED, _EMBED_WEIGHT),
    ),
    (
        "masked-off registers not set",
        r"mov\.[ub]32\s+%r\d+, [%\w]+;(?=(?:\s*mov\.[ub]32[^;]*;)*\s*@%p\d+ ld\.global)", "", 0, "accuracy",
        (_NORM, _NORM_BACKWARD, _WINDOWS),
    ),
    (
        # by one of the units of 16 bytes that it exchanges
        "a swizzle off by one", r"(xor\.b32\s+(%r\d+), %r\d+, \d+;)", r"\1 xor.b32 \2, \2, 16;", 1, "accuracy",
        (_PRODUCT, _DACT, _GATED, _WINDOWS, _WINDOWS_BACKWARD, _EMBED),
    ),
    (
        "offsets in 32 bits",
        r"(mul\.lo\.s64\s+(%rd\d+), [^;]*;)", r"\1 shl.b64 \2, \2, 32; shr.s64 \2, \2, 32;", 0,
        "reach",
        (_FAR_NORM, _FAR_ATTENTION, _FAR_EMBED),
    ),
)  # fmt: skip

COMPILED = tuple(
    CompiledMutant(
        f"{site.label}: {what}", site.kernel, old, new, site.op, site.variant, site.case, count, by, site.dtype
    )
    for what, old, new, count, by, sites in _EDITS
    for site in sites
)
