// digests.cu: which bytes are in each slot. The KV bytes themselves are read only here.
//
// kvc_digests_verify  HEAD: digests of the prefix slots that fall due, against the stored ones
// kvc_digests_write   TAIL: digests of the new tokens' bytes
// kvc_digests_adopt   HEAD, option: stamps and digests of prefix slots that nobody ever stamped
// kvc_digests_sweep   digests of resident slots that the host handed in
//
// A warp takes up to 32 slots at a time (digest.cuh). grid.y splits the digests of a slot, so that a slot with many planes
// is worked on by many blocks at once.
#include "digest.cuh"

// ---- verification --------------------------------------------------------------------------------------------------------
// Slots that fell due in a chunk in which few do, gathered by the block so that its warps can share them.
struct DueList {
    uint32_t count;
    uint32_t slot[KVC_DATA_LIST];
    int32_t position[KVC_DATA_LIST];
};

// Puts the slots of the warp's lanes into the list. All lanes take part; there is room for all of them.
KVC_DEVICE void kvc_list_due(DueList& list, bool is_due, int64_t slot, int64_t position) {
    const uint32_t due = kvc_ballot(is_due);
    if (due == 0) return;
    uint32_t place = 0;
    if (kvc_lane() == 0) place = kvc_atomic_add_u32(&list.count, kvc_popcount(due));
    place = kvc_shfl_u32(place, 0) + kvc_popcount(due & ((1u << kvc_lane()) - 1));
    if (!is_due) return;
    list.slot[place] = (uint32_t)slot;
    list.position[place] = (int32_t)position;
}

// Slots of a row's prefix, one a lane. All lanes take part; returns the digests compared.
KVC_DEVICE uint32_t kvc_verify_slots(const StepParams& p, int32_t index, const DigestRange& range, const LaneSlot& at,
                                     uint32_t forward) {
    uint32_t n_compared = 0;
    const bool is_odd = kvc_compare_digests(p.pool, range, at, n_compared);
    if (kvc_ballot(is_odd)) {
        const Row row = kvc_pointer<Row>(p.pool.rows)[index];
        const Violation about = kvc_row_violation(p.pool, row, index, kvc_tag(KVC_STAGE_HEAD, p.pool.kind, 0));
        kvc_judge_digests(p.guard, p.pool, range, at, forward, about);
    }
    return n_compared;
}

// All positions [first, last) are due: the block goes through them 256 at a time, each warp taking every eighth run of `run`
// neighbours, so that its warps read the same few pages of memory at any time.
KVC_DEVICE uint32_t kvc_verify_all_due(const StepParams& p, int32_t index, int64_t first, int64_t last, const DigestRange& range,
                                       uint32_t forward) {
    const uint32_t n_words = kvc_pointer<Digest>(p.pool.digest_units)[range.first].n_words;
    const uint32_t shift = n_words >= 512 ? 1 : n_words >= 256 ? 2 : n_words >= 128 ? 3 : 4, run = 1u << shift;  // about 4 KiB
    const uint32_t lane = kvc_lane();
    int64_t position = first + ((lane >> shift) * KVC_WARPS << shift) + (kvc_warp_in_block() << shift) + (lane & (run - 1));
    int64_t next = position < last ? kvc_table_slot(p.pool, p.batch, index, position).slot : -1;
    uint32_t n_compared = 0;
    for (int64_t base = first; base < last; base += KVC_THREADS, position += KVC_THREADS) {
        const int64_t slot = next;
        next = position + KVC_THREADS < last ? kvc_table_slot(p.pool, p.batch, index, position + KVC_THREADS).slot : -1;
        n_compared += kvc_verify_slots(p, index, range, kvc_lane_slot(p.pool, slot, position), forward);
    }
    return n_compared;
}

// Those of the list: each warp takes one digest of up to 32 of them at a time. The list is complete and synchronised.
KVC_DEVICE uint32_t kvc_verify_listed(const StepParams& p, int32_t index, const DueList& list, const DigestRange& range,
                                      uint32_t forward) {
    const uint32_t n_parts = (list.count + 31) / 32;
    uint32_t n_compared = 0;
    for (uint32_t task = kvc_warp_in_block(); task < n_parts * (range.last - range.first); task += KVC_WARPS) {
        const uint32_t d = range.first + task / n_parts, entry = task % n_parts * 32 + kvc_lane();
        const bool is_there = entry < list.count;
        const LaneSlot at = kvc_lane_slot(p.pool, is_there ? (int64_t)list.slot[entry] : -1, is_there ? list.position[entry] : 0);
        n_compared += kvc_verify_slots(p, index, {d, d + 1}, at, forward);
    }
    return n_compared;
}

// Positions [first, last), of which few fall due: the block looks through all of them, then digests those that do.
KVC_DEVICE uint32_t kvc_verify_few_due(const StepParams& p, const Row& row, int32_t index, int64_t first, int64_t last,
                                       DueList& list, const DigestRange& range, uint32_t forward) {
    const KvcSlot none = {-1, 0, KVC_SLOT_EMPTY};
    uint32_t n_compared = 0;
    int64_t position = first + kvc_thread();
    KvcSlot next = position < last ? kvc_table_slot(p.pool, p.batch, index, position) : none;
    for (int64_t base = first; base < last; base += KVC_THREADS, position += KVC_THREADS) {
        const KvcSlot at = next;
        next = position + KVC_THREADS < last ? kvc_table_slot(p.pool, p.batch, index, position + KVC_THREADS) : none;
        const bool is_due = at.status == KVC_SLOT_OK && kvc_share(at.slot, p.batch.verify_data_every) == row.share;
        kvc_list_due(list, is_due, at.slot, position);
        kvc_sync_block();
        const uint32_t count = list.count;
        const bool is_last = base + KVC_THREADS >= last;
        if (count && (is_last || count + KVC_THREADS > KVC_DATA_LIST)) {
            n_compared += kvc_verify_listed(p, index, list, range, forward);
            kvc_sync_block();
            if (kvc_thread() == 0) list.count = 0;
        }
        kvc_sync_block();
    }
    return n_compared;
}

// An even share of all units for each block, in the order of the rows; a unit is about sixteen slots that are due: as many
// positions where all are, many more where few are (kvc_stamps_write has counted them).
KVC_KERNEL(KVC_THREADS, 3) kvc_digests_verify(KVC_PARAM StepParams p) {
    KVC_SHARED DueList list;
    const Pool& pool = p.pool;
    if (!kvc_is_judging(p.guard)) return;
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(pool, KVC_WORK_DATA);
    const int64_t n_units = work[p.batch.rows];
    const DigestRange range = kvc_digest_range(pool);
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_HEAD);
    if (kvc_thread() == 0) list.count = 0;
    kvc_make_constants();
    uint32_t n_compared = 0;
    int64_t u = n_units * kvc_block() / kvc_n_blocks();
    const int64_t end = n_units * (kvc_block() + 1) / kvc_n_blocks();
    while (u < end) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u, n_units);
        const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
        const int64_t length = kvc_data_unit(p.batch, row), left = kvc_data_units(p.batch, row) - unit.chunk;
        const int64_t n = left < end - u ? left : end - u;
        const int64_t first = row.verify_start + unit.chunk * length;
        const int64_t last = first + n * length < row.verify_end ? first + n * length : row.verify_end;
        n_compared += row.flags & KVC_ROW_FULL_DATA
                          ? kvc_verify_all_due(p, unit.row, first, last, range, forward)
                          : kvc_verify_few_due(p, row, unit.row, first, last, list, range, forward);
        u += n > 0 ? n : 1;
    }
    const uint64_t n = kvc_block_sum(n_compared);
    if (kvc_thread() == 0 && n) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_DATA_SLOTS, n);
}

// ---- new tokens ----------------------------------------------------------------------------------------------------------
// A warp per few places of the token arrays and digest range, of one place if there are warps enough: a token that has won the
// claim on its slot belongs to a live row, and its stamp tells the position, so no row is looked up.
KVC_KERNEL(KVC_THREADS, 3) kvc_digests_write(KVC_PARAM StepParams p) {
    const Pool& pool = p.pool;
    const uint32_t forward = kvc_forward_number(p.guard);
    const DigestRange range = kvc_digest_range(pool);
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_TAIL);
    const int64_t n_told = kvc_pointer<int32_t>(p.batch.query_start_loc)[p.batch.rows];  // at most a hint
    int64_t each = (n_told + kvc_global_warps() - 1) / kvc_global_warps();
    each = each < 1 ? 1 : each > 32 ? 32 : each;
    kvc_make_constants();
    for (int64_t base = kvc_global_warp() * each; base < p.batch.n_tokens; base += kvc_global_warps() * each) {
        const int64_t t = base + kvc_lane();
        int64_t slot = -1;
        int32_t position = 0;
        if (kvc_lane() < each && t < p.batch.n_tokens) slot = kvc_write_slot(pool, p.batch, t).slot;
        if (slot >= 0) {
            position = kvc_pointer<Stamp>(pool.head[0])[slot].position;
            if (kvc_pointer<uint64_t>(pool.claims)[slot] != ((uint64_t)forward << 32 | (uint64_t)(t + 1))) slot = -1;
        }
        if (kvc_ballot(slot >= 0)) kvc_store_digests(pool, range, kvc_lane_slot(pool, slot, position));
    }
}

// ---- adoption ------------------------------------------------------------------------------------------------------------
// A warp per 32 prefix positions, all digests (grid.y is 1): a slot is stamped only after its digests are there.
// kvc_stamps_verify has claimed the slots; two rows that have a slot at the same position both adopt it, and write the same.
KVC_KERNEL(KVC_THREADS, 3) kvc_digests_adopt(KVC_PARAM StepParams p) {
    const Pool& pool = p.pool;
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(pool, KVC_WORK_VERIFY);
    const int64_t n = work[p.batch.rows];
    kvc_make_constants();
    for (int64_t at = kvc_global_warp() * 32; at < n; at += kvc_global_warps() * 32) {
        const int64_t end = at + 32 < n ? at + 32 : n;
        for (int64_t i = at; i < end;) {  // once for each row of which some positions are among them
            const KvcUnit unit = kvc_find_unit(work, p.batch.rows, i, n);
            const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
            const int64_t first = row.verify_start + unit.chunk, position = first + kvc_lane();
            const int64_t last = first + (end - i) < row.verify_end ? first + (end - i) : row.verify_end;
            int64_t slot = -1;
            if (row.flags & KVC_ROW_LIVE && !(row.flags & KVC_ROW_PENDING) && position < last) {
                slot = kvc_table_slot(pool, p.batch, unit.row, position).slot;
                const bool is_mine =
                    slot >= 0 && kvc_pointer<uint64_t>(pool.claims)[slot] == kvc_adoption_claim(forward, position);
                if (!is_mine) slot = -1;
            }
            if (kvc_ballot(slot >= 0)) {
                kvc_store_digests(pool, {0, pool.n_digests}, kvc_lane_slot(pool, slot, position));
                const Stamp stamp = {0, KVC_NO_TOKEN, (int32_t)position, KVC_PREV_NONE, forward, 0, 0};
                for (uint32_t half = 0; half < pool.n_halves && slot >= 0; ++half) {
                    kvc_mutable_pointer<Stamp>(pool.head[half])[slot] = stamp;
                    kvc_mutable_pointer<Stamp>(pool.tail[half])[slot] = stamp;
                }
            }
            i += last > first ? last - first : 1;
        }
    }
}

// ---- sweep ---------------------------------------------------------------------------------------------------------------
// A warp per 32 resident slots and digest range.
KVC_KERNEL(KVC_THREADS, 3) kvc_digests_sweep(KVC_PARAM SweepParams p) {
    const Pool& pool = p.pool;
    const DigestRange range = kvc_digest_range(pool);
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_SWEEP);
    kvc_make_constants();
    uint32_t n_compared = 0;
    for (int64_t base = kvc_global_warp() * 32; base < p.n; base += kvc_global_warps() * 32) {
        const int64_t i = base + kvc_lane();
        int64_t slot = i < p.n ? kvc_pointer<int32_t>(p.slots)[i] : -1;
        if (slot < 0 || slot >= pool.n_slots || kvc_is_reserved(pool, slot)) slot = -1;
        const LaneSlot at = kvc_lane_slot(pool, slot, slot >= 0 ? kvc_pointer<int32_t>(p.positions)[i] : 0);
        const bool is_odd = kvc_compare_digests(pool, range, at, n_compared);
        if (kvc_ballot(is_odd)) {
            Violation about = kvc_no_violation();
            about.pool = (int32_t)pool.index;
            about.tag = kvc_tag(KVC_STAGE_SWEEP, pool.kind, 0);
            kvc_judge_digests(p.guard, pool, range, at, 0, about);
        }
    }
    const uint64_t n = kvc_block_sum(n_compared);
    if (kvc_thread() == 0 && n) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_DATA_SLOTS, n);
}
