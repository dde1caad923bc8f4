// judge.cuh: what is wrong with a prefix stamp, if anything: the full judgement and its records.
//
// Called only for runs of positions that the fast path of prefix.cuh did not find healthy.
#pragma once
#include "report.cuh"

// What a position contributes to the judgement of the next one.
struct Link {
    uint64_t chain;
    uint32_t step;  // 0: there is no stamp to link to
};

KVC_DEVICE bool kvc_is_aborted(const Guard& guard, const Pool& pool, uint32_t forward) {
    const PoolState& s = kvc_pointer<PoolState>(guard.pool_states)[pool.index];
    if (forward <= s.aborted_floor) return true;
    for (uint32_t i = 0; i < KVC_N_ABORTED && i < s.n_aborted; ++i) {
        if (s.aborted[i] == forward) return true;
    }
    return false;
}

// Outside a forward: one that never reached TAIL, known as such already, or the pool's last, which the next one will make known.
KVC_DEVICE bool kvc_was_left(const Guard& guard, const Pool& pool, uint32_t forward) {
    const PoolState& s = kvc_pointer<PoolState>(guard.pool_states)[pool.index];
    return kvc_is_aborted(guard, pool, forward) || (forward == s.head_forward && forward != s.tail_forward);
}

// The stamp of a slot as the stage sees it, and whether the stage may judge it.
struct SeenStamp {
    Stamp stamp;
    bool is_judged;
    bool is_unfinished;  // TAIL: the forward of the HEAD stamp was completed, but this TAIL stamp is not of it
    bool is_left;        // TAIL: the forward of the HEAD stamp never reached TAIL
};
KVC_DEVICE SeenStamp kvc_see_stamp(const Guard& guard, const Pool& pool, uint32_t stage, uint32_t half, int64_t slot,
                                   uint32_t forward) {
    const Stamp head = kvc_pointer<Stamp>(pool.head[half])[slot];
    if (stage == KVC_STAGE_HEAD) return {head, true, false, false};
    if (head.step == forward || head.step == 0) return {head, false, false, false};  // being written; reported at HEAD
    SeenStamp seen = {kvc_pointer<Stamp>(pool.tail[half])[slot], true, false, false};
    if (seen.stamp.step != head.step) {
        seen.is_judged = false;
        seen.is_left = kvc_is_aborted(guard, pool, head.step);
        seen.is_unfinished = !seen.is_left;
    }
    return seen;
}
KVC_DEVICE bool kvc_is_linkable(const Pool& pool, int64_t slot, const SeenStamp& seen) {
    return seen.is_judged && seen.stamp.token != KVC_NO_TOKEN && !kvc_is_outlived(pool, slot, seen.stamp);
}
KVC_DEVICE Link kvc_link_of(const Pool& pool, int64_t slot, const SeenStamp& seen) {
    return {seen.stamp.chain, kvc_is_linkable(pool, slot, seen) && !kvc_is_relative(seen.stamp) ? seen.stamp.step : 0};
}

// What a relative stamp at a position of a row links to: the stamp that it continued, if the table still has it there and
// it was not rewritten since. (Rare: relative chains need a row without history, register and prefix_chain.)
KVC_DEVICE Link kvc_relative_link(const StepParams& p, int32_t index, uint32_t stage, uint32_t half, int64_t position,
                                  int64_t slot, const Stamp& stamp, uint32_t forward) {
    const int32_t continued = kvc_continued_slot(stamp);
    const KvcSlot before = kvc_table_slot(p.pool, p.batch, index, position - 1);
    if (continued < 0 || before.status != KVC_SLOT_OK || before.slot != continued) return {0, 0};
    const SeenStamp seen = kvc_see_stamp(p.guard, p.pool, stage, half, before.slot, forward);
    if (kvc_is_rewritten(p.pool, before.slot, seen.stamp.step, slot, stamp.step)) return {0, 0};
    return {seen.stamp.chain, kvc_is_linkable(p.pool, before.slot, seen) ? seen.stamp.step : 0};
}

// TOKEN: the token that the engine's history has at this position; negative = not judged.
KVC_DEVICE int32_t kvc_history_token(const Pool& pool, const Batch& batch, const Row& row, int64_t position) {
    const int64_t at = position + pool.token_offset;
    if (!batch.token_history || row.request_slot < 0 || at < 0 || at >= batch.history_length) return KVC_NO_TOKEN;
    return kvc_pointer<int32_t>(batch.token_history)[row.request_slot * batch.history_length + at];
}

// Whether the last prefix stamp is what is known of it outside the cache: its chain, or, between relative chains, its token.
KVC_DEVICE bool kvc_ends_as_anchored(const Row& row, const Stamp& stamp) {
    if (!(row.flags & KVC_ROW_ANCHORED)) return true;
    if (!(row.flags & KVC_ROW_RELATIVE || kvc_is_relative(stamp))) return stamp.chain == row.anchor;
    return !(row.flags & KVC_ROW_KNOWS_LAST) || kvc_token_mix(stamp.token, stamp.position) == row.last_mix;
}

// STALE_EPOCH, and UNWRITTEN since the block was allocated. Who may read a block is also asked of a slot that is written in this very
// forward; its epoch is not.
KVC_DEVICE uint32_t kvc_block_reasons(const StepParams& p, const Row& row, int64_t slot, const SeenStamp& seen, uint32_t forward) {
    if (!p.pool.blocks) return 0;
    const BlockState block = kvc_block_state(p.pool, slot);
    const bool is_written = seen.is_judged && seen.stamp.step && seen.stamp.step != forward;
    return (kvc_may_not_read(block, p.batch.request_ids, row.request_id) ? KVC_REASON_STALE_EPOCH : 0) |
           (is_written ? kvc_epoch_reasons(block, seen.stamp) : 0);
}

// UNWRITTEN, STALE_EPOCH, POSITION, TOKEN and CHAIN of one written or unwritten slot. `may_link` says that the link into it is judged.
KVC_DEVICE void kvc_judge_stamp(const StepParams& p, const Row& row, int32_t index, uint32_t tag, int64_t position,
                                int64_t slot, const SeenStamp& seen, const Link& previous, bool may_link, uint32_t forward) {
    const Stamp& stamp = seen.stamp;
    Violation v = kvc_row_violation(p.pool, row, index, tag);
    if (seen.is_unfinished) {
        v.reasons = KVC_REASON_UNWRITTEN;
        v.detail = KVC_DETAIL_UNFINISHED;
    } else if (stamp.step == 0) {
        v.reasons = KVC_REASON_UNWRITTEN;
    } else {
        const int32_t expected = kvc_history_token(p.pool, p.batch, row, position);
        const bool is_known = stamp.token != KVC_NO_TOKEN;
        if (stamp.position != (int32_t)position) v.reasons |= KVC_REASON_POSITION;
        if (expected >= 0 && is_known && stamp.token != expected) {
            v.reasons |= KVC_REASON_TOKEN;
            v.expected_token = expected;
        }
        if (position == 0) {
            const uint64_t salt = p.batch.salts ? kvc_pointer<uint64_t>(p.batch.salts)[index] : 0;
            v.expected_chain = kvc_link(kvc_anchor(salt), stamp.token, 0);
            if (is_known && !kvc_is_relative(stamp) && stamp.chain != v.expected_chain) v.reasons |= KVC_REASON_CHAIN;
        } else if (may_link && previous.step && is_known) {
            v.expected_chain = kvc_link(previous.chain, stamp.token, stamp.position);
            if (stamp.chain != v.expected_chain) v.reasons |= KVC_REASON_CHAIN;
        }
        if (position == row.prefix - 1 && is_known && !kvc_ends_as_anchored(row, stamp)) {
            v.reasons |= KVC_REASON_CHAIN;
            v.expected_chain = row.anchor;
        }
    }
    v.reasons |= kvc_block_reasons(p, row, slot, seen, forward);
    if (!v.reasons) return;
    v.position = (int32_t)position;
    v.slot = slot;
    kvc_put_stamp(v, stamp);
    if (!(v.reasons & KVC_REASON_CHAIN)) v.expected_chain = 0;
    kvc_report(p.guard, p.pool, v);
}

KVC_DEVICE void kvc_report_table_entry(const StepParams& p, const Row& row, int32_t index, uint32_t tag, int64_t position,
                                       const KvcSlot& entry) {
    Violation v = kvc_row_violation(p.pool, row, index, tag);
    v.reasons = entry.status == KVC_SLOT_OUT ? KVC_REASON_OUT_OF_RANGE : KVC_REASON_UNWRITTEN;
    v.detail = KVC_DETAIL_TABLE_ENTRY;
    v.slot = entry.raw;
    v.position = (int32_t)position;
    kvc_report(p.guard, p.pool, v);
}

// Everything about one prefix position of a live row. Returns whether the slot was left by a forward that never reached TAIL.
KVC_DEVICE bool kvc_judge_position(const StepParams& p, int32_t index, int64_t position, uint32_t stage, uint32_t forward) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[index];
    const KvcSlot at = kvc_table_slot(pool, p.batch, index, position);
    if (at.status != KVC_SLOT_OK) {
        kvc_report_table_entry(p, row, index, kvc_tag(stage, pool.kind, 0), position, at);
        return false;
    }
    // What adoption takes is not reported, nor is, at TAIL, what it left because the row is pending.
    if (p.batch.adopt && kvc_is_unknown(pool, p.batch, at.slot, row.request_id)) return false;
    const KvcSlot before = kvc_table_slot(pool, p.batch, index, position - 1);
    bool is_left = false;
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        const SeenStamp seen = kvc_see_stamp(p.guard, pool, stage, half, at.slot, forward);
        if (half == 0) is_left = seen.is_left;
        if (!(seen.is_judged || seen.is_unfinished)) continue;
        Link previous = {0, 0};
        if (position > 0 && kvc_is_relative(seen.stamp)) {
            previous = kvc_relative_link(p, index, stage, half, position, at.slot, seen.stamp, forward);
        } else if (before.status == KVC_SLOT_OK) {
            previous = kvc_link_of(pool, before.slot, kvc_see_stamp(p.guard, pool, stage, half, before.slot, forward));
        }
        // Before a window the table may name anything, and what it names may belong to others by now: judge the link into the
        // window's first position only if the table has the very slot that the stamp continued, which was not rewritten since.
        // (If a moved stamp's predecessor did not come along, nobody can tell.)
        const bool is_later = previous.step && previous.step < forward &&
                              kvc_is_older(pool, before.slot, previous.step, seen.stamp.step);
        const bool may_link = (position > row.verify_start || position < pool.sink ||
                               (is_later && kvc_continued_slot(seen.stamp) == before.slot)) &&
                              kvc_is_kept(pool, (int64_t)row.prefix + row.n_new, position - 1);
        kvc_judge_stamp(p, row, index, kvc_tag(stage, pool.kind, half), position, at.slot, seen, previous, may_link, forward);
    }
    return is_left;
}

// A lane per position of [first, last), in which the fast path of prefix.cuh did not find everything healthy.
KVC_NOINLINE void kvc_judge_run(const StepParams& p, int32_t index, uint32_t first, uint32_t last, uint32_t stage, uint32_t forward) {
    uint32_t n_left = 0;
    for (uint32_t position = first + kvc_lane(); position < last; position += 32) {
        n_left += kvc_judge_position(p, index, position, stage, forward);
    }
    if (n_left) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_UNJUDGED_SLOTS, n_left);
}
