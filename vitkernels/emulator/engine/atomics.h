// Atomic operations on global memory, and reductions over a warp.
#pragma once
#include "floats.h"
#include "memory.h"

enum Atomic {
#define X(name) ATOM_##name,
  PTX_ATOMICS(X)
#undef X
};

template <class T> static T combined(int op, T old, T b) {
  switch (op) {
    case ATOM_add: return old + b;
    case ATOM_min: return std::min(old, b);
    case ATOM_max: return std::max(old, b);
    default: return b;
  }
}
static u64 combined_bits(int op, int type, u64 old, u64 b, u64 compare) {
  switch (op) {
    case ATOM_and: return old & b;
    case ATOM_or: return old | b;
    case ATOM_xor: return old ^ b;
    case ATOM_exch: return b;
    case ATOM_cas: return old == compare ? b : old;
    default: break;
  }
  switch (type) {
    case T_f32: return f_bits(combined(op, bits_f((u32)old), bits_f((u32)b)));
    case T_f64: return d_bits(combined(op, bits_d(old), bits_d(b)));
    case T_f16: return f2h(to_odd(add_to_odd(h2f((u32)old), h2f((u32)b))));
    case T_bf16: return f2b(to_odd(add_to_odd(b2f((u32)old), b2f((u32)b))));
    case T_f16x2: case T_bf16x2: {
      int half = type == T_f16x2 ? T_f16 : T_bf16;
      return combined_bits(op, half, old & 0xFFFF, b & 0xFFFF, 0) |
             combined_bits(op, half, old >> 16, b >> 16, 0) << 16;
    }
    case T_s32: return (u32)combined(op, (i32)old, (i32)b);
    case T_s64: return (u64)combined(op, (i64)old, (i64)b);
    case T_u64: case T_b64: return combined(op, old, b);
    default: return combined(op, (u32)old, (u32)b);
  }
}

// o: old value or none, address, operand, the new value of cas or none; imm: Atomic, imm2: offset. Lanes go in order.
// Atomics do not race with each other; what they order is not modelled.
static void atomic(const Step& s) {
  int op = (int)s.I.imm, bits = TYPE_BITS[s.I.type];
  bool floating = is_float(s.I.type) || s.I.type == T_f16x2 || s.I.type == T_bf16x2;
  if (floating && op != ATOM_add && op != ATOM_exch && op != ATOM_cas) s.unsupported();
  const u64* a = s.in<u64>(1);
  u32 lanes = addressed(s, 1, 64), bad = lanes & ~s.defined(2, bits);
  if (bad) s.report(K_undefined_store, lowest(bad), a[lowest(bad)] + s.I.imm2, 0);
  count_global(s, a, lanes, s.I.imm2, bits / 8);
  auto operand = [&](int i, int l) { return bits == 64 ? s.in<u64>(i)[l] : (u64)s.in<u32>(i)[l]; };
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    u8* p = global_access(s, a[l] + s.I.imm2, bits / 8, l, true, bits / 8, true);
    u64 old = 0;
    if (p) memcpy(&old, p, bits / 8);
    u64 b = operand(2, l);
    bool cas = op == ATOM_cas;  // its operands are what it compares with, and the new value
    u64 now = combined_bits(op, s.I.type, old, cas ? operand(3, l) : b, cas ? b : 0);
    if (p) memcpy(p, &now, bits / 8);
    if (s.o[0] == -1) continue;
    if (bits == 64) s.out<u64>(0)[l] = old;
    else s.out<u32>(0)[l] = (u32)old;
  }
  if (s.o[0] != -1) s.define(0, bits, FULL);
}

static void reduce_warp(const Step& s) {  // redux.sync; imm: Atomic
  const u32* a = s.in<u32>(1);
  u32 known = s.defined(1, 32), r = a[lowest(s.m)];
  bool nan = s.I.flags & F_nan;
  for (u32 left = s.m & (s.m - 1); left; left &= left - 1) {
    u32 b = a[lowest(left)];
    if (s.I.type != T_f32) r = (u32)combined_bits((int)s.I.imm, s.I.type, r, b, 0);
    else r = f_bits(s.I.imm == ATOM_min ? minimum(bits_f(r), bits_f(b), nan) : maximum(bits_f(r), bits_f(b), nan));
  }
  each(s.out<u32>(0), s.m, [=](int) { return r; });
  s.define(0, 32, (known & s.m) == s.m ? FULL : 0);
}
