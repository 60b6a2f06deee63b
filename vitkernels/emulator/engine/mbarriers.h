// mbarrier objects: phases, arrivals, and the bytes that asynchronous copies bring.
#pragma once
#include "memory.h"

static bool completed(const Mbarrier& b, u32 parity) { return (b.phase & 1) != parity; }

static void complete_phase(Machine& M, Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.done_seen = std::move(b.seen);
  b.done_fenced = std::move(b.fenced);
  if (b.done_seen.size() <= (size_t)b.actor) b.done_seen.resize(b.actor + 1, 0);
  b.done_seen[b.actor] = b.time;
  b.seen.clear();
  b.fenced.clear();
  b.time++;
  b.phase++;
  b.pending = b.expected;
  M.progress++;
}

// The mbarrier at a shared address; nullptr, reported, if none was initialised there. What it is used for must be
// ordered after its initialisation: to the race detector a use is a read.
static Mbarrier* mbarrier_at(const Step& s, u32 address, int lane) {
  u32 a;
  if (!shared_address(s, address, 8, lane, a)) return nullptr;
  auto it = s.M.mbarriers.find(a);
  if (it == s.M.mbarriers.end() || !it->second.live) {
    s.report(K_mbarrier_invalid, lane, address, 0);
    return nullptr;
  }
  shared_read(s, a, 8, lane);
  return &it->second;
}

static void mbarrier_init(const Step& s) {  // o: count, address
  u32 address[32], a, lanes = shared_addresses(s, 1, address);
  const u32* count = s.in<u32>(0);
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    if (!shared_address(s, address[l], 8, l, a)) continue;
    Mbarrier& b = s.M.mbarriers[a];
    if (b.live) s.report(K_mbarrier_invalid, l, address[l], 1);
    if (!b.actor) {
      b.actor = s.M.actors++;
      b.time = 1;
      for (Warp& w : s.M.warps) {
        w.seen.resize(s.M.actors, 0);
        w.fenced.resize(s.M.actors, 0);
      }
    }
    b.live = true;
    b.expected = b.pending = (i32)count[l];
    b.bytes = 0;
    b.phase = 0;
    b.seen.clear();
    b.fenced.clear();
    b.done_seen.clear();
    b.done_fenced.clear();
    u64 value = 0;
    check_overwrite(s, a, 8, l, nullptr);
    shared_write(s, a, 8, l, (u8*)&value, 0xFF, BY_STORE);
    for (u32 g = a >> s.M.granule; g <= (a + 7) >> s.M.granule; g++) s.M.cells[g].proxy = IS_MBARRIER;
  }
}
static void mbarrier_inval(const Step& s) {  // o: address
  u32 address[32], a, lanes = shared_addresses(s, 0, address);
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    Mbarrier* b = mbarrier_at(s, address[l], l);
    if (!b) continue;
    b->live = false;
    u64 value = 0;
    a = address[l] - SHARED_BASE;
    for (u32 g = a >> s.M.granule; g <= (a + 7) >> s.M.granule; g++) s.M.cells[g].proxy = 0;
    check_overwrite(s, a, 8, l, nullptr);
    shared_write(s, a, 8, l, (u8*)&value, 0, BY_STORE);
    memset(&s.M.state[a], UNWRITTEN, 8);
    for (u32 g = a >> s.M.granule; g <= (a + 7) >> s.M.granule; g++) s.M.cells[g].proxy = 0;
  }
}

// o: state or none, bytes or none, count or none, address; imm2: 1 arrives, 2 arrives for good (arrive_drop), 0 only
// expects the bytes
static void mbarrier_arrive(const Step& s) {
  u32 address[32], lanes = shared_addresses(s, 3, address), states[32] = {0};
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    Mbarrier* b = mbarrier_at(s, address[l], l);
    if (!b) continue;
    states[l] = b->phase;
    if (s.o[1] != -1) b->bytes += s.in<u32>(1)[l];
    if (!s.I.imm2) continue;
    i32 count = s.o[2] == -1 ? 1 : (i32)s.in<u32>(2)[l];
    if (count > b->pending) s.report(K_mbarrier_overflow, l, address[l], count - b->pending);
    b->pending -= count;
    if (s.I.imm2 == 2) b->expected -= count;
    join(b->seen, s.W.seen);
    join(b->fenced, s.W.fenced);
    complete_phase(s.M, *b);
  }
  s.M.progress++;
  if (s.I.imm2) release(s);
  if (s.o[0] != -1) {
    each(s.out<u64>(0), s.m, [&](int l) { return (u64)states[l]; });
    s.define(0, 64, FULL);
  }
}

// Whether a warp that asks is told of the phase that completed. The first time it asks it is not, unless something else
// already ordered it after: on a GPU the phase might complete a little later, and a kernel that does not ask again
// would go on too early.
static bool told(const Step& s, const Mbarrier& b) {
  if (b.phase == 0) return true;  // what comes before the first phase
  u32 time = b.time - 1;
  if (s.W.asked.size() <= (size_t)b.actor) s.W.asked.resize(b.actor + 1, 0);
  if (s.W.seen[b.actor] >= time || s.W.asked[b.actor] == time) return true;
  s.W.asked[b.actor] = time;
  s.M.progress++;
  return false;
}

// Lanes whose phase is complete. o: predicate, state or parity, address; imm2: 1 by parity.
static u32 mbarrier_test(const Step& s, u32* waits_for) {
  u32 address[32], lanes = shared_addresses(s, 2, address), ready = 0;
  const Mbarrier* before = nullptr;
  bool tell = true;
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    Mbarrier* b = mbarrier_at(s, address[l], l);
    if (!b) continue;
    u32 parity = s.I.imm2 ? s.in<u32>(1)[l] & 1 : (u32)s.in<u64>(1)[l] & 1;
    if (!completed(*b, parity)) {
      *waits_for = address[l];
      continue;
    }
    if (b != before) tell = told(s, *b);  // the lanes ask together
    before = b;
    if (tell) {
      ready |= 1u << l;
      join(s.W.seen, b->done_seen);
      join(s.W.fenced, b->done_fenced);
    } else {
      *waits_for = address[l];
    }
  }
  return ready;
}

// cp.async.mbarrier.arrive: the lanes' cp.async so far arrive when they are through, and belong to the mbarrier then.
// o: address; imm2: 1 where the arrival was counted at initialisation (.noinc)
static void copies_arrive(const Step& s) {
  u32 address[32], lanes = shared_addresses(s, 0, address);
  Machine& M = s.M;
  auto take = [&](std::vector<Copy>& copies, int l, const Mbarrier& b) {
    for (const Copy& c : copies) {
      if (c.lane != (u32)l) continue;
      for (u32 g = c.to >> M.granule; g <= (c.to + c.bytes - 1) >> M.granule; g++) M.cells[g].pending = 0;
      shared_write(s, c.to, c.bytes, c.lane, c.data, FULL >> (32 - c.bytes), BY_COPY);
      for (u32 g = c.to >> M.granule; g <= (c.to + c.bytes - 1) >> M.granule; g++) {
        M.cells[g].writer = b.actor;
        M.cells[g].time = b.time;
      }
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), [l](const Copy& c) { return c.lane == (u32)l; }),
                 copies.end());
  };
  for (u32 r = lanes; r; r &= r - 1) {
    int l = lowest(r);
    Mbarrier* b = mbarrier_at(s, address[l], l);
    if (!b) continue;
    for (auto& group : s.W.copy_groups) take(group, l, *b);
    take(s.W.copies, l, *b);
    if (!s.I.imm2) continue;  // else it adds the arrival that it makes
    if (--b->pending < 0) s.report(K_mbarrier_overflow, l, address[l], 1);
    complete_phase(M, *b);
  }
}
