// digests.cu: which bytes are in each slot. The KV bytes themselves are read only here.
//
// kvc_digests_verify  HEAD: digests of the prefix slots that fall due, against the stored ones
// kvc_digests_layer   within a forward: digests of one layer of the prefix slots of pending rows, at the point of their read
// kvc_digests_write   TAIL: digests of the new tokens' bytes
// kvc_digests_adopt   HEAD, option: stamps and digests of prefix slots that nobody ever stamped
// kvc_digests_sweep   digests of resident slots that the host handed in
//
// A warp takes up to 32 slots at a time (digest.cuh). grid.y splits the digests of a slot, so that a slot with many planes
// is worked on by many blocks at once.
#include "digest.cuh"

// ---- verification --------------------------------------------------------------------------------------------------------
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

// Positions [first, last), of which all or many are due: the block goes through them 256 at a time.
KVC_DEVICE uint32_t kvc_verify_run(const StepParams& p, const Row& row, int32_t index, int64_t first, int64_t last,
                                   const DigestRange& range, uint32_t forward) {
    int64_t position = first + kvc_place_in_block(kvc_run_shift(p.pool, range.first));
    int64_t next = position < last ? kvc_table_slot(p.pool, p.batch, index, position).slot : -1;
    const bool any_fresh = *kvc_n_fresh(p.guard, p.pool) != 0;
    uint32_t n_compared = 0;
    for (int64_t base = first; base < last; base += KVC_THREADS, position += KVC_THREADS) {
        const int64_t slot = next;
        next = position + KVC_THREADS < last ? kvc_table_slot(p.pool, p.batch, index, position + KVC_THREADS).slot : -1;
        const bool is_due =
            slot >= 0 && (row.flags & KVC_ROW_FULL_DATA || kvc_is_in_turn(p.pool, p.batch, row.share, slot, any_fresh));
        n_compared += kvc_verify_slots(p, index, range, kvc_lane_slot(p.pool, is_due ? slot : -1, position), forward);
    }
    return n_compared;
}

// The slots that kvc_stamps_verify has listed, one digest after the other: an even share of all of them for each block of the grid.
// A block goes through its share a digest and up to 256 slots at a time: the fewer turns, the less often a digest is set up.
struct ListedTurn {
    uint32_t digest, first, n;  // entries [first, first + n) of the list
};
KVC_DEVICE ListedTurn kvc_listed_turn(int64_t item, int64_t last, uint32_t digest, uint32_t n_listed) {
    const uint32_t first = (uint32_t)(item - (int64_t)digest * n_listed);
    const int64_t left = last - item, in_digest = n_listed - first;
    const int64_t n = left < in_digest ? left : in_digest;
    return {digest, first, n < KVC_THREADS ? (uint32_t)n : KVC_THREADS};
}
// This lane's entry of a turn; few are spread over all warps.
KVC_DEVICE Due kvc_listed_entry(const Pool& pool, const Due* list, const ListedTurn& turn) {
    uint32_t shift = kvc_run_shift(pool, turn.digest);
    while (shift && (uint32_t)KVC_WARPS << shift > turn.n) --shift;
    const uint32_t place = kvc_place_in_block(shift);
    return place < turn.n ? list[turn.first + place] : Due{0, -1, 0, 0};  // a position that no entry has
}
KVC_DEVICE uint32_t kvc_verify_listed(const StepParams& p, const Due* list, uint32_t n_listed, uint32_t forward) {
    const uint32_t block = kvc_block_y() * kvc_n_blocks() + kvc_block(), n_blocks = kvc_n_blocks() * kvc_n_blocks_y();
    const Share share = kvc_even_share((int64_t)n_listed * p.pool.n_digests, block, n_blocks);
    if (share.first >= share.last) return 0;
    ListedTurn turn = kvc_listed_turn(share.first, share.last, (uint32_t)((uint64_t)share.first / n_listed), n_listed);
    Due next = kvc_listed_entry(p.pool, list, turn);
    uint32_t n_compared = 0;
    for (int64_t item = share.first; item < share.last;) {
        const Due due = next;
        const DigestRange one = {turn.digest, turn.digest + 1};
        item += turn.n;
        if (item < share.last) {
            turn = kvc_listed_turn(item, share.last, turn.digest + (turn.first + turn.n == n_listed), n_listed);
            next = kvc_listed_entry(p.pool, list, turn);
        }
        const LaneSlot at = kvc_lane_slot(p.pool, due.position >= 0 ? (int64_t)due.slot : -1, due.position);
        if (kvc_ballot(due.position >= 0)) n_compared += kvc_verify_slots(p, due.row, one, at, forward);
    }
    return n_compared;
}

// An even share of all units for each block, in the order of the rows: runs of sixteen positions of rows of which many slots are
// due. Where few are, kvc_stamps_verify has listed them; should the list have been too short, those rows are units too.
KVC_KERNEL(KVC_THREADS, 2) kvc_digests_verify(KVC_PARAM StepParams p) {
    const Pool& pool = p.pool;
    if (!kvc_is_judging(p.guard)) return;
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(pool, KVC_WORK_DATA);
    const int64_t n_units = work[p.batch.rows];
    const uint32_t n_listed = kvc_n_listed(pool);
    const bool is_list_whole = n_listed <= pool.due_capacity;
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_HEAD);
    const DigestRange range = kvc_digest_range(pool);
    kvc_begin_digests(pool);
    uint32_t n_compared = 0;
    if (n_listed && is_list_whole) n_compared += kvc_verify_listed(p, kvc_due_list(pool) + 1, n_listed, forward);
    const Share share = kvc_even_share(n_units, kvc_block(), kvc_n_blocks());
    const int64_t end = share.last;
    int64_t u = share.first;
    while (u < end) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u, n_units);
        const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
        const int64_t length = kvc_data_unit(p.batch, row), others = kvc_n_sink(pool, row) > 0;
        const int64_t left = (int64_t)kvc_data_units(pool, p.batch, row) - others - unit.chunk;
        const int64_t n = left <= 0 ? 1 : left < end - u ? left : end - u;  // the sink's unit goes alone
        const Range run = kvc_unit_range(pool, row, unit.chunk, n, length);
        if (!kvc_is_listed(pool, p.batch, row) || !is_list_whole) {
            n_compared += kvc_verify_run(p, row, unit.row, run.first, run.last, range, forward);
        }
        u += n;
    }
    const uint64_t n = kvc_block_sum(n_compared);
    if (kvc_thread() == 0 && n) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_DATA_SLOTS, n);
}

// ---- a layer of pending rows -----------------------------------------------------------------------------------------------
// A warp per unit of prefix positions, and only in the rows that were left out at HEAD because their KV was still on its way.
KVC_KERNEL(KVC_THREADS, 2) kvc_digests_layer(KVC_PARAM LayerParams p) {
    const Pool& pool = p.pool;
    if (!kvc_is_judging(p.guard)) return;
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_HEAD);
    kvc_begin_digests(pool);
    uint32_t n_compared = 0;
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u, n_units);
        const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
        if (!(row.flags & KVC_ROW_LIVE) || !(row.flags & KVC_ROW_PENDING)) continue;
        const Range range = kvc_unit_range(pool, row, unit.chunk, 1, KVC_VERIFY_UNIT);
        for (int64_t base = range.first; base < range.last; base += 32) {
            const int64_t position = base + kvc_lane();
            const int64_t slot = position < range.last ? kvc_table_slot(pool, p.batch, unit.row, position).slot : -1;
            const LaneSlot at = kvc_lane_slot(pool, slot, position);
            if (kvc_ballot(slot >= 0) == 0) continue;
            for (uint32_t i = 0; i < p.n_digests; ++i) {
                const DigestRange one = {p.digests[i], p.digests[i] + 1};
                if (kvc_ballot(kvc_compare_digests(pool, one, at, n_compared)) == 0) continue;
                const Violation about = kvc_row_violation(pool, row, unit.row, kvc_tag(KVC_STAGE_HEAD, pool.kind, 0));
                kvc_judge_digests(p.guard, pool, one, at, forward, about);
            }
        }
    }
    const uint64_t n = kvc_block_sum(n_compared);
    if (kvc_thread() == 0 && n) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_DATA_SLOTS, n);
}

// ---- new tokens ----------------------------------------------------------------------------------------------------------
// The slot of this lane's one of `each` new tokens from `base` on, and whose it is: that is looked at only once the bytes are
// read, so that stamp and claim are under way together with them.
struct NewSlot {
    LaneSlot at;
    uint64_t claim;
};
KVC_DEVICE NewSlot kvc_new_slot(const StepParams& p, int64_t base, uint32_t each) {
    const int64_t t = base + kvc_lane();
    const int64_t slot = kvc_lane() < each && t < p.batch.n_tokens ? kvc_write_slot(p.pool, p.batch, t).slot : -1;
    NewSlot n = {kvc_lane_slot(p.pool, slot, 0), 0};
    if (slot >= 0) {
        n.at.position = kvc_pointer<Stamp>(p.pool.head[0])[slot].position;
        n.claim = kvc_pointer<uint64_t>(p.pool.claims)[slot];
    }
    return n;
}

// A warp per few places of the token arrays and digest range, of one place if there are warps enough: a token that has won the
// claim on its slot belongs to a live row, and its stamp tells the position, so no row is looked up.
KVC_KERNEL(KVC_THREADS, 2) kvc_digests_write(KVC_PARAM StepParams p) {
    const Pool& pool = p.pool;
    const uint32_t forward = kvc_forward_number(p.guard);
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_TAIL);
    kvc_ask_for_digests(pool);
    const uint32_t n_warps = (uint32_t)kvc_global_warps();
    uint32_t each = ((uint32_t)p.batch.n_tokens + n_warps - 1) / n_warps;
    if (each > 4) {  // long arrays may be mostly empty: at most a hint, but worth a look
        const int32_t n_told = kvc_pointer<int32_t>(p.batch.query_start_loc)[p.batch.rows];
        if (n_told >= 0 && n_told < p.batch.n_tokens) each = ((uint32_t)n_told + n_warps - 1) / n_warps;
    }
    each = each < 1 ? 1 : each > 32 ? 32 : each;
    int64_t base = kvc_global_warp() * each;
    NewSlot next = kvc_new_slot(p, base, each);
    const DigestRange range = kvc_digest_range(pool);
    kvc_make_constants();
    while (base < p.batch.n_tokens) {
        const uint64_t claim = (uint64_t)forward << 32 | (uint64_t)(base + kvc_lane() + 1);
        if (kvc_ballot(next.at.slot >= 0)) kvc_store_digests(pool, range, next.at, next.claim, claim);
        base += (int64_t)n_warps * each;
        next = kvc_new_slot(p, base, each);
    }
}

// ---- adoption ------------------------------------------------------------------------------------------------------------
// A warp per unit of prefix positions, all digests (grid.y is 1): a slot is stamped only after its digests are there.
// kvc_stamps_verify has claimed the slots; two rows that have a slot at the same position both adopt it, and write the same.
KVC_KERNEL(KVC_THREADS, 2) kvc_digests_adopt(KVC_PARAM StepParams p) {
    const Pool& pool = p.pool;
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    const DigestRange all = {0, pool.n_digests};
    kvc_begin_digests(pool);
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u, n_units);
        const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
        if (!(row.flags & KVC_ROW_LIVE) || row.flags & KVC_ROW_PENDING) continue;
        const Range range = kvc_unit_range(pool, row, unit.chunk, 1, KVC_VERIFY_UNIT);
        for (int64_t base = range.first; base < range.last; base += 32) {
            const int64_t position = base + kvc_lane();
            int64_t slot = position < range.last ? kvc_table_slot(pool, p.batch, unit.row, position).slot : -1;
            if (slot >= 0 && kvc_pointer<uint64_t>(pool.claims)[slot] != kvc_adoption_claim(forward, position)) slot = -1;
            if (kvc_ballot(slot >= 0) == 0) continue;
            kvc_store_digests(pool, all, kvc_lane_slot(pool, slot, position), 0, 0);
            const uint32_t epoch = slot >= 0 ? kvc_block_epoch(pool, slot) : 0;
            const Stamp stamp = {0, KVC_NO_TOKEN, (int32_t)position, KVC_PREV_NONE, forward, 0, epoch};
            for (uint32_t half = 0; half < pool.n_halves && slot >= 0; ++half) {
                kvc_mutable_pointer<Stamp>(pool.head[half])[slot] = stamp;
                kvc_mutable_pointer<Stamp>(pool.tail[half])[slot] = stamp;
            }
        }
    }
}

// ---- sweep ---------------------------------------------------------------------------------------------------------------
// A warp per 32 resident slots and digest range.
KVC_KERNEL(KVC_THREADS, 2) kvc_digests_sweep(KVC_PARAM SweepParams p) {
    const Pool& pool = p.pool;
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_SWEEP);
    const DigestRange range = kvc_digest_range(pool);
    const bool any_fresh = *kvc_n_fresh(p.guard, pool) != 0;
    kvc_begin_digests(pool);
    uint32_t n_compared = 0;
    for (int64_t base = kvc_global_warp() * 32; base < p.n; base += kvc_global_warps() * 32) {
        const int64_t i = base + kvc_lane();
        int64_t slot = i < p.n ? kvc_pointer<int32_t>(p.slots)[i] : -1;
        if (slot < 0 || slot >= pool.n_slots || kvc_is_reserved(pool, slot)) slot = -1;
        if (any_fresh && slot >= 0 && kvc_is_fresh(kvc_pointer<uint64_t>(pool.claims)[slot])) slot = -1;  // perhaps on their way
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
