"""The emulator's detectors, against kernels and PTX with a defect put in; and its counters."""

import re

import pytest
import torch
import triton_kernels as kernels
from through_emulator import executing, kinds, recorded

from vitkernels.emulator.execute import Kind, execute
from vitkernels.emulator.ptx import Unsupported

ARCHS = pytest.mark.parametrize("arch", [80, 90])
BARRIER = r"bar\.sync\s+0;"
SHARED_RACES = {Kind.shared_read_race, Kind.shared_overwrite_race, Kind.shared_write_race}


def pipelined(arch, stages=3):
    a, b, c = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16(), torch.zeros(64, 64)
    return recorded(
        kernels.matmul, arch, (1, 1), a, b, c, 64, 64, 256, 256, 1, 64, 1, BM=64, BN=64, BK=32, PRECISION="ieee",
        OUT=kernels.tl.float32, num_warps=4, num_stages=stages,
    )  # fmt: skip


def without_each(pattern, text):
    """The text without one of the matches, for each."""
    return [text[: m.start()] + text[m.end() :] for m in re.finditer(pattern, text)]


@ARCHS
def test_missing_barrier(arch):
    launch = pipelined(arch)
    assert kinds(launch, re.sub(BARRIER, "", launch.text)) & SHARED_RACES
    # some of them are needed by themselves
    errors = SHARED_RACES | {Kind.copy_read, Kind.copy_overwritten, Kind.source_overwritten}
    assert any(kinds(launch, text) & errors for text in without_each(BARRIER, launch.text))


@ARCHS
def test_missing_wait(arch):
    launch = pipelined(arch)
    assert Kind.copy_read in kinds(launch, re.sub(r"cp\.async\.wait_group\s+\w+;", "", launch.text))


@ARCHS
def test_reduction_without_barrier(arch):
    x, y = torch.randn(4, 1024), torch.zeros(4, 1024)
    launch = recorded(kernels.softmax, arch, (1,), x, y, 4, 1024, BM=1, BN=1024, AXIS=1, num_warps=4)
    assert all(kinds(launch, text) & SHARED_RACES for text in without_each(BARRIER, launch.text)[:2])


def test_missing_wgmma_wait_and_fences():
    launch = pipelined(90)
    assert "wgmma.mma_async" in launch.text
    unwaited = kinds(launch, re.sub(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", launch.text))
    assert unwaited & {Kind.source_overwritten, Kind.accumulator_in_flight}
    # operands that went through registers: st.shared, fence.proxy.async, barrier, wgmma
    a, b, c, o = *(torch.randn(64, 64).bfloat16() for _ in range(3)), torch.zeros(64, 64)
    launch = recorded(kernels.chained, 90, (1,), a, b, c, o, BM=64, BN=64, BK=64, BD=64, num_warps=4)
    assert Kind.unfenced_store in kinds(launch, re.sub(r"fence\.proxy\.async[\w.:]*;", "", launch.text))
    assert Kind.unfenced_register in kinds(launch, re.sub(r"wgmma\.fence\.sync\.aligned;", "", launch.text))


def test_bounds_and_views():
    x, y = torch.randn(64), torch.zeros(64)
    with executing(80) as recorder:
        kernels.beyond[(1,)](x, y, 64, B=64)
    (finding,) = recorder.runs[0].findings
    assert finding.kind == Kind.global_read_out_of_bounds
    assert (finding.argument, finding.offset, finding.kernel) == (0, 256, "beyond")
    assert re.match(r"\w*kernels\.py:\d+", finding.place)
    whole = torch.randn(128)
    with executing(80) as recorder:
        kernels.beyond[(1,)](whole[:64], y, 64, B=64)
    assert {f.kind for f in recorder.runs[0].findings} == {Kind.outside_view}


def test_programs_that_clash():
    x, y = torch.randn(64), torch.zeros(64)
    with executing(80) as recorder:
        kernels.clash[(2,)](x, y, B=64)
    assert {f.kind for f in recorder.runs[0].findings} == {Kind.global_write_race}
    assert {f.argument for f in recorder.runs[0].findings} == {1}


@ARCHS
def test_undefined(arch):
    x, y = torch.randn(4, 100), torch.zeros(4, 100)
    launch = recorded(kernels.softmax, arch, (1,), x, y, 4, 100, BM=4, BN=128, AXIS=1, num_warps=1)
    # what is masked off keeps no value
    text = re.sub(r"mov\.u32 (%r\d+), %r\d+;|mov\.u32 (%r\d+), 0x\w+;", "", launch.text)
    undefined = {Kind.undefined_store, Kind.undefined_predicate, Kind.undefined_address, Kind.undefined_product}
    assert undefined & kinds(launch, text)


COUNTED = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry counted(.param .u64 .ptr .global .align 1 counted_param_0)
.reqntid 32
{
  .reg .b32 %r<20>;
  .reg .b64 %rd<20>;
  ld.param.b64 %rd1, [counted_param_0];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, STRIDE;
  add.s64 %rd3, %rd1, %rd2;
  ld.global.b32 %r2, [%rd3];
  mul.lo.s32 %r3, %r1, SHARED;
  mov.b32 %r4, global_smem;
  add.s32 %r5, %r4, %r3;
  st.shared.b32 [%r5], %r2;
  ret;
}
"""


@pytest.mark.parametrize(
    ("stride", "shared", "sectors", "waves"),
    [(4, 4, 4, 1), (128, 128, 32, 32), (32, 8, 32, 2), (8, 132, 8, 1), (0, 0, 1, 1), (64, 16, 32, 4)],
)
def test_counts(stride, shared, sectors, waves):
    x = torch.arange(1 << 12, dtype=torch.int32)
    text = COUNTED.replace("STRIDE", str(stride)).replace("SHARED", str(shared))
    run = execute(text, [x], (1, 1, 1), shared=8192, arch=80)
    assert (run.counts["ldg.sectors"], run.counts["sts.waves"]) == (sectors, waves)


def test_unsupported_is_an_exception():
    x = torch.zeros(1 << 12)
    text = COUNTED.replace("STRIDE", "4").replace("SHARED", "4")
    with pytest.raises(Unsupported, match=r"counted, PTX line 19: frobnicate"):
        execute(text.replace("st.shared.b32 [%r5], %r2", "frobnicate.b32 %r5"), [x], (1, 1, 1), shared=8192, arch=80)
    with pytest.raises(Unsupported, match=r"counted, PTX line 19: sin"):
        execute(text.replace("st.shared.b32 [%r5], %r2", "sin.f64 %rd5, %rd3"), [x], (1, 1, 1), shared=8192, arch=80)


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("add.rz.f32 %r5, %r2, %r2", "add of this type or mode"),  # would be rounded to nearest
        ("add.sat.s32 %r5, %r2, %r2", "add of this type or mode"),
        ("add.f32 %r5, %r2, %r2, %r2", "4 operands"),
        ("cvt.rn.satfinite.e5m2x2.f32 %r5, %r2, %r2", "e5m2x2"),
        ("ld.b32 %r5, [%rd3]", "space generic"),
        ("mul.f32 %r5, %r99, %r2", "operand %r99"),
    ],
)
def test_nothing_is_ignored(instruction, reason):
    text = COUNTED.replace("STRIDE", "4").replace("SHARED", "4").replace("st.shared.b32 [%r5], %r2", instruction)
    with pytest.raises(Unsupported, match=reason):
        execute(text, [torch.zeros(1 << 12)], (1, 1, 1), shared=8192, arch=80)


# ------------------------------------------------------------------------------------------------ more defects


def test_unmasked_load():
    x, y = torch.randn(5, 197), torch.zeros(5, 197)
    launch = recorded(kernels.softmax, 80, (2,), x, y, 5, 197, BM=4, BN=256, AXIS=1, num_warps=4)
    assert Kind.global_read_out_of_bounds in kinds(launch, re.sub(r"@%p\d+ (ld\.global)", r"\1", launch.text))
    assert Kind.global_write_out_of_bounds in kinds(launch, re.sub(r"@%p\d+ (st\.global)", r"\1", launch.text))


@ARCHS
def test_swizzle_off_by_one(arch):
    launch = pipelined(arch)
    result = launch.arguments[2]
    truth = result.clone()
    memory = {Kind.shared_unwritten, Kind.copy_overwritten, Kind.shared_write_race, Kind.shared_out_of_bounds}
    seen = 0
    for m in re.finditer(r"xor\.b32\s+(%r\d+), (%r\d+), (%r\d+);", launch.text):
        to, row, swizzle = m.groups()
        if to in (row, swizzle):
            continue
        twice = f"add.s32 {to}, {swizzle}, {swizzle}; xor.b32 {to}, {row}, {to};"
        found = kinds(launch, launch.text[: m.start()] + twice + launch.text[m.end() :])
        # one that is a permutation still shows in nothing but the values
        assert found & memory or not torch.equal(result, truth)
        seen += 1
    assert seen


@kernels.triton.jit
def strided(x, y, stride, B: kernels.tl.constexpr):
    i = kernels.tl.arange(0, B)
    kernels.tl.store(y + i, kernels.tl.load(x + kernels.tl.program_id(0) * stride + i))


def test_overflow_of_an_address():
    x, y = torch.randn(64), torch.zeros(64)
    with executing(80) as recorder:
        strided[(4,)](x, y, 1 << 30, B=64)
    run = recorder.launches[0].run(ctas=[3])  # 3 * 2^30 is negative in 32 bits
    (finding,) = run.errors
    assert finding.kind == Kind.global_read_out_of_bounds
    assert finding.offset == 4 * (3 * 2**30 - 2**32)


@ARCHS
@pytest.mark.parametrize("seed", range(10))
def test_orders(arch, seed):
    torch.manual_seed(0)
    x = torch.randn(12, 1000)
    y = torch.zeros_like(x)
    programs = torch.randperm(3, generator=torch.Generator().manual_seed(seed)).tolist()
    softmax = recorded(kernels.softmax, arch, (3,), x, y, 12, 1000, BM=4, BN=1024, AXIS=1, num_warps=4)
    y.fill_(float("nan"))
    for launch in (softmax, pipelined(arch), chained(arch), moved(arch)):
        total = launch.grid[0] * launch.grid[1]
        run = launch.run(order_seed=seed + 1, ctas=[p for p in programs if p < total])
        assert not run.errors, run.errors[0]
    assert torch.allclose(y, x.softmax(1), atol=1e-6)


def chained(arch):
    a, b, c, o = *(torch.randn(64, 64).bfloat16() for _ in range(3)), torch.zeros(64, 64)
    return recorded(kernels.chained, arch, (1,), a, b, c, o, BM=64, BN=64, BK=64, BD=64, num_warps=4)


def moved(arch):
    x, y = torch.arange(1024).half(), torch.zeros(1024).half()
    return recorded(kernels.reshapes, arch, (1,), x, y, B=1024)


def test_threads():
    import concurrent.futures

    def once(seed):
        x = torch.arange(1 << 12, dtype=torch.int32)
        text = COUNTED.replace("STRIDE", "4").replace("SHARED", str(4 * (seed % 7)))
        return execute(text, [x], (500, 1, 1), shared=8192, arch=80).counts

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(once, range(28)))
    assert together == [once(seed) for seed in range(28)]


def test_no_compiler(monkeypatch, tmp_path):
    from vitkernels.emulator import build

    monkeypatch.setattr(build, "compilers", lambda: [])
    with pytest.raises(build.NoCompiler, match="apt install g\\+\\+"):
        build.build()
    monkeypatch.setattr(build, "compilers", lambda: [["false"]])
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    with pytest.raises(build.NoCompiler, match="false"):
        build.build()
    assert not list(tmp_path.iterdir())
