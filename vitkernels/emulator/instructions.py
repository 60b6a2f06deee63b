"""One encoder for each PTX instruction, by the first part of its mnemonic (PTX ISA, "Instruction Set")."""

from __future__ import annotations

import re
from collections.abc import Callable

from vitkernels.emulator.lists import ATOMICS, BITS, COMPARISONS, FLAGS, MAP_FIELDS, SPECIALS

ENCODERS: dict[str, Callable] = {}
NONE = -1


def _encodes(*names: str):
    def register(function):
        for name in names:
            ENCODERS[name] = function
        return function

    return register


def _class_of(ty: str) -> str:
    return {"f32": "fp32", "f64": "fp64", "f32x2": "fp32"}.get(ty, "half") if ty.startswith(("f", "bf")) else "alu"


# Number of operands, with the destination; 2 for instructions not listed. The encoder would ignore a further operand.
OPERANDS = {
    **dict.fromkeys(("add", "sub", "mul", "mulhi", "div", "rem", "min", "max", "copysign"), 3),
    **dict.fromkeys(("fma", "mad", "madhi", "prmt"), 4),
    "bfi": 5,
}


def _plain(e, op, parts, ops, cls=None, **more):
    """Encode an operation whose operands all have the mnemonic's last type."""
    ty = parts[-1]
    expected = 3 if op == "lop3" else OPERANDS.get(op, 2)
    if len(ops) != expected:
        raise e.unsupported(f"{len(ops)} operands")
    operands = [e.register(ops[0])] + [e.source(o, ty) for o in ops[1:]]
    e.emit(op, ty, operands, flags=e.flags(parts[1:-1]), cls=cls or _class_of(ty), **more)


# ------------------------------------------------------------------------------------------------ moves


@_encodes("mov")
def _mov(e, parts, ops):
    ty, (to, source) = parts[1], ops
    if ty == "pred":
        return e.emit("movp", "pred", [e.predicate(to), e.predicate(source)])
    special = source[1:].replace(".", "_")
    if source.startswith("%") and special in SPECIALS:
        wide = FLAGS["wide"] if e.bits(to) == 64 else 0
        return e.emit("special", "u32", [e.register(to)], flags=wide, imm=SPECIALS[special])
    whole = "b64" if BITS[ty] == 64 else "b32"
    if to.startswith("{"):
        names = _vector(to)
        return e.emit(
            "unpack", whole, [e.register(n) for n in names] + [e.source(source, ty)], imm=BITS[ty] // len(names)
        )
    if source.startswith("{"):
        names = _vector(source)
        bits = BITS[ty] // len(names)
        return e.emit("pack", whole, [e.register(to)] + [e.source(n, f"b{bits}") for n in names], imm=bits)
    return e.emit("mov", ty, [e.register(to), e.source(source, ty)])


def _vector(text: str) -> list[str]:
    return [t.strip() for t in text.strip()[1:-1].split(",")] if text.startswith("{") else [text.strip()]


@_encodes("cvta")
def _cvta(e, parts, ops):
    e.emit("mov", "b64", [e.register(ops[0]), e.source(ops[1], "b64")])


@_encodes("mapa")
def _mapa(e, parts, ops):  # the cluster has one program: the address stays the same
    if ops[2] not in ("0", "0x0") and not e.lookup(ops[2]):
        raise e.unsupported("another program of a cluster")
    e.emit("mov", parts[-1], [e.register(ops[0]), e.source(ops[1], parts[-1])])


@_encodes("createpolicy")
def _createpolicy(e, parts, ops):
    e.emit("mov", "b64", [e.register(ops[0]), e.constants.operand(0, 64)])


# ------------------------------------------------------------------------------------------------ arithmetic


@_encodes("add", "sub", "min", "max", "neg", "abs", "fma", "copysign", "popc", "clz", "brev")
def _arithmetic(e, parts, ops):
    narrow = parts[-1]
    if parts[-2] == "f32" and narrow in ("f16", "bf16"):  # add.f32.bf16: all operands but the last are narrower
        operands = [e.register(ops[0])]
        for operand in ops[1:-1]:
            operands.append(e.temporary(32))
            e.emit("cvt", "f32", [operands[-1], e.source(operand, narrow)], ty2=narrow, cls="cvt")
        operands.append(e.source(ops[-1], "f32"))
        return e.emit(parts[0], "f32", operands, flags=e.flags(parts), cls="fp32")
    if parts[0] in ("min", "max") and narrow == "f32" and len(ops) == 4:  # of three values, from sm_100 on
        operands = [e.register(ops[0])] + [e.source(o, "f32") for o in ops[1:]]
        return e.emit(f"{parts[0]}3", "f32", operands, flags=e.flags(parts), cls="fp32")
    return _plain(e, parts[0], parts, ops)


@_encodes("sqrt", "rsqrt", "rcp", "ex2", "lg2", "tanh", "sin", "cos")
def _approximated(e, parts, ops):
    _plain(e, parts[0], parts, ops, "mufu")


@_encodes("div", "rem")
def _division(e, parts, ops):
    _plain(e, parts[0], parts, ops, "div" if parts[-1] in ("f32", "f64") else "intdiv")


@_encodes("mul", "mad")
def _multiplication(e, parts, ops):
    op, ty = parts[0], parts[-1]
    if "wide" in parts:
        wide = {"u32": "u64", "s32": "s64", "u16": "u32", "s16": "s32"}[ty]
        operands = [e.register(ops[0]), e.source(ops[1], ty), e.source(ops[2], ty)]
        operands += [e.source(o, wide) for o in ops[3:]]
        return e.emit(f"{op}wide", ty, operands)
    if "hi" in parts:
        return _plain(e, f"{op}hi", parts, ops)
    return _plain(e, "fma" if op == "mad" and ty in ("f32", "f64") else op, parts, ops)


# Truth tables for lop3, whose operands stand for 0xF0, 0xCC and 0xAA.
TABLES = {"and": 0xC0, "or": 0xFC, "xor": 0x3C, "not": 0x0F}


@_encodes("and", "or", "xor", "not")
def _logic(e, parts, ops):
    if parts[-1] == "pred":
        return e.emit(f"{parts[0]}p", "pred", [e.predicate(o) for o in ops])
    return _plain(e, "not" if parts[0] == "not" else "lop3", parts, ops, imm=TABLES[parts[0]])


@_encodes("lop3")
def _lop3(e, parts, ops):
    if len(ops) != 5:
        raise e.unsupported("with a predicate")
    e.emit("lop3", "b32", [e.register(ops[0])] + [e.source(o, "b32") for o in ops[1:4]], imm=int(ops[4], 0))


@_encodes("shl", "shr")
def _shift(e, parts, ops):
    ty = parts[-1]
    e.emit(parts[0], ty, [e.register(ops[0]), e.source(ops[1], ty), e.source(ops[2], "u32")])


@_encodes("bfe")
def _bfe(e, parts, ops):
    ty = parts[-1]
    e.emit("bfe", ty, [e.register(ops[0]), e.source(ops[1], ty), e.source(ops[2], "u32"), e.source(ops[3], "u32")])


@_encodes("bfi", "prmt")
def _bits32(e, parts, ops):
    if parts[1:] != ["b32"]:
        raise e.unsupported("mode")
    _plain(e, parts[0], parts, ops)


@_encodes("shf")
def _shf(e, parts, ops):
    operands = [e.register(ops[0])] + [e.source(o, "b32") for o in ops[1:4]]
    e.emit("shf", "b32", operands, imm=int(parts[1] == "r"), flags=e.flags(parts[2:3]))


@_encodes("cvt")
def _cvt(e, parts, ops):
    to, source = parts[-2], parts[-1]
    flags = e.flags(parts[1:-2])
    if len(ops) == 3:
        operands = [e.register(ops[0]), e.source(ops[1], source), e.source(ops[2], source)]
        return e.emit("cvt2", to, operands, flags=flags, cls="cvt")
    if "b32" in (to, source) or "pack" in parts:
        raise e.unsupported("conversion")
    operand = e.source(ops[1], source)
    if e.lookup(ops[1]) and e.bits(ops[1]) == 64 and BITS[source] < 64:  # the low half of a 64-bit register
        low = e.temporary(32)
        e.emit("cvt", "u32", [low, operand], ty2="u64")
        operand = low
    floats = to[0] in "fbt" or source[0] in "fb"
    return e.emit("cvt", to, [e.register(ops[0]), operand], ty2=source, flags=flags, cls="cvt" if floats else "alu")


@_encodes("setp")
def _setp(e, parts, ops):
    ty = parts[-1]
    combined = {"and": 1, "or": 2, "xor": 3}.get(parts[2], 0) if len(parts) > 3 else 0
    names = [*ops[0].split("|"), "_"]
    operands = [e.predicate(names[0]), e.predicate(names[1]), e.source(ops[1], ty), e.source(ops[2], ty)]
    operands.append(e.predicate(ops[3]) if len(ops) > 3 else -1)
    flags = e.flags(parts[2:-1]) & FLAGS["ftz"]
    e.emit("setp", ty, operands, flags=flags, imm=COMPARISONS[parts[1]] | combined << 8, cls=_class_of(ty))


@_encodes("testp")
def _testp(e, parts, ops):
    if parts[-1] != "f32":
        raise e.unsupported("type")
    imm = ["finite", "infinite", "number", "notanumber"].index(parts[1])
    e.emit("testp", "f32", [e.predicate(ops[0]), e.source(ops[1], "f32")], imm=imm)


@_encodes("selp")
def _selp(e, parts, ops):
    ty = parts[-1]
    e.emit("selp", ty, [e.register(ops[0]), e.source(ops[1], ty), e.source(ops[2], ty), e.predicate(ops[3])])


# ------------------------------------------------------------------------------------------------ memory


def _space(parts: list[str]) -> str:
    return next((p for p in parts if p.startswith(("global", "shared", "param"))), "generic")


@_encodes("ld")
def _ld(e, parts, ops):
    space, ty, names = _space(parts), parts[-1], _vector(ops[0])
    size = BITS[ty] // 8
    flags = FLAGS["wide"] if e.bits(names[0]) == 64 else 0
    registers = [e.register(n) for n in names]
    if space == "param":
        name, offset = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", ops[1]).groups()
        offset = e.parameters[name].offset + int(offset or 0)
        return e.emit("ldparam", ty, registers, flags=flags, imm=offset, imm2=size, cls="param")
    if space == "global":
        base, offset = e.address(ops[1], 64)
        return e.emit("ldg", ty, [*registers, base], flags=flags, imm=offset, imm2=size, cls="ldg")
    if space.startswith("shared"):
        base, offset = e.address(ops[1], 32)
        e.accesses.append(size * len(names))
        return e.emit("lds", ty, [*registers, base], flags=flags, imm=offset, imm2=size, cls="lds")
    raise e.unsupported(f"space {space}")


@_encodes("st")
def _st(e, parts, ops):
    space, ty, names = _space(parts), parts[-1], _vector(ops[1])
    size = BITS[ty] // 8
    operands = [e.source(n, ty if BITS[ty] >= 32 else "b32") for n in names]
    if space == "global":
        base, offset = e.address(ops[0], 64)
        return e.emit("stg", ty, [*operands, base], imm=offset, imm2=size, cls="stg")
    if space.startswith("shared"):
        base, offset = e.address(ops[0], 32)
        e.accesses.append(size * len(names))
        return e.emit("sts", ty, [*operands, base], imm=offset, imm2=size, cls="sts")
    raise e.unsupported(f"space {space}")


@_encodes("atom", "red")
def _atom(e, parts, ops):
    what = [p for p in parts if p in ATOMICS]
    if "global" not in parts or len(what) != 1 or any(p in ("v2", "v4", "v8") for p in parts):
        raise e.unsupported("atomic operation")
    ty = parts[-1]
    to = e.register(ops.pop(0)) if parts[0] == "atom" else NONE
    base, offset = e.address(ops[0], 64)
    operands = [to, base, e.source(ops[1], ty)] + [e.source(o, ty) for o in ops[2:3]]
    e.emit("atom", ty, operands, imm=ATOMICS.index(what[0]), imm2=offset, cls="atom")


@_encodes("redux")
def _redux(e, parts, ops):
    ty = parts[-1]
    if "abs" in parts:
        raise e.unsupported("mode")
    operands = [e.register(ops[0]), e.source(ops[1], ty)]
    e.emit("redux", ty, operands, flags=e.flags(parts), imm=ATOMICS.index(parts[2]), cls="shfl")


@_encodes("ldmatrix", "stmatrix")
def _matrix(e, parts, ops):
    load = parts[0] == "ldmatrix"
    bytes_ = load and {"m16n16", "trans", "b8"} <= set(parts)
    if "m8n8" not in parts and not bytes_:
        raise e.unsupported("shape")
    base, offset = e.address(ops[1 if load else 0], 32)
    names = _vector(ops[0 if load else 1])
    e.accesses.append(16)
    registers = [e.register(n) for n in names] if load else [e.source(n, "b32") for n in names]
    op = "ldmatrix8" if bytes_ else parts[0]
    e.emit(op, "b16", [*registers, base], flags=e.flags(parts), imm=offset, cls=parts[0])


@_encodes("cp")
def _cp(e, parts, ops):
    if parts[1] != "async":
        raise e.unsupported("copy")
    if "bulk" in parts:
        return _bulk(e, parts, ops)
    if "mbarrier" in parts:  # cp.async.mbarrier.arrive[.noinc].shared.b64 [mbarrier]
        return e.emit("cparrive", "b64", [_shared(e, ops[0])], imm2=int("noinc" in parts), cls="async")
    if "commit_group" in parts:
        return e.emit("cpcommit", cls="async")
    if "wait_group" in parts:
        return e.emit("cpwait", imm=int(ops[0], 0), cls="async")
    if "wait_all" in parts:
        return e.emit("cpwait", imm=-1, cls="async")
    if "L2::cache_hint" in parts:
        ops = ops[:-1]
    shared, shared_offset = e.address(ops[0], 32)
    source, offset = e.address(ops[1], 64)
    size = int(ops[2], 0)
    e.accesses.append(size)
    operands = [shared, source] + [e.source(o, "u32") for o in ops[3:4]]
    return e.emit("cpasync", "b8", operands, imm=shared_offset, imm2=size | offset << 8, cls="cpasync")


def _shared(e, text: str) -> int:
    """Return an address in shared memory as one operand."""
    base, offset = e.address(text, 32)
    if base == NONE:
        return e.constants.operand(offset, 32)
    return e.plus(base, offset, "u32")


def _global(e, text: str) -> int:
    base, offset = e.address(text, 64)
    if base == NONE:
        return e.constants.operand(offset, 64)
    return e.plus(base, offset, "u64")


def _bulk(e, parts, ops):
    """Encode cp.async.bulk: its groups, plain copies, and copies of tensor tiles."""
    if "commit_group" in parts:
        return e.emit("bulkcommit", cls="async")
    if "wait_group" in parts:
        return e.emit("bulkwait", imm=int(ops[0], 0), cls="async")
    if "prefetch" in parts:
        return e.emit("nop", cls="async")
    spaces = [p for p in parts if p.startswith(("shared", "global"))]
    load = spaces[0].startswith("shared")
    if load and not any(p.startswith("mbarrier") for p in parts):
        raise e.unsupported("copy")
    unknown = {"im2col", "im2col_no_offs", "im2col::w", "cta_group::2", "multicast::cluster", "reduce", "tile::gather4"}
    if unknown & set(parts) or "tile::scatter4" in parts:
        raise e.unsupported("mode")
    e.accesses.append(16)
    if "tensor" not in parts:  # [to], [from], bytes[, [mbarrier]]
        shared, remote = (ops[0], ops[1]) if load else (ops[1], ops[0])
        mbarrier = _shared(e, ops[3]) if load else NONE
        operands = [_shared(e, shared), _global(e, remote), e.source(ops[2], "u32"), mbarrier]
        return e.emit("cpbulk", "b8", operands, imm2=int(load), cls="bulk")
    tensor, shared = (ops[1], ops[0]) if load else (ops[0], ops[1])  # [map, {coordinates}]
    address, coordinates = re.fullmatch(r"\[\s*([^,]+),\s*\{(.*)\}\s*\]", tensor).groups()
    operands = [_shared(e, shared), _global(e, f"[{address}]"), _shared(e, ops[2]) if load else NONE]
    operands += [e.source(c.strip(), "u32") for c in coordinates.split(",")]
    return e.emit("cptensor", "b8", operands, imm=len(operands) - 3, imm2=int(load), cls="bulk")


@_encodes("mbarrier")
def _mbarrier(e, parts, ops):
    what = parts[1]
    e.accesses.append(8)
    if what == "init":
        return e.emit("mbinit", "b64", [e.source(ops[1], "u32"), _shared(e, ops[0])], cls="mbarrier")
    if what == "inval":
        return e.emit("mbinval", "b64", [_shared(e, ops[0])], cls="mbarrier")
    if what in ("test_wait", "try_wait"):
        parity = "parity" in parts
        operands = [e.predicate(ops[0]), e.source(ops[2], "u32" if parity else "b64"), _shared(e, ops[1])]
        return e.emit("mbtest", "b64", operands, imm2=int(parity), cls="mbarrier")
    if what == "expect_tx":
        operands = [NONE, e.source(ops[1], "u32"), NONE, _shared(e, ops[0])]
        return e.emit("mbarrive", "b64", operands, cls="mbarrier")
    if what not in ("arrive", "arrive_drop") or "noComplete" in parts:
        raise e.unsupported("mbarrier operation")
    if not ops[0].startswith("["):
        state, *ops = ops
    else:
        state = "_"
    extra = e.source(ops[1], "u32") if len(ops) > 1 else NONE
    expect = "expect_tx" in parts
    operands = [e.register(state), extra if expect else NONE, NONE if expect else extra, _shared(e, ops[0])]
    return e.emit("mbarrive", "b64", operands, imm2=1 if what == "arrive" else 2, cls="mbarrier")


@_encodes("tensormap")
def _tensormap(e, parts, ops):
    if parts[1] == "cp_fenceproxy":  # [to], [from], 128
        (to, to_offset), (source, source_offset) = e.address(ops[0], 64), e.address(ops[1], 64)
        return e.emit("mappublish", "b64", [to, source], imm=to_offset, imm2=source_offset, cls="bulk")
    if parts[1:3] != ["replace", "tile"] or "b1024" not in parts:
        raise e.unsupported("tensor map operation")
    field = MAP_FIELDS.index(parts[3])
    shared = parts[4].startswith("shared")
    base, offset = e.address(ops[0], 64)
    ordinal = int(ops[1], 0) if len(ops) > 2 else 0
    e.accesses.append(4)
    operands = [base, e.source(ops[-1], parts[-1])]
    imm = field | ordinal << 8 | shared << 16
    return e.emit("mapreplace", "b64", operands, imm=imm, imm2=offset, cls="bulk")


# ------------------------------------------------------------------------------------------------ warps and control


@_encodes("shfl")
def _shfl(e, parts, ops):
    names = [*ops[0].split("|"), "_"]
    operands = [e.register(names[0]), e.predicate(names[1])] + [e.source(o, "b32") for o in ops[1:]]
    e.emit("shfl", "b32", operands, imm=["up", "down", "bfly", "idx"].index(parts[2]), cls="shfl")


@_encodes("vote")
def _vote(e, parts, ops):
    mode = ["all", "any", "uni", "ballot"].index(parts[2])
    to = e.register(ops[0]) if mode == 3 else e.predicate(ops[0])
    e.emit("vote", "b32" if mode == 3 else "pred", [to, e.predicate(ops[1])], imm=mode)


@_encodes("activemask")
def _activemask(e, parts, ops):
    e.emit("activemask", "b32", [e.register(ops[0])])


@_encodes("elect")
def _elect(e, parts, ops):
    to, predicate = ops[0].split("|")
    e.emit("elect", "b32", [e.register(to), e.predicate(predicate)])


@_encodes("bar", "barrier")
def _barrier(e, parts, ops):
    if parts[1] == "warp":
        return e.emit("warpsync", cls="barrier")
    if parts[1] == "cluster":  # which has one program
        return e.emit("barsync" if "wait" in parts else "nop", imm=16, cls="barrier")
    if parts[1] not in ("sync", "arrive") and parts[1:3] not in (["cta", "sync"], ["cta", "arrive"]):
        raise e.unsupported("barrier")
    op = "barsync" if "sync" in parts else "bararrive"
    if any(o.startswith("%") for o in ops):
        return e.emit(op, operands=[e.source(o, "u32") for o in ops], cls="barrier")
    threads = int(ops[1], 0) if len(ops) > 1 else 0
    return e.emit(op, imm=int(ops[0], 0), imm2=threads, cls="barrier")


@_encodes("bra")
def _bra(e, parts, ops):
    e.jump(ops[0])
    e.emit("bra", cls="branch")


@_encodes("brx")
def _brx(e, parts, ops):  # brx.idx index, targets
    targets = e.targets[ops[1]]
    e.emit("brx", operands=[e.source(ops[0], "u32")] + [0] * len(targets), cls="branch")
    e.table(targets)


@_encodes("ret", "exit")
def _ret(e, parts, ops):
    e.emit("ret", cls="branch")


@_encodes("trap", "brkpt")
def _trap(e, parts, ops):
    e.emit("trap", cls="branch")


@_encodes("membar")
def _membar(e, parts, ops):
    e.emit("membar", cls="barrier")


@_encodes("fence")
def _fence(e, parts, ops):
    e.emit("fenceproxy" if "proxy" in parts and "async" in parts else "membar", cls="barrier")


@_encodes("griddepcontrol", "nanosleep", "setmaxnreg", "prefetch", "applypriority", "discard")
def _nothing(e, parts, ops):
    e.emit("nop", cls="branch")


# ------------------------------------------------------------------------------------------------ matrix products


@_encodes("mma")
def _mma(e, parts, ops):  # mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    rows, columns, depth = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", parts[3]).groups())
    d, a, b, c = parts[6:10]
    known = ("f16", "bf16", "tf32", "f64", "e4m3")
    if columns != 8 or parts[4:6] != ["row", "col"] or a != b or d != c or a not in known:
        raise e.unsupported("product")
    wide = "f64" if a == "f64" else "b32"
    operands = [e.register(n) for n in _vector(ops[0])]
    for text, ty in ((ops[1], wide), (ops[2], wide), (ops[3], "b32" if c == "f16" else c)):
        operands += [e.source(n, ty) for n in _vector(text)]
    e.emit("mma", a, operands, ty2=d, imm=depth | rows << 8 | columns << 16, cls="mma")


@_encodes("wgmma")
def _wgmma(e, parts, ops):
    if parts[1] == "fence":
        return e.emit("wgfence", cls="wgsync")
    if parts[1] == "commit_group":
        return e.emit("wgcommit", cls="wgsync")
    if parts[1] == "wait_group":
        return e.emit("wgwait", imm=int(ops[0], 0), cls="wgsync")
    # wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 d, a, b-desc, scale-d, negate a, negate b[, transpose a], b
    _, columns, depth = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", parts[4]).groups())
    d, a, b = parts[5:8]
    if a != b or a not in ("f16", "bf16", "tf32", "e4m3"):
        raise e.unsupported("product")
    in_registers = ops[1].startswith("{")
    operands = [e.register(n) for n in _vector(ops[0])]
    operands += [e.source(n, "b32" if in_registers else "b64") for n in _vector(ops[1])]
    operands += [e.source(ops[2], "b64"), e.predicate(ops[3])]
    negated = (int(ops[4]) < 0) | (int(ops[5]) < 0) << 1
    transposed = [int(o) for o in ops[6:]]
    first, second = (0, 0) if not transposed else (0, transposed[0]) if in_registers else transposed
    imm = columns | depth << 12 | negated << 20 | first << 22 | second << 23 | in_registers << 24
    return e.emit("wgmma", a, operands, ty2=d, imm=imm, cls="wgmma")
