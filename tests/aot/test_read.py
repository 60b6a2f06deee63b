"""What inspect reads: known listings, kernels that break each rule, and launches that are the JIT's own."""

import json
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="nothing compiles without Triton")

import triton

from tests.aot import bad_kernels
from vitkernels import runtime
from vitkernels.testing.cases import Case
from vitkernels.tools.aot import TARGETS, build, compile_launch, launches, read, trace
from vitkernels.tools.aot.contract import broken_rules

SASS = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0020*/              @!P6 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/              @!P0 LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R148], [R12.64], P1 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/              @P1  BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   STL.64 [R1+0x8], R4 ;
        /*0090*/                   LDL.LU R5, [R1] ;
        /*00a0*/              @!P6 BRA `(.L_x_1) ;
.L_x_0:
        /*00b0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00c0*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*00d0*/              @!P0 EXIT ;
        /*00e0*/                   HMMA.16816.F32.BF16 R68, R36.reuse, R100, R68 ;
        /*00f0*/                   EXIT ;
.L_x_3:
        /*0100*/                   STG.E.U16 desc[UR4][R2.64], R9 ;
        /*0110*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0120*/                   BRA `(.L_x_4);
.L_x_5:
"""
AMDGCN = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	global_load_ubyte v1, v0, s[0:1]
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_short_d16 v2, v3, s[8:11], 0 offen
	global_load_dwordx4 v[4:7], v0, s[0:1]
	buffer_load_dword v8, s[8:11], 0 offen lds
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	v_mfma_f32_16x16x8_xf32 v[0:3], v[4:5], v[6:7], v[0:3]
	global_atomic_add_f32 v0, v1, s[0:1]
	buffer_store_short v2, v3, s[8:11], 0 offen
	s_endpgm
	.amdhsa_kernel kernel
        .private_segment_fixed_size: 24
        .vgpr_count:     96
"""


def test_sass():
    code = read.instructions(SASS)
    assert [i.name for i in code if i.in_loop] == [
        "LDG.E.U16.CONSTANT", "LDG.E.128", "LDGSTS.E.BYPASS.128", "HGMMA.64x128x16.F32.BF16", "BRA", "STL.64", "LDL.LU",
        "BRA", "STG.E.U16", "BRA", "BRA",
    ]  # fmt: skip
    counts = read.sass_counts(code)
    assert counts == {
        "wgmma": 1, "mma_sync": 1, "tcgen05": 0, "mfma": 0, "tma": 1, "cp_async": 1, "narrow": 2, "narrow_in_loop": 2,
        "spilled_bytes": 12,
    }  # fmt: skip


def test_amdgcn():
    code = read.instructions(AMDGCN)
    assert next(i.name for i in code if i.in_loop) == "buffer_load_short_d16"
    assert sum(i.in_loop for i in code) == 5
    counts = read.amdgcn_counts(code)
    assert counts == {
        "wgmma": 0, "mma_sync": 0, "tcgen05": 0, "mfma": 2, "tma": 0, "cp_async": 1, "narrow": 2, "narrow_in_loop": 1,
        "atomics": 1, "tf32": 1,
    }  # fmt: skip


def test_ptx():
    ptx = """
        @%p1 atom.global.gpu.acq_rel.add.f32 %r1, [%rd1], %r2;
        red.global.add.f32 [%rd1], %r2;
        redux.sync.max.s32 %r1, %r2, -1;
        wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%r1}, %rd1, %rd2, p, 1, 1;
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
        tcgen05.mma.cta_group::1.kind::tf32 [%r1], %rd1, %rd2, %r3, p;
    """
    assert read.ptx_counts(ptx) == {"atomics": 2, "tf32": 2}


TTIR = """module {{
  tt.func public @kernel(%x_ptr: !tt.ptr<bf16>, %stride: i32, %n: i32) attributes {{noinline = false}} {{
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c128 = arith.constant 128 : i32 loc(#loc1)
    %wide = arith.constant 768 : i32
    %pid = tt.get_program_id x : i32 loc(#loc2)
    %group = arith.divsi %pid, %n : i32
    %range = tt.make_range {{end = 128 : i32, start = 0 : i32}} : tensor<128xi32>
    %strides = tt.splat %stride : i32 -> tensor<128xi32>
{body}
    tt.return
  }}
}}
"""
ADDRESSES = {
    "the program's number times a stride": ("%a = arith.muli %group, %stride : i32 loc(#loc)", 32),
    "the same in 64 bits": ("%w = arith.extsi %pid : i32 to i64\n%a = arith.muli %w, %s : i64", 64),
    "a row's number": ("%a = arith.muli %pid, %c128 : i32\n%b = arith.extsi %a : i32 to i64", 64),
    "a row times a constant stride": ("%a = arith.muli %pid, %c128 : i32\n%b = arith.muli %a, %wide : i32", 32),
    "a tile of rows times a stride": (
        "%a = arith.muli %pid, %c128 : i32\n%b = tt.splat %a : i32 -> tensor<128xi32>\n"
        "%r = arith.addi %b, %range : tensor<128xi32>\n%o = arith.muli %r, %strides : tensor<128xi32>", 32),
    "offsets within a tile": ("%o = arith.muli %range, %strides : tensor<128xi32>", 64),
    "64 bits with a hint in 32": (
        "%w = arith.extsi %pid : i32 to i64\n"
        "%a = arith.muli %w, %s {tt.divisibility = dense<8> : tensor<1xi32>} : tensor<128xi64>", 64),
    "a loop's counter": (
        "scf.for %i = %pid to %n step %c128  : i32 {\n%a = arith.muli %i, %stride : i32\n}", 32),
    "what a loop hands on": (
        "%r:2 = scf.for %i = %c0 to %n step %c128 iter_args(%a = %c0, %b = %c0) -> (i32, i32)  : i32 {\n"
        "%o = arith.muli %b, %stride : i32\nscf.yield %a, %pid : i32, i32\n}", 32),
    "what a loop hands on, from elsewhere": (
        "%r:2 = scf.for %i = %c0 to %n step %c128 iter_args(%a = %c0, %b = %c0) -> (i32, i32)  : i32 {\n"
        "%o = arith.muli %a, %stride : i32\nscf.yield %a, %pid : i32, i32\n}", 64),
    "what a branch results in": (
        "%r = scf.if %cond -> (i32) {\nscf.yield %pid : i32\n} else {\nscf.yield %c0 : i32\n}\n"
        "%o = arith.muli %r, %stride : i32", 32),
    "another partition's name": (
        "%a = arith.addi %pid, %c0 : i32\n}\npartition0(%arg: i32) num_warps(4) {\n"
        "%o = arith.muli %a, %stride : i32", 64),
    "a partition's program id": (
        "}\npartition0(%arg: i32) num_warps(4) {\n"
        "%a = tt.get_program_id x : i32\n%o = arith.muli %a, %stride : i32", 32),
}  # fmt: skip


@pytest.mark.parametrize(("body", "bits"), ADDRESSES.values(), ids=ADDRESSES)
def test_address_bits(body, bits):
    assert read.address_bits(TTIR.format(body=body)) == bits


@pytest.mark.parametrize(
    ("target", "limits", "blocks"),
    [
        # PERFORMANCE figures of kernels on sm_90, by registers, then by shared memory.
        ("sm_90", (8, 118, 96 << 10), 2),
        ("sm_90", (8, 255, 144 << 10), 1),
        ("sm_90", (4, 140, 60 << 10), 3),
        ("sm_90", (4, 64, 0), 8),
        ("sm_90", (4, 32, 0), 16),
        ("sm_90", (1, 16, 0), 32),
        ("sm_80", (4, 32, 80 << 10), 2),
        ("sm_120", (8, 40, 0), 6),
        ("sm_120", (4, 32, 99 << 10), 1),
        ("sm_120", (4, 32, 100 << 10), 0),
        ("sm_100", (4, 64, 0, 256), 2),
        ("gfx942", (4, 64, 0), 8),
        ("gfx942", (4, 129, 0), 3),
        ("gfx942", (8, 512, 0), 0),
        ("gfx942", (1, 16, 0), 16),
        ("gfx942", (4, 16, (32 << 10) + 1), 1),
    ],
)
def test_blocks(target, limits, blocks):
    assert read.blocks(TARGETS[target], *limits) == blocks


UNITS = {"sm_80": "mma_sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}  # sm_120's is sm_80's


@pytest.mark.parametrize("target", UNITS)
def test_bad_kernels(target):
    """Each of them is caught by its rule, and by no other."""
    read_ = [read.read_kernel(each, compile_launch(each)) for each in trace(lambda: bad_kernels.launch(target), target)]
    expected = {"ttir", "ttgir", "llir"} | ({"amdgcn"} if target == "gfx942" else {"ptx", "cubin", "sass"})
    assert all(set(stages) == expected for _, stages in read_)
    good, spills, narrow, atomic, product, small, two_warps, tf32, short = (report for report, _ in read_)
    assert broken_rules(good) == {}
    assert good.address_bits == 64
    assert broken_rules(spills) == {"spilled_bytes": spills.spilled_bytes}
    assert set(broken_rules(narrow)) == {"narrow_in_loop"}
    assert narrow.narrow > 0
    assert set(broken_rules(atomic)) == {"atomics"}
    assert atomic.atomics == 1
    assert broken_rules(product) == broken_rules(small) == {}
    assert {kind for kind in UNITS.values() if getattr(product, kind)} == {UNITS[target]}
    assert broken_rules(two_warps) == ({"slow_products": 1} if target in ("sm_90", "sm_100") else {})
    assert set(broken_rules(tf32)) == {"tf32"}
    assert broken_rules(short) == {"address_bits": 32}


# Launches of the library on real CPU tensors and on fake ones. A view that starts one element late has an address that
# divides by nothing; widths of 54 and 130 do not divide by 16.
ODD_AND_EVEN = (
    Case("even", 2, 32, 8, 0, 64, 4, 128, "gelu", True),
    Case("odd", 3, 30, 6, 1, 54, 3, 130, "gelu_tanh", True),
)


def tensors_on(device, late=False):
    """Where launches() makes its tensors on "cuda"; with late, each one element after its storage begins."""
    empty = torch.empty

    def elsewhere(*size, **kwargs):
        if kwargs.get("device") != "cuda":
            return empty(*size, **kwargs)
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        kwargs["device"] = device
        if not late:
            return empty(shape, **kwargs)
        return empty(shape.numel() + 1, **kwargs).narrow(0, 1, shape.numel()).view(shape)

    return mock.patch.object(torch, "empty", elsewhere)


def real_launches(launcher, target, late=False, compiles=False):
    """The JIT's own way, with real tensors: what it bound, and, where it ``compiles`` that, the hashes."""
    found, hashes = [], []
    run, mm = triton.JITFunction.run, torch.mm

    def hook(*, fn, compile, **_):
        found.append(compile["specialization_data"])
        return not compiles

    def warm(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        hashes.append(compiled and compiled.hash)

    def widening_mm(a, b, *, out_dtype=None):  # CUDA's alone
        return mm(a, b).to(out_dtype or a.dtype)

    cuda = TARGETS[target].triton.backend == "cuda"
    with (
        build._named_driver(target, f"real, compiled: {compiles}"),
        triton.knobs.runtime.scope(),
        tensors_on("cpu", late),
        mock.patch.object(torch, "mm", widening_mm),
        mock.patch.object(triton.JITFunction, "run", warm),
        mock.patch.object(runtime, "device_facts", return_value=TARGETS[target].facts),
        mock.patch.object(torch.version, "cuda", "12.8" if cuda else None),
        mock.patch.object(torch.version, "hip", None if cuda else "6.4"),
    ):
        triton.knobs.runtime.jit_cache_hook = hook
        launcher()
    return found, hashes


def fake_launches(launcher, target, late=False):
    def launch():
        with tensors_on("cuda", late):
            launcher()

    return trace(launch, target)


@pytest.mark.parametrize("case", ODD_AND_EVEN, ids=lambda case: case.name)
def test_launches_are_the_jits(case):
    """Fake tensors are specialised as real ones are, and compiling from a record gives the JIT's own kernel."""
    found, compiled = {False: set(), True: set()}, 0
    for op, launcher in launches(case, torch.bfloat16).items():
        for target in ("sm_90", "gfx942"):
            for late in (False, True):
                want = real_launches(launcher, target, late)[0]
                assert [each.specialization for each in fake_launches(launcher, target, late)] == want, (
                    op,
                    target,
                    late,
                )
                found[late].update(want)
        if op in ("layer_norm", "patch_embed"):
            _, hashes = real_launches(launcher, "sm_90", compiles=True)
            assert [compile_launch(each).hash for each in trace(launcher, "sm_90")] == hashes, op
            compiled += len(hashes)
    assert compiled >= 5
    # The comparison can fail: the views do make a difference, of which both sides know. Sums over programs are the
    # exception: their launcher makes every tensor.
    assert all("_sum_shares_kernel" in launch for launch in found[False] & found[True])


def test_addresses_of_huge_tensors():
    """Where tensors hold more than 2³¹ elements, so does each head, those that check the reach go over to 64 bits."""
    case = Case("huge", 2, 16384, 16, 0, 2048, 16, 4096)
    found = {}
    for launcher in launches(case, torch.bfloat16).values():
        for launch in trace(launcher, "sm_90"):
            if "INDEX" in json.loads(launch.specialization)["signature"] and launch not in found:
                found[launch] = read.address_bits(compile_launch(launch).asm["ttir"])
    assert set(found.values()) == {64}, found
    assert len(found) >= 6


def test_annotated_sass():
    """nvdisasm of Triton 3.6 writes what an instruction waits for behind its operands; a loop is one all the same."""
    code = read.instructions("""
.L_x_1:
        /*0580*/                   LDG.E.U16 R30, desc[UR6][R30.64+0x2]  &req={1} &wr=0x2 ?trans4;
        /*07a0*/               @P0 BRA `(.L_x_1)                                          ?trans6;
        /*0860*/                   EXIT                                                   ?trans5;
""")
    assert [(i.name, i.in_loop) for i in code] == [("LDG.E.U16", True), ("BRA", True), ("EXIT", False)]
    assert code[0].operands == "R30, desc[UR6][R30.64+0x2]"
