"""Counts of ``vitkernels inspect --run``, held to what can be worked out by hand."""

import pytest
import torch

pytest.importorskip("triton", reason="nothing compiles without Triton")

import triton
import triton.language as tl

from vitkernels.emulator.devices import DEVICES, RATES
from vitkernels.tools.aot.counts import BOUNDS, count, spread

N = 1 << 16


@triton.jit
def copy(x_ptr, y_ptr, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * step))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns, depth = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rows[:, None] * K + (k + depth)[None, :])
        b = tl.load(b_ptr + (k + depth)[:, None] * BN + columns[None, :])
        sums = tl.dot(a, b, sums)
    tl.store(c_ptr + rows[:, None] * BN + columns[None, :], sums)


@triton.jit
def copy_rows(x_ptr, unused_ptr, y_ptr, stride, unused, D: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, D)
    x = tl.load(x_ptr + row * stride + offs)
    if unused:
        x += tl.load(unused_ptr + row * stride + offs)
    tl.store(y_ptr + row * D + offs, x)


@triton.jit
def exponentials(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.exp2(tl.load(x_ptr + offs)))


@triton.jit
def column_sums(x_ptr, y_ptr, M: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.sum(tl.load(x_ptr + rows[:, None] * BLOCK + columns[None, :]), 0))


def new(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def counted(kernel, grid, *arguments, target="sm_90", **options):
    """``kernel``'s counts; ``arguments`` are made where it is launched, as tensors without memory."""

    def launcher():
        kernel[grid](*(a() if callable(a) else a for a in arguments), **options)

    (found,) = count(launcher, target)
    return found


@pytest.mark.parametrize(("lanes_bytes", "block"), [(4, 128), (16, 512)])
def test_copy(lanes_bytes, block):
    """Every lane's bytes lie behind the one before: sectors are full, and each byte moves once."""
    found = counted(copy, (N // block,), lambda: new(N), lambda: new(N), 1, BLOCK=block, num_warps=4)
    requests = 2 * N * 4 // (32 * lanes_bytes)
    assert (found.requests, found.sectors_per_request, found.excess_sectors) == (requests, lanes_bytes, 0)
    assert found.l2_bytes == found.dram_bytes == 2 * N * 4
    assert found.l2_least == N * 4  # the stores: L1 may serve a load
    assert (found.lsu, found.wavefronts) == (requests, 2 * N * 4 // 128)
    assert (found.grid, found.programs) == (N // block, 8)
    assert (found.tensor, found.flops, found.mufu, found.conflicts, found.barriers) == (0, {}, 0, 0, 0)
    assert found.bound_by == "dram"
    assert found.bound_us == pytest.approx(2 * N * 4 / 3.35e6)
    assert found.roofline_share == 1


def test_strided():
    """Each lane's 4 bytes lie in a sector of its own; of the tensor, every 16th element counts."""

    def every_16th():
        return torch.empty_strided((N,), (16,), device="cuda")

    found = counted(copy, (N // 128,), every_16th, lambda: new(N), 16, BLOCK=128, num_warps=4)
    assert found.sectors == N + N // 8
    assert found.sectors_per_request == (32 + 4) / 2
    assert found.excess_sectors == N - N // 8
    assert found.dram_bytes == 2 * N * 4


def test_what_is_not_read_does_not_count():
    """Of a packed tensor, whose views lie in turn, those that programs read, each byte once."""

    def views(read_both):
        packed = new(64, 2, 128)
        first, second = packed.unbind(1)
        copy_rows[(64,)](first, second, new(64, 128), 256, int(read_both) * 3, D=128)

    (one,), (both,) = (count(lambda b=b: views(b), "sm_90") for b in (False, True))
    assert (one.dram_bytes, both.dram_bytes) == (2 * 64 * 128 * 4, 3 * 64 * 128 * 4)
    assert one.l2_bytes == one.dram_bytes


@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_120", "mma")])
def test_product(target, instruction):
    m, n, k = 1024, 128, 256
    tensors = (lambda: new(m, k, dtype=torch.bfloat16), lambda: new(k, n, dtype=torch.bfloat16), lambda: new(m, n))
    found = counted(product, (m // 64,), *tensors, k, BM=64, BN=n, BK=64, num_warps=4, target=target)
    assert found.flops == {f"{instruction} bf16": 2 * m * n * k}
    an_instruction = 2 * (16 * n * 16 if instruction == "wgmma" else 16 * 8 * 16)  # of one warp
    assert found.tensor == 2 * m * n * k // an_instruction
    assert found.dram_bytes == (m * k + k * n) * 2 + m * n * 4
    # For 64 rows and 16 of k, wgmma reads 64 rows of a and n columns of b from shared memory, in 128 bytes a wavefront.
    bytes_read = (64 + n) * 16 * 2 * (m // 64) * (k // 16)
    assert found.operands == (bytes_read // 128 if instruction == "wgmma" else 0)
    # 16 programs are one on each of 16 multiprocessors: the bound is that of one's share.
    peak = RATES[target].tensor["bf16"] * (RATES[target].mma_sync if instruction == "mma" else 1)
    assert found.times_us["tensor"] == pytest.approx(2 * 64 * n * k / (peak * 1e6 / DEVICES[target].num_sms))
    assert found.bound_us == max(found.times_us[pipe] for pipe in BOUNDS)
    assert 0 < found.roofline_share <= 1


def test_special_functions():
    found = counted(exponentials, (N // 128,), lambda: new(N), lambda: new(N), BLOCK=128, num_warps=4)
    assert found.mufu == N // 32
    # Four programs, each of four warps' instructions at two clocks, on the busiest of 132 multiprocessors.
    assert found.times_us["mufu"] == pytest.approx(4 * 4 * 2 / 1980)


def test_bank_conflicts():
    """Sums over rows of two warps meet in shared memory, where Triton 3.7 puts a lane's columns 32 bytes apart.

    Each lane of two warps stores four columns, a word at a time: 8 of 32 lanes meet in a bank, which takes 7 clocks
    more. It loads them back by two times 16 bytes, of which 8 lanes go in a clock: two meet, four times a load.
    """
    if not triton.__version__.startswith("3.7."):
        pytest.skip("the layout is Triton 3.7's")
    found = counted(column_sums, (1,), lambda: new(2, 128), lambda: new(128), M=2, BLOCK=128, num_warps=2)
    assert found.conflicts == 2 * (4 * 7 + 2 * 4)
    assert found.barriers == 4


def test_programs_at_the_edge():
    """The mean of few programs, evenly spread, stands for all, those at an edge among them."""
    assert list(spread(5)) == [0, 1, 2, 3, 4]
    chosen = list(spread(1000))
    assert len(set(chosen)) == 8
    for first in (2, 4, 8):
        starts = sorted(chosen[:first])
        gaps = [b - a for a, b in zip(starts, [*starts[1:], starts[0] + 1000], strict=True)]
        assert max(gaps) <= 2.7 * 1000 / first
    assert len({p % 4 for p in spread(1536)}) == 4  # tiles of an image


def test_data_do_not_count(monkeypatch):
    """Zeros, random numbers and other random numbers execute the same."""
    from vitkernels.tools.aot import emulate

    before = counted(exponentials, (4,), lambda: new(512), lambda: new(512), BLOCK=128)
    monkeypatch.setattr(emulate, "LARGEST_FILL", 0)
    assert counted(exponentials, (4,), lambda: new(512), lambda: new(512), BLOCK=128) == before
