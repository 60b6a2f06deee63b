"""Compiled Triton kernels in the emulator against NumPy and torch."""

import pytest
import torch
import triton_kernels as kernels
from drawn import drawn
from through_emulator import executing
from triton import knobs

from vitkernels.emulator.launch import emulating
from vitkernels.tools.aot.build import TARGETS, _named_driver

ARCHS = pytest.mark.parametrize("arch", [80, 90])


def tolerance(dtype, precision):
    return {torch.float64: 1e-12, torch.float32: 2e-3 if precision == "tf32" else 1e-5}.get(dtype, 1e-5)


LAYOUTS = ["nn", "nt", "tn", "tt"]
TILES = [(64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (64, 32, 64, 4, 1), (128, 16, 32, 4, 2), (16, 64, 16, 1, 2)]
NARROW = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32")]
WIDE = [(torch.float32, "ieee"), (torch.float64, "ieee")]  # products without tensor cores, which take the compiler long
MATMULS = [*drawn(8, LAYOUTS, NARROW, TILES), *drawn(4, LAYOUTS, WIDE, TILES[-1:])]


@ARCHS
@pytest.mark.parametrize(("layout", "kind", "tile"), MATMULS)
def test_matmul(arch, layout, kind, tile):
    dtype, precision = kind
    BM, BN, BK, warps, stages = tile
    torch.manual_seed(0)
    M, N, K = BM + 8, BN + 16, 3 * BK + 8
    a = torch.randn(M, K).to(dtype) if layout[0] == "n" else torch.randn(K, M).to(dtype).t()
    b = torch.randn(K, N).to(dtype) if layout[1] == "n" else torch.randn(N, K).to(dtype).t()
    out = kernels.tl.float64 if dtype == torch.float64 else kernels.tl.float32
    c = torch.full((M, N), float("nan"), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with executing(arch) as recorder:
        kernels.matmul[(2, 2)](
            a, b, c, M, N, K, *a.stride(), *b.stride(), BM=BM, BN=BN, BK=BK, PRECISION=precision, OUT=out,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    truth = a.double() @ b.double()
    error = ((c.double() - truth).abs().max() / truth.abs().max()).item()
    assert error < tolerance(dtype, precision)
    if precision == "tf32":  # and it is tf32
        assert error > 1e-5
    recorder.clean()
    classes = recorder.runs[0].counts
    if arch == 90 and BM >= 64 and warps >= 4 and dtype.itemsize == 2:
        assert classes.get("wgmma")
    elif dtype.itemsize == 2 or precision == "tf32":
        assert classes.get("mma") or classes.get("wgmma")


@pytest.mark.parametrize("arch", [90, 120])
@pytest.mark.parametrize("tile", [(64, 64, 32, 4, 3), (128, 128, 128, 8, 3), (16, 32, 64, 2, 2), (64, 16, 64, 4, 1)])
def test_matmul_of_e4m3(arch, tile):
    BM, BN, BK, warps, stages = tile
    M, N, K = BM + 8, BN + 16, 3 * BK + 16
    torch.manual_seed(0)
    a, b = (torch.randn(rows, K).to(torch.float8_e4m3fn) for rows in (M, N))
    a[0, :4] = torch.tensor([448.0, -(2.0**-9), 0.0, 1.75 * 2.0**-6]).to(a.dtype)  # the largest, and subnormal numbers
    c = torch.full((M, N), float("nan"))
    b = b.t()
    with executing(arch) as recorder:
        kernels.matmul[(2, -(-N // BN))](
            a, b, c, M, N, K, *a.stride(), *b.stride(), BM=BM, BN=BN, BK=BK, PRECISION="ieee", OUT=kernels.tl.float32,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    recorder.clean()
    truth = a.double() @ b.double()
    assert (c.double() - truth).abs().max() < 1e-6 * truth.abs().max()
    classes = recorder.runs[0].counts
    assert classes.get("wgmma" if arch == 90 and BM >= 64 else "mma")


@ARCHS
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((64, 64, 64, 64, 4), torch.bfloat16),
        ((128, 128, 32, 64, 8), torch.float16),
        ((64, 32, 128, 16, 4), torch.bfloat16),
        ((64, 256, 64, 128, 4), torch.float16),
        ((16, 32, 32, 32, 1), torch.bfloat16),
    ],
)
def test_chained(arch, dtype, sizes):
    BM, BN, BK, BD, warps = sizes
    torch.manual_seed(0)
    a, b, c = torch.randn(BM, BK).to(dtype), torch.randn(BK, BN).to(dtype), torch.randn(BN, BD).to(dtype)
    o = torch.full((BM, BD), float("nan"))
    with executing(arch) as recorder:
        kernels.chained[(1,)](a, b, c, o, BM=BM, BN=BN, BK=BK, BD=BD, num_warps=warps)
    truth = (a.double() @ b.double()).to(dtype).double() @ c.double()
    assert (o.double() - truth).abs().max() / truth.abs().max() < 4e-3
    recorder.clean()


@ARCHS
@pytest.mark.parametrize(("shape", "warps"), [((5, 197), 1), ((70, 33), 8), ((1, 1000), 4)])
def test_softmax(arch, shape, warps):
    x = torch.randn(shape)
    y = torch.full(shape, float("nan"))
    N = shape[1]
    BN = 1 << (N - 1).bit_length()
    with executing(arch) as recorder:
        kernels.softmax[(-(-shape[0] // 4),)](x, y, *shape, BM=4, BN=BN, AXIS=1, num_warps=warps)
    assert torch.allclose(y, x.softmax(1), atol=1e-6)
    recorder.clean()


@ARCHS
def test_softmax_of_columns(arch):
    with executing(arch) as recorder:
        x = torch.randn(32, 64)
        y = torch.full_like(x, float("nan"))
        kernels.softmax[(1,)](x, y, 32, 64, BM=32, BN=64, AXIS=0, num_warps=4)
    assert torch.allclose(y, x.softmax(0), atol=1e-6)
    recorder.clean()


@ARCHS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
def test_transpose(arch, dtype):
    x = (torch.arange(100 * 70) % 251).view(100, 70).to(dtype)
    y = torch.zeros(70, 100, dtype=dtype)
    with executing(arch) as recorder:
        kernels.transpose[(4, 3)](x, y, 100, 70, BM=32, BN=32)
    assert torch.equal(y, x.t())
    recorder.clean()


@ARCHS
@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.int64])
def test_reshapes(arch, dtype):
    B = 1024
    x = torch.arange(B).to(dtype)
    y = torch.zeros(B, dtype=dtype)
    with executing(arch) as recorder:
        kernels.reshapes[(1,)](x, y, B=B)
    t = x.view(B // 16, 16).t().reshape(4, 4, B // 16).permute(1, 2, 0).reshape(B // 2, 2)
    assert torch.equal(y, torch.stack([t[:, 1], t[:, 0]], -1).reshape(-1))
    recorder.clean()


def truncated(a, b):
    return torch.div(a, b, rounding_mode="trunc")


@ARCHS
def test_divergent(arch):
    x = torch.randint(-50, 50, (500,), dtype=torch.int32)
    y = torch.zeros_like(x)
    with executing(arch) as recorder:
        kernels.divergent[(4,)](x, y, 500, B=128)
    recorder.clean()
    w = x.clone()
    for _ in range(3):
        w = truncated(w * 3, 2) - torch.where(w > 7, torch.fmod(w, 5), truncated(-w, 3))
    assert torch.equal(y[:128], w[:128])
    assert torch.equal(y[256:384], w[256:384])
    assert torch.equal(y[128:256], x[128:256].cumsum(0).int())


@pytest.mark.parametrize("emulated_first", [False, True])
def test_a_gpus_binary_and_the_emulators_are_apart_in_tritons_cache(emulated_first, tmp_path):
    """A kernel has one key for both: on a GPU its binary is machine code, in the emulator PTX."""
    x, y = torch.randn(8, 16), torch.empty(16, 8)

    def emulated():
        y.fill_(float("nan"))
        with emulating("sm_80"):
            kernels.transpose[(1, 1)](x, y, 8, 16, BM=8, BN=16)
        assert torch.equal(y, x.t())

    def for_a_gpu():
        with _named_driver("sm_80", f"disk cache, {emulated_first}"):
            kernel = kernels.transpose.warmup(x, y, 8, 16, BM=8, BN=16, grid=(1, 1))
        assert kernel.metadata.target == TARGETS["sm_80"].triton and kernel.asm["cubin"].startswith(b"\x7fELF")

    emulated()  # installs the driver, whose setting of the cache the block below leaves again
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        for run in (emulated, for_a_gpu) if emulated_first else (for_a_gpu, emulated):
            kernels.transpose.device_caches.clear()
            run()
    assert sum(1 for _ in tmp_path.glob("*/transpose.cubin")) == 2
