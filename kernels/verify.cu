// verify.cu: who is in each slot. HEAD and TAIL of a forward, and the sweep.
//
// kvc_stamps_verify  an even share of all prefix positions per warp: HEAD stamps of both halves against table, register, history;
//                    and for kvc_digests_verify, which slots fall due
// kvc_stamps_tail    the same for TAIL stamps of the prefix; the new tokens: looked up through the table, TAIL stamps written
// kvc_stamps_sweep   a lane per resident slot that the host handed in
#include "prefix.cuh"

// ---- kvc_stamps_verify ---------------------------------------------------------------------------------------------------
// Claims the slots that kvc_digests_adopt will take: rows may share one, and a broken table may name it at two positions;
// the lowest position has it. Counts the slots that nobody had claimed before.
KVC_DEVICE void kvc_claim_unknown(const StepParams& p, uint32_t forward) {
    const Pool& pool = p.pool;
    const int64_t* work = kvc_work(pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    uint64_t n_claimed = 0;
    uint32_t n_taken = 0;  // of fresh ones
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u, n_units);
        const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
        if (!(row.flags & KVC_ROW_LIVE) || row.flags & KVC_ROW_PENDING) continue;
        const Range range = kvc_unit_range(pool, row, unit.chunk, 1, KVC_VERIFY_UNIT);
        for (int64_t position = range.first + kvc_lane(); position < range.last; position += 32) {
            const KvcSlot at = kvc_table_slot(pool, p.batch, unit.row, position);
            if (at.status != KVC_SLOT_OK || !kvc_is_unknown(pool, p.batch, at.slot, row.request_id)) continue;
            const uint64_t claim = kvc_adoption_claim(forward, position);
            const uint64_t before = kvc_atomic_max_u64(kvc_mutable_pointer<uint64_t>(pool.claims) + at.slot, claim);
            n_claimed += before < claim && before >> 32 != forward;
            n_taken += kvc_is_fresh(before);
        }
    }
    if (n_taken) kvc_atomic_add_u32(kvc_n_fresh(p.guard, pool), 0u - n_taken);
    if (n_claimed) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_ADOPTED_SLOTS, n_claimed);
}

// Both halves in one pass, and no plan: a warp finds the row of a unit by searching the prefix sums of kvc_begin, once per row.
KVC_KERNEL(KVC_THREADS, 2) kvc_stamps_verify(KVC_PARAM StepParams p) {
    const uint32_t forward = kvc_forward_number(p.guard);
    if (p.batch.adopt) kvc_claim_unknown(p, forward);
    if (!kvc_is_judging(p.guard)) return;
    if (kvc_block() == 0 && kvc_thread() == 0) kvc_count_launch(p.guard, p.pool, KVC_STAGE_HEAD);
    const uint64_t n = kvc_block_sum(kvc_verify_prefixes<KVC_STAGE_HEAD>(p, forward));
    if (kvc_thread() == 0) kvc_count_entries(p.guard, p.pool, KVC_STAGE_HEAD, n);
}

// ---- kvc_stamps_tail -----------------------------------------------------------------------------------------------------
// DUPLICATE_WRITE of a loser, and the look-up of the token's place through the table as it is now.
KVC_NOINLINE void kvc_judge_new_token(const StepParams& p, int32_t index, int64_t i, bool is_loser, uint32_t forward) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[index];
    const KvcSlot target = kvc_write_slot(pool, p.batch, row.first_token + i);
    const uint32_t tag = kvc_tag(KVC_STAGE_TAIL, pool.kind, 0);
    const int64_t t = row.first_token + i, position = row.prefix + i;
    if (is_loser) {
        Violation v = kvc_row_violation(pool, row, index, tag);
        v.reasons = KVC_REASON_DUPLICATE_WRITE;
        v.slot = target.slot;
        v.position = (int32_t)position;
        kvc_put_stamp(v, kvc_pointer<Stamp>(pool.head[0])[target.slot]);
        v.expected_token = (int32_t)kvc_int_at(p.batch.input_ids, p.batch.wide_ids, t);
        kvc_report(p.guard, pool, v);
    }
    if (target.raw < 0) return;  // the engine says that this token has no place
    const KvcSlot home = kvc_table_slot(pool, p.batch, index, position);
    if (home.status != KVC_SLOT_OK) {
        kvc_report_table_entry(p, row, index, tag, position, home);
        return;
    }
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        const Stamp stamp = kvc_pointer<Stamp>(pool.head[half])[home.slot];
        if (stamp.step == forward) continue;
        Violation v = kvc_row_violation(pool, row, index, kvc_tag(KVC_STAGE_TAIL, pool.kind, half));
        v.reasons = KVC_REASON_UNWRITTEN;
        v.slot = home.slot;
        v.position = (int32_t)position;
        kvc_put_stamp(v, stamp);
        kvc_report(p.guard, pool, v);
    }
}

// The fast path: the token lies where the table puts it, and this forward has stamped it.
KVC_DEVICE bool kvc_is_where_it_belongs(const StepParams& p, int32_t index, int64_t position, const KvcSlot& target,
                                        uint32_t forward) {
    if (target.raw < 0) return true;
    const KvcSlot home = kvc_table_slot(p.pool, p.batch, index, position);
    if (home.status != KVC_SLOT_OK) return false;
    for (uint32_t half = 0; half < p.pool.n_halves; ++half) {
        if (kvc_pointer<Stamp>(p.pool.head[half])[home.slot].step != forward) return false;
    }
    return true;
}

// A new token that the engine writes to a reserved block, and that no later query will see.
KVC_DEVICE bool kvc_is_spared(const Pool& pool, const Row& row, int64_t position, const KvcSlot& target) {
    if (target.status != KVC_SLOT_EMPTY || !pool.window) return false;
    return position <= (int64_t)row.prefix + row.n_new - pool.window && position >= pool.sink;
}

// A lane per new token of a chunk of 32; returns whether this lane's was stamped.
KVC_DEVICE bool kvc_finish_chunk(const StepParams& p, const KvcUnit& unit, uint32_t forward, bool is_judging) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
    if (!(row.flags & KVC_ROW_LIVE)) return false;
    const int64_t i = unit.chunk * KVC_TAIL_CHUNK + kvc_lane();
    bool is_written = false;
    if (i < row.n_new) {
        const int64_t t = row.first_token + i;
        const KvcSlot target = kvc_write_slot(pool, p.batch, t);
        const bool is_slot = target.status == KVC_SLOT_OK;
        is_written =
            is_slot && kvc_pointer<uint64_t>(pool.claims)[target.slot] == ((uint64_t)forward << 32 | (uint64_t)(t + 1));
        for (uint32_t half = 0; half < pool.n_halves && is_written; ++half) {
            kvc_mutable_pointer<Stamp>(pool.tail[half])[target.slot] = kvc_pointer<Stamp>(pool.head[half])[target.slot];
        }
        // That a ring has gone round within one forward is no clash.
        const bool is_loser = is_slot && !is_written && kvc_is_kept(pool, (int64_t)row.prefix + row.n_new, row.prefix + i);
        const bool is_spared = kvc_is_spared(pool, row, row.prefix + i, target);
        if (is_judging && (is_loser || !(is_spared || kvc_is_where_it_belongs(p, unit.row, row.prefix + i, target, forward)))) {
            kvc_judge_new_token(p, unit.row, i, is_loser, forward);
        }
    }
    return is_written;
}

// The fresh slots of the prefixes, whose bytes HEAD has verified, are fresh no more. Out of line: it is rare.
KVC_NOINLINE void kvc_settle_fresh(const StepParams& p) {
    const Pool& pool = p.pool;
    const int64_t* work = kvc_work(pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    uint32_t n_settled = 0;
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u, n_units);
        const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
        if (!(row.flags & KVC_ROW_LIVE) || row.flags & KVC_ROW_PENDING) continue;
        const Range range = kvc_unit_range(pool, row, unit.chunk, 1, KVC_VERIFY_UNIT);
        for (int64_t position = range.first + kvc_lane(); position < range.last; position += 32) {
            const KvcSlot at = kvc_table_slot(pool, p.batch, unit.row, position);
            if (at.status != KVC_SLOT_OK) continue;
            uint64_t* word = kvc_mutable_pointer<uint64_t>(pool.claims) + at.slot;
            const uint64_t claim = kvc_load_volatile_u64(word);
            if (kvc_is_fresh(claim)) n_settled += kvc_atomic_cas_u64(word, claim, claim >> 32 << 32) == claim;  // rows may share it
        }
    }
    if (n_settled) kvc_atomic_add_u32(kvc_n_fresh(p.guard, pool), 0u - n_settled);
}

// Even shares of the prefix as in kvc_stamps_verify, then a warp per 32 new tokens, from the last warp down; a slot written in
// this forward is in the second kind only.
KVC_KERNEL(KVC_THREADS, 2) kvc_stamps_tail(KVC_PARAM StepParams p) {
    const uint32_t forward = kvc_forward_number(p.guard);
    const bool is_judging = kvc_is_judging(p.guard);
    const int64_t* work = kvc_work(p.pool, KVC_WORK_TAIL);
    const int64_t n_units = work[p.batch.rows];
    if (kvc_block() == 0 && kvc_thread() == 0) {
        kvc_count_launch(p.guard, p.pool, KVC_STAGE_TAIL);
        kvc_mutable_pointer<PoolState>(p.guard.pool_states)[p.pool.index].tail_forward = forward;
    }
    uint32_t n_entries = 0;
    for (int64_t u = kvc_global_warps() - 1 - kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        n_entries += kvc_finish_chunk(p, kvc_find_unit(work, p.batch.rows, u, n_units), forward, is_judging);
    }
    if (is_judging) n_entries += kvc_verify_prefixes<KVC_STAGE_TAIL>(p, forward);
    // Others may be counting down: all lanes have to go by one look.
    if (is_judging && kvc_ballot(kvc_load_volatile_u32(kvc_n_fresh(p.guard, p.pool)) != 0)) kvc_settle_fresh(p);
    const uint64_t n = kvc_block_sum(n_entries);
    if (kvc_thread() == 0) kvc_count_entries(p.guard, p.pool, KVC_STAGE_TAIL, n);
}

// ---- kvc_stamps_sweep ----------------------------------------------------------------------------------------------------
// A lane per resident slot: HEAD stamp against the provider's position, predecessor and token; TAIL against HEAD.
KVC_DEVICE void kvc_sweep_slot(const SweepParams& p, int64_t i) {
    const Pool& pool = p.pool;
    const int64_t slot = kvc_pointer<int32_t>(p.slots)[i];
    const int32_t position = kvc_pointer<int32_t>(p.positions)[i];
    const int64_t before = kvc_pointer<int32_t>(p.predecessors)[i];
    const int32_t expected = p.tokens ? kvc_pointer<int32_t>(p.tokens)[i] : KVC_NO_TOKEN;
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        Violation v = kvc_no_violation();
        v.tag = kvc_tag(KVC_STAGE_SWEEP, pool.kind, half);
        v.pool = (int32_t)pool.index;
        v.slot = slot;
        v.position = position;
        if (slot < 0 || slot >= pool.n_slots || kvc_is_reserved(pool, slot)) {
            v.detail = KVC_DETAIL_TABLE_ENTRY;
            v.reasons = slot >= pool.n_slots ? KVC_REASON_OUT_OF_RANGE : KVC_REASON_UNWRITTEN;
            if (half == 0) kvc_report(p.guard, pool, v);
            continue;
        }
        const Stamp stamp = kvc_pointer<Stamp>(pool.head[half])[slot];
        const uint32_t tail_step = kvc_pointer<Stamp>(pool.tail[half])[slot].step;
        if (pool.blocks && stamp.step) v.reasons |= kvc_epoch_reasons(kvc_block_state(pool, slot), stamp);
        const bool is_known = stamp.token != KVC_NO_TOKEN;
        if (stamp.step == 0) {
            v.reasons = KVC_REASON_UNWRITTEN;
        } else {
            if (stamp.position != position) v.reasons |= KVC_REASON_POSITION;
            if (expected >= 0 && is_known && stamp.token != expected) {
                v.reasons |= KVC_REASON_TOKEN;
                v.expected_token = expected;
            }
            if (before >= 0 && before < pool.n_slots && is_known) {
                const Stamp previous = kvc_pointer<Stamp>(pool.head[half])[before];
                const bool may_link = kvc_is_relative(stamp)
                                          ? kvc_continued_slot(stamp) == before &&
                                                !kvc_is_rewritten(pool, before, previous.step, slot, stamp.step)
                                          : !kvc_is_relative(previous);
                v.expected_chain = kvc_link(previous.chain, stamp.token, stamp.position);
                const bool is_there = previous.step && previous.token != KVC_NO_TOKEN && !kvc_is_outlived(pool, before, previous);
                if (may_link && is_there && stamp.chain != v.expected_chain) v.reasons |= KVC_REASON_CHAIN;
            }
            if (tail_step != stamp.step && !kvc_was_left(p.guard, pool, stamp.step)) {
                v.reasons |= KVC_REASON_UNWRITTEN;
                v.detail = KVC_DETAIL_UNFINISHED;
            }
        }
        if (!v.reasons) continue;
        kvc_put_stamp(v, stamp);
        if (!(v.reasons & KVC_REASON_CHAIN)) v.expected_chain = 0;
        kvc_report(p.guard, pool, v);
    }
}

KVC_KERNEL(KVC_THREADS) kvc_stamps_sweep(KVC_PARAM SweepParams p) {
    if (kvc_block() == 0 && kvc_thread() == 0) {
        kvc_count_launch(p.guard, p.pool, KVC_STAGE_SWEEP);
        kvc_count_entries(p.guard, p.pool, KVC_STAGE_SWEEP, (uint64_t)p.n);
    }
    for (int64_t i = (int64_t)kvc_block() * KVC_THREADS + kvc_thread(); i < p.n; i += (int64_t)kvc_n_blocks() * KVC_THREADS) {
        kvc_sweep_slot(p, i);
    }
}
