// blocks.cuh: who owns a block, and what that makes of a read or a write of one of its slots.
//
// The ledger on the host (kvcanary/ledger.py) decides; the words here are changed by lifecycle.cu alone, in stream order, so they
// hold for the whole of any other launch. Without lifecycle there are none (pool.blocks is null), and nothing here is judged.
#pragma once
#include "slots.cuh"

// The word of a slot's block; `slot` lies inside the pool, which has such words.
KVC_DEVICE BlockState kvc_block_state(const Pool& pool, int64_t slot) {
    const uint32_t block = kvc_divide((uint32_t)slot, pool.page_size, pool.page_shift);
    return kvc_pointer<BlockState>(pool.blocks)[block];
}

// The epoch that a stamp made now for a slot of the pool gets.
KVC_DEVICE uint32_t kvc_block_epoch(const Pool& pool, int64_t slot) { return pool.blocks ? kvc_block_state(pool, slot).epoch : 0; }

// A block that neither belongs to the reader nor is shared. Nobody can tell in a batch without request ids; a row without one is
// somebody else everywhere.
KVC_DEVICE bool kvc_may_not_read(const BlockState& block, bool has_ids, uint32_t request_id) {
    return has_ids && !(block.flags & KVC_BLOCK_SHARED) && (block.owner == 0 || block.owner != request_id);
}
// Only its primary owner may write a block, also while it is shared; a block that nobody holds may be written by anybody.
KVC_DEVICE bool kvc_may_not_write(const BlockState& block, bool has_ids, uint32_t request_id) {
    return has_ids && (block.owner ? block.owner != request_id : (block.flags & KVC_BLOCK_SHARED) != 0);
}
KVC_DEVICE bool kvc_is_unowned(const BlockState& block) { return block.owner == 0 && !(block.flags & KVC_BLOCK_SHARED); }

// The epoch that a stamp gets: 0, which is no block's, of a write that is none of the writer's business.
KVC_DEVICE uint32_t kvc_epoch_of_write(const BlockState& block, bool has_ids, uint32_t request_id) {
    return kvc_may_not_write(block, has_ids, request_id) ? 0 : block.epoch;
}

// STALE_EPOCH, and UNWRITTEN of a slot that was last written before its block was allocated: what a written stamp of another epoch
// is reported for.
KVC_DEVICE uint32_t kvc_epoch_reasons(const BlockState& block, const Stamp& stamp) {
    if (stamp.epoch == block.epoch) return 0;
    return KVC_REASON_STALE_EPOCH | (stamp.epoch ? KVC_REASON_UNWRITTEN : 0);
}

// A stamp of an epoch that is over: it says nothing of what the block holds now, and the bytes under it are nobody's any more.
KVC_DEVICE bool kvc_is_outlived(const BlockState& block, const Stamp& stamp) { return stamp.epoch && stamp.epoch != block.epoch; }
KVC_DEVICE bool kvc_is_outlived(const Pool& pool, int64_t slot, const Stamp& stamp) {
    return pool.blocks && kvc_is_outlived(kvc_block_state(pool, slot), stamp);
}

// What adoption takes: a slot of which no half was ever stamped, or none since its block was allocated, in a block that the row
// may read.
KVC_DEVICE bool kvc_is_unknown(const Pool& pool, const Batch& batch, int64_t slot, uint32_t request_id) {
    const BlockState block = pool.blocks ? kvc_block_state(pool, slot) : BlockState{};
    if (pool.blocks && kvc_may_not_read(block, batch.request_ids, request_id)) return false;
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        const Stamp &head = kvc_pointer<Stamp>(pool.head[half])[slot], &tail = kvc_pointer<Stamp>(pool.tail[half])[slot];
        if (head.step && !(pool.blocks && kvc_is_outlived(block, head))) return false;
        if (tail.step && !(pool.blocks && kvc_is_outlived(block, tail))) return false;
    }
    return true;
}

// A fresh slot, unless its stamp says nothing of what the block holds now: adoption may take that one.
KVC_NOINLINE bool kvc_is_fresh_and_known(const Pool& pool, int64_t slot) {
    if (!kvc_is_fresh(kvc_pointer<uint64_t>(pool.claims)[slot])) return false;
    const Stamp stamp = kvc_pointer<Stamp>(pool.head[0])[slot];
    return stamp.step && !kvc_is_outlived(pool, slot, stamp);
}
// Whether the bytes of a slot of a row's prefix are to be digested in this forward, if not those of the whole row are. `share`: the
// row's; `any_fresh`: the pool has fresh slots.
KVC_DEVICE bool kvc_is_in_turn(const Pool& pool, const Batch& batch, uint32_t share, int64_t slot, bool any_fresh) {
    return kvc_share(slot, batch.verify_data_every) == share || (any_fresh && kvc_is_fresh_and_known(pool, slot));
}
