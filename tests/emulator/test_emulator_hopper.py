"""What sm_90 adds: tensor maps, bulk copies, mbarriers, named barriers, and warps that run different code."""

import re

import gluon_kernels
import pytest
import torch
import triton
import triton.language as tl
from drawn import drawn
from through_emulator import executing, kinds
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vitkernels.emulator.execute import Kind, execute
from vitkernels.testing.compare import check


def descriptor(tensor, block, swizzle=128, padding="zero"):
    layout = gl.NVMMASharedLayout(swizzle, tensor.element_size() * 8, rank=len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout, padding)


# ------------------------------------------------------------------------------------------------ tiles


TILES = [
    ((1000,), (256,), (800,)),
    ((40, 64), (32, 64), (16, 0)),
    ((40, 72), (16, 64), (-8, 16)),
    ((3, 40, 64), (2, 16, 64), (2, 30, -8)),
    ((3, 2, 20, 64), (1, 2, 8, 64), (1, 1, 16, 16)),
    ((2, 3, 2, 20, 64), (2, 1, 1, 8, 64), (1, 2, 0, -4, 0)),
]


DTYPES, SWIZZLES = [torch.float16, torch.float32], [0, 32, 64, 128]


@pytest.mark.parametrize(
    ("tile", "dtype", "swizzle"),
    [*((TILES[0], dtype, 0) for dtype in DTYPES), *drawn(20, TILES[1:], DTYPES, SWIZZLES)],  # one dim is not swizzled
)
def test_tiles(tile, dtype, swizzle):
    shape, block, at = tile
    x = torch.randn(shape).to(dtype)
    y, out = torch.zeros_like(x), torch.zeros(block, dtype=dtype)
    padding = "nan" if swizzle == 64 else "zero"
    rank = len(block)
    ones = [1] * (rank - 1)
    layout = gl.BlockedLayout([*ones, 1], [*ones, 32], [*ones, 4], list(range(rank))[::-1])
    with executing(90) as recorder:
        gluon_kernels.copy_tile[(1,)](
            descriptor(x, block, swizzle, padding),
            descriptor(y, block, swizzle),
            out,
            out.numel(),
            block,
            at,
            layout,
        )
    recorder.clean()
    expected = torch.full(block, float("nan") if padding == "nan" else 0.0, dtype=dtype)
    where = [slice(max(a, 0), max(min(a + b, n), 0)) for a, b, n in zip(at, block, shape, strict=True)]
    into = tuple(slice(w.start - a, w.stop - a) for w, a in zip(where, at, strict=True))
    expected[into] = x[tuple(where)]
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    written = torch.zeros_like(x)
    written[tuple(where)] = x[tuple(where)]
    assert torch.equal(y, written)


@triton.jit
def doubled(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BM, BN])
    target = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BM, BN])
    for j in range(0, N, BN):
        target.store([tl.program_id(0) * BM, j], source.load([tl.program_id(0) * BM, j]) * 2)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dtype", "BN"), [(torch.float16, 64), (torch.float32, 16), (torch.bfloat16, 128)])
def test_descriptors_made_on_the_device(arch, dtype, BN):
    x = torch.randn(100, 136).to(dtype)
    y = torch.zeros_like(x)
    with executing(arch) as recorder:
        doubled[(2,)](x, y, 100, 136, BM=64, BN=BN)
    recorder.clean()
    assert torch.equal(y, x * 2)
    assert bool(recorder.runs[0].counts.get("bulk")) == (arch == 90)


@triton.jit
def tripled(source, target, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    target.store([m, n], source.load([m, n]) * 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("BN", [32, 128])
def test_descriptors_from_the_host(arch, BN):
    from triton.tools.tensor_descriptor import TensorDescriptor as Plain

    x = torch.randn(100, 136)
    y = torch.zeros_like(x)
    with executing(arch) as recorder:
        tripled[(2, -(-136 // BN))](Plain.from_tensor(x, [64, BN]), Plain.from_tensor(y, [64, BN]), BM=64, BN=BN)
    recorder.clean()
    assert torch.equal(y, x * 3)


# ------------------------------------------------------------------------------------------------ warp specialisation


def gemm_launch(first=0, stages=2):
    torch.manual_seed(0)
    M, N, K = 100, 200, 264
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.zeros(M, N).bfloat16()
    with executing(90) as recorder:
        gluon_kernels.gemm[(2, 2)](
            descriptor(a, (64, 64)), descriptor(b, (128, 64)), descriptor(c, (64, 128)), K, 64, 128, 64, stages, first,
            num_warps=4,
        )  # fmt: skip
    return recorder, c, a.double() @ b.double().t()


@pytest.fixture(scope="module")
def gemm():
    recorder, _, _ = gemm_launch()
    recorder.clean()
    return recorder.launches[0]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_gemm(stages):
    recorder, c, truth = gemm_launch(stages=stages)
    recorder.clean()
    assert (c.double() - truth).abs().max() < 0.01 * truth.abs().max()
    verdict = check("c", c, truth.bfloat16(), truth)
    assert verdict.passed, verdict.detail
    assert recorder.runs[0].counts["wgmma"] > 0


def test_orders_of_warps(gemm):
    for seed in range(10):
        assert not gemm.run(order_seed=seed, ctas=[seed % 4]).errors


def test_wrong_phase():
    # a wait for the odd phase of a new mbarrier passes at once
    recorder, _, _ = gemm_launch(first=2)
    found = {f.kind for f in recorder.runs[0].errors}
    assert found & {Kind.shared_read_race, Kind.shared_unwritten, Kind.deadlock}


WAIT = r"\{\s*\.reg \.pred complete;\s*waitLoop:.*?\}"


def test_missing_mbarrier_wait(gemm):
    waits = [m.span() for m in re.finditer(WAIT, gemm.text, re.S)]
    assert waits
    races = {
        *(Kind.shared_read_race, Kind.shared_overwrite_race, Kind.shared_write_race),
        *(Kind.source_overwritten, Kind.shared_unwritten),
    }
    for a, b in waits:
        assert kinds(gemm, gemm.text[:a] + gemm.text[b:]) & races


def test_missing_arrival(gemm):
    found = gemm.run(re.sub(r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64[^;]*;", "", gemm.text)).findings
    (deadlock, *_) = [f for f in found if f.kind == Kind.deadlock and "try_wait" in f.text]
    assert deadlock.other == 1  # the arrival that the mbarrier lacks
    assert deadlock.address > 0


def test_wrong_number_of_bytes(gemm):
    assert Kind.deadlock in kinds(gemm, gemm.text.replace("], 24576;", "], 24592;"))


def test_missing_fence_before_a_bulk_store(gemm):
    assert Kind.unfenced_store in kinds(gemm, re.sub(r"fence\.proxy\.async[\w.:]*;", "", gemm.text))


def test_missing_wait_for_a_bulk_store(gemm):
    assert Kind.copy_at_exit in kinds(gemm, re.sub(r"cp\.async\.bulk\.wait_group\.read\s+0;", "", gemm.text))


def test_dropped_commit_of_wgmma(gemm):
    found = kinds(gemm, re.sub(r"wgmma\.wait_group\.sync\.aligned 0;", "", gemm.text))
    assert found & {Kind.accumulator_in_flight, Kind.source_overwritten}


@pytest.mark.parametrize(("N", "stages"), [(200, 2), (130, 1)])
def test_attention(N, stages):
    torch.manual_seed(0)
    H, D = 2, 64
    q, k, v = (torch.randn(H, N, D).bfloat16() for _ in range(3))
    o = torch.full((H, N, D), float("nan"))
    scale = D**-0.5 * 1.4426950408889634
    with executing(90) as recorder:
        gluon_kernels.attention[(-(-N // 64), H)](
            descriptor(q, (1, 64, D)), descriptor(k, (1, 64, D)), descriptor(v, (1, 64, D)), o, N, scale, 64, 64, D,
            stages, num_warps=4,
        )  # fmt: skip
    recorder.clean()
    truth = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (o - truth).abs().max() < 5e-3


# ------------------------------------------------------------------------------------------------ PTX by hand


HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0)
.reqntid THREADS
{
  .reg .pred %p<20>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<20>;
  ld.param.b64 %rd1, [kernel_param_0];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  setp.lt.u32 %p1, %r1, 32;
  setp.eq.u32 %p2, %r1, 0;
  shl.b32 %r2, %r1, 2;
  mov.b32 %r3, global_smem;
  add.s32 %r4, %r3, %r2;
"""


def run(body, threads=64, **options):
    x = torch.zeros(threads + 1024, dtype=torch.int32)
    result = execute(
        HEAD.replace("THREADS", str(threads)) + body + "ret;\n}\n", [x], (1, 1, 1), shared=8192, arch=90, **options
    )
    return x, result, {f.kind for f in result.errors}


NAMED = """
  @%p1 bra $PRODUCER;
  bar.sync 1, 64;
  ld.shared.b32 %r5, [%r4 + -128];
  st.global.b32 [%rd3], %r5;
  bra.uni $END;
$PRODUCER:
  st.shared.b32 [%r4], %r1;
  bar.arrive 1, 64;
$END:
"""


def test_named_barriers():
    for seed in range(4):
        x, _, errors = run(NAMED, order_seed=seed)
        assert not errors
        assert torch.equal(x[32:64], torch.arange(32).int())
    assert run(NAMED.replace("bar.sync 1, 64;", ""))[2] & {Kind.shared_read_race, Kind.shared_unwritten}
    # another barrier orders nothing, and is one that nobody else comes to
    assert Kind.deadlock in run(NAMED.replace("bar.arrive 1", "bar.arrive 2"))[2]


def test_registers_name_barriers():
    text = NAMED.replace("bar.sync 1, 64;", "mov.b32 %r9, 1;\n mov.b32 %r10, 64;\n barrier.sync %r9, %r10;")
    x, _, errors = run(text)
    assert not errors
    assert torch.equal(x[32:64], torch.arange(32).int())


HANDED_OVER = """
  @%p2 mbarrier.init.shared::cta.b64 [%r3+4096], 32;
  bar.sync 0;
  @%p1 bra $PRODUCER;
$SPIN:
  mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r3+4096], 0;
  @!%p3 bra $SPIN;
  ld.shared.b32 %r5, [%r4 + -128];
  st.global.b32 [%rd3], %r5;
  bra.uni $END;
$PRODUCER:
  st.shared.b32 [%r4], %r1;
  mbarrier.arrive.shared::cta.b64 %rd5, [%r3+4096];
  mbarrier.try_wait.shared::cta.b64 %p4, [%r3+4096], %rd5;
$END:
"""


def test_handed_over_by_mbarrier():
    for seed in range(4):
        x, _, errors = run(HANDED_OVER, order_seed=seed)
        assert not errors
        assert torch.equal(x[32:64], torch.arange(32).int())
    assert Kind.deadlock in run(HANDED_OVER.replace("], 32;", "], 33;"))[2]
    twice = HANDED_OVER.replace("arrive.shared::cta.b64 %rd5, [%r3+4096]", "arrive.shared::cta.b64 %rd5, [%r3+4096], 2")
    assert Kind.mbarrier_overflow in run(twice.replace("], 32;", "], 63;"))[2]
    assert Kind.mbarrier_invalid in run(HANDED_OVER.replace("arrive.shared::cta.b64 %rd5, [%r3+4096]", "arrive.shared::cta.b64 %rd5, [%r3+4104]"))[2]  # fmt: skip  # noqa: E501
    # an arrival before the store publishes nothing
    late = HANDED_OVER.replace("  st.shared.b32 [%r4], %r1;\n", "").replace("$END:", "st.shared.b32 [%r4], %r1;\n$END:")
    assert run(late)[2] & {Kind.shared_read_race, Kind.shared_unwritten}
    # no barrier between the initialisation and its use
    assert run(HANDED_OVER.replace("  bar.sync 0;\n", ""))[2]
    assert Kind.mbarrier_overwritten in run(HANDED_OVER.replace("st.shared.b32 [%r4]", "st.shared.b32 [%r4+4096]"))[2]


COPIED = """
  st.global.b32 [%rd3 + 4096], %r1;
  @%p2 mbarrier.init.shared::cta.b64 [%r3+4096], 32;
  bar.sync 0;
  @%p1 bra $PRODUCER;
  mov.b32 %r8, 0;
{
  .reg .pred complete;
  waitLoop:
  mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3+4096], %r8;
  @!complete bra.uni waitLoop;
}
  ld.shared.b32 %r5, [%r4 + -128];
  st.global.b32 [%rd3], %r5;
  bra.uni $END;
$PRODUCER:
  cp.async.ca.shared.global [%r4], [%rd3+4096], 4;
  cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r3+4096];
$END:
"""


def test_copies_that_arrive():
    x, _, errors = run(COPIED)
    assert not errors
    assert torch.equal(x[32:64], torch.arange(32).int())
    assert run(COPIED.replace("@!complete bra.uni waitLoop", ""))[2] & {Kind.shared_read_race, Kind.copy_read}


BULK = """
  st.global.b32 [%rd3 + 512], %r1;
  @%p2 mbarrier.init.shared::cta.b64 [%r3+4096], 1;
  bar.sync 0;
  add.s64 %rd4, %rd1, 512;
  add.s64 %rd6, %rd1, 1024;
  elect.sync %r6|%p5, -1;
  and.pred %p6, %p5, %p1;
  mapa.shared::cluster.u32 %r11, %r3, 0;
  @%p6 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3+4096], 256;
  @%p6 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r11], [%rd4], 256, [%r3+4096];
{
  .reg .pred complete;
  waitLoop:
  mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3+4096], 0;
  @!complete bra.uni waitLoop;
}
  ld.shared.b32 %r5, [%r4];
  st.global.b32 [%rd3], %r5;
  add.s32 %r7, %r5, 1;
  bar.sync 0;
  st.shared.b32 [%r4], %r7;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  @%p6 cp.async.bulk.global.shared::cta.bulk_group [%rd6], [%r3], 256;
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group 0;
"""


def test_plain_bulk_copies():
    x, _, errors = run(BULK)
    assert not errors
    assert torch.equal(x[:64], torch.arange(64).int())
    assert torch.equal(x[256:320], torch.arange(64).int() + 1)
    assert Kind.shared_read_race in run(BULK.replace("@!complete bra.uni waitLoop", ""))[2]
    assert Kind.unfenced_store in run(BULK.replace("fence.proxy.async.shared::cta;", ""))[2]
    early = run(BULK.replace("  bar.sync 0;\n  @%p6 cp", "  @%p6 cp"))[2]
    assert early & {Kind.shared_read_race, Kind.shared_overwrite_race, Kind.source_overwritten}
    assert Kind.copy_at_exit in run(BULK.replace("cp.async.bulk.wait_group 0;", ""))[2]


def test_lanes_meet_where_their_paths_do():
    # the join stands in the text before one of the ways to it, as LLVM lays out a loop with a branch in it
    text = """
      mov.b32 %r6, 0;
      mov.b32 %r7, 0;
      and.b32 %r5, %r1, 1;
      setp.eq.u32 %p3, %r5, 0;
      bra.uni $LOOP;
    $JOIN:
      bar.sync 0;
      add.s32 %r7, %r7, 1;
      setp.lt.u32 %p4, %r7, 3;
      @%p4 bra $LOOP;
      bra.uni $DONE;
    $LOOP:
      @%p3 bra $JOIN;
      add.s32 %r6, %r6, 1;
      bra.uni $JOIN;
    $DONE:
      st.global.b32 [%rd3], %r6;
    """
    x, result, errors = run(text)
    assert not errors
    assert x[:6].tolist() == [0, 3] * 3
    assert result.counts["stg"] == 2


def test_a_jump_table():
    text = """
      and.b32 %r5, %r1, 3;
      $TABLE: .branchtargets $A, $B, $A, $C;
      brx.idx %r5, $TABLE;
    $A:
      mov.b32 %r6, 1;
      bra.uni $JOIN;
    $B:
      mov.b32 %r6, 2;
      bra.uni $JOIN;
    $C:
      mov.b32 %r6, 3;
    $JOIN:
      st.global.b32 [%rd3], %r6;
    """
    x, result, errors = run(text)
    assert not errors
    assert x[:8].tolist() == [1, 2, 1, 3] * 2
    assert result.counts["stg"] == 2  # the lanes meet again
