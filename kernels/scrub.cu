// scrub.cu: the patrol. A few blocks of the pool after the others, whatever the batch is about, so that damage is also found in
// blocks that nobody reads for now.
//
// kvc_scrub  HEAD of a step's first forward, option: the written slots of the next blocks that somebody holds: their digests
//            against the bytes, and the link of each stamp to the one that it continued
//
// kvc_begin has moved the cursor. Only with lifecycle: the bytes of a block that nobody holds may be overwritten at any time.
#include "blocks.cuh"
#include "digest.cuh"

// ---- links ---------------------------------------------------------------------------------------------------------------
// Whether the predecessor's stamp is still the one that `stamp` continued, as far as can be known: not rewritten later, and in a
// block that was not given away since. A block that its owner has left to those who share it cannot be written any more.
KVC_DEVICE bool kvc_is_still_continued(const Pool& pool, int32_t before, const Stamp& previous, const Stamp& stamp) {
    if (stamp.token == KVC_NO_TOKEN || previous.token == KVC_NO_TOKEN || previous.step == 0) return false;
    if (!kvc_is_older(pool, before, previous.step, stamp.step)) return false;
    if (!kvc_is_relative(stamp) && kvc_is_relative(previous)) return false;
    const BlockState block = kvc_block_state(pool, before);
    return block.flags & KVC_BLOCK_LIVE && previous.epoch == block.epoch && (block.owner == 0 || block.since < stamp.step);
}

KVC_NOINLINE void kvc_report_patrolled_link(const Guard& guard, const Pool& pool, uint32_t half, int64_t slot, uint64_t expected) {
    const Stamp stamp = kvc_pointer<Stamp>(pool.head[half])[slot];
    Violation v = kvc_no_violation();
    v.pool = (int32_t)pool.index;
    v.tag = kvc_tag(KVC_STAGE_HEAD, pool.kind, half);
    v.detail = KVC_DETAIL_SCRUB;
    v.reasons = KVC_REASON_CHAIN;
    v.slot = slot;
    v.position = stamp.position;
    kvc_put_stamp(v, stamp);
    v.expected_chain = expected;
    kvc_report(guard, pool, v);
}

KVC_DEVICE void kvc_patrol_link(const Guard& guard, const Pool& pool, uint32_t half, int64_t slot) {
    const Stamp* stamps = kvc_pointer<Stamp>(pool.head[half]);
    const Stamp stamp = stamps[slot];
    const int32_t before = kvc_continued_slot(stamp);
    if (before < 0 || before >= pool.n_slots) return;
    const Stamp previous = stamps[before];
    if (!kvc_is_still_continued(pool, before, previous, stamp)) return;
    const uint64_t expected = kvc_link(previous.chain, stamp.token, stamp.position);
    if (stamp.chain != expected) kvc_report_patrolled_link(guard, pool, half, slot, expected);
}

// ---- kvc_scrub -----------------------------------------------------------------------------------------------------------
// Slots of which a thread has found something.
struct Found {
    uint32_t n_checked, n_orphans;
};

// The slot if its stamps are whole, of an earlier forward and of its block's epoch, else none. Written slots of blocks that nobody
// holds are orphans: counted only. Bytes that were moved and that no forward has verified since may still be on their way, as in
// a load layer by layer: the first forward that reads them sees to them.
KVC_DEVICE LaneSlot kvc_patrolled_slot(const Pool& pool, int64_t slot, uint32_t forward, bool any_fresh, Found& found) {
    const LaneSlot none = {-1, 0, 0, 0};
    if (kvc_is_reserved(pool, slot)) return none;
    const Stamp head = kvc_pointer<Stamp>(pool.head[0])[slot];
    const uint32_t tail_step = kvc_pointer<Stamp>(pool.tail[0])[slot].step;
    if (head.step == 0 || head.step == forward || head.step != tail_step) return none;
    if (!(kvc_block_state(pool, slot).flags & KVC_BLOCK_LIVE)) {
        found.n_orphans += 1;
        return none;
    }
    if (kvc_is_outlived(pool, slot, head)) return none;
    if (any_fresh && kvc_is_fresh(kvc_pointer<uint64_t>(pool.claims)[slot])) return none;
    found.n_checked += 1;
    return kvc_lane_slot(pool, slot, head.position);
}

// An even part of the slots at hand for each block, 256 at a time; grid.y splits the digests, and its first part sees to the links.
KVC_KERNEL(KVC_THREADS, 2) kvc_scrub(KVC_PARAM StepParams p) {
    const Pool& pool = p.pool;
    if (!kvc_is_judging(p.guard)) return;
    const uint32_t forward = kvc_forward_number(p.guard);
    const uint32_t n_blocks = (uint32_t)pool.n_blocks, n_turns = kvc_units(n_blocks, pool.scrub_blocks);
    const PoolState& state_of_pool = kvc_pointer<PoolState>(p.guard.pool_states)[pool.index];
    const uint32_t turn = (state_of_pool.scrub_turn - 1) % n_turns;
    const bool any_fresh = state_of_pool.n_fresh != 0;
    const uint32_t first_block = turn * pool.scrub_blocks, n_left = n_blocks - first_block;
    const int64_t n_slots = (int64_t)(n_left < pool.scrub_blocks ? n_left : pool.scrub_blocks) * pool.page_size;
    const int64_t first_slot = (int64_t)first_block * pool.page_size;
    if (kvc_is_first_thread()) kvc_atomic_add_u64(kvc_mutable_pointer<uint64_t>(p.guard.scrub_runs) + pool.index, 1);
    const DigestRange range = kvc_digest_range(pool);
    kvc_begin_digests(pool);
    const uint32_t place = kvc_place_in_block(pool.n_digests ? kvc_run_shift(pool, range.first) : 4);
    const Share share = kvc_even_share(n_slots, kvc_block(), kvc_n_blocks());
    Found found = {0, 0};
    uint32_t n_compared = 0;
    for (int64_t base = share.first; base < share.last; base += KVC_THREADS) {
        const int64_t slot = first_slot + base + place;
        LaneSlot at = {-1, 0, 0, 0};
        if (base + place < share.last) at = kvc_patrolled_slot(pool, slot, forward, any_fresh, found);
        if (kvc_ballot(at.slot >= 0) == 0) continue;
        const bool is_odd = kvc_compare_digests(pool, range, at, n_compared);
        if (kvc_ballot(is_odd)) {
            Violation about = kvc_no_violation();
            about.pool = (int32_t)pool.index;
            about.tag = kvc_tag(KVC_STAGE_HEAD, pool.kind, 0);
            about.detail = KVC_DETAIL_SCRUB;
            kvc_judge_digests(p.guard, pool, range, at, forward, about);
        }
        if (kvc_block_y()) continue;
        for (uint32_t half = 0; half < pool.n_halves && at.slot >= 0; ++half) kvc_patrol_link(p.guard, pool, half, at.slot);
    }
    uint64_t sums[3] = {n_compared, kvc_block_y() ? 0 : found.n_checked, kvc_block_y() ? 0 : found.n_orphans}, totals[3];
    kvc_block_exclusive_sums(sums, totals);
    if (kvc_thread()) return;
    uint64_t* state = kvc_state(p.guard);
    if (totals[0]) kvc_atomic_add_u64(state + KVC_STATE_DATA_SLOTS, totals[0]);
    if (totals[1]) kvc_atomic_add_u64(state + KVC_STATE_SCRUB_SLOTS, totals[1]);
    if (totals[2]) kvc_atomic_add_u64(state + KVC_STATE_SCRUB_ORPHANS, totals[2]);
}
