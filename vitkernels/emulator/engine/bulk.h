// Bulk copies (TMA): plain ones, and tiles of tensors that a tensor map describes.
//
// The bytes move when the copy is issued; that nobody may look at them until the copy was waited for is the race
// detector's to tell. A load belongs to its mbarrier, as an actor of its own; what a store reads is held until the
// issuing lane's cp.async.bulk.wait_group.
#pragma once
#include <cstddef>

#include "mbarriers.h"

// The 128 bytes of a tensor map, which PTX leaves opaque. Python writes the same (vitkernels/emulator/descriptors.py).
struct TensorMap {
  u64 address;
  u64 strides[4];  // bytes, of all dimensions but the innermost
  u32 dims[5], box[5], element_strides[5];
  u32 rank_less_one, element, interleave, swizzle, fill;
  u32 unused[2];
};
static_assert(sizeof(TensorMap) == 128, "a tensor map has 128 bytes");
// PTX ISA, "tensormap.replace", element types
static const int ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};

// nullptr if all is as the hardware demands, else what is not
static const char* map_error(const TensorMap& t) {
  if (t.rank_less_one > 4) return "rank";
  if (t.element > 12 || t.interleave) return "element type or interleave";
  if (t.swizzle > 3) return "swizzle";
  if (t.address & 15) return "address not a multiple of 16";
  u32 inner = t.box[0] * ELEMENT_BYTES[t.element];
  if (inner & 15) return "inner box not a multiple of 16 bytes";
  if (t.swizzle && inner > 16u << t.swizzle) return "inner box wider than the swizzle";
  for (u32 d = 0; d <= t.rank_less_one; d++) {
    if (t.box[d] == 0 || t.box[d] > 256) return "box";
    if (t.dims[d] == 0) return "dimension";
    if (t.element_strides[d] != 1) return "element stride";
    if (d && t.strides[d - 1] & 15) return "stride not a multiple of 16 bytes";
  }
  return nullptr;
}
static bool read_map(const Step& s, u64 address, int lane, TensorMap& t) {
  if (address >= PARAM_BASE && address < GLOBAL_BASE) {
    if (address - PARAM_BASE + 128 > (u64)s.M.param_bytes) {
      s.report(K_global_read_out_of_bounds, lane, address, 128);
      return false;
    }
    memcpy(&t, s.M.params + (address - PARAM_BASE), 128);
  } else {
    const u8* p = global_access(s, address, 128, lane, false, 64);
    if (!p) return false;
    memcpy(&t, p, 128);
  }
  if (!map_error(t)) return true;
  s.report(K_tensor_map, lane, address, 0);
  return false;
}

static ALWAYS_INLINE u32 tile_swizzled(u32 address, u32 mode) {  // 0 none, 1: 32 bytes, 2: 64, 3: 128
  return mode ? address ^ (address >> 3 & (mode == 3 ? 0x70 : mode == 2 ? 0x30 : 0x10)) : address;
}

// n bytes (at most 16) that an mbarrier's copy brings
static void bulk_write(const Step& s, u32 a, u32 n, int lane, const u8* data, const Mbarrier& b) {
  Machine& M = s.M;
  check_overwrite(s, a, n, lane, nullptr);
  u32 last = (a + n - 1) >> M.granule;
  for (u32 g = a >> M.granule; g <= last; g++)
    if (M.cells[g].proxy == BY_STORE && M.cells[g].time > s.W.fenced[M.cells[g].writer])
      s.report(K_unfenced_overwrite, lane, a + SHARED_BASE, M.cells[g].writer);
  shared_write(s, a, n, lane, data, FULL >> (32 - n), BY_BULK);
  for (u32 g = a >> M.granule; g <= last; g++) {
    M.cells[g].writer = b.actor;
    M.cells[g].time = b.time;
  }
}
static void bulk_read(const Step& s, u32 a, int lane, BulkStore& store) {  // 16 bytes
  if (async_read(s, a) != 0xFFFF) s.report(K_undefined_store, lane, a + SHARED_BASE, 0);
  store.sources.push_back({a, 16});
}

// Calls f(shared offset, global address or 0 where out of bounds, bytes) for each up to 16 bytes of a tile.
template <class F> static void over_tile(const TensorMap& t, u32 shared, const i32* at, F f) {
  u32 size = ELEMENT_BYTES[t.element], rank = t.rank_less_one + 1, inner = t.box[0] * size;
  u32 rows = 1;
  for (u32 d = 1; d < rank; d++) rows *= t.box[d];
  for (u32 row = 0; row < rows; row++) {
    u64 address = t.address;
    bool in = true;
    for (u32 d = 1, rest = row; d < rank; d++) {
      i64 x = (i64)at[d] + rest % t.box[d];
      rest /= t.box[d];
      in &= x >= 0 && x < (i64)t.dims[d];
      address += x * t.strides[d - 1];
    }
    for (u32 b = 0; b < inner; b += 16) {
      u32 to = tile_swizzled(shared + row * inner + b, t.swizzle);
      i64 x = (i64)at[0] + b / size;
      i64 from = std::max<i64>(x, 0), end = std::min<i64>(x + 16 / size, t.dims[0]);
      if (!in) from = end = x;
      f(to, address + from * size, (u32)(from - x) * size, from < end ? (u32)(end - from) * size : 0);
    }
  }
}

// o: shared address, tensor map, mbarrier or none, coordinates..; imm: rank, imm2: 1 to shared, 0 to global
static void copy_tensor(const Step& s) {
  Machine& M = s.M;
  int rank = (int)s.I.imm;
  for (u32 r = s.m; r; r &= r - 1) {
    int l = lowest(r);
    TensorMap t;
    i32 at[5] = {0};
    u32 known = s.defined(0, 32) & s.defined(1, 64);
    for (int d = 0; d < rank; d++) {
      at[d] = s.in<i32>(3 + d)[l];
      known &= s.defined(3 + d, 32);
    }
    if (!(known >> l & 1)) {
      s.report(K_undefined_address, l, 0, 0);
      continue;
    }
    if (!read_map(s, s.in<u64>(1)[l], l, t)) continue;
    if ((int)t.rank_less_one + 1 != rank) {
      s.report(K_tensor_map, l, s.in<u64>(1)[l], rank);
      continue;
    }
    u32 address = s.in<u32>(0)[l], bytes = ELEMENT_BYTES[t.element], shared = address - SHARED_BASE;
    for (int d = 0; d < rank; d++) bytes *= t.box[d];
    if (address < SHARED_BASE || (u64)shared + bytes > M.shared_bytes) {
      s.report(K_shared_out_of_bounds, l, address, bytes);
      continue;
    }
    if (address & 127) {
      s.report(K_misaligned_shared, l, address, 128);
      continue;
    }
    Counts& counts = M.counts[s.pc];
    counts.requests++;
    counts.sectors += (bytes + 31) / 32;
    counts.ideal += (bytes + 31) / 32;
    if (s.I.imm2) {
      Mbarrier* b = mbarrier_at(s, s.in<u32>(2)[l], l);
      if (!b) continue;
      static const u8 nan[13][8] = {{0}, {0}, {0}, {0}, {0}, {0}, {0xFF, 0x7F}, {0xFF, 0xFF, 0xFF, 0x7F},
                                    {0xFF, 0xFF, 0xFF, 0x7F}, {0, 0, 0, 0, 0, 0, 0xF8, 0x7F}, {0xFF, 0x7F},
                                    {0xFF, 0xFF, 0xFF, 0x7F}, {0xFF, 0xFF, 0xFF, 0x7F}};
      u32 size = ELEMENT_BYTES[t.element];
      over_tile(t, address, at, [&](u32 to, u64 from, u32 skip, u32 take) {
        u8 data[16];
        for (u32 i = 0; i < 16; i++) data[i] = t.fill ? nan[t.element][i % size] : 0;
        const u8* p = take ? global_access(s, from, take, l, false, size) : nullptr;
        if (p) memcpy(data + skip, p, take);
        bulk_write(s, to - SHARED_BASE, 16, l, data, *b);
      });
      b->bytes -= bytes;
      complete_phase(M, *b);
    } else {
      BulkStore store{(u32)l, -1, {}};
      over_tile(t, address, at, [&](u32 from, u64 to, u32 skip, u32 take) {
        bulk_read(s, from - SHARED_BASE, l, store);
        u8* p = take ? global_access(s, to, take, l, true, ELEMENT_BYTES[t.element]) : nullptr;
        if (p) memcpy(p, &M.shared[from - SHARED_BASE + skip], take);
      });
      s.W.bulk_stores.push_back(std::move(store));
    }
  }
}

// o: shared address, global address, bytes, mbarrier or none; imm2: 1 to shared, 0 to global
static void copy_bulk(const Step& s) {
  for (u32 r = s.m; r; r &= r - 1) {
    int l = lowest(r);
    u32 address = s.in<u32>(0)[l], bytes = s.in<u32>(2)[l], shared = address - SHARED_BASE;
    u64 global = s.in<u64>(1)[l];
    if (!(s.defined(0, 32) & s.defined(1, 64) & s.defined(2, 32) & 1u << l)) {
      s.report(K_undefined_address, l, 0, 0);
      continue;
    }
    if (address < SHARED_BASE || (u64)shared + bytes > s.M.shared_bytes) {
      s.report(K_shared_out_of_bounds, l, address, bytes);
      continue;
    }
    if ((address | bytes) & 15) {
      s.report(K_misaligned_shared, l, address, 16);
      continue;
    }
    Mbarrier* b = s.I.imm2 ? mbarrier_at(s, s.in<u32>(3)[l], l) : nullptr;
    if (s.I.imm2 && !b) continue;
    BulkStore store{(u32)l, -1, {}};
    for (u32 i = 0; i < bytes; i += 16) {
      u8* p = global_access(s, global + i, 16, l, !s.I.imm2, 16);
      static const u8 zeros[16] = {0};
      if (s.I.imm2) {
        bulk_write(s, shared + i, 16, l, p ? p : zeros, *b);
      } else {
        bulk_read(s, shared + i, l, store);
        if (p) memcpy(p, &s.M.shared[shared + i], 16);
      }
    }
    if (b) {
      b->bytes -= bytes;
      complete_phase(s.M, *b);
    } else {
      s.W.bulk_stores.push_back(std::move(store));
    }
  }
}

// Groups of bulk stores are a lane's own.
static void bulk_commit(const Step& s) {
  for (BulkStore& b : s.W.bulk_stores)
    if (b.group < 0 && (s.m >> b.lane & 1)) b.group = s.W.bulk_groups[b.lane];
  for (u32 r = s.m; r; r &= r - 1) s.W.bulk_groups[lowest(r)]++;
}
static void bulk_wait(const Step& s) {  // all but the newest imm groups
  auto through = [&](const BulkStore& b) {
    return (s.m >> b.lane & 1) && b.group >= 0 && b.group < (i64)s.W.bulk_groups[b.lane] - s.I.imm;
  };
  auto& all = s.W.bulk_stores;
  for (BulkStore& b : all)
    if (through(b))
      for (const Range& r : b.sources) async_read_done(s, r);
  all.erase(std::remove_if(all.begin(), all.end(), through), all.end());
}

// ------------------------------------------------------------------------------------------------ tensormap

enum MapField {
#define X(name) MAP_##name,
  PTX_MAP_FIELDS(X)
#undef X
};

// tensormap.replace. o: map (64-bit address, of shared memory or global), new value; imm: field | ordinal << 8 | 1 <<
// 16 for shared memory, imm2: offset
static void replace_in_map(const Step& s) {
  int field = (int)s.I.imm & 0xFF, ordinal = (int)(s.I.imm >> 8) & 0xFF;
  bool shared = s.I.imm >> 16 & 1, wide = field == MAP_global_address || field == MAP_global_stride;
  static const u32 offsets[] = {
      offsetof(TensorMap, address), offsetof(TensorMap, rank_less_one), offsetof(TensorMap, box),
      offsetof(TensorMap, dims), offsetof(TensorMap, strides), offsetof(TensorMap, element_strides),
      offsetof(TensorMap, element), offsetof(TensorMap, interleave), offsetof(TensorMap, swizzle),
      offsetof(TensorMap, fill)};  // in the order of PTX_MAP_FIELDS
  u32 n = wide ? 8 : 4, offset = offsets[field] + ordinal * n;
  for (u32 r = s.m; r; r &= r - 1) {
    int l = lowest(r);
    u64 address = s.in<u64>(0)[l] + s.I.imm2;
    u64 value = wide ? s.in<u64>(1)[l] : s.in<u32>(1)[l];
    bool known = s.defined(1, 8 * n) >> l & 1;
    if (!(s.defined(0, 64) >> l & 1)) {
      s.report(K_undefined_address, l, 0, 0);
    } else if (shared) {
      u32 a;
      if (!shared_address(s, (u32)address, 128, l, a)) continue;
      check_overwrite(s, a + offset, n, l, (u8*)&value);
      shared_write(s, a + offset, n, l, (u8*)&value, known ? (1u << n) - 1 : 0, BY_STORE);
    } else {
      u8* p = global_access(s, address, 128, l, true, 64);
      if (p) memcpy(p + offset, &value, n);
    }
  }
}
// tensormap.cp_fenceproxy: the warp copies a map. o: global address, shared address, both 64 bits; imm, imm2: offsets
static void publish_map(const Step& s) {
  int l = lowest(s.m);
  u32 a;
  if (!shared_address(s, (u32)(s.in<u64>(1)[l] + s.I.imm2), 128, l, a)) return;
  for (u32 i = 0; i < 128; i += 16)
    if (shared_read(s, a + i, 16, l) != 0xFFFF) s.report(K_undefined_store, l, a + i + SHARED_BASE, 0);
  u8* p = global_access(s, s.in<u64>(0)[l] + s.I.imm, 128, l, true, 128);
  if (p) memcpy(p, &s.M.shared[a], 128);
}
