"""Each instruction that Triton emits for the library's kernels, on random and edge values, against exact arithmetic.

Results of 16, 32 and 64 bits are compared bit by bit; approximations within their documented error.
"""

import fractions
import math
import zlib

import numpy as np
import pytest
import torch

from vitkernels.emulator.execute import execute
from vitkernels.emulator.lists import BITS

LANES = 256

# ------------------------------------------------------------------------------------------------ formats

# significant bits, smallest and largest exponent
FORMATS = {
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "tf32": (11, -126, 127),
    "f32": (24, -126, 127),
    "f64": (53, -1022, 1023),
}
EDGES = {
    "f16": [0, 0x8000, 1, 0x83FF, 0x400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x3555],
    "bf16": [0, 0x8000, 1, 0x807F, 0x80, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x3EAB],
    "f32": [
        *(0, 0x80000000, 1, 0x807FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000),
        *(0xFF800000, 0x7FC00000, 0x3EAAAAAB, 0x4B000001, 0xCF000000, 0x4F000000, 0x5F000000, 0x3F000000, 0x40200000),
        *(0x33000000, 0x33000001, 0x477FF000, 0x477FEFFF, 0x38800000, 0x387FFFFF, 0x3F808000, 0x3F818000, 0x3F801000),
    ],
    "f64": [
        *(0, 1 << 63, 1, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000),
        *(0xFFF0000000000000, 0x7FF8000000000000, 0x3FD5555555555555, 0x41DFFFFFFFC00000, 0x36A0000000000000),
        *(0x47EFFFFFF0000000, 0x47EFFFFFEFFFFFFF, 0x3810000000000000, 0x380FFFFFFFFFFFFF),
    ],
}


def integer_edges(bits):
    top = 1 << bits - 1
    return [0, 1, 2, 3, 7, 31, 32, 63, 64, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 0x5A & (2 * top - 1)]


def operand(ty, rng):
    """LANES values as the bits of a type: edge values, values near 1 and any bits."""
    bits = BITS[ty]
    if ty.endswith("x2"):
        low, high = operand(ty[:-2], rng), operand(ty[:-2], rng)
        return low | high << np.uint64(bits // 2)
    edges = np.array(EDGES.get(ty) or integer_edges(bits), np.uint64)
    any_bits = rng.integers(0, 1 << min(bits, 63), LANES, dtype=np.uint64)
    if bits == 64:
        any_bits |= rng.integers(0, 2, LANES, dtype=np.uint64) << np.uint64(63)
    values = any_bits
    if ty in FORMATS:
        near = rng.standard_normal(LANES) * 4
        values = np.where(
            rng.random(LANES) < 0.6, np.array([encode(fractions.Fraction(v), ty) for v in near], np.uint64), any_bits
        )
    return np.where(rng.random(LANES) < 0.4, rng.choice(edges, LANES), values).astype(np.uint64)


def decode(bits, ty):
    """A float's bits as a Fraction, or as inf, -inf or nan."""
    significant, low, _ = FORMATS[ty]
    width = {"tf32": 32}.get(ty, BITS[ty])
    stored = {"tf32": 23}.get(ty, significant - 1)
    sign = -1 if bits >> (width - 1) & 1 else 1
    exponent = bits >> stored & (1 << width - 1 - stored) - 1
    mantissa = bits & (1 << stored) - 1
    if exponent == (1 << width - 1 - stored) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * fractions.Fraction(mantissa) * fractions.Fraction(2) ** (low - stored)
    return sign * (fractions.Fraction(mantissa | 1 << stored) * fractions.Fraction(2) ** (exponent - 1 + low - stored))


def encode(value, ty, mode="rn", negative_zero=False):
    """The bits that a value rounds to: rn to even, rz towards zero, rna halves away from zero."""
    significant, low, _ = FORMATS[ty]
    width, stored = ({"tf32": 32}.get(ty, BITS[ty])), {"tf32": 23}.get(ty, significant - 1)
    dropped = stored - (significant - 1)
    infinity = (1 << width - 1 - stored) - 1 << stored
    if isinstance(value, float) and math.isnan(value):
        return -1
    sign = 1 << width - 1 if value < 0 or (value == 0 and negative_zero) else 0
    if isinstance(value, float) and math.isinf(value):
        return sign | infinity
    value = abs(fractions.Fraction(value))
    if value == 0:
        return sign
    exponent = max(value.numerator.bit_length() - value.denominator.bit_length(), low)
    while fractions.Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    while exponent > low and fractions.Fraction(2) ** exponent > value:
        exponent -= 1
    scaled = value / fractions.Fraction(2) ** (exponent - significant + 1)
    whole, rest = divmod(scaled, 1)
    half = fractions.Fraction(1, 2)
    up = {"rn": rest > half or (rest == half and whole % 2), "rz": False, "rna": rest >= half}[mode]
    whole = int(whole) + bool(up)
    bits = (whole + ((exponent - low) << significant - 1)) << dropped
    if bits >= infinity:
        return sign | (infinity if mode != "rz" else infinity - (1 << dropped))
    return sign | bits


# ------------------------------------------------------------------------------------------------ running one


def run(instruction, to, types, operands, predicates=False, arch=90):
    """Run one instruction, ``{d}`` and ``{a}``, ``{b}``, ``{c}`` its registers, in LANES threads."""
    register = {1: "%p", 16: "%rs", 32: "%r", 64: "%rd"}
    size = {16: 2, 32: 4, 64: 8}
    names, loads = {}, []
    buffers = []
    for i, (name, ty, values) in enumerate(zip("abc", types, operands, strict=False)):
        bits = max(BITS[ty], 16)
        names[name] = f"{register[bits]}{10 + i}"
        raw = values.astype({16: np.uint16, 32: np.uint32, 64: np.uint64}[bits])
        buffers.append(torch.from_numpy(raw.view({16: np.int16, 32: np.int32, 64: np.int64}[bits]).copy()))
        loads.append(
            f"ld.param.b64 %rd1, [k_param_{i}]; mul.wide.u32 %rd2, %r1, {size[bits]}; add.s64 %rd3, %rd1, %rd2;"
            f"ld.global.b{bits} {names[name]}, [%rd3];"
        )
    bits = 1 if predicates else max(BITS[to], 16)
    names["d"] = f"{register[bits]}20"
    store_bits = 32 if predicates else bits
    stored = "%r30" if predicates else names["d"]
    n = len(operands)
    out = torch.zeros(LANES, dtype={16: torch.int16, 32: torch.int32, 64: torch.int64}[store_bits])
    text = f"""
.visible .entry k({", ".join(f".param .u64 k_param_{i}" for i in range(n + 1))})
.reqntid {LANES}
{{
.reg .pred %p<40>; .reg .b16 %rs<40>; .reg .b32 %r<40>; .reg .b64 %rd<40>;
mov.u32 %r1, %tid.x;
{" ".join(loads)}
{instruction.format(**names)};
{"selp.b32 %r30, 1, 0, %p20;" if predicates else ""}
ld.param.b64 %rd1, [k_param_{n}]; mul.wide.u32 %rd2, %r1, {size[store_bits]}; add.s64 %rd3, %rd1, %rd2;
st.global.b{store_bits} [%rd3], {stored};
ret;
}}
"""
    result = execute(text, [*buffers, out], (1, 1, 1), shared=0, arch=arch)
    kinds = {f.kind.name for f in result.errors} - {"division_by_zero"}
    assert not kinds, result.errors[0]
    return out.numpy().view({16: np.uint16, 32: np.uint32, 64: np.uint64}[store_bits]).astype(np.uint64)


def signed(values, bits):
    return [int(v) - (1 << bits) if int(v) >> bits - 1 else int(v) for v in values]


def integers(values, ty):
    return signed(values, BITS[ty]) if ty[0] == "s" else [int(v) for v in values]


def check(got, expected, bits, text):
    mask = (1 << bits) - 1
    wrong = [i for i, (g, e) in enumerate(zip(got, expected, strict=True)) if int(g) & mask != e & mask]
    assert not wrong, f"{text}: lane {wrong[0]}: {int(got[wrong[0]]):#x}, expected {expected[wrong[0]] & mask:#x}"


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


# ------------------------------------------------------------------------------------------------ integers


def shifted(a, n, bits, left):
    if left:
        return a << n if n < bits else 0
    return a >> min(n, bits)


def truncated(a, b):
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("ty", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("op", [*INTEGERS, "mul.hi", "div", "rem"])
def test_two_integers(op, ty, rng):
    bits = BITS[ty]
    a, b = operand(ty, rng), operand(ty, rng)
    got = run(f"{op}.{ty} {{d}}, {{a}}, {{b}}", ty, [ty, ty], [a, b])
    x, y = integers(a, ty), integers(b, ty)
    if op in ("div", "rem"):
        keep = [i for i, v in enumerate(y) if v]  # what a division by zero gives is not defined
        got, x, y = got[keep], [x[i] for i in keep], [y[i] for i in keep]
        function = truncated if op == "div" else lambda p, q: p - truncated(p, q) * q
    else:
        function = (lambda p, q: p * q >> bits) if op == "mul.hi" else INTEGERS[op]
    check(got, [function(p, q) for p, q in zip(x, y, strict=True)], bits, f"{op}.{ty}")


@pytest.mark.parametrize("ty", ["s16", "u16"])
@pytest.mark.parametrize("op", ["add", "min", "max"])
def test_pairs_of_integers(op, ty, rng):
    a, b = operand("u32", rng), operand("u32", rng)
    got = run(f"{op}.{ty}x2 {{d}}, {{a}}, {{b}}", "u32", ["u32", "u32"], [a, b])
    for shift in (0, 16):
        x, y = (integers((v >> shift).astype(np.uint16), ty) for v in (a, b))
        halves = (got >> shift).astype(np.uint16)
        check(halves, [INTEGERS[op](p, q) for p, q in zip(x, y, strict=True)], 16, f"{op}.{ty}x2")


@pytest.mark.parametrize("ty", ["s16", "u16", "s32", "u32"])
@pytest.mark.parametrize("mad", [False, True])
def test_wide_products(ty, mad, rng):
    bits = BITS[ty]
    wide = {16: "u32", 32: "u64"}[bits]
    a, b, c = operand(ty, rng), operand(ty, rng), operand(wide, rng)
    op = f"mad.wide.{ty} {{d}}, {{a}}, {{b}}, {{c}}" if mad else f"mul.wide.{ty} {{d}}, {{a}}, {{b}}"
    got = run(op, wide, [ty, ty, wide], [a, b, c])
    expected = [p * q + mad * int(r) for p, q, r in zip(integers(a, ty), integers(b, ty), c, strict=True)]
    check(got, expected, 2 * bits, op)


@pytest.mark.parametrize("ty", ["s32", "u32", "s64"])
@pytest.mark.parametrize("part", ["lo", "hi"])
def test_integer_mad(ty, part, rng):
    if part == "hi" and ty == "s64":
        pytest.skip("not emitted")
    a, b, c = (operand(ty, rng) for _ in range(3))
    got = run(f"mad.{part}.{ty} {{d}}, {{a}}, {{b}}, {{c}}", ty, [ty] * 3, [a, b, c])
    down = BITS[ty] if part == "hi" else 0
    x, y, z = (integers(v, ty) for v in (a, b, c))
    check(got, [(p * q >> down) + r for p, q, r in zip(x, y, z, strict=True)], BITS[ty], f"mad.{part}.{ty}")


BITWISE = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("op", BITWISE)
def test_bitwise(op, bits, rng):
    ty = f"b{bits}"
    a, b = operand(ty, rng), operand(ty, rng)
    got = run(f"{op}.{ty} {{d}}, {{a}}, {{b}}", ty, [ty, ty], [a, b])
    check(got, [BITWISE[op](int(p), int(q)) for p, q in zip(a, b, strict=True)], bits, op)


@pytest.mark.parametrize("ty", ["b16", "b32", "b64"])
def test_not(ty, rng):
    a = operand(ty, rng)
    check(run(f"not.{ty} {{d}}, {{a}}", ty, [ty], [a]), [~int(v) for v in a], BITS[ty], "not")


@pytest.mark.parametrize("op", ["shl.b16", "shl.b32", "shl.b64", *(f"shr.{s}{b}" for s in "su" for b in (16, 32, 64))])
def test_shifts(op, rng):
    ty = op[4:]
    a, n = operand(ty, rng), rng.integers(0, 80, LANES).astype(np.uint64)
    got = run(f"{op} {{d}}, {{a}}, {{b}}", ty, [ty, "u32"], [a, n])
    expected = [shifted(p, int(q), BITS[ty], op[:3] == "shl") for p, q in zip(integers(a, ty), n, strict=True)]
    check(got, expected, BITS[ty], op)


def field(value, position, length, bits, sign):
    if length == 0:
        return 0
    taken = value >> position if position < bits else (-1 if value < 0 else 0)
    taken &= (1 << length) - 1
    top = value >> min(position + length - 1, bits - 1) & 1
    return taken - (1 << length) if sign and top else taken


@pytest.mark.parametrize("ty", ["s32", "u32", "s64", "u64"])
def test_bfe(ty, rng):
    bits = BITS[ty]
    a, p, n = operand(ty, rng), *(rng.integers(0, bits + 4, LANES).astype(np.uint64) for _ in range(2))
    got = run(f"bfe.{ty} {{d}}, {{a}}, {{b}}, {{c}}", ty, [ty, "u32", "u32"], [a, p, n])
    lists = integers(a, ty), p, n
    check(
        got, [field(x, int(q), int(r), bits, ty[0] == "s") for x, q, r in zip(*lists, strict=True)], bits, f"bfe.{ty}"
    )


@pytest.mark.parametrize(("position", "length"), [(0, 8), (8, 16), (5, 9), (31, 4), (0, 32), (3, 0)])
def test_bfi(position, length, rng):
    a, b = operand("b32", rng), operand("b32", rng)
    got = run(f"bfi.b32 {{d}}, {{a}}, {{b}}, {position}, {length}", "b32", ["b32", "b32"], [a, b])
    mask = ((1 << length) - 1) << position
    expected = [(int(q) & ~mask) | (int(p) << position & mask & 0xFFFFFFFF) for p, q in zip(a, b, strict=True)]
    check(got, expected, 32, "bfi")


def permuted(a, b, selector):
    source = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
    result = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = source[pick & 7]
        result |= ((0xFF if byte & 0x80 else 0) if pick & 8 else byte) << 8 * i
    return result


def test_prmt(rng):
    a, b, s = (operand("b32", rng) for _ in range(3))
    got = run("prmt.b32 {d}, {a}, {b}, {c}", "b32", ["b32"] * 3, [a, b, s])
    check(got, [permuted(*map(int, v)) for v in zip(a, b, s, strict=True)], 32, "prmt")


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1D, 0])
def test_lop3(table, rng):
    a, b, c = (operand("b32", rng) for _ in range(3))
    got = run(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table}", "b32", ["b32"] * 3, [a, b, c])
    expected = []
    for x, y, z in zip(a, b, c, strict=True):
        bit = [
            (table >> ((int(x) >> i & 1) * 4 + (int(y) >> i & 1) * 2 + (int(z) >> i & 1)) & 1) << i for i in range(32)
        ]
        expected.append(sum(bit))
    check(got, expected, 32, "lop3")


@pytest.mark.parametrize("mode", ["l.wrap", "r.wrap", "l.clamp", "r.clamp"])
def test_funnel_shift(mode, rng):
    a, b = operand("b32", rng), operand("b32", rng)
    n = rng.integers(0, 40, LANES).astype(np.uint64)
    got = run(f"shf.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}}", "b32", ["b32"] * 3, [a, b, n])
    expected = []
    for x, y, k in zip(a, b, n, strict=True):
        k = int(k) & 31 if "wrap" in mode else min(int(k), 32)
        both = int(y) << 32 | int(x)
        expected.append((both << k >> 32) if mode[0] == "l" else both >> k)
    check(got, expected, 32, mode)


@pytest.mark.parametrize("bits", [32, 64])
def test_counted_bits(bits, rng):
    ty = f"b{bits}"
    a = operand(ty, rng)
    check(run(f"popc.{ty} {{d}}, {{a}}", "b32", [ty], [a]), [int(v).bit_count() for v in a], 32, "popc")
    check(run(f"clz.{ty} {{d}}, {{a}}", "b32", [ty], [a]), [bits - int(v).bit_length() for v in a], 32, "clz")
    reversed_ = [int(f"{int(v):0{bits}b}"[::-1], 2) for v in a]
    check(run(f"brev.{ty} {{d}}, {{a}}", ty, [ty], [a]), reversed_, bits, "brev")


@pytest.mark.parametrize("ty", ["s16", "s32", "s64"])
@pytest.mark.parametrize("op", ["neg", "abs"])
def test_sign_of_integers(op, ty, rng):
    a = operand(ty, rng)
    expected = [-v if op == "neg" else abs(v) for v in integers(a, ty)]
    check(run(f"{op}.{ty} {{d}}, {{a}}", ty, [ty], [a]), expected, BITS[ty], op)


COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("ty", ["b16", "s16", "u16", "b32", "s32", "u32", "b64", "s64", "u64"])
@pytest.mark.parametrize("how", COMPARE)
def test_compared_integers(how, ty, rng):
    if ty[0] == "b" and how not in ("eq", "ne"):
        pytest.skip("bits have no order")
    a, b = operand(ty, rng), operand(ty, rng)
    got = run(f"setp.{how}.{ty} {{d}}, {{a}}, {{b}}", "u32", [ty, ty], [a, b], predicates=True)
    expected = [COMPARE[how](p, q) for p, q in zip(integers(a, ty), integers(b, ty), strict=True)]
    check(got, expected, 32, how)


# ------------------------------------------------------------------------------------------------ floats


def floats(values, ty, flush=False):
    out = []
    for v in values:
        x = decode(int(v), ty)
        if flush and not isinstance(x, float) and abs(x) < fractions.Fraction(2) ** FORMATS[ty][1]:
            x = fractions.Fraction(0)
        out.append(x)
    return out


def special(op, a, b, c):
    """What IEEE arithmetic gives where an operand is inf or NaN; by Python's floats, which do not overflow here."""
    small = [float(v) if isinstance(v, float) else float((v > 0) - (v < 0)) for v in (a, b, c)]
    try:
        return {"add": small[0] + small[1], "sub": small[0] - small[1], "mul": small[0] * small[1]}.get(
            op, small[0] * small[1] + small[2]
        )
    except OverflowError:
        return math.nan


def arithmetic(op, a, b, c=fractions.Fraction(0)):
    if any(isinstance(v, float) for v in (a, b, c)):
        return special(op, a, b, c)
    return {"add": a + b, "sub": a - b, "mul": a * b}.get(op, a * b + c)


def check_floats(got, expected, ty, text, mode="rn", flush=False):
    """Bits equal; NaN is any NaN, and the sign of a zero sum is not looked at."""
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        want = encode(e, ty, mode)
        value = decode(int(g), ty)
        if want == -1:
            assert isinstance(value, float), f"{text}: lane {i}: {int(g):#x}, expected NaN"
            assert math.isnan(value), f"{text}: lane {i}: {int(g):#x}, expected NaN"
            continue
        reference = decode(want, ty)
        if flush and not isinstance(reference, float) and abs(reference) < fractions.Fraction(2) ** FORMATS[ty][1]:
            reference = 0
        assert value == reference, f"{text}: lane {i}: {int(g):#x}, expected {want:#x}"


@pytest.mark.parametrize("ty", ["f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_float_arithmetic(op, ty, rng):
    one = ty.removesuffix("x2")
    values = [operand(ty, rng) for _ in range(3)]
    n = 3 if op == "fma" else 2
    names = ", ".join(f"{{{x}}}" for x in "abc"[:n])
    got = run(f"{op}{'.rn' if op == 'fma' else ''}.{ty} {{d}}, {names}", ty, [ty] * n, values[:n])
    for half in range(2 if ty != one else 1):
        part = [v >> np.uint64(half * BITS[one]) & np.uint64((1 << BITS[one]) - 1) for v in (*values, got)]
        a, b, c = (floats(v, one) for v in part[:3])
        expected = [arithmetic(op, *v[: max(n, 2)]) for v in zip(a, b, c, strict=True)]
        check_floats(part[3], expected, one, f"{op}.{ty}")


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_flushed(op, rng):
    values = [operand("f32", rng) for _ in range(3)]
    n = 3 if op == "fma" else 2
    names = ", ".join(f"{{{x}}}" for x in "abc"[:n])
    got = run(f"{op}{'.rn' if op == 'fma' else ''}.ftz.f32 {{d}}, {names}", "f32", ["f32"] * n, values[:n])
    a, b, c = (floats(v, "f32", flush=True) for v in values)
    check_floats(got, [arithmetic(op, *v[:n]) for v in zip(a, b, c, strict=True)], "f32", f"{op}.ftz", flush=True)


@pytest.mark.parametrize("op", ["add", "sub", "fma"])
@pytest.mark.parametrize("narrow", ["f16", "bf16"])
def test_mixed_precision(op, narrow, rng):
    a, b, c = operand(narrow, rng), operand(narrow, rng), operand("f32", rng)
    if op == "fma":
        got = run(
            f"fma.rn.f32.{narrow} {{d}}, {{a}}, {{b}}, {{c}}", "f32", [narrow, narrow, "f32"], [a, b, c], arch=120
        )
        lists = floats(a, narrow), floats(b, narrow), floats(c, "f32")
        expected = [arithmetic("fma", *v) for v in zip(*lists, strict=True)]
    else:
        got = run(f"{op}.rn.f32.{narrow} {{d}}, {{a}}, {{b}}", "f32", [narrow, "f32"], [a, c], arch=120)
        expected = [arithmetic(op, *v) for v in zip(floats(a, narrow), floats(c, "f32"), strict=True)]
    check_floats(got, expected, "f32", f"{op}.f32.{narrow}")


@pytest.mark.parametrize("ty", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("op", ["min", "max", "min.NaN", "max.NaN"])
def test_smaller_and_larger(op, ty, rng):
    if ty == "f64" and "NaN" in op:
        pytest.skip("there is none")
    a, b = operand(ty, rng), operand(ty, rng)
    got = run(f"{op}.{ty} {{d}}, {{a}}, {{b}}", ty, [ty, ty], [a, b])
    expected = []
    for x, y in zip(floats(a, ty), floats(b, ty), strict=True):
        nan = [isinstance(v, float) and math.isnan(v) for v in (x, y)]
        if any(nan):
            expected.append(math.nan if "NaN" in op or all(nan) else y if nan[0] else x)
        else:
            expected.append(min(x, y) if op[:3] == "min" else max(x, y))
    check_floats(got, expected, ty, op)


@pytest.mark.parametrize("op", ["min", "max"])
def test_a_signaling_nan_is_no_number(op):
    signaling, one = (np.full(LANES, bits, np.uint64) for bits in (0x7FF0000000000001, 0x3FF0000000000000))
    for a, b in ((signaling, one), (one, signaling)):
        got = run(f"{op}.f64 {{d}}, {{a}}, {{b}}", "f64", ["f64", "f64"], [a, b])
        assert (np.asarray(got) == one).all()


@pytest.mark.parametrize("op", ["min", "max", "min.NaN", "max.NaN"])
def test_smallest_and_largest_of_three(op, rng):
    values = [operand("f32", rng) for _ in range(3)]
    got = run(f"{op}.f32 {{d}}, {{a}}, {{b}}, {{c}}", "f32", ["f32"] * 3, values, arch=120)
    expected = []
    for lane in zip(*(floats(v, "f32") for v in values), strict=True):
        numbers = [v for v in lane if not (isinstance(v, float) and math.isnan(v))]
        if not numbers or ("NaN" in op and len(numbers) < 3):
            expected.append(math.nan)
        else:
            expected.append(min(numbers) if op[:3] == "min" else max(numbers))
    check_floats(got, expected, "f32", op)


@pytest.mark.parametrize("ty", ["f32", "f64"])
@pytest.mark.parametrize("op", ["div.rn", "sqrt.rn", "rcp.rn"])
def test_rounded_functions(op, ty, rng):
    a, b = operand(ty, rng), operand(ty, rng)
    two = op == "div.rn"
    got = run(f"{op}.{ty} {{d}}, {{a}}{', {b}' if two else ''}", ty, [ty, ty], [a, b])
    native = {"f32": np.float32, "f64": np.float64}[ty]
    raw = {"f32": np.uint32, "f64": np.uint64}[ty]
    x, y = (v.astype(raw).view(native) for v in (a, b))
    with np.errstate(all="ignore"):
        expected = x / y if two else np.sqrt(x) if op == "sqrt.rn" else native(1) / x
    mine = got.astype(raw).view(native)
    assert np.array_equal(mine, expected, equal_nan=True)


APPROXIMATED = {
    "ex2.approx.f32": np.exp2, "ex2.approx.ftz.f32": np.exp2, "lg2.approx.f32": np.log2, "sqrt.approx.ftz.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x), "rcp.approx.ftz.f32": lambda x: 1 / x, "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos, "tanh.approx.f32": np.tanh,
}  # fmt: skip


@pytest.mark.parametrize("op", APPROXIMATED)
def test_approximated_functions(op, rng):
    x = (rng.standard_normal(LANES) * 5).astype(np.float32)
    if op[:2] in ("lg", "sq", "rs"):
        x = np.abs(x)
    got = run(f"{op} {{d}}, {{a}}", "f32", ["f32"], [x.view(np.uint32).astype(np.uint64)])
    mine = got.astype(np.uint32).view(np.float32)
    np.testing.assert_allclose(mine, APPROXIMATED[op](x.astype(np.float64)), rtol=1e-6, atol=1e-6)


def test_full_division(rng):
    a, b = ((rng.standard_normal(LANES) + 3).astype(np.float32) for _ in range(2))
    raw = [v.view(np.uint32).astype(np.uint64) for v in (a, b)]
    got = run("div.full.f32 {d}, {a}, {b}", "f32", ["f32", "f32"], raw)
    np.testing.assert_allclose(got.astype(np.uint32).view(np.float32), a / b, rtol=3e-7)


@pytest.mark.parametrize("ty", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("op", ["neg", "abs"])
def test_sign_of_floats(op, ty, rng):
    one = ty.removesuffix("x2")
    top = sum(1 << i * BITS[one] + BITS[one] - 1 for i in range(2 if one != ty else 1))
    a = operand(ty, rng)
    got = run(f"{op}.{ty} {{d}}, {{a}}", ty, [ty], [a])
    check(got, [int(v) ^ top if op == "neg" else int(v) & ~top for v in a], BITS[ty], op)


@pytest.mark.parametrize("ty", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("how", [*COMPARE, *(f"{x}u" for x in COMPARE), "num", "nan"])
def test_compared_floats(how, ty, rng):
    a, b = operand(ty, rng), operand(ty, rng)
    got = run(f"setp.{how}.{ty} {{d}}, {{a}}, {{b}}", "u32", [ty, ty], [a, b], predicates=True)
    expected = []
    for x, y in zip(floats(a, ty), floats(b, ty), strict=True):
        nan = any(isinstance(v, float) and math.isnan(v) for v in (x, y))
        if how in ("num", "nan"):
            expected.append(nan == (how == "nan"))
        elif how == "neu":
            expected.append(nan or x != y)
        else:
            ordered = COMPARE[how.removesuffix("u")]
            expected.append(how.endswith("u") if nan else bool(ordered(x, y)))
    check(got, expected, 32, how)


@pytest.mark.parametrize("with_", ["and", "or", "xor"])
def test_comparison_combined(with_, rng):
    a, b, c = (operand("s32", rng) for _ in range(3))
    text = f"setp.lt.s32 %p5, {{c}}, 0; setp.lt.{with_}.s32 {{d}}, {{a}}, {{b}}, %p5"
    got = run(text, "u32", ["s32"] * 3, [a, b, c], predicates=True)
    lists = (integers(v, "s32") for v in (a, b, c))
    check(got, [BITWISE[with_](p < q, r < 0) for p, q, r in zip(*lists, strict=True)], 32, with_)


# ------------------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize(
    ("to", "source", "mode"),
    [
        ("f16", "f32", "rn"), ("bf16", "f32", "rn"), ("f16", "f32", "rz"), ("bf16", "f32", "rz"), ("f16", "f64", "rn"),
        ("bf16", "f64", "rn"), ("f32", "f64", "rn"), ("f32", "f64", "rz"), ("tf32", "f32", "rna"), ("f32", "f16", ""),
        ("f32", "bf16", ""), ("f64", "f32", ""), ("f64", "f16", ""),
    ],
)  # fmt: skip
def test_float_to_float(to, source, mode, rng):
    a = operand(source, rng)
    dots = f".{mode}" if mode else ""
    name = "b32" if to == "tf32" else to
    got = run(f"cvt{dots}.{to}.{source} {{d}}, {{a}}", name, [source], [a])
    check_floats(got, floats(a, source), to, f"cvt{dots}.{to}.{source}", mode or "rn")


@pytest.mark.parametrize("to", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_two_floats_to_a_pair(to, mode, rng):
    a, b = operand("f32", rng), operand("f32", rng)
    got = run(f"cvt.{mode}.{to}.f32 {{d}}, {{a}}, {{b}}", "b32", ["f32", "f32"], [a, b])
    check_floats(got >> np.uint64(16), floats(a, "f32"), to[:-2], to, mode)
    check_floats(got & np.uint64(0xFFFF), floats(b, "f32"), to[:-2], to, mode)


def test_two_floats_to_a_pair_of_e4m3(rng):
    """Against PyTorch's conversion, which makes NaN of what satfinite takes to 448; ties and subnormals too."""
    ties = np.array(
        [2.0**-10, 3 * 2.0**-10, 2.0**-7 + 2.0**-10, 17 / 16, 19 / 16, -23 / 2, 447.0, 449.0, 1e30], np.float32
    )
    a, b = (
        np.where(rng.random(LANES) < 0.3, rng.choice(ties.view(np.uint32), LANES), operand("f32", rng)) for _ in "ab"
    )
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    got = run("cvt.rn.satfinite.e4m3x2.f32 {d}, {a}, {b}", "b16", ["f32", "f32"], [a, b])
    for byte, values in ((got >> np.uint64(8) & np.uint64(0xFF), a), (got & np.uint64(0xFF), b)):
        exact = torch.from_numpy(values.astype(np.uint32).view(np.float32))
        want = exact.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        nan = exact.isnan().numpy()
        assert (byte[nan] & np.uint64(0x7F) == 0x7F).all()
        assert (byte[~nan] == want[~nan]).all()


def test_a_pair_of_e4m3_to_two_halves(rng):
    a = rng.integers(0, 1 << 16, LANES, dtype=np.uint64)
    a[:16] = np.arange(0x70, 0x80, dtype=np.uint64) << np.uint64(8) | np.arange(0xF0, 0x100, dtype=np.uint64)
    got = run("cvt.rn.f16x2.e4m3x2 {d}, {a}", "b32", ["b16"], [a])
    values = torch.from_numpy(a.astype(np.uint16)).view(torch.float8_e4m3fn).half()
    halves = torch.from_numpy(got.astype(np.uint32)).view(torch.float16)
    assert torch.equal(halves.isnan(), values.isnan())
    assert torch.equal(halves.nan_to_num(), values.nan_to_num())


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u16", "s8", "u8"])
@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
@pytest.mark.parametrize("mode", ["rzi", "rni", "rmi", "rpi"])
def test_float_to_integer(to, source, mode, rng):
    a = operand(source, rng)
    got = run(f"cvt.{mode}.{to}.{source} {{d}}, {{a}}", to, [source], [a])
    bits = BITS[to]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    rounding = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[mode]
    expected = []
    for x in floats(a, source):
        if isinstance(x, float) and math.isnan(x):
            expected.append(1 << 63 if bits == 64 else 0)
        elif isinstance(x, float):
            expected.append(high if x > 0 else low)
        else:
            expected.append(min(max(rounding(x), low), high))
    check(got, expected, bits, f"cvt.{mode}.{to}.{source}")


@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_integer_to_float(to, source, rng):
    a = operand(source, rng)
    got = run(f"cvt.rn.{to}.{source} {{d}}, {{a}}", to, [source], [a])
    expected = [fractions.Fraction(v) for v in integers(a, source)]
    check_floats(got, expected, to, f"cvt.rn.{to}.{source}")


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("ty", ["f32", "f64"])
def test_to_whole_numbers(mode, ty, rng):
    a = operand(ty, rng)
    got = run(f"cvt.{mode}.{ty}.{ty} {{d}}, {{a}}", ty, [ty], [a])
    rounding = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[mode]
    expected = [x if isinstance(x, float) else fractions.Fraction(rounding(x)) for x in floats(a, ty)]
    check_floats(got, expected, ty, mode)


WIDTHS = ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"]


@pytest.mark.parametrize("to", WIDTHS)
@pytest.mark.parametrize("source", WIDTHS)
def test_integer_to_integer(to, source, rng):
    a = operand(source, rng)
    x = integers(a, source)
    check(run(f"cvt.{to}.{source} {{d}}, {{a}}", to, [source], [a]), x, BITS[to], f"cvt.{to}.{source}")
    low, high = (-(1 << BITS[to] - 1), (1 << BITS[to] - 1) - 1) if to[0] == "s" else (0, (1 << BITS[to]) - 1)
    got = run(f"cvt.sat.{to}.{source} {{d}}, {{a}}", to, [source], [a])
    check(got, [min(max(v, low), high) for v in x], BITS[to], f"cvt.sat.{to}.{source}")


# ------------------------------------------------------------------------------------------------ moves and exchange


def test_packing(rng):
    a, b = operand("b16", rng), operand("b16", rng)
    got = run("mov.b32 {d}, {{{a}, {b}}}", "b32", ["b16", "b16"], [a, b])
    check(got, [int(p) | int(q) << 16 for p, q in zip(a, b, strict=True)], 32, "pack")
    c = operand("b64", rng)
    got = run("mov.b64 {{%r31, %r32}}, {a}; add.s32 {d}, %r31, %r32", "b32", ["b64"], [c])
    check(got, [(int(v) & 0xFFFFFFFF) + (int(v) >> 32) for v in c], 32, "unpack")
    got = run("mov.b32 {{_, %rs31}}, {a}; mov.b16 {d}, %rs31", "b16", ["b32"], [c & np.uint64(0xFFFFFFFF)])
    check(got, [int(v) >> 16 for v in c], 16, "unpack")


@pytest.mark.parametrize("ty", ["b16", "b32", "b64", "f32", "f64"])
def test_selected(ty, rng):
    a, b, c = operand(ty, rng), operand(ty, rng), operand("s32", rng)
    got = run(f"setp.lt.s32 %p5, {{c}}, 0; selp.{ty} {{d}}, {{a}}, {{b}}, %p5", ty, [ty, ty, "s32"], [a, b, c])
    expected = [int(p) if r < 0 else int(q) for p, q, r in zip(a, b, integers(c, "s32"), strict=True)]
    check(got, expected, BITS[ty], "selp")


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
def test_shuffles(mode, by, rng):
    a = operand("b32", rng)
    clamp = 0 if mode == "up" else 31
    got = run(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {by}, {clamp}, -1", "b32", ["b32"], [a])
    expected = []
    for i in range(LANES):
        lane = i % 32
        to = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": by}[mode]
        expected.append(int(a[i - lane + (to if 0 <= to < 32 else lane)]))
    check(got, expected, 32, mode)


@pytest.mark.parametrize("op", ["add.s32", "min.s32", "max.u32", "and.b32", "or.b32", "xor.b32"])
def test_reduced_over_a_warp(op, rng):
    a = operand("u32", rng)
    got = run(f"redux.sync.{op} {{d}}, {{a}}, -1", "u32", ["u32"], [a])
    expected = []
    for warp in range(LANES // 32):
        values = integers(a[warp * 32 : warp * 32 + 32], op[-3:])
        total = values[0]
        for v in values[1:]:
            total = {**INTEGERS, **BITWISE}[op[:-4]](total, v)
        expected += [total] * 32
    check(got, expected, 32, op)


@pytest.mark.parametrize(
    ("op", "ty"), [("add", "f32"), ("add", "u32"), ("max", "s32"), ("add", "u64"), ("exch", "b32")]
)
def test_atomics(op, ty, rng):
    bits = BITS[ty]
    dtype = {"f32": torch.float32, "u64": torch.int64}.get(ty, torch.int32)
    values = torch.from_numpy(rng.integers(-100, 100, LANES)).to(dtype)
    total = torch.zeros(1, dtype=dtype)
    text = f"""
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
.reqntid {LANES}
{{
.reg .b32 %r<9>; .reg .b64 %rd<9>;
mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [k_param_0]; mul.wide.u32 %rd2, %r1, {bits // 8}; add.s64 %rd3, %rd1, %rd2;
ld.param.b64 %rd4, [k_param_1];
ld.global.b{bits} %r{"d5" if bits == 64 else "5"}, [%rd3];
atom.global.gpu.acq_rel.{op}.{ty} %r{"d6, [%rd4], %rd5" if bits == 64 else "6, [%rd4], %r5"};
ret;
}}
"""
    run_ = execute(text, [values, total], (2, 1, 1), shared=0, arch=80)
    assert not run_.errors
    expected = {"add": 2 * values.sum(), "max": values.max().clamp(min=0), "exch": values[-1]}[op]
    assert total.item() == expected.item()
