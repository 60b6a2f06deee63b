"""A kernel with a race: all programs store to one element."""

import triton
import triton.language as tl


@triton.jit
def last_one_wins(out_ptr):
    tl.store(out_ptr, tl.program_id(0))
