// Executes PTX on a CPU, warp by warp, and reports what a GPU would not. See machine.h for what is modelled.
#include <sys/mman.h>

#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <type_traits>

#include "machine.h"
//
#include "atomics.h"
#include "bulk.h"
#include "floats.h"
#include "integers.h"
#include "loads.h"
#include "mbarriers.h"
#include "memory.h"
#include "products.h"
#include "warps.h"

// ------------------------------------------------------------------------------------------------ one instruction

// Registers of wgmma under way must not be touched, and those it is given must not have been written since its fence.
static void watch_registers(const Step& s) {
  const Instruction& I = s.I;
  switch (I.op) {
    case OP_wgmma: case OP_mma: case OP_wgwait: case OP_wgfence: case OP_wgcommit: case OP_movp: case OP_andp:
    case OP_orp: case OP_xorp: case OP_notp: case OP_vote: return;
    default: break;
  }
  size_t mine = (size_t)s.w * s.M.slots;
  int last = I.op == OP_selp || I.op == OP_setp ? I.count - 1 : I.count;
  for (int i = I.op == OP_setp || I.op == OP_testp ? 2 : 0; i < last; i++)
    if (s.o[i] >= 0 && !(I.op == OP_shfl && i == 1) && s.M.in_flight[mine + s.o[i]])
      s.report(K_accumulator_in_flight, 0, 0, s.o[i]);
  bool writes = I.op != OP_setp && I.op != OP_testp && I.op != OP_sts && I.op != OP_stg && I.op != OP_stmatrix;
  if (!writes || !I.count) return;
  int written = 1;
  if (I.op == OP_ldparam) written = I.count;
  if (I.op == OP_lds || I.op == OP_ldg || I.op == OP_ldmatrix || I.op == OP_ldmatrix8 || I.op == OP_unpack)
    written = I.count - 1;
  ++s.W.steps;
  for (int i = 0; i < written; i++)
    if (s.o[i] >= 0) s.M.written_at[mine + s.o[i]] = s.W.steps;
}

static void execute(const Step& s) {
  const int type = s.I.type;
  const bool fp = is_float(type) || type == T_f16x2 || type == T_bf16x2 || type == T_f32x2;
  if (s.M.uses_wgmma) watch_registers(s);
  switch (s.I.op) {
    case OP_nop: case OP_membar: return;
    case OP_mov: return move(s);
    case OP_movp: {
      u32 known, v = s.pred(s.o[1], known);
      return s.set_pred(s.o[0], v, known);
    }
    case OP_pack: return pack(s);
    case OP_unpack: return unpack(s);
    case OP_special: return special(s);
    case OP_add: return fp ? floating(s) : integers(s, [](auto a, auto b) { return a + b; });
    case OP_sub: return fp ? floating(s) : integers(s, [](auto a, auto b) { return a - b; });
    case OP_mul: return fp ? floating(s) : integers(s, [](auto a, auto b) { return a * b; });
    case OP_min: return fp ? floating(s) : integers(s, [](auto a, auto b) { return std::min(a, b); });
    case OP_max: return fp ? floating(s) : integers(s, [](auto a, auto b) { return std::max(a, b); });
    case OP_div: return fp ? floating(s) : divide(s);
    case OP_rem: return divide(s);
    case OP_mulhi: return multiply_high(s);
    case OP_mulwide: case OP_madwide: return multiply_wide(s);
    case OP_mad: case OP_madhi: return multiply_add(s);
    case OP_neg: case OP_abs: return negate_or_absolute(s);
    case OP_lop3: case OP_not: return bitwise(s);
    case OP_shl: case OP_shr: return shift(s);
    case OP_bfe: return extract(s);
    case OP_bfi: return insert(s);
    case OP_prmt: return permute(s);
    case OP_shf: return funnel(s);
    case OP_popc: case OP_clz: return count_bits(s);
    case OP_brev: return reverse_bits(s);
    case OP_min3: case OP_max3: case OP_fma: case OP_sqrt: case OP_rsqrt: case OP_rcp: case OP_ex2: case OP_lg2:
    case OP_tanh: case OP_sin: case OP_cos: case OP_copysign: return floating(s);
    case OP_cvt: return convert_one(s);
    case OP_cvt2: return convert_two(s);
    case OP_setp: return set_predicate(s);
    case OP_testp: return test_property(s);
    case OP_selp: return select(s);
    case OP_andp: case OP_orp: case OP_xorp: return combine_predicates(s);
    case OP_notp: {
      u32 known, v = s.pred(s.o[1], known);
      return s.set_pred(s.o[0], ~v, known);
    }
    case OP_ldparam: return load_param(s);
    case OP_ldg: return load_global(s);
    case OP_stg: return store_global(s);
    case OP_lds: return load_shared(s);
    case OP_sts: return store_shared(s);
    case OP_ldmatrix: return load_matrix(s);
    case OP_ldmatrix8: return load_matrix_of_bytes(s);
    case OP_stmatrix: return store_matrix(s);
    case OP_atom: return atomic(s);
    case OP_redux: return reduce_warp(s);
    case OP_cpasync: return copy_async(s);
    case OP_cpcommit:
      s.W.copy_groups.push_back(std::move(s.W.copies));
      s.W.copies.clear();
      return;
    case OP_cpwait: return copy_wait(s);
    case OP_shfl: return shuffle(s);
    case OP_vote: return vote(s);
    case OP_activemask: return active_mask(s);
    case OP_elect: return elect(s);
    case OP_warpsync: return release(s);
    case OP_mbinit: return mbarrier_init(s);
    case OP_mbinval: return mbarrier_inval(s);
    case OP_mbarrive: return mbarrier_arrive(s);
    case OP_cparrive: return copies_arrive(s);
    case OP_cptensor: return copy_tensor(s);
    case OP_cpbulk: return copy_bulk(s);
    case OP_bulkcommit: return bulk_commit(s);
    case OP_bulkwait: return bulk_wait(s);
    case OP_mapreplace: return replace_in_map(s);
    case OP_mappublish: return publish_map(s);
    case OP_mma: return mma(s);
    case OP_wgmma: return wgmma(s);
    case OP_wgfence:
      s.W.fenced_registers = s.W.steps;
      s.W.fenced_stage = true;
      return;
    case OP_wgcommit: return wgmma_commit(s);
    case OP_wgwait: return wgmma_wait(s);
    case OP_fenceproxy: return fence_proxy(s);
    default: s.unsupported();
  }
}

// ------------------------------------------------------------------------------------------------ one warp

static void add_split(const Machine& M, Warp& W, i32 pc, u32 mask, Wait wait = RUNNING, u32 on = 0) {
  if (!mask) return;
  for (Split& s : W.splits)
    if (s.pc == pc && s.wait == wait && s.on == on && wait != AT_BARRIER) {
      s.mask |= mask;
      return;
    }
  auto after = std::find_if(W.splits.begin(), W.splits.end(), [&](const Split& s) {
    return M.order[s.pc] > M.order[pc];
  });
  W.splits.insert(after, {pc, mask, wait, on});
}
static size_t first_running(const Warp& W) {
  size_t i = 0;
  while (i < W.splits.size() && W.splits[i].wait != RUNNING) i++;
  return i;
}

static void at_exit(Machine& M, int w, int pc) {
  Warp& W = M.warps[w];
  W.done = true;
  size_t left = W.copies.size() + W.bulk_stores.size();
  for (auto& group : W.copy_groups) left += group.size();
  M.progress++;
  if (left) M.report(K_copy_at_exit, pc, w, 0, left, 0);
}

enum Outcome { ADVANCE, JUMPED, LEFT };

static void branch_indexed(const Step& s, u32 mask) {  // o: index, targets..
  u32 known = s.defined(0, 32);
  if (s.m & ~known) s.report(K_undefined_predicate, lowest(s.m & ~known), 0, 0);
  const u32* index = s.in<u32>(0);
  for (u32 r = s.m; r; r &= r - 1) {
    int l = lowest(r);
    if (index[l] + 1 >= (u32)s.I.count) throw Unsupported{s.pc, "an index beyond the targets"};
    add_split(s.M, s.W, s.o[1 + index[l]], 1u << l);
  }
  add_split(s.M, s.W, s.pc + 1, mask & ~s.m);
}
static u32 uniform_operand(const Step& s, int i) {
  u32 value = 0;
  if (!uniform(s, i, value)) s.report(K_divergent_collective, 0, 0, i);
  return value;
}
static Outcome at_barrier(const Step& s, u32 mask, bool diverged) {
  if (diverged || (mask | s.W.exited) != s.W.full || s.m != mask) s.report(K_divergent_barrier, 0, 0, (i32)s.m);
  u32 id = s.I.count > 0 ? uniform_operand(s, 0) : (u32)s.I.imm;
  u32 threads = s.I.count > 1 ? uniform_operand(s, 1) : (u32)s.I.imm2;
  if (id > 16) throw Unsupported{s.pc, "a barrier's number above 15"};
  barrier_arrive(s, id, threads);
  if (s.I.op == OP_barsync) add_split(s.M, s.W, s.pc + 1, mask, AT_BARRIER, id);
  if (threads && barrier_full(s.M, id)) open_barrier(s.M, id);
  return s.I.op == OP_barsync ? LEFT : ADVANCE;
}
// A wait that fails lets the other warps run.
static Outcome at_mbarrier(const Step& s, u32 mask) {
  u32 waits_for = 0, ready = mbarrier_test(s, &waits_for);
  s.set_pred(s.o[0], ready, FULL);
  if (ready == s.m) return ADVANCE;
  add_split(s.M, s.W, s.pc + 1, mask, YIELDED, waits_for);
  return LEFT;
}

// Executes an instruction that decides what runs next, or any other. `pc` is where to go under JUMPED.
static Outcome dispatch(const Step& s, i32& pc, u32& mask, bool diverged) {
  switch (s.I.op) {
    case OP_bra:
      if (s.m == mask) {
        pc = (i32)s.I.imm;
        return JUMPED;
      }
      add_split(s.M, s.W, (i32)s.I.imm, s.m);
      add_split(s.M, s.W, pc + 1, mask & ~s.m);
      return LEFT;
    case OP_brx: branch_indexed(s, mask); return LEFT;
    case OP_ret:
      s.W.exited |= s.m;
      mask &= ~s.m;
      return mask ? ADVANCE : LEFT;
    case OP_trap:
      s.report(K_trap, lowest(s.m), 0, 0);
      s.M.stopped = true;
      return LEFT;
    case OP_barsync: case OP_bararrive: return at_barrier(s, mask, diverged);
    case OP_mbtest: return at_mbarrier(s, mask);
    default: execute(s); return ADVANCE;
  }
}

// Runs a warp until all its lanes have left or wait, or for a long time. Of lanes that diverged, those furthest
// behind run first, so that they meet again where their paths do.
static void run_warp(Machine& M, int w) {
  static const u64 LONG = 1 << 22;
  Warp& W = M.warps[w];
  i32 pc = 0;
  u64 started = M.total;
  while (!M.stopped) {
    size_t first = first_running(W);
    if (first == W.splits.size()) break;
    pc = W.splits[first].pc;
    u32 mask = W.splits[first].mask;
    W.splits.erase(W.splits.begin() + first);
    const bool diverged = !W.splits.empty();
    size_t second = first_running(W);
    const bool others = second < W.splits.size();
    const i32 next = others ? M.order[W.splits[second].pc] : 0;
    for (;;) {
      if (others && M.order[pc] >= next) {
        add_split(M, W, pc, mask);
        break;
      }
      const Instruction& I = M.code[pc];
      if (++M.total > M.limit) {
        M.report(K_instruction_limit, pc, w, 0, 0, 0);
        M.stopped = true;
        break;
      }
      u32 m = mask;
      if (I.guard >= 0) {
        i32 p = I.guard & PRED_INDEX;
        u32 v = W.predicates[p], bad = mask & ~W.predicates_defined[p];
        if (bad) M.report(K_undefined_predicate, pc, w, lowest(bad), 0, 0);
        m &= I.guard & NEGATED ? ~v : v;
      }
      Counts& t = M.counts[pc];
      t.executed++;
      t.lanes += __builtin_popcount(m);
      if (!m) {
        pc++;
        continue;
      }
      Step s{M, W, I, M.operands + I.first, m, pc, w};
      Outcome outcome = dispatch(s, pc, mask, diverged);
      if (outcome == LEFT) break;
      if (outcome == ADVANCE) {
        pc++;
      } else if (M.total - started > LONG) {  // others may have to write what it waits for
        add_split(M, W, pc, mask);
        M.progress++;
        return;
      }
    }
  }
  if (W.splits.empty() && !W.done) at_exit(M, w, pc);
}

// ------------------------------------------------------------------------------------------------ one program

static void start_program(Machine& M, i32 program) {
  M.program = program;
  M.cta[0] = program % M.grid[0];
  M.cta[1] = program / M.grid[0] % M.grid[1];
  M.cta[2] = program / M.grid[0] / M.grid[1];
  // nothing is defined, and what is there shows: NaN in shared memory, a large number and a wild address in registers
  std::fill(M.shared.begin(), M.shared.end(), 0xFF);
  std::fill(M.state.begin(), M.state.end(), UNWRITTEN);
  std::fill(M.cells.begin(), M.cells.end(), Cell());
  std::fill(M.defined_file.begin(), M.defined_file.end(), Planes());
  std::fill(M.predicate_defined_file.begin(), M.predicate_defined_file.end(), 0);
  std::fill(M.register_file.begin(), M.register_file.end(), 0x7F);
  std::fill(M.in_flight.begin(), M.in_flight.end(), 0);
  std::fill(M.written_at.begin(), M.written_at.end(), 0);
  for (Barrier& b : M.barriers) b = Barrier();
  M.mbarriers.clear();
  M.actors = M.warp_count;
  M.warps.assign(M.warp_count, Warp());
  for (int w = 0; w < M.warp_count; w++) {
    Warp& W = M.warps[w];
    W.registers = M.register_file.data() + (size_t)w * M.slots * 128;
    W.defined = M.defined_file.data() + (size_t)w * M.slots;
    W.predicates = M.predicate_file.data() + (size_t)w * M.preds;
    W.predicates_defined = M.predicate_defined_file.data() + (size_t)w * M.preds;
    int lanes = M.threads - w * 32;
    W.full = lanes >= 32 ? FULL : (1u << lanes) - 1;
    W.splits.push_back({0, W.full, RUNNING, 0});
    W.seen.assign(M.warp_count, 0);
    W.fenced.assign(M.warp_count, 0);
    W.seen[w] = 1;
  }
}

// Who waits for what: a barrier's number, or an mbarrier and the arrivals that it lacks.
static void report_deadlock(Machine& M) {
  for (int w = 0; w < M.warp_count; w++)
    for (const Split& s : M.warps[w].splits) {
      auto it = s.wait == YIELDED ? M.mbarriers.find(s.on - SHARED_BASE) : M.mbarriers.end();
      if (it == M.mbarriers.end()) M.report(K_deadlock, s.pc - 1, w, lowest(s.mask), 0, (i32)s.on);
      else M.report(K_deadlock, s.pc - 1, w, lowest(s.mask), s.on, it->second.pending);
    }
  M.stopped = true;
}

static void run_program(Machine& M, u64& random, bool shuffled) {
  const int PATIENCE = 1000;
  int idle = 0;  // rounds without progress
  while (!M.stopped) {
    int order[MAX_WARPS];
    for (int i = 0; i < M.warp_count; i++) order[i] = i;
    for (int i = M.warp_count - 1; shuffled && i > 0; i--) {
      random = random * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[i], order[(random >> 33) % (i + 1)]);
    }
    u64 before = M.progress;
    bool polling = false, all_done = true;
    for (int i = 0; i < M.warp_count && !M.stopped; i++) {
      Warp& W = M.warps[order[i]];
      if (W.done) continue;
      for (Split& s : W.splits)
        if (s.wait == YIELDED) s.wait = RUNNING;
      run_warp(M, order[i]);
      for (const Split& s : W.splits) polling |= s.wait == YIELDED;
    }
    if (M.stopped) return;
    for (const Warp& W : M.warps) all_done &= W.done;
    if (all_done) return;
    for (int id = 0; id < 17; id++)
      if (barrier_full(M, id)) open_barrier(M, id);
    // who polls may give up and do something else: only where that leads nowhere is there a deadlock
    idle = M.progress == before ? idle + 1 : 0;
    if (idle && (!polling || idle == PATIENCE)) report_deadlock(M);
  }
}

// ------------------------------------------------------------------------------------------------ for Python

// Zeros to note accesses in, or null. Of a view with holes, whose notes may exceed the memory, only what is touched is
// taken: calloc asks for all of it, and is refused.
const size_t LARGE = 1 << 24;
static void* notes(size_t bytes) {
  if (bytes < LARGE) return calloc(bytes, 1);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
static void free_notes(void* p, size_t bytes) {
  if (bytes < LARGE) free(p);
  else if (p) munmap(p, bytes);
}

extern "C" {
u64 emu_address(i32 buffer, u64 offset) { return GLOBAL_BASE + ((u64)buffer << WINDOW_BITS) + WINDOW_MIDDLE + offset; }
// Which buffer an address is nearest to, and at what offset; -1: none.
i32 emu_locate(u64 address, i64* offset) {
  if (address < GLOBAL_BASE) return -1;
  *offset = (i64)((address - GLOBAL_BASE) & ((1ull << WINDOW_BITS) - 1)) - WINDOW_MIDDLE;
  return (i32)((address - GLOBAL_BASE) >> WINDOW_BITS);
}

Machine* emu_new(const i64* code, i32 length, const i32* order, const i32* operands, const u32* constants, i32 slots,
                 i32 preds, i32 threads, u32 shared_bytes, i32 granule, i32 arch) {
  Machine* M = new (std::nothrow) Machine();
  if (!M) return nullptr;
  M->code = (Instruction*)malloc(sizeof(Instruction) * (length + 1));
  if (!M->code) {
    delete M;
    return nullptr;
  }
  for (i32 i = 0; i < length; i++) {
    const i64* r = code + (size_t)i * ROW;
    M->code[i] = {(i32)r[0], (i32)r[1], (i32)r[2], (i32)r[3], (i32)r[4], (i32)r[5], (i32)r[6], r[7], r[8]};
    M->uses_wgmma |= M->code[i].op == OP_wgmma;
  }
  M->length = length;
  M->order = order;
  M->operands = operands;
  M->constants = constants;
  M->slots = slots;
  M->preds = preds;
  M->threads = threads;
  M->warp_count = (threads + 31) / 32;
  M->shared_bytes = shared_bytes;
  M->granule = granule;
  M->arch = arch;
  M->counts.assign(length, Counts());
  return M;
}
void emu_params(Machine* M, const u8* params, i32 bytes) {
  M->params = params;
  M->param_bytes = bytes;
}
void emu_buffer(Machine* M, u8* host, u64 size, i32 granule, u64 view_from, u64 view_to) {
  size_t n = (size >> granule) + 2;
  M->buffers.push_back({host, size, granule, view_from, view_to, (u64*)notes(n * 8), (u64*)notes(n * 8),
                        (u8*)notes((size >> 5) + 2)});
}

// Runs the listed programs in this order. Returns the number of findings, or -1: emu_error tells.
i64 emu_run(Machine* machine, const i32* programs, i32 count, const i32* grid, i32 check_warp, u64 limit, u64 seed) {
  Machine& M = *machine;
  try {
    for (const Buffer& b : M.buffers) {
      if (b.size > (u64)WINDOW_MIDDLE) throw std::length_error("a tensor spans more than 32 GiB");
      if (!b.writes || !b.reads || !b.sectors) throw std::bad_alloc();
    }
    M.limit = limit;
    M.check_warp = check_warp;
    for (int i = 0; i < 3; i++) M.grid[i] = grid[i];
    size_t cells = (M.shared_bytes >> M.granule) + 8;
    M.shared.assign(M.shared_bytes + 64, 0);
    M.state.assign(M.shared_bytes + 64, 0);
    M.cells.assign(cells, Cell());
    M.read_times.assign(cells * M.warp_count, 0);
    M.register_file.assign((size_t)M.warp_count * M.slots * 128, 0);
    M.defined_file.assign((size_t)M.warp_count * M.slots, Planes());
    M.predicate_file.assign((size_t)M.warp_count * M.preds, 0);
    M.predicate_defined_file.assign((size_t)M.warp_count * M.preds, 0);
    M.in_flight.assign((size_t)M.warp_count * M.slots, 0);
    M.written_at.assign(M.uses_wgmma ? (size_t)M.warp_count * M.slots : 1, 0);
    u64 random = seed * 6364136223846793005ull + 1442695040888963407ull;
    for (i32 k = 0; k < count && !M.stopped; k++) {
      start_program(M, programs[k]);
      run_program(M, random, seed != 0);
    }
    return (i64)M.found.size();
  } catch (const Unsupported& e) {
    M.error = e.text;
    M.error_pc = e.pc;
  } catch (const std::exception& e) {
    M.error = e.what();
    M.error_pc = -1;
  }
  return -1;
}
const char* emu_error(Machine* M) { return M->error.c_str(); }
i32 emu_error_pc(Machine* M) { return M->error_pc; }
u64 emu_total(Machine* M) { return M->total; }
void emu_found(Machine* M, i64* out) {
  for (const Found& f : M->found) {
    const i64 row[] = {f.kind, f.pc, f.cta, f.warp, f.lane, f.other, (i64)f.address, (i64)f.count};
    memcpy(out, row, sizeof row);
    out += 8;
  }
}
void emu_counts(Machine* M, u64* out) { memcpy(out, M->counts.data(), sizeof(Counts) * M->length); }
// Different 32-byte sectors of a buffer that were read, and written.
void emu_touched(Machine* M, i32 buffer, u64* out) {
  for (int i = 0; i < 2; i++) out[i] = M->buffers[buffer].touched[i];
}
// Where a buffer's marks lie: of its (size >> 5) + 1 sectors, or of what read or wrote its (size >> granule) + 1 granules.
const void* emu_sectors(Machine* M, i32 buffer) { return M->buffers[buffer].sectors; }
const void* emu_granules(Machine* M, i32 buffer, i32 written) {
  const Buffer& b = M->buffers[buffer];
  return written ? b.writes : b.reads;
}
void emu_free(Machine* M) {
  for (Buffer& b : M->buffers) {
    size_t n = (b.size >> b.granule) + 2;
    free_notes(b.writes, n * 8);
    free_notes(b.reads, n * 8);
    free_notes(b.sectors, (b.size >> 5) + 2);
  }
  free(M->code);
  delete M;
}
}
