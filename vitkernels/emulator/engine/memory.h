// Checks and counters of accesses to global and shared memory.
#pragma once
#include "machine.h"

// What went before is now published: later accesses bear a later time.
static inline void release(const Step& s) { s.W.seen[s.w]++; }

// ------------------------------------------------------------------------------------------------ global memory

static const u64 BY_ATOMIC = 1ull << 31;
static inline u64 stamp(const Step& s) { return (u64)(s.M.program + 1) << 32 | (u32)s.w << 26 | (s.now() & 0x3FFFFFF); }

// Whether an earlier access of this program is ordered before this one.
static ALWAYS_INLINE bool ordered(const Step& s, u64 stamped) {
  return (stamped & 0x3FFFFFF) <= s.W.seen[stamped >> 26 & 31];
}

// The host's address of n bytes, or nullptr; notes the access and reports what is wrong with it.
static u8* global_access(const Step& s, u64 address, u32 n, int lane, bool write, u32 alignment, bool atomic = false) {
  Machine& M = s.M;
  if (address % alignment) {
    s.report(K_misaligned_global, lane, address, alignment);
    return nullptr;
  }
  u64 window = (address - GLOBAL_BASE) >> WINDOW_BITS;
  Buffer* b = address >= GLOBAL_BASE && window < M.buffers.size() ? &M.buffers[window] : nullptr;
  i64 at = (i64)((address - GLOBAL_BASE) & ((1ull << WINDOW_BITS) - 1)) - WINDOW_MIDDLE;
  if (!b || at < 0 || (u64)at + n > b->size) {
    s.report(write ? K_global_write_out_of_bounds : K_global_read_out_of_bounds, lane, address, n);
    return nullptr;
  }
  if ((u64)at < b->view_from || (u64)at + n > b->view_to) s.report(K_outside_view, lane, address, n);
  u64 me = stamp(s) | (atomic ? BY_ATOMIC : 0);
  u32 program = me >> 32;
  u64 last = ((u64)at + n - 1) >> b->granule;
  for (u64 g = (u64)at >> b->granule; g <= last; g++) {
    u64 wrote = b->writes[g], read = b->reads[g];
    if (wrote && wrote != me && !(atomic && (wrote & BY_ATOMIC))) {
      int kind = write ? K_global_write_race : K_global_read_race;
      if (wrote >> 32 != program) s.report(kind, lane, address, (i32)(wrote >> 32) - 1);
      else if (!ordered(s, wrote)) s.report(K_global_race_in_program, lane, address, wrote >> 26 & 31);
    }
    if (write) {
      if (read && read != me) {
        if (read >> 32 != program) s.report(K_global_overwrite_race, lane, address, (i32)(read >> 32) - 1);
        else if (!ordered(s, read)) s.report(K_global_race_in_program, lane, address, read >> 26 & 31);
      }
      b->writes[g] = me;
    } else {
      // 2^32 - 1 stands for several programs
      b->reads[g] = read && read >> 32 != program ? ~0ull << 32 : me;
    }
  }
  u8 how = write ? 2 : 1;
  for (u64 i = (u64)at >> 5; i <= ((u64)at + n - 1) >> 5; i++) {
    b->touched[write] += !(b->sectors[i] & how);
    b->sectors[i] |= how;
  }
  return b->host + at;
}

// Sectors of 32 bytes that a warp's access of n bytes a lane touches, and how few would do.
static void count_global(const Step& s, const u64* a, u32 m, i64 offset, u32 n) {
  if (!m) return;
  u64 sectors[96], different[32];
  int touched = 0, addresses = 0;
  u64 highest = 0, highest_sector = 0;  // most accesses go upwards: what is above all so far is new
  for (u32 r = m; r; r &= r - 1) {
    u64 x = a[lowest(r)] + offset;
    bool seen = false;
    if (addresses && x <= highest)
      for (int i = addresses - 1; i >= 0 && !seen; i--) seen = different[i] == x;
    if (seen) continue;
    different[addresses++] = x;
    highest = std::max(highest, x);
    for (u64 sector = x >> 5; sector <= (x + n - 1) >> 5; sector++) {
      bool in = false;
      if (touched && sector <= highest_sector)
        for (int i = touched - 1; i >= 0 && !in; i--) in = sectors[i] == sector;
      if (!in) sectors[touched++] = sector;
      highest_sector = std::max(highest_sector, sector);
    }
  }
  Counts& t = s.M.counts[s.pc];
  t.requests++;
  t.sectors += touched;
  t.ideal += ((u64)addresses * n + 31) / 32;
}

// ------------------------------------------------------------------------------------------------ shared memory

// Whether an access is within shared memory and aligned; `a` is then its offset.
static ALWAYS_INLINE bool shared_address(const Step& s, u32 address, u32 n, int lane, u32& a) {
  a = address - SHARED_BASE;
  if (address < SHARED_BASE || (u64)a + n > s.M.shared_bytes) {
    s.report(K_shared_out_of_bounds, lane, address, n);
    return false;
  }
  if (address & (n - 1)) {
    s.report(K_misaligned_shared, lane, address, n);
    return false;
  }
  return true;
}

// Lanes whose address is defined; the others are reported and left out.
static u32 addressed(const Step& s, int operand, int bits) {
  u32 bad = s.m & ~s.defined(operand, bits);
  if (bad) s.report(K_undefined_address, lowest(bad), 0, 0);
  return s.m & ~bad;
}
static u32 shared_addresses(const Step& s, int operand, u32* address) {
  if (s.o[operand] == -1) {
    LANES(l) address[l] = (u32)s.I.imm;
    return s.m;
  }
  const u32* a = s.in<u32>(operand);
  LANES(l) address[l] = a[l] + (u32)s.I.imm;
  return addressed(s, operand, 32);
}

static ALWAYS_INLINE void note_reader(const Step& s, Cell* cells, u32* read_times, u32 g, u32 now) {
  cells[g].readers |= 1u << s.w;
  read_times[(size_t)g * s.M.warp_count + s.w] = now;
}

// Which of n bytes (at most 32) are defined, a bit each.
static ALWAYS_INLINE u32 defined_bytes(const Machine& M, u32 a, u32 n) {
  const u8* p = &M.state[a];
  u32 all = n >= 32 ? FULL : (1u << n) - 1;
  u32 i = 0;
  u64 x;
  for (; i + 8 <= n; i += 8) {
    memcpy(&x, p + i, 8);
    if (x != 0x0303030303030303ull) break;
  }
  if (i == n) return all;
  u32 r = all;
  for (; i < n; i++)
    if (p[i] != DEFINED) r &= ~(1u << i);
  return r;
}

// Checks a read of n bytes by the generic proxy and returns which of them are defined.
static inline u32 shared_read(const Step& s, u32 a, u32 n, int lane) {
  Machine& M = s.M;
  const u32* seen = s.W.seen.data();
  Cell* cells = M.cells.data();
  u32 *read_times = M.read_times.data(), now = s.now(), last = (a + n - 1) >> M.granule;
  for (u32 g = a >> M.granule; g <= last; g++) {
    const Cell& c = cells[g];
    if (c.pending) s.report(K_copy_read, lane, a + SHARED_BASE, c.pending - 1);
    if (c.time > seen[c.writer]) s.report(K_shared_read_race, lane, a + SHARED_BASE, c.writer);
    else if (M.check_warp && c.writer == s.w && c.time == now && c.lane != lane && lane >= 0)
      s.report(K_warp_exchange, lane, a + SHARED_BASE, c.lane);
    note_reader(s, cells, read_times, g, now);
  }
  u32 known = defined_bytes(M, a, n);
  if (known != (n >= 32 ? FULL : (1u << n) - 1))
    for (u32 i = 0; i < n; i++)
      if (M.state[a + i] == UNWRITTEN) {
        s.report(K_shared_unwritten, lane, a + i + SHARED_BASE, -1);
        break;
      }
  return known;
}

// Checks that nobody else may be at the n bytes that are about to be written; `data` is what will be, if known.
static inline void check_overwrite(const Step& s, u32 a, u32 n, int lane, const u8* data) {
  Machine& M = s.M;
  const u32 *seen = s.W.seen.data(), *read_times = M.read_times.data();
  const Cell* cells = M.cells.data();
  u32 last = (a + n - 1) >> M.granule;
  for (u32 g = a >> M.granule; g <= last; g++) {
    const Cell& c = cells[g];
    if (c.pending) s.report(K_copy_overwritten, lane, a + SHARED_BASE, c.pending - 1);
    if (c.proxy == IS_MBARRIER) s.report(K_mbarrier_overwritten, lane, a + SHARED_BASE, c.writer);
    if (c.reading) s.report(K_source_overwritten, lane, a + SHARED_BASE, c.reading);
    if (c.time > seen[c.writer]) {
      u32 from = std::max(a, g << M.granule), to = std::min(a + n, (g + 1) << M.granule);
      bool same = data && !memcmp(&M.shared[from], data + (from - a), to - from);
      s.report(same ? K_shared_same_write : K_shared_write_race, lane, a + SHARED_BASE, c.writer);
    }
    for (u32 r = c.readers & ~(1u << s.w); r; r &= r - 1) {
      int reader = lowest(r);
      if (read_times[(size_t)g * M.warp_count + reader] > seen[reader]) {
        s.report(K_shared_overwrite_race, lane, a + SHARED_BASE, reader);
        break;
      }
    }
  }
}

// The write itself; `known` has a bit for each byte that is defined.
static inline void shared_write(const Step& s, u32 a, u32 n, int lane, const u8* data, u32 known, Proxy proxy) {
  Machine& M = s.M;
  u32 last = (a + n - 1) >> M.granule;
  for (u32 g = a >> M.granule; g <= last; g++) {
    Cell& c = M.cells[g];
    c.time = s.now();
    c.writer = s.w;
    c.lane = lane;
    c.proxy = proxy;
    c.readers = 0;
  }
  memcpy(&M.shared[a], data, n);
  if (known == (n >= 32 ? FULL : (1u << n) - 1)) memset(&M.state[a], DEFINED, n);
  else
    for (u32 i = 0; i < n; i++) M.state[a + i] = known >> i & 1 ? DEFINED : UNDEFINED;
}

// cp.async that has been waited for: its bytes are there, as the waiting warp's.
static void deliver(const Step& s, std::vector<Copy>& copies) {
  Machine& M = s.M;
  for (Copy& c : copies) {
    for (u32 g = c.to >> M.granule; g <= (c.to + c.bytes - 1) >> M.granule; g++) M.cells[g].pending = 0;
    shared_write(s, c.to, c.bytes, c.lane, c.data, FULL >> (32 - c.bytes), BY_COPY);
  }
  copies.clear();
}

// Checks a read of 16 bytes by the asynchronous proxy (wgmma, bulk store) that goes on until a later wait; returns
// which of them are defined.
static ALWAYS_INLINE u32 async_read(const Step& s, u32 a) {
  Machine& M = s.M;
  const u32 *seen = s.W.seen.data(), *fenced = s.W.fenced.data();
  Cell* cells = M.cells.data() + (a >> M.granule);
  bool wrong = false;
  for (int i = 0, n = 16 >> M.granule; i < n; i++) {
    Cell& c = cells[i];
    c.reading++;
    bool generic = c.proxy == BY_STORE || c.proxy == BY_COPY;
    wrong |= c.pending || c.time > seen[c.writer] || (generic && c.time > fenced[c.writer]);
  }
  u32 known = defined_bytes(M, a, 16);
  if (!wrong && known == 0xFFFF) return known;
  for (int i = 0, n = 16 >> M.granule; i < n; i++) {
    Cell& c = cells[i];
    if ((c.proxy == BY_STORE || c.proxy == BY_COPY) && c.time > fenced[c.writer])
      s.report(c.proxy == BY_COPY ? K_unfenced_copy : K_unfenced_store, -1, a + SHARED_BASE, c.writer);
  }
  return shared_read(s, a, 16, -1);
}
static inline void async_read_done(const Step& s, const Range& r) {
  u32 last = (r.at + r.bytes - 1) >> s.M.granule, *read_times = s.M.read_times.data(), now = s.now();
  Cell* cells = s.M.cells.data();
  for (u32 g = r.at >> s.M.granule; g <= last; g++) {
    cells[g].reading--;
    note_reader(s, cells, read_times, g, now);
  }
}

// Wavefronts of a warp's access of n bytes a lane: 32 lanes of 4 bytes, 16 of 8 or 8 of 16 go in a phase.
static void count_shared(const Step& s, const u32* address, u32 m, u32 n) {
  if (!m) return;
  int lanes = n <= 4 ? 32 : n == 8 ? 16 : 8;
  Counts& t = s.M.counts[s.pc];
  t.requests++;
  for (int p = 0; p < 32; p += lanes) {
    u32 phase = (lanes == 32 ? FULL : ((1u << lanes) - 1) << p) & m;
    if (!phase) continue;
    u8 used[32] = {0};
    u32 bank[32][32];
    int waves = 0, words = 0;
    u32 before = FULL;
    for (u32 r = phase; r; r &= r - 1) {
      u32 a = address[lowest(r)];
      if (a == before) continue;
      before = a;
      for (u32 x = a >> 2; x <= (a + n - 1) >> 2; x++) {
        int b = x & 31;
        bool in = false;
        for (int i = 0; i < used[b] && !in; i++) in = bank[b][i] == x;
        if (in || used[b] == 32) continue;
        bank[b][used[b]++] = x;
        waves = std::max<int>(waves, used[b]);
        words++;
      }
    }
    t.waves += waves;
    t.ideal_waves += (words + 31) / 32;
    t.phases++;
  }
}
