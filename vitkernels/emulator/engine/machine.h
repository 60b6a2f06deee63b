// The machine: programs (CTAs), warps, registers and what is known of each byte of them.
//
// A register is 32 lanes: 32 x u32 for types up to 32 bits, 32 x u64 (two slots) for 64 bits; a predicate is one u32.
// Each byte of a register has a plane of 32 bits, one a lane, that tells whether it is defined; so has each byte of
// shared memory, as in valgrind's memcheck. What is undefined may be moved about; it is reported where it would show:
// in an address, a branch, a guard, a store to global memory or an operand of a matrix product.
//
// Order is by vector clocks: a warp's accesses bear its time, which ends with each barrier or arrival (a release), and
// a warp has seen another's accesses up to a time once a barrier joined their clocks. The asynchronous copies that
// complete on an mbarrier are actors of their own, one an mbarrier, whose time is the mbarrier's phase. A second clock,
// `fenced`, is what fence.proxy.async has made visible to the asynchronous proxy (wgmma and bulk copies).
#pragma once
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "numbers.h"

static const u32 FULL = 0xFFFFFFFFu;
#define X(name, value) static const u32 name = value;
PTX_NUMBERS(X)
#undef X
static const u64 PARAM_BASE = 1ull << PARAM_BASE_BITS;  // generic addresses of the kernel's parameters
static const u64 GLOBAL_BASE = 1ull << 40;        // window of the first buffer
static const int WINDOW_BITS = 36;                // windows are 64 GiB apart,
static const i64 WINDOW_MIDDLE = 1ll << 35;       // and a buffer starts in the middle, so that what is below it shows
static const int MAX_WARPS = 32;                  // a program has at most 1024 threads

enum Op : i32 {
#define X(name) OP_##name,
  PTX_OPS(X)
#undef X
  OP_COUNT
};
static const char* const OP_NAMES[] = {
#define X(name) #name,
    PTX_OPS(X)
#undef X
};
enum Special : i32 {
#define X(name) SPECIAL_##name,
  PTX_SPECIALS(X)
#undef X
};
enum Comparison : i32 {
#define X(name) CMP_##name,
  PTX_COMPARISONS(X)
#undef X
};
enum Kind : i32 {
#define X(name, text, severity) K_##name,
  PTX_FINDINGS(X)
#undef X
};

#define LANES(l) for (int l = 0; l < 32; l++)
static ALWAYS_INLINE int lowest(u32 mask) { return __builtin_ctz(mask); }

// An operand is a slot of the register file (>= 0), -1 for none, or -2 - row of the constants. A predicate is its
// number, plus NEGATED, or one of two constants.
struct Instruction {
  i32 op, type, type2, flags, guard, count, first;
  i64 imm, imm2;
};
static const int ROW = 9;  // integers of an encoded instruction
static const i32 NEGATED = 1 << NEGATED_BIT, PRED_INDEX = NEGATED - 1, PRED_FALSE = -2, PRED_TRUE = -3;

// byte[k], bit l: byte k of lane l is defined.
struct Planes {
  u32 byte[4];
};
static const Planes ALL_DEFINED[2] = {{{FULL, FULL, FULL, FULL}}, {{FULL, FULL, FULL, FULL}}};

typedef std::vector<u32> Clock;
static inline void join(Clock& a, const Clock& b) {
  if (a.size() < b.size()) a.resize(b.size(), 0);
  for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}

struct Unsupported {
  i32 pc;
  std::string text;
};

struct Buffer {
  u8* host;
  u64 size;
  i32 granule;         // log2 bytes of what is told apart: at most the tensors' element
  u64 view_from, view_to;
  u64 *writes, *reads;  // by granule: program + 1 << 32 | warp << 26 | the warp's time
  u8* sectors;          // by 32 bytes: 1 read, 2 written
  u64 touched[2] = {};  // how many of these were read, and written
};
struct Found {
  i32 kind, pc, cta, warp, lane, other;
  u64 address, count;
};
struct Counts {
  u64 executed, lanes, requests, sectors, ideal, waves, ideal_waves, phases;
};

// A granule of shared memory.
struct Cell {
  u32 time;      // of the last write,
  u32 readers;   // warps that read since
  u16 writer;    // by this actor
  u8 lane;
  u8 proxy;      // Proxy, or 0
  u16 pending;   // warp + 1 whose cp.async writes it
  u16 reading;   // wgmmas and bulk stores that read it
};
enum Proxy : u8 { BY_STORE = 1, BY_COPY = 2, BY_BULK = 3, IS_MBARRIER = 4 };
enum ByteState : u8 { UNWRITTEN = 0, UNDEFINED = 1, DEFINED = 3 };

struct Copy {  // cp.async under way
  u32 to, bytes, lane;
  u8 data[16];
};
struct Range {
  u32 at, bytes;
};
struct BulkStore {  // under way
  u32 lane;
  i64 group;  // -1 before it is committed
  std::vector<Range> sources;
};
enum Wait : u8 { RUNNING, AT_BARRIER, YIELDED };
struct Split {  // lanes of a warp that run together
  i32 pc;
  u32 mask;
  Wait wait;
  u32 on;  // barrier, or the mbarrier's address
};

struct Warp {
  u8* registers;
  Planes* defined;
  u32 *predicates, *predicates_defined;
  std::vector<Split> splits;
  u32 full, exited;
  bool done;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  // what wgmma reads (shared memory) and holds (accumulators), by group
  std::vector<Range> sources;
  std::deque<std::vector<Range>> source_groups;
  std::vector<i32> accumulators;
  std::deque<std::vector<i32>> accumulator_groups;
  std::vector<BulkStore> bulk_stores;
  i64 bulk_groups[32];  // committed, by lane
  u64 steps, fenced_registers;  // step of the last wgmma.fence
  bool fenced_stage;            // there was one since the last commit
  Clock seen, fenced;
  Clock asked;  // by mbarrier: the phase that it asked for in vain
};
struct Barrier {
  i32 threads, wanted;  // arrived; given with the instruction, 0 for all
  Clock seen, fenced;
};

struct Mbarrier {
  bool live;
  i32 actor;              // its number among the clocks, 0: none yet
  u32 time;               // of its actor: counts phases, over initialisations too
  u32 phase;
  i32 expected, pending;  // arrivals
  i64 bytes;              // expected and not yet there
  Clock seen, fenced, done_seen, done_fenced;  // of the phase under way and of the last that completed
};

struct Machine {
  Instruction* code;
  i32 length;
  const i32* order;  // place of each instruction in the control flow: who is behind runs first
  const i32* operands;
  const u32* constants;
  const u8* params;
  i32 param_bytes;
  i32 slots, preds, threads, warp_count;
  u32 shared_bytes;
  i32 granule;  // log2 bytes of a Cell
  i32 arch;
  bool uses_wgmma;
  std::vector<Buffer> buffers;
  // of the program that runs
  std::vector<u8> shared, state;
  std::vector<Cell> cells;
  std::vector<u32> read_times;  // by granule and warp
  std::vector<Warp> warps;
  std::vector<u8> register_file, in_flight;  // in_flight by warp and slot: an accumulator of a wgmma under way
  std::vector<Planes> defined_file;
  std::vector<u32> predicate_file, predicate_defined_file;
  std::vector<u64> written_at;  // by warp and slot: step of the last write, for wgmma.fence
  Barrier barriers[17];  // the last is the cluster's, of one program
  std::unordered_map<u32, Mbarrier> mbarriers;
  i32 actors;
  i32 cta[3], grid[3], program;
  // of the run
  std::unordered_map<u64, size_t> index;
  std::vector<Found> found;
  std::vector<Counts> counts;
  u64 total, limit;
  u64 progress;    // counts what a waiting warp may wait for
  bool check_warp, stopped;
  std::string error;
  i32 error_pc;

  void report(int kind, int pc, int warp, int lane, u64 address, int other, u64 n = 1) {
    auto added = index.emplace((u64)kind << 32 | (u32)pc, found.size());
    if (added.second) found.push_back({kind, pc, program, warp, lane, other, address, n});
    else found[added.first->second].count += n;
  }
};

// One instruction of one warp, being executed by the lanes of `m`.
struct Step {
  Machine& M;
  Warp& W;
  const Instruction& I;
  const i32* o;
  const u32 m;
  const int pc, w;

  template <class T> ALWAYS_INLINE const T* in(int i) const {
    i32 s = o[i];
    return s >= 0 ? (const T*)(W.registers + (size_t)s * 128) : (const T*)(M.constants + (size_t)(-2 - s) * 32);
  }
  template <class T> ALWAYS_INLINE T* out(int i) const { return (T*)(W.registers + (size_t)o[i] * 128); }

  ALWAYS_INLINE const Planes* planes(int i) const { return o[i] >= 0 ? W.defined + o[i] : ALL_DEFINED; }
  // Lanes whose lower `bits` are defined.
  ALWAYS_INLINE u32 defined(int i, int bits) const {
    const Planes* p = planes(i);
    if (bits <= 8) return p->byte[0];
    if (bits == 16) return p->byte[0] & p->byte[1];
    u32 r = p->byte[0] & p->byte[1] & p->byte[2] & p->byte[3];
    if (bits == 64) r &= p[1].byte[0] & p[1].byte[1] & p[1].byte[2] & p[1].byte[3];
    return r;
  }
  ALWAYS_INLINE void define(int i, int bits, u32 d) const {
    Planes* p = W.defined + o[i];
    for (int s = 0; s < (bits == 64 ? 2 : 1); s++)
      for (int k = 0; k < 4; k++) p[s].byte[k] = (p[s].byte[k] & ~m) | (d & m);
  }
  // Planes of operand i in the order of its bytes; what a narrow register has above counts as defined.
  ALWAYS_INLINE void bytes(int i, int bits, u32* out) const {
    const Planes* p = planes(i);
    for (int k = 0; k < 8; k++) out[k] = k < bits / 8 ? p[k >> 2].byte[k & 3] : FULL;
  }
  ALWAYS_INLINE void set_bytes(int i, int bits, const u32* in) const {
    Planes* p = W.defined + o[i];
    for (int k = 0; k < (bits == 64 ? 8 : 4); k++) {
      u32& x = p[k >> 2].byte[k & 3];
      x = (x & ~m) | (in[k] & m);
    }
  }
  ALWAYS_INLINE u32 pred(i32 p, u32& known) const {
    known = FULL;
    if (p == PRED_FALSE) return 0;
    if (p == PRED_TRUE) return FULL;
    known = W.predicates_defined[p & PRED_INDEX];
    u32 v = W.predicates[p & PRED_INDEX];
    return p & NEGATED ? ~v : v;
  }
  ALWAYS_INLINE void set_pred(i32 p, u32 value, u32 known) const {
    if (p < 0) return;
    W.predicates[p] = (W.predicates[p] & ~m) | (value & m);
    W.predicates_defined[p] = (W.predicates_defined[p] & ~m) | (known & m);
  }
  ALWAYS_INLINE void report(int kind, int lane, u64 address, int other) const {
    M.report(kind, pc, w, lane, address, other);
  }
  [[noreturn]] void unsupported() const { throw Unsupported{pc, OP_NAMES[I.op]}; }
  ALWAYS_INLINE u32 now() const { return W.seen[w]; }
};

// d[l] = f(l) for the lanes of m. The registers of one instruction are the same slot or apart, never shifted.
template <class T, class F> static ALWAYS_INLINE void each(T* d, u32 m, F f) {
  if (m == FULL) {
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    LANES(l) d[l] = f(l);
  } else {
    LANES(l) if (m >> l & 1) d[l] = f(l);
  }
}
