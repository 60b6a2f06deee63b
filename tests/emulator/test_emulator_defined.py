"""Definedness goes byte by byte: what does not depend on an undefined byte is defined."""

import pytest
import torch

from vitkernels.emulator.execute import Kind, execute

# %r2 is undefined, and so are %rs2 and %rd2; %r1 is the thread's number, %rs1 its lower half.
HEAD = """
.visible .entry k(.param .u64 k_param_0)
.reqntid 32
{
.reg .pred %p<9>; .reg .b16 %rs<20>; .reg .b32 %r<20>; .reg .f32 %f<9>; .reg .b64 %rd<20>;
mov.u32 %r1, %tid.x;
cvt.u16.u32 %rs1, %r1;
ld.param.b64 %rd1, [k_param_0];
mul.wide.u32 %rd3, %r1, 8;
add.s64 %rd4, %rd1, %rd3;
mov.b32 %r9, {%rs1, %rs2};
"""

DEFINED = {
    "lower half": "st.global.b16 [%rd4], %r9;",
    "unpacked": "mov.b32 {%rs3, %rs4}, %r9; st.global.b16 [%rd4], %rs3;",
    "masked": "and.b32 %r3, %r9, 65535; st.global.b32 [%rd4], %r3;",
    "masked by or": "or.b32 %r3, %r9, 0xFFFF0000; st.global.b32 [%rd4], %r3;",
    "in place": "mov.b32 %r3, 65535; and.b32 %r3, %r9, %r3; prmt.b32 %r3, %r3, 0, 0x4410; st.global.b32 [%rd4], %r3;",
    "shifted out": "shl.b32 %r3, %r9, 16; st.global.b32 [%rd4], %r3;",
    "shifted by bits": "shl.b32 %r3, %r9, 20; st.global.b32 [%rd4], %r3;",
    "permuted": "prmt.b32 %r3, %r9, 0, 0x4510; st.global.b32 [%rd4], %r3;",
    "sign of a defined byte": "prmt.b32 %r3, %r9, 0, 0x9910; st.global.b32 [%rd4], %r3;",
    "extracted": "bfe.u32 %r3, %r9, 3, 9; st.global.b32 [%rd4], %r3;",
    "inserted over": "bfi.b32 %r3, %r1, %r9, 16, 16; st.global.b32 [%rd4], %r3;",
    "converted": "cvt.u32.u16 %r3, %rs1; cvt.u16.u32 %rs3, %r9; st.global.b16 [%rd4], %rs3;",
    "selected": "setp.lt.u32 %p1, %r1, 99; selp.b32 %r3, %r1, %r2, %p1; st.global.b32 [%rd4], %r3;",
    "decided without it": "setp.eq.u32 %p1, %r2, 0; setp.gt.u32 %p2, %r1, 99; and.pred %p3, %p1, %p2;"
    "@%p3 st.global.b32 [%rd4], %r1;",
    "lop3": "lop3.b32 %r3, %r9, 65535, %r1, 0x80; st.global.b32 [%rd4], %r3;",
    "funnel": "shf.l.wrap.b32 %r3, %r1, %r9, 16; shr.u32 %r3, %r3, 16; st.global.b16 [%rd4], %r3;",
    "through shared memory": "st.shared.b32 [global_smem], %r9; ld.shared.b16 %rs3, [global_smem];"
    "st.global.b16 [%rd4], %rs3;",
    "shuffled": "shfl.sync.bfly.b32 %r3, %r9, 1, 31, -1; st.global.b16 [%rd4], %r3;",
    "64 bits": "mov.b64 %rd5, {%r1, %r2}; cvt.u32.u64 %r3, %rd5; st.global.b32 [%rd4], %r3;",
    "a pair's half": "add.f16x2 %r3, %r9, %r9; st.global.b16 [%rd4], %r3;",
    "a pair of integers' half": "add.s16x2 %r3, %r9, %r9; st.global.b16 [%rd4], %r3;",
    "moved about": "mov.b32 %r3, %r2; mov.b32 %r4, %r3; shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;",
}
UNDEFINED = {
    "upper half": ("shr.u32 %r3, %r9, 16; st.global.b16 [%rd4], %r3;", Kind.undefined_store),
    "whole": ("st.global.b32 [%rd4], %r9;", Kind.undefined_store),
    "one byte": ("and.b32 %r3, %r9, 0x1FFFF; st.global.b32 [%rd4], %r3;", Kind.undefined_store),
    "a bit more": ("bfe.u32 %r3, %r9, 3, 14; st.global.b32 [%rd4], %r3;", Kind.undefined_store),
    "shifted in": ("shr.u32 %r3, %r9, 1; st.global.b16 [%rd4], %r3;", Kind.undefined_store),
    "permuted": ("prmt.b32 %r3, %r9, 0, 0x4442; st.global.b32 [%rd4], %r3;", Kind.undefined_store),
    "sign": ("prmt.b32 %r3, %r9, 0, 0xB010; st.global.b32 [%rd4], %r3;", Kind.undefined_store),
    "sum": ("add.s32 %r3, %r9, 0; st.global.b32 [%rd4], %r3;", Kind.undefined_store),
    "selected": (
        "setp.gt.u32 %p1, %r1, 99; selp.b32 %r3, %r1, %r2, %p1; st.global.b32 [%rd4], %r3;",
        Kind.undefined_store,
    ),
    "decides": ("setp.eq.u32 %p1, %r2, 0; @%p1 st.global.b32 [%rd4], %r1;", Kind.undefined_predicate),
    "branches": ("setp.eq.u32 %p1, %r2, 0; @%p1 bra $END; st.global.b32 [%rd4], %r1; $END:", Kind.undefined_predicate),
    "addresses": ("st.global.b32 [%rd2], %r1;", Kind.undefined_address),
    "addresses shared": ("st.shared.b32 [%r2], %r1;", Kind.undefined_address),
    "through shared memory": (
        "st.shared.b32 [global_smem], %r9; ld.shared.b32 %r3, [global_smem]; st.global.b32 [%rd4], %r3;",
        Kind.undefined_store,
    ),
    "a pair's half": ("add.f16x2 %r3, %r9, %r9; st.global.b32 [%rd4], %r3;", Kind.undefined_store),
    "a pair of integers": ("add.s16x2 %r3, %r9, %r9; st.global.b32 [%rd4], %r3;", Kind.undefined_store),
    "a product": (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, {%r1, %r1, %r1, %r9}, {%r1, %r1},"
        "{%f5, %f5, %f5, %f5};",
        Kind.undefined_product,
    ),
}  # fmt: skip


def errors(body):
    out = torch.zeros(64, dtype=torch.int32)
    run = execute(HEAD + body + "ret;\n}\n", [out], (1, 1, 1), shared=1024, arch=80)
    return {f.kind for f in run.errors}


@pytest.mark.parametrize("name", DEFINED)
def test_defined(name):
    assert not errors(DEFINED[name])


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined(name):
    body, kind = UNDEFINED[name]
    assert errors(body) == {kind}
