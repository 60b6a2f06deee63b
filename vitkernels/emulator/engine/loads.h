// Loads, stores and cp.async.
#pragma once
#include "memory.h"

static inline u64 extended(int type, u64 v) {
  return type == T_s8 ? (u64)(i64)(i8)v : type == T_s16 ? (u64)(i64)(i16)v : type == T_s32 ? (u64)(i64)(i32)v : v;
}

static void load_param(const Step& s) {  // imm: offset, imm2: bytes of an element
  int n = (int)s.I.imm2;
  for (int i = 0; i < s.I.count; i++) {
    u64 v = 0;
    memcpy(&v, s.M.params + s.I.imm + (size_t)i * n, n);
    v = extended(s.I.type, v);
    if (s.I.flags & F_wide) each(s.out<u64>(i), s.m, [v](int) { return v; });
    else each(s.out<u32>(i), s.m, [v](int) { return (u32)v; });
    s.define(i, s.I.flags & F_wide ? 64 : 32, FULL);
  }
}

// Register i of the lanes takes `size` bytes from each lane's place, extended as the type tells.
template <class Raw, class Register>
static ALWAYS_INLINE void gather(Register* d, u32 lanes, const u8* const* from, int offset) {
  auto value = [=](int l) {
    Raw x;
    memcpy(&x, from[l] + offset, sizeof x);
    return (Register)x;
  };
  each(d, lanes, value);
}
template <class Register> static void gather_typed(const Step& s, int i, u32 lanes, const u8* const* from) {
  int size = (int)s.I.imm2, offset = i * size;
  Register* d = s.out<Register>(i);
  switch (s.I.type) {
    case T_s8: return gather<i8>(d, lanes, from, offset);
    case T_s16: return gather<i16>(d, lanes, from, offset);
    case T_s32: return gather<i32>(d, lanes, from, offset);
    default: break;
  }
  switch (size) {
    case 1: return gather<u8>(d, lanes, from, offset);
    case 2: return gather<u16>(d, lanes, from, offset);
    case 4: return gather<u32>(d, lanes, from, offset);
    default: return gather<u64>(d, lanes, from, offset);
  }
}
static void set_planes(const Step& s, int i, u32 lanes, const u32* known) {
  Planes* p = s.W.defined + s.o[i];
  for (int k = 0; k < (s.I.flags & F_wide ? 8 : 4); k++) {
    u32& plane = p[k >> 2].byte[k & 3];
    plane = (plane & ~lanes) | (known[k] & lanes);
  }
}

static void load_global(const Step& s) {  // o: registers, address; imm: offset, imm2: bytes of an element
  int n = s.I.count - 1, size = (int)s.I.imm2;
  static const u64 nowhere[32] = {0};
  static const u8 zeros[32] = {0};
  static const u32 known[8] = {FULL, FULL, FULL, FULL, FULL, FULL, FULL, FULL};
  const u64* a = s.o[n] == -1 ? nowhere : s.in<u64>(n);
  u32 lanes = s.o[n] == -1 ? s.m : addressed(s, n, 64);
  count_global(s, a, lanes, s.I.imm, n * size);
  const u8* from[32];
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    from[l] = global_access(s, a[l] + s.I.imm, n * size, l, false, n * size);
    if (!from[l]) from[l] = zeros;
  }
  for (int i = 0; i < n; i++) {
    if (s.I.flags & F_wide) gather_typed<u64>(s, i, lanes, from);
    else gather_typed<u32>(s, i, lanes, from);
    set_planes(s, i, lanes, known);
  }
}
static void store_global(const Step& s) {
  int n = s.I.count - 1, size = (int)s.I.imm2;
  static const u64 nowhere[32] = {0};
  const u64* a = s.o[n] == -1 ? nowhere : s.in<u64>(n);
  u32 lanes = s.o[n] == -1 ? s.m : addressed(s, n, 64);
  count_global(s, a, lanes, s.I.imm, n * size);
  for (int i = 0; i < n; i++) {
    u32 bad = lanes & ~s.defined(i, 8 * size);
    if (bad) s.report(K_undefined_store, lowest(bad), a[lowest(bad)] + s.I.imm + i * size, i);
  }
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    u8* to = global_access(s, a[l] + s.I.imm, n * size, l, true, n * size);
    if (!to) continue;
    for (int i = 0; i < n; i++) {
      if (size == 8) memcpy(to + i * size, &s.in<u64>(i)[l], 8);
      else memcpy(to + i * size, &s.in<u32>(i)[l], size);
    }
  }
}

static void load_shared(const Step& s) {
  int n = s.I.count - 1, size = (int)s.I.imm2, all = n * size;
  u32 address[32], known[32], at;
  u32 lanes = shared_addresses(s, n, address), valid = 0, undefined = 0;
  count_shared(s, address, lanes, all);
  u32 whole = all >= 32 ? FULL : (1u << all) - 1;
  const u8* from[32];
  int before = -1;
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    if (before >= 0 && address[l] == address[before] && !s.M.check_warp) {  // a broadcast
      from[l] = from[before];
      known[l] = known[before];
    } else {
      if (!shared_address(s, address[l], all, l, at)) continue;
      known[l] = shared_read(s, at, all, l);
      from[l] = &s.M.shared[at];
      before = l;
    }
    valid |= 1u << l;
    undefined |= (u32)(known[l] != whole) << l;
  }
  for (int i = 0; i < n; i++) {
    u32 planes[8] = {FULL, FULL, FULL, FULL, FULL, FULL, FULL, FULL};
    for (u32 r = undefined; r; r &= r - 1) {
      int l = lowest(r);
      for (int k = 0; k < size; k++)
        if (!(known[l] >> (i * size + k) & 1)) planes[k] &= ~(1u << l);
    }
    if (s.I.flags & F_wide) gather_typed<u64>(s, i, valid, from);
    else gather_typed<u32>(s, i, valid, from);
    set_planes(s, i, valid, planes);
  }
}
static void store_shared(const Step& s) {
  int n = s.I.count - 1, size = (int)s.I.imm2, all = n * size;
  u32 address[32], at, planes[8][8];
  u32 lanes = shared_addresses(s, n, address), whole = all >= 32 ? FULL : (1u << all) - 1, defined = FULL;
  count_shared(s, address, lanes, all);
  for (int i = 0; i < n; i++) {
    s.bytes(i, 8 * size, planes[i]);
    for (int k = 0; k < size; k++) defined &= planes[i][k];
  }
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    if (!shared_address(s, address[l], all, l, at)) continue;
    u8 data[32];
    u32 known = whole;
    for (int i = 0; i < n; i++) {
      if (size == 8) memcpy(data + i * size, &s.in<u64>(i)[l], 8);
      else memcpy(data + i * size, &s.in<u32>(i)[l], size);
      if (!(defined >> l & 1))
        for (int k = 0; k < size; k++)
          if (!(planes[i][k] >> l & 1)) known &= ~(1u << (i * size + k));
    }
    check_overwrite(s, at, all, l, data);
    shared_write(s, at, all, l, data, known, BY_STORE);
  }
}

// ldmatrix and stmatrix: o: registers, address. Row r of matrix i is at the address of lane 8 i + r; lane l has
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 (of column l / 4 under trans).
static u32 matrix_addresses(const Step& s, u32* address) {
  int n = s.I.count - 1;
  if (s.m != FULL) s.report(K_divergent_collective, 0, 0, (i32)s.m);
  u32 needed = n == 4 ? FULL : (1u << 8 * n) - 1;
  u32 lanes = needed & shared_addresses(s, n, address);
  count_shared(s, address, lanes, 16);
  return lanes;
}
static void load_matrix(const Step& s) {
  u32 address[32], lanes = matrix_addresses(s, address);
  for (int i = 0; i < s.I.count - 1; i++) {
    u16 matrix[8][8] = {{0}};
    u32 known[8] = {0}, at;
    for (int row = 0; row < 8; row++) {
      int l = 8 * i + row;
      if (!(lanes >> l & 1) || !shared_address(s, address[l], 16, l, at)) continue;
      known[row] = shared_read(s, at, 16, l);
      memcpy(matrix[row], &s.M.shared[at], 16);
    }
    u32* d = s.out<u32>(i);
    u32 planes[8] = {0};
    LANES(l) {
      int g = l >> 2, t = 2 * (l & 3);
      if (s.I.flags & F_trans) {
        d[l] = matrix[t][g] | (u32)matrix[t + 1][g] << 16;
        for (int k = 0; k < 4; k++) planes[k] |= (known[t + (k >> 1)] >> (2 * g + (k & 1)) & 1) << l;
      } else {
        d[l] = matrix[g][t] | (u32)matrix[g][t + 1] << 16;
        for (int k = 0; k < 4; k++) planes[k] |= (known[g] >> (2 * t + k) & 1) << l;
      }
    }
    s.set_bytes(i, 32, planes);
  }
}
// ldmatrix.m16n16.trans.b8: rows of 16 bytes at the addresses of 16 lanes a matrix; lane l has bytes 4 (l % 4) to
// 4 (l % 4) + 3 of columns l / 4 and l / 4 + 8, in two registers.
static void load_matrix_of_bytes(const Step& s) {
  int n = (s.I.count - 1) / 2;
  if (s.m != FULL) s.report(K_divergent_collective, 0, 0, (i32)s.m);
  u32 address[32], lanes = shared_addresses(s, s.I.count - 1, address) & (n == 2 ? FULL : 0xFFFF), at;
  count_shared(s, address, lanes, 16);
  for (int i = 0; i < n; i++) {
    u8 matrix[16][16] = {{0}};
    u32 known[16] = {0};
    for (int row = 0; row < 16; row++) {
      int l = 16 * i + row;
      if (!(lanes >> l & 1) || !shared_address(s, address[l], 16, l, at)) continue;
      known[row] = shared_read(s, at, 16, l);
      memcpy(matrix[row], &s.M.shared[at], 16);
    }
    for (int half = 0; half < 2; half++) {
      u32 *d = s.out<u32>(2 * i + half), planes[8] = {0};
      LANES(l) {
        int column = (l >> 2) + 8 * half, row = 4 * (l & 3);
        d[l] = 0;
        for (int k = 0; k < 4; k++) {
          d[l] |= (u32)matrix[row + k][column] << 8 * k;
          planes[k] |= (known[row + k] >> column & 1) << l;
        }
      }
      s.set_bytes(2 * i + half, 32, planes);
    }
  }
}
static void store_matrix(const Step& s) {
  u32 address[32], lanes = matrix_addresses(s, address);
  for (int i = 0; i < s.I.count - 1; i++) {
    u16 matrix[8][8];
    u32 known[8] = {0}, planes[8], at;
    const u32* d = s.in<u32>(i);
    s.bytes(i, 32, planes);
    LANES(l) {
      int g = l >> 2, t = 2 * (l & 3);
      for (int half = 0; half < 2; half++) {
        int row = s.I.flags & F_trans ? t + half : g, column = s.I.flags & F_trans ? g : t + half;
        matrix[row][column] = (u16)(d[l] >> 16 * half);
        for (int k = 0; k < 2; k++) known[row] |= (planes[2 * half + k] >> l & 1) << (2 * column + k);
      }
    }
    for (int row = 0; row < 8; row++) {
      int l = 8 * i + row;
      if (!(lanes >> l & 1) || !shared_address(s, address[l], 16, l, at)) continue;
      check_overwrite(s, at, 16, l, (u8*)matrix[row]);
      shared_write(s, at, 16, l, (u8*)matrix[row], known[row], BY_STORE);
    }
  }
}

// o: shared address, global address, bytes of the source or none; imm: shared offset, imm2: bytes | global offset << 8
static void copy_async(const Step& s) {
  u32 n = (u32)(s.I.imm2 & 0xFF), address[32], from_source = 0;
  i64 offset = s.I.imm2 >> 8;
  const u64* g = s.in<u64>(1);
  const u32* bytes = s.I.count > 2 ? s.in<u32>(2) : nullptr;
  u32 lanes = shared_addresses(s, 0, address) & s.defined(1, 64) & (bytes ? s.defined(2, 32) : FULL);
  if (lanes != s.m) s.report(K_undefined_address, lowest(s.m & ~lanes), 0, 0);
  for (u32 r = lanes; r; r &= r - 1) from_source |= (u32)(!bytes || bytes[lowest(r)]) << lowest(r);
  u64 requests = s.M.counts[s.pc].requests + (lanes != 0);
  count_shared(s, address, lanes, n);
  count_global(s, g, from_source, offset, n);
  s.M.counts[s.pc].requests = requests;
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    Copy c;
    memset(c.data, 0, sizeof c.data);
    c.bytes = n;
    c.lane = l;
    u32 take = bytes ? std::min(bytes[l], n) : n;
    if (take) {
      const u8* from = global_access(s, g[l] + offset, take, l, false, n);
      if (from) memcpy(c.data, from, take);
    }
    if (!shared_address(s, address[l], n, l, c.to)) continue;
    check_overwrite(s, c.to, n, l, nullptr);
    u32 last = (c.to + n - 1) >> s.M.granule;
    for (u32 cell = c.to >> s.M.granule; cell <= last; cell++) s.M.cells[cell].pending = s.w + 1;
    s.W.copies.push_back(c);
  }
}
static void copy_wait(const Step& s) {  // all but the newest imm groups; -1: all there are
  i64 keep = s.I.imm;
  while ((i64)s.W.copy_groups.size() > std::max<i64>(keep, 0)) {
    deliver(s, s.W.copy_groups.front());
    s.W.copy_groups.pop_front();
  }
  if (keep < 0) deliver(s, s.W.copies);
}
