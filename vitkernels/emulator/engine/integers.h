// Moves, integer arithmetic, bits and predicates; and how definedness goes through them, byte by byte.
#pragma once
#include "machine.h"

// ------------------------------------------------------------------------------------------------ definedness

// Any undefined operand makes the whole result undefined. Operands are from `first`, all of `bits`.
static ALWAYS_INLINE u32 all_defined(const Step& s, int first, int bits) {
  u32 d = FULL;
  for (int i = first; i < s.I.count; i++) d &= s.defined(i, bits);
  return d;
}

// One value for all lanes of m, if there is one.
static inline bool uniform(const Step& s, int i, u32& value) {
  const u32* a = s.in<u32>(i);
  int first = lowest(s.m);
  for (u32 r = s.m; r; r &= r - 1)
    if (a[lowest(r)] != a[first]) return false;
  value = a[first];
  return (s.defined(i, 32) & s.m) == s.m;
}

// The planes of a value of `bits` shifted by `shift` bits (left is positive); what is shifted in is as `fill` tells.
static inline void shifted_planes(const u32* in, u32* out, int bits, int shift, u32 fill) {
  int n = bits / 8;
  auto bit_plane = [&](int bit) { return bit < 0 ? FULL : bit >= bits ? fill : in[bit >> 3]; };
  for (int k = 0; k < n; k++) {
    // a byte of the result comes from at most two neighbours
    int low = 8 * k - shift, high = low + 7;
    out[k] = bit_plane(low) & bit_plane(high);
  }
  for (int k = n; k < 8; k++) out[k] = FULL;
}

static ALWAYS_INLINE u32 by_table(int table, u32 a, u32 b, u32 c) {
  u32 r = 0;
  for (int k = 0; k < 8; k++)
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}
// Whether a byte of a bitwise function of three is defined where some of its operands are not: it is, if the answer is
// the same whatever their bits.
static bool known_byte(int table, const u8* value, const bool* known) {
  u8 first = 0;
  for (int choice = 0; choice < 8; choice++) {
    u8 v[3];
    for (int i = 0; i < 3; i++) v[i] = known[i] ? value[i] : (choice >> i & 1) ? 0xFF : 0;
    u8 r = (u8)by_table(table, v[0], v[1], v[2]);
    if (choice == 0) first = r;
    if (r != first) return false;
  }
  return true;
}

// ------------------------------------------------------------------------------------------------ shapes of operations

template <class T, class F> static ALWAYS_INLINE void unary(const Step& s, F f) {
  const T* a = s.in<T>(1);
  each(s.out<T>(0), s.m, [=](int l) { return (T)f(a[l]); });
}
template <class T, class F> static ALWAYS_INLINE void binary(const Step& s, F f) {
  const T *a = s.in<T>(1), *b = s.in<T>(2);
  each(s.out<T>(0), s.m, [=](int l) { return (T)f(a[l], b[l]); });
}
template <class T, class F> static ALWAYS_INLINE void ternary(const Step& s, F f) {
  const T *a = s.in<T>(1), *b = s.in<T>(2), *c = s.in<T>(3);
  each(s.out<T>(0), s.m, [=](int l) { return (T)f(a[l], b[l], c[l]); });
}
// Each half of the result follows from those of the operands alone: LLVM leaves halves undefined that nothing reads.
static void define_halves(const Step& s) {
  u32 a[4], b[4], known[4];
  s.bytes(1, 32, a);
  s.bytes(2, 32, b);
  for (int k = 0; k < 4; k++) known[k] = a[k & 2] & a[k | 1] & b[k & 2] & b[k | 1];
  s.set_bytes(0, 32, known);
}
// f of two integers of the instruction's type
template <class F> static ALWAYS_INLINE void integers(const Step& s, F f) {
  if (s.I.flags) s.unsupported();  // saturation
  switch (s.I.type) {
    case T_u16: case T_b16: binary<u32>(s, [f](u32 a, u32 b) { return (u16)f((u16)a, (u16)b); }); break;
    case T_s16: binary<u32>(s, [f](u32 a, u32 b) { return (u16)f((i16)a, (i16)b); }); break;
    case T_u32: case T_b32: binary<u32>(s, f); break;
    case T_s32: binary<u32>(s, [f](u32 a, u32 b) { return (u32)f((i32)a, (i32)b); }); break;
    case T_u64: case T_b64: binary<u64>(s, f); break;
    case T_s64: binary<u64>(s, [f](u64 a, u64 b) { return (u64)f((i64)a, (i64)b); }); break;
    case T_u16x2:
      binary<u32>(s, [f](u32 a, u32 b) {
        return (u16)f((u16)a, (u16)b) | (u32)(u16)f((u16)(a >> 16), (u16)(b >> 16)) << 16;
      });
      return define_halves(s);
    case T_s16x2:
      binary<u32>(s, [f](u32 a, u32 b) {
        return (u16)f((i16)a, (i16)b) | (u32)(u16)f((i16)(a >> 16), (i16)(b >> 16)) << 16;
      });
      return define_halves(s);
    default: s.unsupported();
  }
  s.define(0, TYPE_BITS[s.I.type], all_defined(s, 1, TYPE_BITS[s.I.type]));
}

// ------------------------------------------------------------------------------------------------ moves

static void move(const Step& s) {
  if (TYPE_BITS[s.I.type] == 64) unary<u64>(s, [](u64 a) { return a; });
  else unary<u32>(s, [](u32 a) { return a; });
  int slots = TYPE_BITS[s.I.type] == 64 ? 2 : 1;
  const Planes* from = s.planes(1);
  Planes* to = s.W.defined + s.o[0];
  for (int i = 0; i < slots; i++)
    for (int k = 0; k < 4; k++) to[i].byte[k] = (to[i].byte[k] & ~s.m) | (from[i].byte[k] & s.m);
}
static void pack(const Step& s) {  // o[0] = {o[1], ..}, each imm bits
  int n = s.I.count - 1, part = (int)s.I.imm, bits = TYPE_BITS[s.I.type];
  u64 value[32] = {0}, mask = part == 32 ? FULL : (1u << part) - 1;
  u32 known[8], of_part[8];
  for (int i = 0; i < n; i++) {
    const u32* a = s.in<u32>(1 + i);
    LANES(l) value[l] |= (u64)(a[l] & mask) << (part * i);
    s.bytes(1 + i, part, of_part);
    for (int k = 0; k < part / 8; k++) known[i * part / 8 + k] = of_part[k];
  }
  if (bits == 64) each(s.out<u64>(0), s.m, [&](int l) { return value[l]; });
  else each(s.out<u32>(0), s.m, [&](int l) { return (u32)value[l]; });
  s.set_bytes(0, bits, known);
}
static void unpack(const Step& s) {  // {o[0], ..} = o[count - 1], each imm bits
  int n = s.I.count - 1, part = (int)s.I.imm, bits = TYPE_BITS[s.I.type];
  u64 value[32], mask = part == 32 ? FULL : (1u << part) - 1;
  u32 known[8];
  s.bytes(n, bits, known);
  if (bits == 64) memcpy(value, s.in<u64>(n), sizeof value);
  else LANES(l) value[l] = s.in<u32>(n)[l];
  for (int i = 0; i < n; i++) {
    if (s.o[i] < 0) continue;
    each(s.out<u32>(i), s.m, [&](int l) { return (u32)(value[l] >> (part * i) & mask); });
    u32 of_part[4] = {FULL, FULL, FULL, FULL};
    for (int k = 0; k < part / 8; k++) of_part[k] = known[i * part / 8 + k];
    s.set_bytes(i, 32, of_part);
  }
}
static void special(const Step& s) {
  const Machine& M = s.M;
  u32* d = s.out<u32>(0);
  auto value = [&](int l) -> u32 {
    switch (s.I.imm) {
      case SPECIAL_tid_x: return s.w * 32 + l;
      case SPECIAL_ntid_x: return M.threads;
      case SPECIAL_ctaid_x: case SPECIAL_clusterid_x: return M.cta[0];
      case SPECIAL_ctaid_y: case SPECIAL_clusterid_y: return M.cta[1];
      case SPECIAL_ctaid_z: case SPECIAL_clusterid_z: return M.cta[2];
      case SPECIAL_nctaid_x: case SPECIAL_nclusterid_x: return M.grid[0];
      case SPECIAL_nctaid_y: case SPECIAL_nclusterid_y: return M.grid[1];
      case SPECIAL_nctaid_z: case SPECIAL_nclusterid_z: return M.grid[2];
      case SPECIAL_laneid: return l;
      case SPECIAL_warpid: return s.w;
      case SPECIAL_nwarpid: return M.warp_count;
      case SPECIAL_ntid_y: case SPECIAL_ntid_z: case SPECIAL_cluster_nctarank: case SPECIAL_cluster_nctaid_x:
      case SPECIAL_cluster_nctaid_y: case SPECIAL_cluster_nctaid_z: return 1;
      case SPECIAL_clock: case SPECIAL_clock64: case SPECIAL_globaltimer: return (u32)M.total;
      case SPECIAL_lanemask_eq: return 1u << l;
      case SPECIAL_lanemask_lt: return (1u << l) - 1;
      case SPECIAL_lanemask_le: return (2u << l) - 1;
      case SPECIAL_lanemask_gt: return ~((2u << l) - 1);
      case SPECIAL_lanemask_ge: return ~((1u << l) - 1);
      default: return 0;
    }
  };
  if (s.I.flags & F_wide) each(s.out<u64>(0), s.m, [&](int l) { return (u64)value(l); });
  else each(d, s.m, value);
  s.define(0, s.I.flags & F_wide ? 64 : 32, FULL);
}

// ------------------------------------------------------------------------------------------------ arithmetic

static void multiply_high(const Step& s) {
  switch (s.I.type) {
    case T_u16: binary<u32>(s, [](u32 a, u32 b) { return (a & 0xFFFF) * (b & 0xFFFF) >> 16; }); break;
    case T_s16: binary<u32>(s, [](u32 a, u32 b) { return (u16)((i32)(i16)a * (i32)(i16)b >> 16); }); break;
    case T_u32: binary<u32>(s, [](u32 a, u32 b) { return (u64)a * b >> 32; }); break;
    case T_s32: binary<u32>(s, [](u32 a, u32 b) { return (i64)(i32)a * (i32)b >> 32; }); break;
    case T_u64: binary<u64>(s, [](u64 a, u64 b) { return (u64)((u128)a * b >> 64); }); break;
    case T_s64: binary<u64>(s, [](u64 a, u64 b) { return (u64)((i128)(i64)a * (i64)b >> 64); }); break;
    default: s.unsupported();
  }
  s.define(0, TYPE_BITS[s.I.type], all_defined(s, 1, TYPE_BITS[s.I.type]));
}
// a b + c with a product twice as wide as its factors
static void multiply_wide(const Step& s) {
  const u32 *a = s.in<u32>(1), *b = s.in<u32>(2);
  bool with = s.I.op == OP_madwide;
  int bits = TYPE_BITS[s.I.type];
  u32 known = s.defined(1, bits) & s.defined(2, bits) & (with ? s.defined(3, 2 * bits) : FULL);
  static const u64 zeros[32] = {0};
  const u64* wide = with ? s.in<u64>(3) : zeros;
  const u32* narrow = (const u32*)wide;
  switch (s.I.type) {
    case T_u32: each(s.out<u64>(0), s.m, [=](int l) { return (u64)a[l] * b[l] + wide[l]; }); break;
    case T_s32: each(s.out<u64>(0), s.m, [=](int l) { return (u64)((i64)(i32)a[l] * (i32)b[l]) + wide[l]; }); break;
    case T_u16: each(s.out<u32>(0), s.m, [=](int l) { return (a[l] & 0xFFFF) * (b[l] & 0xFFFF) + narrow[l]; }); break;
    case T_s16: each(s.out<u32>(0), s.m, [=](int l) { return (u32)((i32)(i16)a[l] * (i16)b[l]) + narrow[l]; }); break;
    default: s.unsupported();
  }
  s.define(0, 2 * bits, known);
}
static void multiply_add(const Step& s) {
  int bits = TYPE_BITS[s.I.type];
  if (s.I.op == OP_madhi) {
    auto unsigned_ = [](u32 a, u32 b, u32 c) { return (u32)((u64)a * b >> 32) + c; };
    auto signed_ = [](u32 a, u32 b, u32 c) { return (u32)((i64)(i32)a * (i32)b >> 32) + c; };
    if (s.I.type == T_u32) ternary<u32>(s, unsigned_);
    else if (s.I.type == T_s32) ternary<u32>(s, signed_);
    else s.unsupported();
  } else if (bits == 64) ternary<u64>(s, [](u64 a, u64 b, u64 c) { return a * b + c; });
  else if (bits == 32) ternary<u32>(s, [](u32 a, u32 b, u32 c) { return a * b + c; });
  else ternary<u32>(s, [](u32 a, u32 b, u32 c) { return (a * b + c) & 0xFFFF; });
  s.define(0, bits, all_defined(s, 1, bits));
}

template <class T> static T quotient(T a, T b, bool remainder) {
  if (b == 0) return (T)~(T)0;
  if (std::is_signed<T>::value && b == (T)-1) return remainder ? 0 : (T)(0 - (u64)a);  // the smallest overflows
  return remainder ? a % b : a / b;
}
static void divide(const Step& s) {
  bool rem = s.I.op == OP_rem;
  u32 zero = 0;
  int bits = TYPE_BITS[s.I.type];
  if (bits == 64) LANES(l) zero |= (u32)(s.in<u64>(2)[l] == 0) << l;
  else LANES(l) zero |= (u32)((s.in<u32>(2)[l] & (bits == 16 ? 0xFFFF : FULL)) == 0) << l;
  zero &= s.m & s.defined(2, bits);
  if (zero) s.report(K_division_by_zero, lowest(zero), 0, 0);
  integers(s, [rem](auto a, auto b) { return quotient(a, b, rem); });
}

static void negate_or_absolute(const Step& s) {
  bool neg = s.I.op == OP_neg;
  switch (s.I.type) {
    case T_f32: {
      bool z = s.I.flags & F_ftz;
      unary<u32>(s, [=](u32 a) {
        u32 r = neg ? a ^ 0x80000000u : a & 0x7FFFFFFF;
        return z ? f_bits(flushed(bits_f(r))) : r;
      });
      break;
    }
    case T_f64: unary<u64>(s, [=](u64 a) { return neg ? a ^ 1ull << 63 : a & ~(1ull << 63); }); break;
    case T_f16: case T_bf16: unary<u32>(s, [=](u32 a) { return neg ? (a ^ 0x8000) & 0xFFFF : a & 0x7FFF; }); break;
    case T_f16x2: case T_bf16x2: unary<u32>(s, [=](u32 a) { return neg ? a ^ 0x80008000u : a & 0x7FFF7FFFu; }); break;
    case T_s64: unary<u64>(s, [=](u64 a) { return neg || (i64)a < 0 ? 0 - a : a; }); break;
    case T_s16: unary<u32>(s, [=](u32 a) { return (u16)(neg || (i16)a < 0 ? 0 - a : a); }); break;
    case T_s32: unary<u32>(s, [=](u32 a) { return neg || (i32)a < 0 ? 0 - a : a; }); break;
    default: s.unsupported();
  }
  s.define(0, TYPE_BITS[s.I.type], all_defined(s, 1, TYPE_BITS[s.I.type]));
}

// ------------------------------------------------------------------------------------------------ bits

// imm is the truth table of three operands, missing ones repeated.
static void bitwise(const Step& s) {
  int bits = TYPE_BITS[s.I.type], table = (int)s.I.imm, n = s.I.count - 1;
  auto go = [&](auto f) {
    if (bits == 64) binary<u64>(s, f);
    else binary<u32>(s, f);
  };
  if (n == 2 && table == 0xC0) go([](auto a, auto b) { return a & b; });
  else if (n == 2 && table == 0xFC) go([](auto a, auto b) { return a | b; });
  else if (n == 2 && table == 0x3C) go([](auto a, auto b) { return a ^ b; });
  else if (n == 1 && bits == 64) unary<u64>(s, [](u64 a) { return ~a; });
  else if (n == 1) unary<u32>(s, [bits](u32 a) { return bits == 16 ? ~a & 0xFFFF : ~a; });
  else
    ternary<u32>(s, [table](u32 a, u32 b, u32 c) { return by_table(table, a, b, c); });
  u32 known = all_defined(s, 1, bits);
  if ((known & s.m) == s.m) return s.define(0, bits, FULL);
  if (s.o[0] == s.o[1] || (n > 1 && s.o[0] == s.o[2]) || (n > 2 && s.o[0] == s.o[3])) {
    // an operand's value is gone: only what was defined throughout is known to be
    u32 in[8], out[8];
    for (int k = 0; k < 8; k++) out[k] = FULL;
    for (int i = 1; i <= n; i++) {
      s.bytes(i, bits, in);
      for (int k = 0; k < 8; k++) out[k] &= in[k];
    }
    return s.set_bytes(0, bits, out);
  }
  u32 in[3][8], out[8];
  for (int i = 0; i < 3; i++) s.bytes(std::min(i, n - 1) + 1, bits, in[i]);
  for (int k = 0; k < bits / 8; k++) {
    out[k] = in[0][k] & in[1][k] & in[2][k];
    for (u32 r = s.m & ~out[k]; r; r &= r - 1) {
      int l = lowest(r);
      u8 value[3];
      bool defined[3];
      for (int i = 0; i < 3; i++) {
        int operand = std::min(i, n - 1) + 1;
        u64 v = bits == 64 ? s.in<u64>(operand)[l] : s.in<u32>(operand)[l];
        value[i] = (u8)(v >> 8 * k);
        defined[i] = in[i][k] >> l & 1;
      }
      out[k] |= (u32)known_byte(table, value, defined) << l;
    }
  }
  for (int k = bits / 8; k < 8; k++) out[k] = FULL;
  s.set_bytes(0, bits, out);
}

static void shift(const Step& s) {
  int bits = TYPE_BITS[s.I.type];
  bool left = s.I.op == OP_shl, arithmetic = !left && is_signed(s.I.type);
  u32 known[8], amount;
  s.bytes(1, bits, known);
  u32 all = s.defined(1, bits) & s.defined(2, 32);
  bool exact = (all & s.m) != s.m && uniform(s, 2, amount);
  const u32* n = s.in<u32>(2);
  if (bits == 64) {
    const u64* a = s.in<u64>(1);
    u64* d = s.out<u64>(0);
    if (left) each(d, s.m, [=](int l) { return n[l] > 63 ? 0 : a[l] << n[l]; });
    else if (arithmetic) each(d, s.m, [=](int l) { return (u64)((i64)a[l] >> std::min(n[l], 63u)); });
    else each(d, s.m, [=](int l) { return n[l] > 63 ? 0 : a[l] >> n[l]; });
  } else if (bits == 32) {
    if (left) binary<u32>(s, [](u32 a, u32 b) { return b > 31 ? 0 : a << b; });
    else if (arithmetic) binary<u32>(s, [](u32 a, u32 b) { return (i32)a >> (b > 31 ? 31 : b); });
    else binary<u32>(s, [](u32 a, u32 b) { return b > 31 ? 0 : a >> b; });
  } else {
    if (left) binary<u32>(s, [](u32 a, u32 b) { return b > 15 ? 0 : a << b & 0xFFFF; });
    else if (arithmetic) binary<u32>(s, [](u32 a, u32 b) { return (u16)((i16)a >> (b > 15 ? 15 : b)); });
    else binary<u32>(s, [](u32 a, u32 b) { return b > 15 ? 0 : (a & 0xFFFF) >> b; });
  }
  if (!exact) return s.define(0, bits, all);
  u32 out[8];
  int by = (int)std::min(amount, (u32)bits);
  shifted_planes(known, out, bits, left ? by : -by, arithmetic ? known[bits / 8 - 1] : FULL);
  s.set_bytes(0, bits, out);
}

static void extract(const Step& s) {  // bfe: length bits from a position on, the sign extended for signed types
  int bits = TYPE_BITS[s.I.type];
  bool sign = is_signed(s.I.type);
  u32 planes[8], position, length, out[8];
  s.bytes(1, bits, planes);
  u32 known = s.defined(1, bits) & s.defined(2, 32) & s.defined(3, 32);
  bool exact = (known & s.m) != s.m && uniform(s, 2, position) && uniform(s, 3, length);
  const u32 *pos = s.in<u32>(2), *len = s.in<u32>(3);
  auto field = [=](u64 a, int p, int n) -> u64 {  // a is extended to 64 bits already
    if (n == 0) return 0;
    u64 v = p >= bits ? (sign && (i64)a < 0 ? ~0ull : 0) : sign ? (u64)((i64)a >> p) : a >> p;
    if (n >= 64) return v;
    v &= (1ull << n) - 1;
    bool top = a >> std::min(p + n - 1, bits - 1) & 1;
    return sign && top ? v | ~0ull << n : v;
  };
  if (bits == 64) {
    const u64* a = s.in<u64>(1);
    each(s.out<u64>(0), s.m, [=](int l) { return field(a[l], pos[l] & 0xFF, len[l] & 0xFF); });
  } else {
    const u32* a = s.in<u32>(1);
    each(s.out<u32>(0), s.m, [=](int l) {
      return (u32)field(sign ? (u64)(i64)(i32)a[l] : a[l], pos[l] & 0xFF, len[l] & 0xFF);
    });
  }
  if (!exact) return s.define(0, bits, known);
  int p = position & 0xFF, n = length & 0xFF;
  for (int k = 0; k < 8; k++) {
    out[k] = FULL;
    for (int bit = 8 * k; bit < 8 * k + 8 && bit < bits; bit++) {
      int from = bit < n ? p + bit : sign && n ? p + n - 1 : bits;
      if (from < bits) out[k] &= planes[from >> 3];
      else if (sign && n) out[k] &= planes[bits / 8 - 1];
    }
  }
  s.set_bytes(0, bits, out);
}

static void insert(const Step& s) {  // bfi: the lower bits of a into b
  if (TYPE_BITS[s.I.type] != 32) s.unsupported();
  u32 known = all_defined(s, 1, 32), planes_a[8], planes_b[8], position, length;
  s.bytes(1, 32, planes_a);
  s.bytes(2, 32, planes_b);
  bool exact = (known & s.m) != s.m && uniform(s, 3, position) && uniform(s, 4, length);
  const u32 *a = s.in<u32>(1), *b = s.in<u32>(2), *pos = s.in<u32>(3), *len = s.in<u32>(4);
  each(s.out<u32>(0), s.m, [=](int l) {
    u32 p = pos[l] & 0xFF, n = len[l] & 0xFF;
    if (n == 0 || p > 31) return b[l];
    u32 mask = (n > 31 ? FULL : (1u << n) - 1) << p;
    return (b[l] & ~mask) | (a[l] << p & mask);
  });
  if (!exact) return s.define(0, 32, known);
  u32 out[8];
  int p = position & 0xFF, n = length & 0xFF;
  for (int k = 0; k < 4; k++) {
    out[k] = FULL;
    for (int bit = 8 * k; bit < 8 * k + 8; bit++)
      out[k] &= bit >= p && bit < p + n ? planes_a[(bit - p) >> 3] : planes_b[k];
  }
  s.set_bytes(0, 32, out);
}

static void permute(const Step& s) {  // prmt: each byte of the result is one of the eight of {b, a}, or its sign
  u32 planes[8], out[4] = {0};
  s.bytes(1, 32, planes);
  u32 of_b[8];
  s.bytes(2, 32, of_b);
  for (int k = 0; k < 4; k++) planes[4 + k] = of_b[k];
  u32 known = all_defined(s, 1, 32);
  bool exact = (known & s.m) != s.m;
  u32 selectors[32];
  u32 selectors_known = s.defined(3, 32);
  memcpy(selectors, s.in<u32>(3), sizeof selectors);
  ternary<u32>(s, [](u32 a, u32 b, u32 c) {
    u64 v = (u64)b << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
      u32 pick = c >> 4 * i & 0xF, byte = v >> 8 * (pick & 7) & 0xFF;
      r |= (pick & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << 8 * i;
    }
    return r;
  });
  if (!exact) return s.define(0, 32, FULL);
  LANES(l) for (int k = 0; k < 4; k++) out[k] |= (planes[selectors[l] >> 4 * k & 7] >> l & 1) << l;
  for (int k = 0; k < 4; k++) out[k] &= selectors_known;
  s.set_bytes(0, 32, out);
}

static void funnel(const Step& s) {  // shf
  bool left = !(s.I.imm & 1), wrap = s.I.flags & F_wrap;
  u32 known = all_defined(s, 1, 32), planes[8], of_b[8], amount;
  s.bytes(1, 32, planes);
  s.bytes(2, 32, of_b);
  for (int k = 0; k < 4; k++) planes[4 + k] = of_b[k];
  bool exact = (known & s.m) != s.m && uniform(s, 3, amount);
  ternary<u32>(s, [=](u32 a, u32 b, u32 c) {
    u32 n = wrap ? c & 31 : std::min(c, 32u);
    u64 v = (u64)b << 32 | a;
    return left ? (u32)(v << n >> 32) : (u32)(v >> n);
  });
  if (!exact) return s.define(0, 32, known);
  u32 out[8];
  int n = wrap ? amount & 31 : std::min(amount, 32u);
  shifted_planes(planes, out, 64, left ? n : -n, FULL);
  s.set_bytes(0, 32, left ? out + 4 : out);
}

static void count_bits(const Step& s) {  // popc, clz: a 32-bit result of 32 or 64 bits
  bool zeros = s.I.op == OP_clz;
  int bits = TYPE_BITS[s.I.type];
  u32 known = s.defined(1, bits);
  if (bits == 64) {
    const u64* a = s.in<u64>(1);
    each(s.out<u32>(0), s.m, [=](int l) {
      return (u32)(zeros ? (a[l] ? __builtin_clzll(a[l]) : 64) : __builtin_popcountll(a[l]));
    });
  } else {
    unary<u32>(s, [=](u32 a) { return zeros ? (a ? __builtin_clz(a) : 32) : __builtin_popcount(a); });
  }
  s.define(0, 32, known);
}
template <class T> static T reversed(T a) {
  T r = 0;
  for (size_t i = 0; i < 8 * sizeof(T); i++) r |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return r;
}
static void reverse_bits(const Step& s) {
  int bits = TYPE_BITS[s.I.type];
  u32 known = s.defined(1, bits);
  if (bits == 64) unary<u64>(s, reversed<u64>);
  else unary<u32>(s, reversed<u32>);
  s.define(0, bits, known);
}

// ------------------------------------------------------------------------------------------------ predicates

static void select(const Step& s) {
  int bits = TYPE_BITS[s.I.type];
  u32 known, p = s.pred(s.o[3], known), a[8], b[8];
  s.bytes(1, bits, a);
  s.bytes(2, bits, b);
  if (bits == 64) {
    const u64 *x = s.in<u64>(1), *y = s.in<u64>(2);
    each(s.out<u64>(0), s.m, [=](int l) { return p >> l & 1 ? x[l] : y[l]; });
  } else {
    const u32 *x = s.in<u32>(1), *y = s.in<u32>(2);
    each(s.out<u32>(0), s.m, [=](int l) { return p >> l & 1 ? x[l] : y[l]; });
  }
  for (int k = 0; k < 8; k++) a[k] = ((p & a[k]) | (~p & b[k])) & known;
  s.set_bytes(0, bits, a);
}
static void combine_predicates(const Step& s) {
  u32 known_a, known_b, a = s.pred(s.o[1], known_a), b = s.pred(s.o[2], known_b), known = known_a & known_b;
  // false and anything is false, true or anything is true
  if (s.I.op == OP_andp) s.set_pred(s.o[0], a & b, known | (known_a & ~a) | (known_b & ~b));
  else if (s.I.op == OP_orp) s.set_pred(s.o[0], a | b, known | (known_a & a) | (known_b & b));
  else s.set_pred(s.o[0], a ^ b, known);
}

template <class T> static ALWAYS_INLINE u32 compared(int how, const T* a, const T* b) {
  u32 r = 0;
  switch (how) {
    case CMP_eq: LANES(l) r |= (u32)(a[l] == b[l]) << l; break;
    case CMP_ne: LANES(l) r |= (u32)(a[l] != b[l]) << l; break;
    case CMP_lt: LANES(l) r |= (u32)(a[l] < b[l]) << l; break;
    case CMP_le: LANES(l) r |= (u32)(a[l] <= b[l]) << l; break;
    case CMP_gt: LANES(l) r |= (u32)(a[l] > b[l]) << l; break;
    default: LANES(l) r |= (u32)(a[l] >= b[l]) << l; break;
  }
  return r;
}
template <class T> static ALWAYS_INLINE u32 compared_floats(int how, const T* a, const T* b) {
  u32 unordered = 0;
  LANES(l) unordered |= (u32)(a[l] != a[l] || b[l] != b[l]) << l;
  if (how == CMP_num) return ~unordered;
  if (how == CMP_nan) return unordered;
  if (how >= CMP_equ) return compared(how - CMP_equ, a, b) | unordered;
  return compared(how, a, b) & ~unordered;
}
// o: p, q or -1, a, b, c or -1; imm: comparison | (1 and, 2 or, 3 xor with c) << 8; q is the opposite of p.
static void set_predicate(const Step& s) {
  int how = (int)s.I.imm & 0xFF, with = (int)(s.I.imm >> 8), type = s.I.type, bits = TYPE_BITS[type];
  u32 known = s.defined(2, bits) & s.defined(3, bits), r, opposite;
  const u32 *a = s.in<u32>(2), *b = s.in<u32>(3);
  const u64 *wide_a = (const u64*)a, *wide_b = (const u64*)b;
  float fa[32], fb[32];
  auto halves = [&](int shift) {
    bool bf = type == T_bf16 || type == T_bf16x2;
    LANES(l) {
      u32 x = a[l] >> shift & 0xFFFF, y = b[l] >> shift & 0xFFFF;
      fa[l] = bf ? b2f(x) : h2f(x);
      fb[l] = bf ? b2f(y) : h2f(y);
    }
    return compared_floats(how, fa, fb);
  };
  switch (type) {
    case T_u32: case T_b32: r = compared(how, a, b); break;
    case T_s32: r = compared(how, (const i32*)a, (const i32*)b); break;
    case T_u64: case T_b64: r = compared(how, wide_a, wide_b); break;
    case T_s64: r = compared(how, (const i64*)wide_a, (const i64*)wide_b); break;
    case T_u16: case T_b16: {
      u16 x[32], y[32];
      LANES(l) x[l] = (u16)a[l], y[l] = (u16)b[l];
      r = compared(how, x, y);
      break;
    }
    case T_s16: {
      i16 x[32], y[32];
      LANES(l) x[l] = (i16)a[l], y[l] = (i16)b[l];
      r = compared(how, x, y);
      break;
    }
    case T_f32:
      if (s.I.flags & F_ftz) {
        LANES(l) fa[l] = flushed(bits_f(a[l])), fb[l] = flushed(bits_f(b[l]));
        r = compared_floats(how, fa, fb);
      } else {
        r = compared_floats(how, (const float*)a, (const float*)b);
      }
      break;
    case T_f64: r = compared_floats(how, (const double*)wide_a, (const double*)wide_b); break;
    case T_f16: case T_bf16: r = halves(0); break;
    case T_f16x2: case T_bf16x2:  // q is the upper half's
      if (with) s.unsupported();
      r = halves(0);
      s.set_pred(s.o[1], halves(16), known);
      return s.set_pred(s.o[0], r, known);
    default: s.unsupported();
  }
  opposite = ~r;
  if (with) {
    u32 known_c, c = s.pred(s.o[4], known_c);
    // and with false, or with true, need no comparison
    u32 decided = with == 1 ? known_c & ~c : with == 2 ? known_c & c : 0;
    known = (known & known_c) | decided;
    r = with == 1 ? r & c : with == 2 ? r | c : r ^ c;
    opposite = with == 1 ? opposite & c : with == 2 ? opposite | c : opposite ^ c;
  }
  s.set_pred(s.o[0], r, known);
  s.set_pred(s.o[1], opposite, known);
}
