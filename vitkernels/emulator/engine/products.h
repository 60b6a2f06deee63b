// Matrix products: mma.sync and wgmma. Products of 8-bit, 16-bit and tf32 operands are exact in fp64, in which they are
// summed; the result is rounded to fp32 once, where the hardware rounds (downwards) within the sum, and of e4m3 keeps
// some 14 bits of it.
#pragma once
#include "memory.h"

#if defined(__FP_FAST_FMA) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
static ALWAYS_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
static ALWAYS_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

// c[rows][n] += a[rows][depth] b[depth][n]; n is a multiple of 8
static void multiply(double* c, const double* a, const double* b, int rows, int depth, int n) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < n; j += 8) {
      double sum[8];
      for (int v = 0; v < 8; v++) sum[v] = c[(size_t)i * n + j + v];
      for (int k = 0; k < depth; k++) {
        double x = a[(size_t)i * depth + k];
        const double* y = b + (size_t)k * n + j;
        for (int v = 0; v < 8; v++) sum[v] = multiply_add(x, y[v], sum[v]);
      }
      for (int v = 0; v < 8; v++) c[(size_t)i * n + j + v] = sum[v];
    }
}
static inline double half_value(int type, u32 x) { return type == T_bf16 ? b2f(x & 0xFFFF) : h2f(x & 0xFFFF); }

// Lanes in which some operand from `first` on, `n` of them, has an undefined byte; touched accumulators are reported.
static u32 undefined_operands(const Step& s, int first, int n, int bits) {
  u32 bad = 0;
  for (int i = first; i < first + n; i++) {
    bad |= ~s.defined(i, bits);
    if (s.o[i] >= 0 && s.M.in_flight[(size_t)s.w * s.M.slots + s.o[i]]) s.report(K_accumulator_in_flight, 0, 0, s.o[i]);
  }
  return bad;
}

static void mma_fp64(const Step& s, int rows, int depth) {
  bool small = rows == 8;
  int na = small ? 1 : 16 * depth / 32, nb = small ? 1 : depth * 8 / 32, nc = small ? 2 : 4;
  double a[16][16], b[16][8], c[16][8];
  LANES(l) {
    int g = l >> 2, t = l & 3;
    for (int i = 0; i < na; i++) {
      int row = small ? g : g + 8 * (i & 1), k = small ? t : t + 4 * (i >> 1);
      a[row][k] = s.in<double>(nc + i)[l];
    }
    for (int i = 0; i < nb; i++) b[t + 4 * i][g] = s.in<double>(nc + na + i)[l];
    for (int i = 0; i < nc; i++) c[g + 8 * (i >> 1)][2 * t + (i & 1)] = s.in<double>(nc + na + nb + i)[l];
  }
  u32 bad = undefined_operands(s, nc, na + nb + nc, 64);
  for (int i = 0; i < rows; i++)
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < 8; j++) c[i][j] = std::fma(a[i][k], b[k][j], c[i][j]);
  for (int i = 0; i < nc; i++) {
    double* d = s.out<double>(i);
    LANES(l) d[l] = c[(l >> 2) + 8 * (i >> 1)][2 * (l & 3) + (i & 1)];
    s.define(i, 64, FULL);
  }
  if (bad) s.report(K_undefined_product, lowest(bad), 0, 0);
}

// The left operand's registers of m16 as [16][depth] doubles: of mma and of wgmma alike.
static void left_registers(const Step& s, int first, int n, int type, int depth, double* a) {
  for (int i = 0; i < n; i++) {
    const u32* x = s.in<u32>(first + i);
    LANES(l) {
      int g = l >> 2, t = l & 3;
      if (type == T_tf32) {
        a[(g + 8 * (i & 1)) * depth + t + 4 * (i >> 1)] = tf32(x[l]);
      } else if (type == T_e4m3) {
        double* at = a + (g + 8 * (i & 1)) * depth + 4 * t + 16 * (i >> 1);
        for (int j = 0; j < 4; j++) at[j] = e2f(x[l] >> 8 * j & 0xFF);
      } else {
        double* at = a + (g + 8 * (i & 1)) * depth + 2 * t + 8 * (i >> 1);
        at[0] = half_value(type, x[l]);
        at[1] = half_value(type, x[l] >> 16);
      }
    }
  }
}

// Accumulators of 16 rows by n columns: fp16 in n / 4 registers, fp32 in n / 2.
static void read_accumulators(const Step& s, int first, int type, int n, double* c) {
  LANES(l) {
    int g = l >> 2, t = 2 * (l & 3);
    for (int i = 0; i < (type == T_f16 ? n / 4 : n / 2); i++) {
      u32 x = s.in<u32>(first + i)[l];
      if (type == T_f16) {
        double* at = c + (size_t)(g + 8 * (i & 1)) * n + 8 * (i >> 1) + t;
        at[0] = h2f(x & 0xFFFF);
        at[1] = h2f(x >> 16);
      } else {
        c[(size_t)(g + 8 * (i >> 1 & 1)) * n + 8 * (i >> 2) + t + (i & 1)] = bits_f(x);
      }
    }
  }
}
static void write_accumulators(const Step& s, int type, int n, const double* c) {
  for (int i = 0; i < (type == T_f16 ? n / 4 : n / 2); i++) {
    u32* d = s.out<u32>(i);
    LANES(l) {
      int g = l >> 2, t = 2 * (l & 3);
      if (type == T_f16) {
        const double* at = c + (size_t)(g + 8 * (i & 1)) * n + 8 * (i >> 1) + t;
        d[l] = f2h(to_odd(at[0])) | f2h(to_odd(at[1])) << 16;
      } else {
        d[l] = f_bits((float)c[(size_t)(g + 8 * (i >> 1 & 1)) * n + 8 * (i >> 2) + t + (i & 1)]);
      }
    }
    s.define(i, 32, FULL);
  }
}

static void mma(const Step& s) {  // o: d, a, b, c; imm: depth | rows << 8 | columns << 16; type of a and b, type2 of c
  int depth = (int)s.I.imm & 0xFF, rows = (int)(s.I.imm >> 8) & 0xFF, type = s.I.type;
  if (s.m != FULL) s.report(K_divergent_collective, 0, 0, (i32)s.m);
  if (type == T_f64) return mma_fp64(s, rows, depth);
  double a[16 * 32], b[32 * 8], c[16 * 8];
  int nc = s.I.type2 == T_f16 ? 2 : 4, na = depth * TYPE_BITS[type] / 64, nb = na / 2;
  u32 bad = undefined_operands(s, nc, na + nb + nc, 32);
  left_registers(s, nc, na, type, depth, a);
  for (int i = 0; i < nb; i++) {
    const u32* x = s.in<u32>(nc + na + i);
    LANES(l) {
      int g = l >> 2, t = l & 3;
      if (type == T_tf32) {
        b[(t + 4 * i) * 8 + g] = tf32(x[l]);
      } else if (type == T_e4m3) {
        for (int j = 0; j < 4; j++) b[(4 * t + 16 * i + j) * 8 + g] = e2f(x[l] >> 8 * j & 0xFF);
      } else {
        b[(2 * t + 8 * i) * 8 + g] = half_value(type, x[l]);
        b[(2 * t + 1 + 8 * i) * 8 + g] = half_value(type, x[l] >> 16);
      }
    }
  }
  read_accumulators(s, nc + na + nb, s.I.type2, 8, c);
  multiply(c, a, b, 16, depth, 8);
  write_accumulators(s, s.I.type2, 8, c);
  if (bad) s.report(K_undefined_product, lowest(bad), 0, 0);
}

// ------------------------------------------------------------------------------------------------ wgmma

static inline u32 swizzled(u32 a, int mode) {  // 1: 128 bytes, 2: 64, 3: 32, 0: none
  return mode ? a ^ (a >> 3 & (mode == 1 ? 0x70 : mode == 2 ? 0x30 : 0x10)) : a;
}

template <int TYPE> static ALWAYS_INLINE void unit_values(const u8* p, double* out, size_t step) {
  const int n = 128 / TYPE_BITS[TYPE];
  float value[16];
  if (TYPE == T_e4m3) {
    for (int j = 0; j < n; j++) value[j] = e2f(p[j]);
  } else if (TYPE == T_tf32) {
    u32 x[4];
    memcpy(x, p, 16);
    for (int j = 0; j < n; j++) value[j] = tf32(x[j & 3]);
  } else {
    u16 x[8];
    memcpy(x, p, 16);
    for (int j = 0; j < n; j++) value[j] = TYPE == T_bf16 ? b2f(x[j & 7]) : h2f(x[j & 7]);
  }
  for (int j = 0; j < n; j++) out[j * step] = value[j];
}

// Reads `rows` (of M or of N, from row0) by depth out of shared memory as a descriptor tells (PTX ISA, "Asynchronous
// warpgroup level matrix instructions", "Matrix descriptor format"); out[row * row_step + k * k_step].
template <int TYPE>
static void read_tile_of(const Step& s, u64 descriptor, int row0, int rows, int depth, bool mn_major, double* out,
                         size_t row_step, size_t k_step) {
  Machine& M = s.M;
  const int size = TYPE_BITS[TYPE] / 8, per_unit = 16 / size, mode = (int)(descriptor >> 62) & 3;
  const u32 start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  const u32 stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 49 & 7) throw Unsupported{s.pc, "a matrix descriptor with a base offset"};
  const int width = mode == 1 ? 8 : mode == 2 ? 4 : mode == 3 ? 2 : 1;  // 16-byte units of a row of the swizzle atom
  auto fetch = [&](u32 offset, double* to, size_t step) {
    u32 address = swizzled(start + offset, mode), a;
    static const u8 zeros[16] = {0};
    const u8* p = zeros;
    if (shared_address(s, address, 16, -1, a)) {
      if (async_read(s, a) != 0xFFFF) s.report(K_undefined_product, -1, address, 1);
      s.W.sources.push_back({a, 16});
      p = M.shared.data() + a;
    }
    unit_values<TYPE>(p, to, step);
  };
  if (!mn_major) {
    for (int row = 0; row < rows; row++) {
      u32 at = ((row0 + row) & 7) * (width * 16) + ((row0 + row) >> 3) * stride;
      for (int u = 0; u < depth / per_unit; u++)
        fetch(at + u * (mode ? 16 : leading), out + row * row_step + u * per_unit * k_step, k_step);
    }
  } else {
    for (int u = 0; u < rows / per_unit; u++) {
      int mn = row0 / per_unit + u;
      for (int k = 0; k < depth; k++) {
        u32 at = mode ? (mn % width) * 16 + (mn / width) * leading + (k & 7) * (width * 16) + (k >> 3) * stride
                      : mn * stride + (k & 7) * 16 + (k >> 3) * leading;
        fetch(at, out + u * per_unit * row_step + k * k_step, row_step);
      }
    }
  }
}
static void read_tile(const Step& s, u64 descriptor, int row0, int rows, int depth, bool mn_major, double* out,
                      size_t row_step, size_t k_step) {
  int type = s.I.type;
  auto read = type == T_tf32   ? read_tile_of<T_tf32>
              : type == T_bf16 ? read_tile_of<T_bf16>
              : type == T_e4m3 ? read_tile_of<T_e4m3>
                               : read_tile_of<T_f16>;
  read(s, descriptor, row0, rows, depth, mn_major, out, row_step, k_step);
}
static u64 descriptor_operand(const Step& s, int i) {
  const u64* x = s.in<u64>(i);
  u32 bad = ~s.defined(i, 64);
  if (bad) s.report(K_undefined_product, lowest(bad), 0, 2);
  LANES(l) if (x[l] != x[0]) {
    s.report(K_divergent_collective, l, x[l], 1);
    break;
  }
  return x[0];
}

// o: d, a's four registers or its descriptor, b's descriptor, scale-d; imm: columns | depth << 12 | negate a << 20 |
// negate b << 21 | transpose a << 22 | transpose b << 23 | a in registers << 24. Each warp of the four does 16 rows.
static void wgmma(const Step& s) {
  Machine& M = s.M;
  Warp& W = s.W;
  i64 imm = s.I.imm;
  int n = (int)imm & 0xFFF, depth = (int)(imm >> 12) & 0xFF, type = s.I.type, nd = s.I.type2 == T_f16 ? n / 4 : n / 2;
  bool in_registers = imm >> 24 & 1;
  int na = in_registers ? 4 : 1;
  if (s.m != FULL) s.report(K_divergent_collective, 0, 0, (i32)s.m);
  u32 known, p = s.pred(s.o[nd + na + 1], known);
  if (known != FULL) s.report(K_undefined_predicate, lowest(~known), 0, 0);
  if (p != 0 && p != FULL) s.report(K_divergent_collective, 0, 0, (i32)p);
  bool accumulate = p & 1;
  static thread_local std::vector<double> a, b, rows, c;
  a.resize(16 * depth);
  b.resize((size_t)depth * n);
  rows.resize((size_t)depth * n);
  c.assign((size_t)16 * n, 0);
  u32 bad = 0;
  size_t mine = (size_t)s.w * M.slots;
  auto since_fence = [&](i32 slot) { return M.written_at[mine + slot] > W.fenced_registers; };
  // LLVM moves the arithmetic that makes the operand, and copies of the accumulator, below the fence that Triton puts;
  // ptxas then puts a warpgroup.arrive behind them, or moves them back
  int kind = W.fenced_stage ? K_unfenced_operand : K_unfenced_register;
  if (in_registers) {
    bad = undefined_operands(s, nd, 4, 32);
    for (int i = nd; i < nd + 4; i++)
      if (s.o[i] >= 0 && since_fence(s.o[i])) s.report(kind, 0, 0, s.o[i]);
    left_registers(s, nd, 4, type, depth, a.data());
  } else {
    read_tile(s, descriptor_operand(s, nd), (s.w & 3) * 16, 16, depth, imm >> 22 & 1, a.data(), depth, 1);
  }
  if (imm >> 23 & 1) {
    read_tile(s, descriptor_operand(s, nd + na), 0, n, depth, true, b.data(), 1, n);
  } else {
    read_tile(s, descriptor_operand(s, nd + na), 0, n, depth, false, rows.data(), depth, 1);
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < n; j++) b[(size_t)k * n + j] = rows[(size_t)j * depth + k];
  }
  if (accumulate) {
    for (int i = 0; i < nd; i++) {
      bad |= ~s.defined(i, 32);
      if (!M.in_flight[mine + s.o[i]] && since_fence(s.o[i])) s.report(kind, 0, 0, s.o[i]);
    }
    read_accumulators(s, 0, s.I.type2, n, c.data());
  }
  if ((imm >> 20 ^ imm >> 21) & 1)
    for (double& x : a) x = -x;
  multiply(c.data(), a.data(), b.data(), 16, depth, n);
  write_accumulators(s, s.I.type2, n, c.data());
  for (int i = 0; i < nd; i++) {
    M.in_flight[mine + s.o[i]] = 1;
    W.accumulators.push_back(s.o[i]);
  }
  if (bad) s.report(K_undefined_product, lowest(bad), 0, 0);
}
static void wgmma_commit(const Step& s) {
  s.W.source_groups.push_back(std::move(s.W.sources));
  s.W.sources.clear();
  s.W.accumulator_groups.push_back(std::move(s.W.accumulators));
  s.W.accumulators.clear();
  s.W.fenced_stage = false;
}
static void wgmma_wait(const Step& s) {  // all but the newest imm groups
  Warp& W = s.W;
  while ((i64)W.source_groups.size() > s.I.imm) {
    for (const Range& r : W.source_groups.front()) async_read_done(s, r);
    W.source_groups.pop_front();
    W.accumulator_groups.pop_front();
  }
  u8* in_flight = &s.M.in_flight[(size_t)s.w * s.M.slots];
  memset(in_flight, 0, s.M.slots);
  for (auto& group : W.accumulator_groups)
    for (i32 slot : group) in_flight[slot] = 1;
  for (i32 slot : W.accumulators) in_flight[slot] = 1;
}
