// lifecycle.cu: who owns a block.
//
// kvc_blocks_update  a thread per block id of a call to allocate, share, free or claim
//
// The ids come by value, in the parameters: the launch is ordered on its stream like any other and needs no buffer that somebody
// would have to wait for. Made by kvcanary/backends/device.py, outside any graph; kvcanary/ledger.py has refused what makes no sense.
#include "blocks.cuh"

static_assert(sizeof(LifecycleParams) <= 4096, "what a kernel's parameters may have on every driver");

// What becomes of a block's word. `now` is the last forward begun: the change lies behind it.
KVC_DEVICE BlockState kvc_changed_block(BlockState block, uint32_t op, uint32_t owner, uint32_t now) {
    const bool was_live = block.flags & KVC_BLOCK_LIVE;
    switch (op) {
        case KVC_OP_ALLOCATE: {
            const uint32_t epoch = block.epoch + 1;
            return {epoch ? epoch : 1, owner, KVC_BLOCK_LIVE, now};  // 0 is the epoch of foreign writes
        }
        case KVC_OP_SHARE: return {block.epoch, block.owner, KVC_BLOCK_LIVE | KVC_BLOCK_SHARED, was_live ? block.since : now};
        case KVC_OP_LEAVE: return {block.epoch, 0, KVC_BLOCK_LIVE | KVC_BLOCK_SHARED, now};
        case KVC_OP_UNSHARE: return {block.epoch, block.owner, KVC_BLOCK_LIVE, block.since};
        case KVC_OP_CLAIM: return {block.epoch, owner, KVC_BLOCK_LIVE, now};
        default: return {block.epoch, 0, 0, now};  // FREE
    }
}

// A thread per id; no id comes twice in a launch.
KVC_KERNEL(KVC_THREADS) kvc_blocks_update(KVC_PARAM LifecycleParams p) {
    const uint32_t now = (uint32_t)kvc_pointer<uint64_t>(p.state)[KVC_STATE_FORWARD];
    const uint32_t n = p.ends[KVC_N_BLOCK_OPS - 1] < KVC_MAX_BLOCK_IDS ? p.ends[KVC_N_BLOCK_OPS - 1] : KVC_MAX_BLOCK_IDS;
    for (uint32_t i = kvc_block() * KVC_THREADS + kvc_thread(); i < n; i += kvc_n_blocks() * KVC_THREADS) {
        uint32_t op = 0;
        while (i >= p.ends[op]) ++op;
        const uint32_t id = (uint32_t)p.ids[i];
        if (id >= p.n_blocks) continue;
        BlockState& block = kvc_mutable_pointer<BlockState>(p.blocks)[id];
        block = kvc_changed_block(block, op, p.owner, now);
    }
}
