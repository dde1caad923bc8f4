// report.cuh: violation records into the mapped ring, taint, and the run counters.
//
// The ring lies in pinned host memory. A writer claims a place by compare-and-swap on a counter in device memory, and only
// if the host has read far enough; so no record is ever overwritten before it was read, and record 0 never. Row first, then
// a system fence, then the commit word: the host sees a whole record or none.
#pragma once
#include "blocks.cuh"

KVC_DEVICE Violation kvc_no_violation() {
    Violation v = {};
    v.plane = -1;
    v.row = -1;
    v.request_slot = -1;
    v.stored_token = KVC_NO_TOKEN;
    v.expected_token = KVC_NO_TOKEN;
    v.stored_position = -1;
    v.prev_slot = -1;
    return v;
}

KVC_DEVICE Violation kvc_row_violation(const Pool& pool, const Row& row, int32_t row_index, uint32_t tag) {
    Violation v = kvc_no_violation();
    v.tag = tag;
    v.pool = (int32_t)pool.index;
    v.row = row_index;
    v.request_id = row.request_id;
    v.request_slot = row.request_slot;
    v.flags = row.flags;
    return v;
}

KVC_DEVICE void kvc_put_stamp(Violation& v, const Stamp& stamp) {
    v.stored_chain = stamp.chain;
    v.stored_token = stamp.token;
    v.stored_position = stamp.position;
    v.prev_slot = kvc_continued_slot(stamp);
    v.stamp_owner = stamp.owner;
    v.stamp_step = stamp.step;
    v.stamp_epoch = stamp.epoch;
}

// Whose the slot's block is, where the record is about a slot of the pool.
KVC_DEVICE void kvc_put_block(Violation& v, const Pool& pool) {
    const bool is_slot = v.detail == KVC_DETAIL_SLOT || v.detail == KVC_DETAIL_UNFINISHED || v.detail == KVC_DETAIL_SCRUB ||
                         v.detail == KVC_DETAIL_RESERVED;
    if (!pool.blocks || !is_slot || v.slot < 0 || v.slot >= pool.n_slots) return;
    const BlockState block = kvc_block_state(pool, v.slot);
    v.block_owner = block.owner;
    v.block_epoch = block.epoch;
    v.block_since = block.since;
    v.block_flags = block.flags;
}

// Out of line: it is rare, and would weigh down the code around every call.
KVC_NOINLINE void kvc_report(const Guard& guard, const Pool& pool, Violation v) {
    uint64_t* state = kvc_state(guard);
    uint64_t* control = kvc_mutable_pointer<uint64_t>(guard.control);
    v.step = (uint32_t)state[KVC_STATE_STEP];
    v.forward = (uint32_t)state[KVC_STATE_FORWARD];
    kvc_put_block(v, pool);
    if (v.row >= 0 && (uint32_t)v.row < pool.max_requests) {
        kvc_atomic_or_u32(kvc_mutable_pointer<uint32_t>(guard.taint) + v.row, v.reasons);
    }
    kvc_atomic_add_u64(state + KVC_STATE_OBSERVATIONS, 1);
    uint64_t claim = kvc_load_volatile_u64(state + KVC_STATE_CLAIMED);
    for (;;) {
        // Signed: between the two loads others may have claimed and the host read on, so that READ is above this claim.
        const uint64_t n_read = kvc_load_volatile_u64(control + KVC_CONTROL_READ);
        if ((int64_t)(claim - n_read) >= (int64_t)guard.ring_capacity) {
            kvc_atomic_add_u64(state + KVC_STATE_DROPPED, 1);
            return;
        }
        const uint64_t seen = kvc_atomic_cas_u64(state + KVC_STATE_CLAIMED, claim, claim + 1);
        if (seen == claim) break;
        claim = seen;
    }
    const uint64_t place = claim == 0 ? 0 : 1 + (claim - 1) % guard.ring_capacity;
    Violation* record = kvc_mutable_pointer<Violation>(guard.ring) + place;
    v.commit = 0;
    *record = v;
    kvc_fence_system();
    kvc_store_volatile_u64(&record->commit, claim + 1);
    kvc_store_volatile_u64(control + KVC_CONTROL_ALARM, claim + 1);
}

// A launch covers the tags of both halves; called by one thread of the grid.
KVC_DEVICE void kvc_count_launch(const Guard& guard, const Pool& pool, uint32_t stage) {
    uint64_t* runs = kvc_mutable_pointer<uint64_t>(guard.kernel_runs) + (int64_t)pool.index * KVC_N_TAGS;
    for (uint32_t half = 0; half < pool.n_halves; ++half) kvc_atomic_add_u64(runs + kvc_tag(stage, pool.kind, half), 1);
}

KVC_DEVICE void kvc_count_entries(const Guard& guard, const Pool& pool, uint32_t stage, uint64_t n) {
    if (n == 0) return;
    uint64_t* runs = kvc_mutable_pointer<uint64_t>(guard.slot_runs) + (int64_t)pool.index * KVC_N_TAGS;
    for (uint32_t half = 0; half < pool.n_halves; ++half) kvc_atomic_add_u64(runs + kvc_tag(stage, pool.kind, half), n);
}

KVC_DEVICE void kvc_count_data_launch(const Guard& guard, const Pool& pool, uint32_t stage) {
    kvc_atomic_add_u64(kvc_mutable_pointer<uint64_t>(guard.data_runs) + (int64_t)pool.index * 3 + stage, 1);
}
