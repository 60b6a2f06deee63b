// Floating-point arithmetic and conversions. fp32 and fp64 are the host's; 16-bit results are rounded once.
#pragma once
#include "integers.h"

// Of a number and a NaN, a signaling one too, which std::fmin answers with NaN, the number.
template <class T> static ALWAYS_INLINE T minimum(T a, T b, bool nan) {
  if (nan && (a != a || b != b)) return bits_f(0x7FFFFFFF);
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T> static ALWAYS_INLINE T maximum(T a, T b, bool nan) {
  if (nan && (a != a || b != b)) return bits_f(0x7FFFFFFF);
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// f of one to three fp32, denormals flushed on both sides under ftz
template <class F> static ALWAYS_INLINE void single(const Step& s, F f) {
  const float *a = s.in<float>(1), *b = s.I.count > 2 ? s.in<float>(2) : a, *c = s.I.count > 3 ? s.in<float>(3) : a;
  if (!(s.I.flags & F_ftz)) each(s.out<float>(0), s.m, [=](int l) { return f(a[l], b[l], c[l]); });
  else each(s.out<float>(0), s.m, [=](int l) { return flushed(f(flushed(a[l]), flushed(b[l]), flushed(c[l]))); });
}
static void fp32(const Step& s) {
  bool nan = s.I.flags & F_nan;
  switch (s.I.op) {
    case OP_add: single(s, [](float a, float b, float) { return a + b; }); break;
    case OP_sub: single(s, [](float a, float b, float) { return a - b; }); break;
    case OP_mul: single(s, [](float a, float b, float) { return a * b; }); break;
    case OP_div: single(s, [](float a, float b, float) { return a / b; }); break;
    case OP_fma: single(s, [](float a, float b, float c) { return __builtin_fmaf(a, b, c); }); break;
    case OP_min: single(s, [nan](float a, float b, float) { return minimum(a, b, nan); }); break;
    case OP_max: single(s, [nan](float a, float b, float) { return maximum(a, b, nan); }); break;
    case OP_min3:
      single(s, [nan](float a, float b, float c) { return minimum(minimum(a, b, nan), c, nan); });
      break;
    case OP_max3:
      single(s, [nan](float a, float b, float c) { return maximum(maximum(a, b, nan), c, nan); });
      break;
    case OP_sqrt: single(s, [](float a, float, float) { return std::sqrt(a); }); break;
    case OP_rsqrt: single(s, [](float a, float, float) { return (float)(1.0 / std::sqrt((double)a)); }); break;
    case OP_rcp: single(s, [](float a, float, float) { return 1.0f / a; }); break;
    case OP_ex2: single(s, [](float a, float, float) { return std::exp2(a); }); break;
    case OP_lg2: single(s, [](float a, float, float) { return std::log2(a); }); break;
    case OP_tanh: single(s, [](float a, float, float) { return std::tanh(a); }); break;
    case OP_sin: single(s, [](float a, float, float) { return std::sin(a); }); break;
    case OP_cos: single(s, [](float a, float, float) { return std::cos(a); }); break;
    case OP_copysign: single(s, [](float a, float b, float) { return std::copysign(b, a); }); break;
    default: s.unsupported();
  }
  if (s.I.flags & F_sat) {
    float* d = s.out<float>(0);
    each(d, s.m, [=](int l) { return d[l] > 0 ? std::min(d[l], 1.0f) : 0.0f; });
  }
  s.define(0, 32, all_defined(s, 1, 32));
}

// Pairs of fp32 in 64-bit registers.
template <class F> static ALWAYS_INLINE void single_pair(const Step& s, F f) {
  const float *a = s.in<float>(1), *b = s.I.count > 2 ? s.in<float>(2) : a, *c = s.I.count > 3 ? s.in<float>(3) : a;
  float* d = s.out<float>(0);
  bool z = s.I.flags & F_ftz;
  for (u32 r = s.m; r; r &= r - 1)
    for (int i = 2 * lowest(r), end = i + 2; i < end; i++)
      d[i] = z ? flushed(f(flushed(a[i]), flushed(b[i]), flushed(c[i]))) : f(a[i], b[i], c[i]);
}
static void fp32x2(const Step& s) {
  switch (s.I.op) {
    case OP_add: single_pair(s, [](float a, float b, float) { return a + b; }); break;
    case OP_sub: single_pair(s, [](float a, float b, float) { return a - b; }); break;
    case OP_mul: single_pair(s, [](float a, float b, float) { return a * b; }); break;
    case OP_fma: single_pair(s, [](float a, float b, float c) { return __builtin_fmaf(a, b, c); }); break;
    default: s.unsupported();
  }
  u32 known[8] = {FULL, FULL, FULL, FULL, FULL, FULL, FULL, FULL}, of[8];
  for (int i = 1; i < s.I.count; i++) {
    s.bytes(i, 64, of);
    for (int h = 0; h < 8; h += 4) {
      u32 all = known[h] & of[h] & of[h + 1] & of[h + 2] & of[h + 3];
      for (int k = 0; k < 4; k++) known[h + k] = all;
    }
  }
  s.set_bytes(0, 64, known);
}

template <class F> static ALWAYS_INLINE void twice(const Step& s, F f) {
  const double *a = s.in<double>(1), *b = s.I.count > 2 ? s.in<double>(2) : a, *c = s.I.count > 3 ? s.in<double>(3) : a;
  each(s.out<double>(0), s.m, [=](int l) { return f(a[l], b[l], c[l]); });
}
static void fp64(const Step& s) {
  switch (s.I.op) {
    case OP_add: twice(s, [](double a, double b, double) { return a + b; }); break;
    case OP_sub: twice(s, [](double a, double b, double) { return a - b; }); break;
    case OP_mul: twice(s, [](double a, double b, double) { return a * b; }); break;
    case OP_div: twice(s, [](double a, double b, double) { return a / b; }); break;
    case OP_fma: twice(s, [](double a, double b, double c) { return std::fma(a, b, c); }); break;
    case OP_min: twice(s, [](double a, double b, double) { return minimum(a, b, false); }); break;
    case OP_max: twice(s, [](double a, double b, double) { return maximum(a, b, false); }); break;
    case OP_sqrt: twice(s, [](double a, double, double) { return std::sqrt(a); }); break;
    case OP_rsqrt: twice(s, [](double a, double, double) { return 1.0 / std::sqrt(a); }); break;
    case OP_rcp: twice(s, [](double a, double, double) { return 1.0 / a; }); break;
    case OP_copysign: twice(s, [](double a, double b, double) { return std::copysign(b, a); }); break;
    default: s.unsupported();
  }
  s.define(0, 64, all_defined(s, 1, 64));
}

// One 16-bit operation: the exact result, or one rounded to odd, in fp64, then rounded once.
static double half_result(const Step& s, double a, double b, double c) {
  bool nan = s.I.flags & F_nan;
  switch (s.I.op) {
    case OP_add: return add_to_odd(a, b);
    case OP_sub: return add_to_odd(a, -b);
    case OP_mul: return a * b;
    case OP_fma: return add_to_odd(a * b, c);
    case OP_min: return minimum((float)a, (float)b, nan);
    case OP_max: return maximum((float)a, (float)b, nan);
    case OP_ex2: return std::exp2(a);
    case OP_tanh: return std::tanh(a);
    default: s.unsupported();
  }
}
static void fp16(const Step& s) {  // fp16 and bf16, one or a pair
  int type = s.I.type;
  bool bf = type == T_bf16 || type == T_bf16x2, pair = type == T_f16x2 || type == T_bf16x2;
  const u32 *a = s.in<u32>(1), *b = s.I.count > 2 ? s.in<u32>(2) : a, *c = s.I.count > 3 ? s.in<u32>(3) : a;
  u32* d = s.out<u32>(0);
  auto value = [bf](u32 x) -> double { return bf ? b2f(x) : h2f(x); };
  for (u32 left = s.m; left; left &= left - 1) {
    int l = lowest(left);
    u32 r = 0;
    for (int h = 0; h < (pair ? 32 : 16); h += 16) {
      double x = half_result(s, value(a[l] >> h & 0xFFFF), value(b[l] >> h & 0xFFFF), value(c[l] >> h & 0xFFFF));
      if (s.I.flags & F_relu) x = x > 0 || std::isnan(x) ? x : 0;
      if (s.I.flags & F_sat) x = x > 0 ? std::min(x, 1.0) : 0;
      float odd = to_odd(x);
      r |= (bf ? f2b(odd) : f2h(odd)) << h;
    }
    d[l] = r;
  }
  u32 known[8] = {FULL, FULL, FULL, FULL}, of[8];
  for (int i = 1; i < s.I.count; i++) {
    s.bytes(i, pair ? 32 : 16, of);
    for (int k = 0; k < 4; k += 2) known[k] = known[k + 1] = known[k] & of[k] & of[k + 1];
  }
  s.set_bytes(0, 32, known);
}
static void floating(const Step& s) {
  // only rounding to nearest
  if (s.I.flags & (F_rz | F_rm | F_rp | F_xorsign | F_abs)) s.unsupported();
  switch (s.I.type) {
    case T_f32: return fp32(s);
    case T_f64: return fp64(s);
    case T_f32x2: return fp32x2(s);
    case T_f16: case T_bf16: case T_f16x2: case T_bf16x2: return fp16(s);
    default: s.unsupported();
  }
}

// ------------------------------------------------------------------------------------------------ conversions

static void convert_one(const Step& s) {  // type: destination, type2: source
  if (s.I.type == T_f16x2 && s.I.type2 == T_e4m3x2 && !s.I.flags) {
    unary<u32>(s, [](u32 a) { return f2h(e2f(a & 0xFF)) | f2h(e2f(a >> 8 & 0xFF)) << 16; });
    u32 known[8];
    s.bytes(1, 16, known);
    u32 halves[8] = {known[0], known[0], known[1], known[1]};
    return s.set_bytes(0, 32, halves);
  }
  auto no_pair = [&](int type) { if (type == T_e4m3 || type == T_e4m3x2) s.unsupported(); };
  no_pair(s.I.type);
  no_pair(s.I.type2);
  int to = s.I.type, from = s.I.type2, flags = s.I.flags, bits_to = TYPE_BITS[to], bits_from = TYPE_BITS[from];
  if (to == T_f32 && from == T_bf16 && !flags) unary<u32>(s, [](u32 a) { return a << 16; });
  else if (to == T_f32 && from == T_f16 && !(flags & ~F_ftz)) unary<u32>(s, [](u32 a) { return f_bits(h2f(a)); });
  else if (to == T_f32 && from == T_s32 && !flags) unary<u32>(s, [](u32 a) { return f_bits((float)(i32)a); });
  else
    for (u32 r = s.m; r; r &= r - 1) {
      int l = lowest(r);
      u64 v = convert(to, from, flags, bits_from == 64 ? s.in<u64>(1)[l] : s.in<u32>(1)[l]);
      if (bits_to == 64) s.out<u64>(0)[l] = v;
      else s.out<u32>(0)[l] = (u32)v;
    }
  if (is_float(to) || is_float(from) || (flags & F_sat)) return s.define(0, bits_to, s.defined(1, bits_from));
  u32 known[8];
  s.bytes(1, bits_from, known);
  u32 above = is_signed(from) ? known[bits_from / 8 - 1] : FULL;
  for (int k = bits_from / 8; k < 8; k++) known[k] = above;
  // what a narrow destination holds above its bits: the sign of an 8-bit integer, or nothing
  for (int k = bits_to / 8; k < 8; k++) known[k] = to == T_s8 ? known[0] : FULL;
  s.set_bytes(0, bits_to, known);
}
static void convert_two(const Step& s) {  // a pair from two fp32: the first goes high
  bool rz = s.I.flags & F_rz, relu = s.I.flags & F_relu;
  auto positive = [relu](u32 x) { return relu && (i32)x < 0 && x <= 0xFF800000u ? 0 : x; };
  if (s.I.type == T_bf16x2 && !rz)
    binary<u32>(s, [=](u32 a, u32 b) { return f2b(bits_f(positive(b))) | f2b(bits_f(positive(a))) << 16; });
  else if (s.I.type == T_bf16x2)
    binary<u32>(s, [=](u32 a, u32 b) { return f2b_rz(bits_f(positive(b))) | f2b_rz(bits_f(positive(a))) << 16; });
  else if (s.I.type == T_f16x2 && !rz)
    binary<u32>(s, [=](u32 a, u32 b) { return f2h(bits_f(positive(b))) | f2h(bits_f(positive(a))) << 16; });
  else if (s.I.type == T_f16x2)
    binary<u32>(s, [=](u32 a, u32 b) { return f2h_rz(bits_f(positive(b))) | f2h_rz(bits_f(positive(a))) << 16; });
  else if (s.I.type == T_e4m3x2 && (s.I.flags & F_sat))
    binary<u32>(s, [=](u32 a, u32 b) { return f2e(bits_f(positive(b))) | f2e(bits_f(positive(a))) << 8; });
  else s.unsupported();
  u32 high = s.defined(1, 32), low = s.defined(2, 32);
  if (s.I.type == T_e4m3x2) {
    u32 bytes[8] = {low, high, FULL, FULL};
    return s.set_bytes(0, 32, bytes);
  }
  u32 known[8] = {low, low, high, high};
  s.set_bytes(0, 32, known);
}
static void test_property(const Step& s) {  // testp: finite, infinite, number, notanumber
  const float* a = s.in<float>(1);
  u32 r = 0;
  LANES(l) {
    bool v = s.I.imm == 0 ? std::isfinite(a[l]) : s.I.imm == 1 ? std::isinf(a[l]) : std::isnan(a[l]) == (s.I.imm == 3);
    r |= (u32)v << l;
  }
  s.set_pred(s.o[0], r, s.defined(1, 32));
}
