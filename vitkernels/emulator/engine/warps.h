// Exchange between the lanes of a warp, and between warps: shuffles, votes, barriers, fences.
#pragma once
#include "memory.h"

// o: d, p or -1, a, b, c, mask; imm: 0 up, 1 down, 2 butterfly, 3 index
static void shuffle(const Step& s) {
  const u32 *a = s.in<u32>(2), *b = s.in<u32>(3), *c = s.in<u32>(4);
  u32 value[32], within = 0, from_planes[8], planes[8] = {0};
  s.bytes(2, 32, from_planes);
  bool inactive = false;
  for (u32 r = s.m; r; r &= r - 1) {
    int l = lowest(r), by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31, from;
    int low = l & segment, high = low | (clamp & ~segment);
    bool in;
    switch (s.I.imm) {
      case 0: from = l - by, in = from >= high; break;
      case 1: from = l + by, in = from <= high; break;
      case 2: from = l ^ by, in = from <= high; break;
      default: from = low | (by & ~segment), in = from <= high; break;
    }
    if (!in) from = l;
    inactive |= !(s.m >> from & 1);
    value[l] = a[from];
    within |= (u32)in << l;
    for (int k = 0; k < 4; k++) planes[k] |= (from_planes[k] >> from & 1) << l;
  }
  u32 known = s.defined(3, 32) & s.defined(4, 32);
  for (int k = 0; k < 4; k++) planes[k] &= known;
  if (inactive) s.report(K_shuffle_inactive, 0, 0, (i32)s.m);
  each(s.out<u32>(0), s.m, [&](int l) { return value[l]; });
  s.set_bytes(0, 32, planes);
  s.set_pred(s.o[1], within, known);
}

static void vote(const Step& s) {  // imm: 0 all, 1 any, 2 equal, 3 ballot
  u32 known, p = s.pred(s.o[1], known) & s.m;
  bool defined = (known & s.m) == s.m;
  if (s.I.imm == 3) {
    each(s.out<u32>(0), s.m, [=](int) { return p; });
    return s.define(0, 32, defined ? FULL : 0);
  }
  bool v = s.I.imm == 0 ? p == s.m : s.I.imm == 1 ? p != 0 : p == s.m || p == 0;
  s.set_pred(s.o[0], v ? FULL : 0, defined ? FULL : 0);
}
static void active_mask(const Step& s) {
  u32 m = s.m;
  each(s.out<u32>(0), m, [=](int) { return m; });
  s.define(0, 32, FULL);
}
static void elect(const Step& s) {  // the lowest lane of those that run
  u32 leader = lowest(s.m);
  if (s.o[0] >= 0) {
    each(s.out<u32>(0), s.m, [=](int) { return leader; });
    s.define(0, 32, FULL);
  }
  s.set_pred(s.o[1], 1u << leader, FULL);
}

// ------------------------------------------------------------------------------------------------ barriers

static void open_barrier(Machine& M, int id) {
  Barrier& b = M.barriers[id];
  for (Warp& w : M.warps)
    for (Split& split : w.splits)
      if (split.wait == AT_BARRIER && split.on == (u32)id) {
        split.wait = RUNNING;
        join(w.seen, b.seen);
        join(w.fenced, b.fenced);
      }
  b = Barrier();
  M.progress++;
}
// bar.sync and bar.arrive: o: number, threads, or imm: number, imm2: threads; 0 threads are all. A warp counts as 32.
static void barrier_arrive(const Step& s, int id, i32 wanted) {
  Barrier& b = s.M.barriers[id];
  if (b.threads && b.wanted != wanted) s.report(K_divergent_barrier, 0, 0, id);
  b.wanted = wanted;
  b.threads += 32;
  join(b.seen, s.W.seen);
  join(b.fenced, s.W.fenced);
  release(s);
}
static bool barrier_full(const Machine& M, int id) {
  const Barrier& b = M.barriers[id];
  if (!b.threads) return false;
  if (b.wanted) return b.threads >= b.wanted;
  int alive = 0;
  for (const Warp& w : M.warps) alive += !w.done;
  return b.threads >= 32 * alive;
}

// fence.proxy.async: all that this warp has seen is visible to the asynchronous proxy.
static void fence_proxy(const Step& s) {
  join(s.W.fenced, s.W.seen);
  release(s);
}
