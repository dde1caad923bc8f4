// prefix.cuh: the pass over the prefixes of the batch, for HEAD and for TAIL: stamps of both halves against table, register and
// history; at HEAD also which slots fall due.
//
// A position that the fast path finds healthy is done; any other is judged anew, from memory, by judge.cuh. So the fast path
// may be wrong in one direction only: it must not call healthy what the judgement would report.
#pragma once
#include "judge.cuh"

// ---- fast path -----------------------------------------------------------------------------------------------------------
// What the loop wants to know of a row, in the shape in which it wants it.
struct HotRow {
    TableRow table;
    const int32_t* history;  // of position known_from; null: none
    uint32_t known_from, n_known;
    uint32_t anchored_at;  // the position whose chain must be the anchor
    uint32_t request_id;
    uint64_t anchor;
    bool is_listed, any_fresh;  // HEAD: whether the slots that fall due are listed, and whether fresh ones may be among them
    uint32_t share;             // the share of the data that is due
};
template <uint32_t STAGE>
KVC_DEVICE HotRow kvc_hot_row(const StepParams& p, const Row& row, int32_t index) {
    const Batch& batch = p.batch;
    HotRow hot = {kvc_table_row(batch, index), nullptr, 0, 0, 0xffffffffu, row.request_id, row.anchor, false, false, row.share};
    if (STAGE == KVC_STAGE_HEAD && kvc_is_listed(p.pool, batch, row) && !(row.flags & KVC_ROW_PENDING)) {
        hot.is_listed = true;
        hot.any_fresh = kvc_load_volatile_u32(kvc_n_fresh(p.guard, p.pool)) != 0;
    }
    const int64_t offset = p.pool.token_offset;
    if (batch.token_history && row.request_slot >= 0 && batch.history_length > offset) {
        hot.known_from = offset < 0 ? (uint32_t)-offset : 0;
        const int64_t n_known = batch.history_length - offset - hot.known_from;
        hot.n_known = n_known > KVC_MAX_POSITIONS ? KVC_MAX_POSITIONS : n_known > 0 ? (uint32_t)n_known : 0;
        hot.history = kvc_pointer<int32_t>(batch.token_history) + row.request_slot * batch.history_length + offset + hot.known_from;
    }
    if (row.flags & KVC_ROW_ANCHORED && row.prefix > 0) hot.anchored_at = (uint32_t)row.prefix - 1;
    return hot;
}

// A stamp as it comes from memory, in two loads: x, y = chain; z = token; w = position; then prev_slot, step, owner, epoch.
struct RawStamp {
    kvc_u128 front, back;
};
KVC_DEVICE RawStamp kvc_raw_stamp(uint64_t plane, int32_t slot) {
    const uint64_t address = plane + (uint64_t)(uint32_t)slot * sizeof(Stamp);
    return {kvc_load_u128_if((const void*)address, slot >= 0), kvc_load_u128_if((const void*)(address + 16), slot >= 0)};
}
KVC_DEVICE uint32_t kvc_differs(const kvc_u128& a, const kvc_u128& b) {
    return (a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w);
}

// What the stamps of a position say at a stage, both halves at once.
struct Seen {
    uint64_t chain;
    int32_t token;
    uint32_t position;
    bool is_same;      // in both halves
    bool is_judged;    // false: written in this forward, or (TAIL) never
    bool is_whole;     // written, and (TAIL) of the forward of the HEAD stamp
    bool is_relative;
    bool is_linkable;  // the next position's link to it can be judged
};
struct Raw {
    RawStamp k, v;
    uint32_t head_steps[2];
};
template <uint32_t STAGE>
KVC_DEVICE Raw kvc_raw(const Pool& pool, int32_t slot) {
    const uint64_t* planes = STAGE == KVC_STAGE_HEAD ? pool.head : pool.tail;
    const uint32_t other = pool.n_halves - 1;  // of one half, the same again: it costs nothing but the second look
    Raw raw;
    raw.k = kvc_raw_stamp(planes[0], slot);
    raw.v = kvc_raw_stamp(planes[other], slot);
    raw.head_steps[0] = raw.head_steps[1] = 0;
    if (STAGE == KVC_STAGE_TAIL) {
        const uint64_t offset = (uint64_t)(uint32_t)slot * sizeof(Stamp) + 20;
        raw.head_steps[0] = kvc_load_u32_if((const void*)(pool.head[0] + offset), slot >= 0);
        raw.head_steps[1] = kvc_load_u32_if((const void*)(pool.head[other] + offset), slot >= 0);
    }
    return raw;
}
template <uint32_t STAGE>
KVC_DEVICE Seen kvc_see(const Raw& raw, uint32_t forward) {
    const RawStamp &k = raw.k, &v = raw.v;
    const uint32_t step = k.back.y;
    const uint32_t head_steps[2] = {STAGE == KVC_STAGE_HEAD ? step : raw.head_steps[0],
                                    STAGE == KVC_STAGE_HEAD ? v.back.y : raw.head_steps[1]};
    Seen seen;
    seen.chain = (uint64_t)k.front.y << 32 | k.front.x;
    seen.token = (int32_t)k.front.z;
    seen.position = k.front.w;
    seen.is_judged = STAGE == KVC_STAGE_HEAD || (head_steps[0] != 0 && head_steps[0] != forward);
    seen.is_whole = step != 0 && step == head_steps[0];
    seen.is_relative = (int32_t)k.back.x <= KVC_PREV_RELATIVE;
    seen.is_linkable = seen.is_judged && seen.is_whole && seen.token != KVC_NO_TOKEN && !seen.is_relative;
    const bool is_equal = (kvc_differs(k.front, v.front) | kvc_differs(k.back, v.back)) == 0;
    // What is not judged may differ: at TAIL, stamps that are being written.
    seen.is_same = head_steps[0] == head_steps[1] && (is_equal || !seen.is_judged);
    return seen;
}

// What the positions before those at hand leave to them. It must be the same in both halves, or the first lane is odd.
struct Carried {
    uint64_t chain;
    uint32_t is_linkable, is_same;
};

// Whether this lane's position is plainly healthy. All lanes take part; lane 0 finds its predecessor's link in `carried`, which
// then gets the last lane's.
template <uint32_t STAGE>
KVC_DEVICE bool kvc_is_healthy(const HotRow& hot, uint32_t position, int32_t slot, const Seen& seen, Carried& carried) {
    const uint32_t lane = kvc_lane();
    int32_t expected = KVC_NO_TOKEN;
    if (position - hot.known_from < hot.n_known && slot >= 0) expected = hot.history[position - hot.known_from];
    const uint32_t linkable = kvc_ballot(slot >= 0 && seen.is_linkable), same = kvc_ballot(seen.is_same);
    const uint64_t rotated = kvc_shfl_u64(seen.chain, (lane - 1) & 31);
    const uint64_t previous = lane ? rotated : carried.chain;
    const bool has_link = (linkable << 1 | carried.is_linkable) >> lane & 1;
    const bool is_same = (same & (same << 1 | carried.is_same)) >> lane & 1;
    carried = {rotated, linkable >> 31, same >> 31};  // the chain is right in lane 0
    bool is_healthy = seen.is_whole && seen.position == position;
    if (seen.token != KVC_NO_TOKEN) {  // not adopted
        is_healthy &= !seen.is_relative && (expected < 0 || expected == seen.token);
        is_healthy &= position != hot.anchored_at || seen.chain == hot.anchor;
        is_healthy &= !has_link || seen.chain == kvc_link(previous, seen.token, (int32_t)seen.position);
    }
    if (STAGE == KVC_STAGE_TAIL) is_healthy |= !seen.is_judged;
    return slot >= 0 && is_same && is_healthy;
}

// Whether what a lane sees is plainly of the block's epoch, and in a block that its row may read.
template <uint32_t STAGE>
KVC_DEVICE bool kvc_is_of_its_block(const Pool& pool, const Batch& batch, const HotRow& hot, int32_t slot, const Raw& raw,
                                    uint32_t forward) {
    const uint32_t number = kvc_divide((uint32_t)slot, pool.page_size, pool.page_shift);
    const kvc_u128 word = kvc_load_u128_if(kvc_pointer<BlockState>(pool.blocks) + number, slot >= 0);
    const BlockState block = {word.x, word.y, word.z, word.w};
    const uint32_t head_step = STAGE == KVC_STAGE_HEAD ? raw.k.back.y : raw.head_steps[0];
    if (STAGE == KVC_STAGE_TAIL && (head_step == 0 || head_step == forward)) return true;  // not judged there
    const bool is_of_epoch = raw.k.back.w == block.epoch || head_step == forward;
    return is_of_epoch && !kvc_may_not_read(block, batch.request_ids, hot.request_id);
}

// ---- which slots fall due --------------------------------------------------------------------------------------------------
// Of a row of which few slots do: lists those that do among the lanes' slots (-1: none). All lanes take part. A list that is
// full only counts on. What other blocks adopt meanwhile changes nothing: a fresh slot whose stamp is known is not adopted.
KVC_DEVICE void kvc_list_due(const Pool& pool, const Batch& batch, const HotRow& hot, int32_t index, uint32_t position,
                             int32_t slot) {
    const bool is_due = slot >= 0 && kvc_is_in_turn(pool, batch, hot.share, slot, hot.any_fresh);
    const uint32_t due = kvc_ballot(is_due);
    if (due == 0) return;
    Due* list = kvc_due_list(pool);
    uint32_t place = 0;
    if (kvc_lane() == 0) place = kvc_atomic_add_u32(&list->slot, kvc_popcount(due));
    place = kvc_shfl_u32(place, 0) + kvc_popcount(due & ((1u << kvc_lane()) - 1));
    if (is_due && place < pool.due_capacity) list[1 + place] = {(uint32_t)slot, (int32_t)position, index, 0};
}
// Positions of a ring, or of the sink.
KVC_NOINLINE void kvc_list_due_run(const StepParams& p, int32_t index, uint32_t first, uint32_t last) {
    const HotRow hot = kvc_hot_row<KVC_STAGE_HEAD>(p, kvc_pointer<Row>(p.pool.rows)[index], index);
    if (!hot.is_listed) return;
    for (uint32_t base = first; base < last; base += 32) {
        const uint32_t position = base + kvc_lane();
        const int32_t slot = position < last ? (int32_t)kvc_table_slot(p.pool, p.batch, index, position).slot : -1;
        kvc_list_due(p.pool, p.batch, hot, index, position, slot);
    }
}

// ---- runs ------------------------------------------------------------------------------------------------------------------
// A warp goes through neighbouring positions of a row, 64 at a time: all their stamps are under way at once, and the table entries of
// the next ones. (More of them are more code, which in a step has to be fetched anew, and more registers than there are.) A lane
// gets its predecessor's link from the lane below, the first one from memory.
#define KVC_AT_ONCE KVC_VERIFY_UNIT
#define KVC_GROUPS (KVC_AT_ONCE / 32)
struct Entries {
    uint32_t own[KVC_GROUPS], before;  // before: of the position before them
};
KVC_DEVICE Entries kvc_entries(const Batch& batch, const HotRow& hot, uint32_t first) {
    Entries e;
#pragma unroll
    for (uint32_t g = 0; g < KVC_GROUPS; ++g) e.own[g] = kvc_fast_entry(batch, hot.table, first + 32 * g + kvc_lane());
    e.before = kvc_fast_entry(batch, hot.table, first - 1);  // beyond any table for position 0
    return e;
}

// Whether this lane has found something odd in positions [first, last), at most 64, of a live row; HEAD also lists those that fall
// due. `entries` are theirs; afterwards those of the 64 behind them.
template <uint32_t STAGE>
KVC_DEVICE bool kvc_is_any_odd(const StepParams& p, const HotRow& hot, int32_t index, uint32_t first, uint32_t last,
                               Entries& entries, uint32_t forward) {
    const Pool& pool = p.pool;
    const Batch& batch = p.batch;
    const uint32_t lane = kvc_lane();
    int32_t slots[KVC_GROUPS];
    Raw raw[KVC_GROUPS];
#pragma unroll
    for (uint32_t g = 0; g < KVC_GROUPS; ++g) {
        const uint32_t position = first + 32 * g + lane;
        slots[g] = position < last ? kvc_fast_slot(pool, batch, entries.own[g], position) : -1;
        raw[g] = kvc_raw<STAGE>(pool, slots[g]);
    }
    const int32_t before = lane == 0 && first ? kvc_fast_slot(pool, batch, entries.before, first - 1) : -1;
    const Raw raw_before = kvc_raw<STAGE>(pool, before);
    entries = kvc_entries(batch, hot, first + KVC_AT_ONCE);
    if (STAGE == KVC_STAGE_HEAD && hot.is_listed) {  // while the stamps are on their way
#pragma unroll
        for (uint32_t g = 0; g < KVC_GROUPS; ++g) kvc_list_due(pool, batch, hot, index, first + 32 * g + lane, slots[g]);
    }
    Carried carried = {0, 1, 1};  // before position 0 stands the anchor
    if (first == 0) {
        carried.chain = kvc_anchor(batch.salts ? kvc_pointer<uint64_t>(batch.salts)[index] : 0);
    } else {
        const Seen seen = kvc_see<STAGE>(raw_before, forward);
        carried.chain = seen.chain;
        carried.is_linkable = kvc_ballot(before >= 0 && seen.is_linkable) & 1;
        carried.is_same = kvc_ballot(seen.is_same) & 1;
    }
    bool is_odd = false;
    if (pool.blocks) {
#pragma unroll
        for (uint32_t g = 0; g < KVC_GROUPS; ++g) {
            is_odd |= first + 32 * g + lane < last && !kvc_is_of_its_block<STAGE>(pool, batch, hot, slots[g], raw[g], forward);
        }
    }
#pragma unroll
    for (uint32_t g = 0; g < KVC_GROUPS; ++g) {
        const uint32_t position = first + 32 * g + lane;
        const bool is_healthy = kvc_is_healthy<STAGE>(hot, position, slots[g], kvc_see<STAGE>(raw[g], forward), carried);
        is_odd |= position < last && !is_healthy;
    }
    return is_odd;
}

// Positions [first, stop) of a live row. What is odd is judged once the warp is through: a call inside the loop costs the loop
// registers. (The one that looks for fresh slots, in a pool that has some, costs eleven, which there are.)
template <uint32_t STAGE>
KVC_DEVICE void kvc_verify_stamps(const StepParams& p, const Row& row, int32_t index, uint32_t first, uint32_t stop,
                                  uint32_t forward) {
    const HotRow hot = kvc_hot_row<STAGE>(p, row, index);
    uint32_t odd = stop;  // from where on it takes a closer look
    if (row.flags & KVC_ROW_RELATIVE && hot.anchored_at - first < stop - first) {
        odd = hot.anchored_at - (hot.anchored_at - first) % KVC_AT_ONCE;
    }
    Entries entries = kvc_entries(p.batch, hot, first);
#pragma unroll 1
    for (uint32_t position = first; position < stop; position += KVC_AT_ONCE) {
        const uint32_t end = position + KVC_AT_ONCE, last = end < stop ? end : stop;
        const bool is_odd = kvc_is_any_odd<STAGE>(p, hot, index, position, last, entries, forward);
        if (kvc_ballot(is_odd) && position < odd) odd = position;
    }
    if (odd < stop) kvc_judge_run(p, index, odd, stop, STAGE, forward);
}

// This warp's part of all prefix positions; returns how many there were in its first lane, 0 in the others.
template <uint32_t STAGE>
KVC_DEVICE uint32_t kvc_verify_prefixes(const StepParams& p, uint32_t forward) {
    const int64_t* work = kvc_work(p.pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    const Share share = kvc_even_share(n_units, (uint32_t)kvc_global_warp(), (uint32_t)kvc_global_warps());
    const int64_t end = share.last;
    int64_t u = share.first;
    uint32_t n_entries = 0;
    while (u < end) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u, n_units);
        const Row row = kvc_pointer<Row>(p.pool.rows)[unit.row];
        const int64_t n_left = (int64_t)kvc_units((uint32_t)(row.verify_end - row.verify_start), KVC_VERIFY_UNIT) - unit.chunk;
        const bool is_run = n_left > 0 && !p.pool.ring_length;
        const int64_t n = !is_run ? 1 : n_left < end - u ? n_left : end - u;
        u += n;
        if (!(row.flags & KVC_ROW_LIVE)) continue;
        const Range range = kvc_unit_range(p.pool, row, unit.chunk, n, KVC_VERIFY_UNIT);
        if (is_run) {
            kvc_verify_stamps<STAGE>(p, row, unit.row, (uint32_t)range.first, (uint32_t)range.last, forward);
        } else {  // a unit of a ring, or the sink
            kvc_judge_run(p, unit.row, (uint32_t)range.first, (uint32_t)range.last, STAGE, forward);
            if (STAGE == KVC_STAGE_HEAD) kvc_list_due_run(p, unit.row, (uint32_t)range.first, (uint32_t)range.last);
        }
        n_entries += (uint32_t)(range.last - range.first);
    }
    return kvc_lane() == 0 ? n_entries : 0;
}
