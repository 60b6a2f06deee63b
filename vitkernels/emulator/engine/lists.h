// The lists that C++ and Python share. C++ expands them; vitkernels/emulator/lists.py reads this file's text, so an
// entry must stay in the form X(name), X(name, number) or X(name, "text", error or note).
#pragma once

// PTX types and their bits.
#define PTX_TYPES(X) \
  X(u8, 8) X(s8, 8) X(b8, 8) X(u16, 16) X(s16, 16) X(b16, 16) X(f16, 16) X(bf16, 16) \
  X(u32, 32) X(s32, 32) X(b32, 32) X(f32, 32) X(f16x2, 32) X(bf16x2, 32) X(tf32, 32) \
  X(u64, 64) X(s64, 64) X(b64, 64) X(f64, 64) X(f32x2, 64) X(b128, 128) X(pred, 1) \
  X(e4m3, 8) X(e4m3x2, 16) X(u16x2, 32) X(s16x2, 32)

// Modifiers of an instruction; each is one bit, in this order.
#define PTX_FLAGS(X) \
  X(ftz) X(sat) X(nan) X(rz) X(rna) X(rni) X(rm) X(rp) X(trans) X(relu) X(abs) X(xorsign) X(wrap) X(wide)

// Special registers; a dot is written as an underscore.
#define PTX_SPECIALS(X) \
  X(tid_x) X(tid_y) X(tid_z) X(ntid_x) X(ntid_y) X(ntid_z) X(ctaid_x) X(ctaid_y) X(ctaid_z) \
  X(nctaid_x) X(nctaid_y) X(nctaid_z) X(laneid) X(warpid) X(nwarpid) X(clock) X(clock64) X(globaltimer) X(smid) \
  X(cluster_ctarank) X(cluster_nctarank) X(cluster_ctaid_x) X(cluster_ctaid_y) X(cluster_ctaid_z) \
  X(cluster_nctaid_x) X(cluster_nctaid_y) X(cluster_nctaid_z) X(clusterid_x) X(clusterid_y) X(clusterid_z) \
  X(nclusterid_x) X(nclusterid_y) X(nclusterid_z) X(lanemask_eq) X(lanemask_lt) X(lanemask_le) X(lanemask_gt) \
  X(lanemask_ge)

// Comparisons of setp; those that end in u are true of a NaN, lo to hs are unsigned names of lt to ge.
#define PTX_COMPARISONS(X) \
  X(eq) X(ne) X(lt) X(le) X(gt) X(ge) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(num) X(nan)

// Operations of atom, red and redux.
#define PTX_ATOMICS(X) X(add) X(min) X(max) X(and) X(or) X(xor) X(exch) X(cas)

// Fields of a tensor map, as tensormap.replace names them.
#define PTX_MAP_FIELDS(X) \
  X(global_address) X(rank) X(box_dim) X(global_dim) X(global_stride) X(element_stride) X(elemtype) \
  X(interleave_layout) X(swizzle_mode) X(fill_mode)

// Where dynamic shared memory starts, as on sm_90; log2 of the generic address of the parameters; the bit of a
// predicate operand that negates it.
#define PTX_NUMBERS(X) X(SHARED_BASE, 1024) X(PARAM_BASE_BITS, 36) X(NEGATED_BIT, 20)

#define PTX_OPS(X) \
  X(nop) X(mov) X(movp) X(pack) X(unpack) X(special) \
  X(add) X(sub) X(mul) X(mulhi) X(mulwide) X(mad) X(madwide) X(madhi) X(div) X(rem) \
  X(min) X(max) X(min3) X(max3) X(neg) X(abs) \
  X(lop3) X(not) X(shl) X(shr) X(bfe) X(bfi) X(prmt) X(shf) X(popc) X(clz) X(brev) \
  X(fma) X(sqrt) X(rsqrt) X(rcp) X(ex2) X(lg2) X(tanh) X(sin) X(cos) X(copysign) \
  X(cvt) X(cvt2) X(setp) X(selp) X(andp) X(orp) X(xorp) X(notp) X(testp) \
  X(ldparam) X(ldg) X(stg) X(lds) X(sts) X(ldmatrix) X(ldmatrix8) X(stmatrix) X(atom) X(redux) \
  X(cpasync) X(cpcommit) X(cpwait) \
  X(shfl) X(vote) X(activemask) X(elect) X(barsync) X(bararrive) X(warpsync) X(bra) X(ret) X(trap) \
  X(mbinit) X(mbinval) X(mbarrive) X(mbtest) X(cparrive) \
  X(cptensor) X(cpbulk) X(bulkcommit) X(bulkwait) X(mapreplace) X(mappublish) X(brx) \
  X(mma) X(wgmma) X(wgfence) X(wgcommit) X(wgwait) X(fenceproxy) X(membar)

// What the engine reports. A note is no error by itself.
#define PTX_FINDINGS(X) \
  X(global_read_out_of_bounds, "read outside every tensor that the kernel was given", error) \
  X(global_write_out_of_bounds, "write outside every tensor that the kernel was given", error) \
  X(outside_view, "access outside the view that was handed in, inside its storage", error) \
  X(misaligned_global, "misaligned global access", error) \
  X(global_read_race, "program reads what another program wrote", error) \
  X(global_write_race, "two programs write the same bytes", error) \
  X(global_overwrite_race, "program writes what another program read", error) \
  X(global_race_in_program, "two warps' accesses to global memory that nothing orders", error) \
  X(shared_out_of_bounds, "access outside shared memory", error) \
  X(misaligned_shared, "misaligned shared access", error) \
  X(shared_read_race, "read of another warp's write that nothing orders before it", error) \
  X(shared_overwrite_race, "write over what another warp reads, unordered", error) \
  X(shared_write_race, "two warps write different values, unordered", error) \
  X(shared_same_write, "two warps write the same value, unordered", note) \
  X(shared_unwritten, "read of shared memory that was never written", error) \
  X(warp_exchange, "exchange through shared memory within a warp without bar.warp.sync", note) \
  X(copy_read, "read of shared memory while cp.async writes it", error) \
  X(copy_overwritten, "write to shared memory while cp.async writes it", error) \
  X(copy_at_exit, "exit with asynchronous copies under way", error) \
  X(source_overwritten, "write to shared memory while wgmma or a bulk store reads it", error) \
  X(unfenced_store, "asynchronous access to what st.shared wrote without fence.proxy.async", error) \
  X(unfenced_copy, "asynchronous access to what cp.async wrote without fence.proxy.async", note) \
  X(unfenced_overwrite, "bulk copy over what st.shared wrote without fence.proxy.async", error) \
  X(mbarrier_invalid, "mbarrier used that was not initialised, or initialised twice", error) \
  X(mbarrier_overflow, "more arrivals on an mbarrier than its phase expects", error) \
  X(mbarrier_overwritten, "write over an mbarrier", error) \
  X(tensor_map, "tensor map that the hardware rejects", error) \
  X(accumulator_in_flight, "register touched while wgmma is under way", error) \
  X(unfenced_register, "register given to wgmma that was written since wgmma.fence", error) \
  X(unfenced_operand, "register of wgmma written after its wgmma.fence: ptxas orders them", note) \
  X(undefined_address, "undefined address", error) \
  X(undefined_predicate, "undefined predicate decides", error) \
  X(undefined_store, "undefined value stored to global memory", error) \
  X(undefined_product, "undefined operand of a matrix product", error) \
  X(divergent_barrier, "barrier in divergent code", error) \
  X(divergent_collective, "instruction of a whole warp in divergent code, or with operands that differ", error) \
  X(shuffle_inactive, "shuffle from an inactive lane", error) \
  X(division_by_zero, "integer division by zero", error) \
  X(trap, "trap (a failed assertion)", error) \
  X(deadlock, "deadlock", error) \
  X(instruction_limit, "more instructions than the limit", error)
