// Number formats: exact conversions in portable integer code, so that every compiler and machine gives the same bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lists.h"

typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
__extension__ typedef unsigned __int128 u128;
__extension__ typedef __int128 i128;

#define ALWAYS_INLINE inline __attribute__((always_inline))

enum Type : i32 {
#define X(name, bits) T_##name,
  PTX_TYPES(X)
#undef X
};
static const int TYPE_BITS[] = {
#define X(name, bits) bits,
    PTX_TYPES(X)
#undef X
};

enum FlagBit : i32 {
#define X(name) FLAG_BIT_##name,
  PTX_FLAGS(X)
#undef X
};
enum Flag : i32 {
#define X(name) F_##name = 1 << FLAG_BIT_##name,
  PTX_FLAGS(X)
#undef X
};

template <class To, class From> static ALWAYS_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static ALWAYS_INLINE float bits_f(u32 x) { return same_bits<float>(x); }
static ALWAYS_INLINE u32 f_bits(float f) { return same_bits<u32>(f); }
static ALWAYS_INLINE double bits_d(u64 x) { return same_bits<double>(x); }
static ALWAYS_INLINE u64 d_bits(double f) { return same_bits<u64>(f); }

// fp16 to fp32: the exponent's bias differs by 112; the multiplication puts it right, of subnormals too.
static ALWAYS_INLINE float h2f(u32 h) {
  float magnitude = bits_f((h & 0x7FFF) << 13) * 0x1p112f;
  u32 special = (h & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;
  return bits_f(f_bits(magnitude) | special | (h & 0x8000) << 16);
}
// To nearest, ties to even. Subnormals: adding 0.5 leaves their bits, rounded, at the bottom of the significand.
static ALWAYS_INLINE u32 f2h(float f) {
  u32 x = f_bits(f) & 0x7FFFFFFF, sign = f_bits(f) >> 16 & 0x8000;
  u32 tiny = f_bits(bits_f(x) + 0.5f) - 0x3F000000u;
  u32 normal = (x + 0xC8000FFFu + (x >> 13 & 1)) >> 13;
  u32 large = x > 0x7F800000 ? 0x7FFF : 0x7C00;
  u32 h = x < 0x38800000 ? tiny : x < 0x47800000 ? normal : large;
  return x > 0x7F800000 ? h : h | sign;
}
static inline u32 f2h_rz(float f) {
  u32 x = f_bits(f) & 0x7FFFFFFF, sign = f_bits(f) >> 16 & 0x8000;
  if (x > 0x7F800000) return 0x7FFF;
  if (x == 0x7F800000) return sign | 0x7C00;
  if (x >= 0x47800000) return sign | 0x7BFF;
  if (x >= 0x38800000) return sign | (x - 0x38000000) >> 13;
  u32 shift = 126 - (x >> 23);
  return sign | (shift > 31 ? 0 : ((x & 0x7FFFFF) | 0x800000) >> shift);
}
static ALWAYS_INLINE float b2f(u32 b) { return bits_f(b << 16); }
static ALWAYS_INLINE u32 f2b(float f) {
  u32 x = f_bits(f);
  u32 rounded = (x + 0x7FFF + (x >> 16 & 1)) >> 16;
  return (x & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : rounded;
}
static ALWAYS_INLINE u32 f2b_rz(float f) { return (f_bits(f) & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : f_bits(f) >> 16; }
// e4m3 (arXiv 2209.05433): 4 bits of exponent, bias 7, 3 bits of mantissa; no infinity, and NaN is all ones.
static inline float e2f(u32 e) {
  float magnitude = bits_f((e & 0x7F) << 20) * 0x1p120f;
  return (e & 0x7F) == 0x7F ? bits_f(0x7FFFFFFF) : e & 0x80 ? -magnitude : magnitude;
}
// To nearest, ties to even; beyond 448, infinity too, to 448, as satfinite asks.
static inline u32 f2e(float f) {
  u32 x = f_bits(f) & 0x7FFFFFFF, sign = f_bits(f) >> 24 & 0x80;
  if (x > 0x7F800000) return 0x7F;
  if (x >= 0x43E00000) return sign | 0x7E;
  // Below 2^-6, the smallest normal number, adding 2^14 leaves the bits, rounded, at the bottom of the significand.
  if (x < 0x3C800000) return sign | (f_bits(bits_f(x) + 0x1p14f) - 0x46800000u);
  u32 rounded = (x + 0x7FFFF + (x >> 20 & 1)) >> 20;
  return sign | std::min(rounded - (120u << 3), 0x7Eu);
}
// What the tensor cores take of a tf32 operand: its upper 19 bits.
static ALWAYS_INLINE float tf32(u32 x) { return bits_f(x & 0xFFFFE000u); }
static ALWAYS_INLINE float flushed(float f) {
  u32 x = f_bits(f);
  return bits_f((x & 0x7F800000) ? x : x & 0x80000000u);
}

// To fp32, rounded to odd: a second rounding, to a shorter format, is then as one rounding would be.
static inline float to_odd(double d) {
  float f = (float)d;
  if (!std::isfinite(d) || (double)f == d) return f;
  u32 x = f_bits(f);
  if (std::isinf(f) || std::fabs((double)f) > std::fabs(d)) x--;
  return bits_f(x | 1);
}
// a + b in fp64, rounded to odd (Knuth's two-sum gives the error).
static inline double add_to_odd(double a, double b) {
  double s = a + b;
  if (!std::isfinite(s)) return s;
  double t = s - a, error = (a - (s - t)) + (b - t);
  if (error == 0 || (d_bits(s) & 1)) return s;
  return bits_d((error > 0) == (s > 0) ? d_bits(s) + 1 : d_bits(s) - 1);
}

static inline bool is_float(int type) {
  return type == T_f16 || type == T_bf16 || type == T_f32 || type == T_f64 || type == T_tf32;
}
static inline bool is_signed(int type) { return type == T_s8 || type == T_s16 || type == T_s32 || type == T_s64; }

static inline double as_double(int type, u64 v) {
  switch (type) {
    case T_f16: return h2f((u16)v);
    case T_bf16: return b2f((u16)v);
    case T_f64: return bits_d(v);
    default: return bits_f((u32)v);
  }
}
// An integer of the type in 64 bits, its sign extended.
static inline i64 as_integer(int type, u64 v) {
  switch (type) {
    case T_u8: case T_b8: return (u8)v;
    case T_s8: return (i8)v;
    case T_u16: case T_b16: return (u16)v;
    case T_s16: return (i16)v;
    case T_u32: case T_b32: return (u32)v;
    case T_s32: return (i32)v;
    default: return (i64)v;
  }
}

static inline u64 float_to_float(int to, int from, int flags, u64 v) {
  double x = as_double(from, v);
  if (from == T_f32 && (flags & F_ftz)) x = flushed((float)x);
  if (flags & F_rni) x = std::nearbyint(x);
  // rz, rm and rp between equal formats round to an integer
  else if (to == from && (flags & F_rz)) x = std::trunc(x);
  else if (to == from && (flags & F_rm)) x = std::floor(x);
  else if (to == from && (flags & F_rp)) x = std::ceil(x);
  if (flags & F_sat) x = std::isnan(x) ? 0 : std::min(1.0, std::max(0.0, x));
  if (flags & F_relu) x = x > 0 || std::isnan(x) ? x : 0;
  float odd = to_odd(x);
  bool truncate = flags & F_rz;
  switch (to) {
    case T_f16: return truncate ? f2h_rz(odd) : f2h(odd);
    case T_bf16: return truncate ? f2b_rz(odd) : f2b(odd);
    case T_tf32: {
      u32 b = f_bits(odd);
      if ((b & 0x7F800000) == 0x7F800000) return b;
      if (flags & F_rna) return (b + 0x1000) & 0xFFFFE000u;
      return (b + 0xFFF + (b >> 13 & 1)) & 0xFFFFE000u;
    }
    case T_f32: {
      float f = (float)x;
      if (truncate && std::isfinite(x) && std::fabs((double)f) > std::fabs(x)) f = bits_f(f_bits(f) - 1);
      return f_bits(flags & F_ftz ? flushed(f) : f);
    }
    default: return d_bits(x);
  }
}
// Out of range goes to the nearest bound; NaN to 0, but to 2^63 in 64 bits.
static inline u64 float_to_integer(int to, int from, int flags, u64 v) {
  double x = as_double(from, v);
  if (from == T_f32 && (flags & F_ftz)) x = flushed((float)x);
  if (std::isnan(x)) return to == T_u64 || to == T_s64 ? 1ull << 63 : 0;
  x = flags & F_rz ? std::trunc(x) : flags & F_rm ? std::floor(x) : flags & F_rp ? std::ceil(x) : std::nearbyint(x);
  auto within = [x](double low, double high) { return x < low ? low : x > high ? high : x; };
  switch (to) {
    case T_s8: return (u32)(i32)within(-128, 127);
    case T_u8: return (u8)within(0, 255);
    case T_s16: return (u16)(i16)within(-32768, 32767);
    case T_u16: return (u16)within(0, 65535);
    case T_s32: return (u32)(i32)within(-2147483648.0, 2147483647.0);
    case T_u32: return (u32)within(0, 4294967295.0);
    case T_s64: return x >= 0x1p63 ? ~0ull >> 1 : x <= -0x1p63 ? 1ull << 63 : (u64)(i64)x;
    default: return x >= 0x1p64 ? ~0ull : x <= 0 ? 0 : (u64)x;
  }
}
static inline u64 integer_to_float(int to, int from, int flags, u64 v) {
  i64 x = as_integer(from, v);
  bool wide = from == T_u64 || from == T_b64;
  double d = wide ? (double)(u64)x : (double)x;
  switch (to) {
    case T_f64: return d_bits(d);
    case T_f32: {
      float f = wide ? (float)(u64)x : (float)x;
      if ((flags & F_rz) && std::fabs((double)f) > std::fabs(d)) f = bits_f(f_bits(f) - 1);
      return f_bits(f);
    }
    // 64 bits do not fit fp64, but what they would round to is beyond fp16's range and above bf16's bits
    case T_f16: return f2h(to_odd(d));
    default: return f2b(to_odd(d));
  }
}
static inline u64 integer_to_integer(int to, int from, int flags, u64 v) {
  i64 x = as_integer(from, v);
  if ((flags & F_sat) && TYPE_BITS[to] == 64) {
    if (x < 0 && from == T_u64 && to == T_s64) x = INT64_MAX;
    else if (x < 0 && from != T_u64 && to == T_u64) x = 0;
  } else if (flags & F_sat) {
    int bits = TYPE_BITS[to];
    i64 low = is_signed(to) ? -(1ll << (bits - 1)) : 0, high = (1ll << (is_signed(to) ? bits - 1 : bits)) - 1;
    bool wide = from == T_u64 && x < 0;
    x = wide ? high : std::min(std::max(x, low), high);
  }
  switch (to) {
    case T_u8: return (u8)x;
    case T_s8: return (u32)(i32)(i8)x;
    case T_u16: case T_s16: case T_b16: return (u16)x;
    case T_u32: case T_s32: case T_b32: return (u32)x;
    default: return (u64)x;
  }
}
static inline u64 convert(int to, int from, int flags, u64 v) {
  if (is_float(from)) return is_float(to) ? float_to_float(to, from, flags, v) : float_to_integer(to, from, flags, v);
  return is_float(to) ? integer_to_float(to, from, flags, v) : integer_to_integer(to, from, flags, v);
}
