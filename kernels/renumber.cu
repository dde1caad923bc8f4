// renumber.cu: forward numbers have 32 bits in stamps, claims and blocks. Long before they run out, all are moved down.
//
// kvc_renumber      a thread per slot: the numbers in stamps and claims; and those of registers and blocks
// kvc_renumber_end  one thread: those in the pools' states, and the number of the forward itself
//
// The last KVC_RENUMBER_KEEP forwards keep their order and their distance; whatever is older becomes 2, or 1 where its forward never
// reached TAIL. What is that old says no more which stamp it continued: nobody could tell any more which of the two is younger.
// kvc_begin asks for it in the control block; launched by kvcanary/backends/device.py between two forwards. Launched once too
// often, it does nothing.
#include "judge.cuh"

// Numbers up to this are old; 0: it is too early, or too late: what has the last number is of many forwards.
KVC_DEVICE uint32_t kvc_last_old(const Guard& guard) {
    const uint32_t forward = kvc_forward_number(guard);
    return forward > KVC_RENUMBER_KEEP + 2 && forward < KVC_LAST_FORWARD ? forward - KVC_RENUMBER_KEEP : 0;
}
KVC_DEVICE uint32_t kvc_renumbered(uint32_t number, uint32_t old) { return number > old ? number - old + 2 : number ? 2 : 0; }
KVC_DEVICE uint64_t kvc_renumbered_claim(uint64_t claim, uint32_t old) {
    return (uint64_t)kvc_renumbered((uint32_t)(claim >> 32), old) << 32 | (uint32_t)claim;
}

KVC_DEVICE void kvc_renumber_stamp(Stamp& stamp, uint32_t number, uint32_t old) {
    if (stamp.step && stamp.step <= old) stamp.prev_slot = kvc_is_relative(stamp) ? KVC_PREV_RELATIVE : KVC_PREV_NONE;
    stamp.step = number;
}
// Both stages of a half: of one forward before, of one forward after, and the other way round.
KVC_DEVICE void kvc_renumber_half(const Guard& guard, const Pool& pool, uint32_t half, int64_t slot, uint32_t old) {
    Stamp& head = kvc_mutable_pointer<Stamp>(pool.head[half])[slot];
    Stamp& tail = kvc_mutable_pointer<Stamp>(pool.tail[half])[slot];
    uint32_t of_head = kvc_renumbered(head.step, old), of_tail = kvc_renumbered(tail.step, old);
    if (head.step == tail.step) {
        of_tail = of_head;
    } else {
        if (of_head == 2 && kvc_was_left(guard, pool, head.step)) of_head = 1;
        if (of_tail == of_head) of_tail = 3 - of_head;
    }
    kvc_renumber_stamp(head, of_head, old);
    kvc_renumber_stamp(tail, of_tail, old);
}

// ---- kvc_renumber --------------------------------------------------------------------------------------------------------
KVC_KERNEL(KVC_THREADS) kvc_renumber(KVC_PARAM RenumberParams p) {
    const Pool& pool = p.pool;
    const uint32_t old = kvc_last_old(p.guard);
    if (!old) return;
    uint64_t* claims = kvc_mutable_pointer<uint64_t>(pool.claims);
    uint64_t* register_claims = kvc_mutable_pointer<uint64_t>(pool.register_claims);
    const int64_t first = (int64_t)kvc_block() * KVC_THREADS + kvc_thread(), stride = (int64_t)kvc_n_blocks() * KVC_THREADS;
    for (int64_t slot = first; slot < pool.n_slots; slot += stride) {
        for (uint32_t half = 0; half < pool.n_halves; ++half) kvc_renumber_half(p.guard, pool, half, slot, old);
        claims[slot] = kvc_renumbered_claim(claims[slot], old);
    }
    for (int64_t i = first; i < (int64_t)pool.max_requests; i += stride) {
        register_claims[i] = kvc_renumbered_claim(register_claims[i], old);
    }
    BlockState* blocks = kvc_mutable_pointer<BlockState>(pool.blocks);
    for (int64_t i = first; pool.blocks && i < pool.n_blocks; i += stride) blocks[i].since = kvc_renumbered(blocks[i].since, old);
}

// ---- kvc_renumber_end ----------------------------------------------------------------------------------------------------
KVC_DEVICE void kvc_renumber_pool_state(PoolState& s, uint32_t old) {
    const bool is_whole = s.head_forward == s.tail_forward;
    const uint32_t of_head = kvc_renumbered(s.head_forward, old), of_tail = kvc_renumbered(s.tail_forward, old);
    s.head_forward = of_head == 2 && !is_whole ? 1 : of_head;  // never reached TAIL
    s.tail_forward = is_whole || of_tail != s.head_forward ? of_tail : 3 - of_tail;
    for (uint32_t i = 0; i < KVC_N_ABORTED; ++i) {
        const uint32_t number = kvc_renumbered(s.aborted[i], old);
        s.aborted[i] = number == 2 ? 1 : number;
    }
    s.aborted_floor = s.aborted_floor > old ? s.aborted_floor - old + 2 : 1;
}

KVC_KERNEL(KVC_THREADS) kvc_renumber_end(KVC_PARAM RenumberParams p) {
    if (kvc_block() || kvc_thread()) return;
    uint64_t* state = kvc_state(p.guard);
    const uint32_t old = kvc_last_old(p.guard);
    if (old) {
        for (uint32_t i = 0; i < p.n_pools; ++i) kvc_renumber_pool_state(kvc_mutable_pointer<PoolState>(p.guard.pool_states)[i], old);
        state[KVC_STATE_FORWARD] = kvc_renumbered((uint32_t)state[KVC_STATE_FORWARD], old);
        state[KVC_STATE_FORWARD_DONE] = kvc_renumbered((uint32_t)state[KVC_STATE_FORWARD_DONE], old);
        state[KVC_STATE_FORWARD_BASE] += old - 2;
    }
    kvc_store_volatile_u64(kvc_mutable_pointer<uint64_t>(p.guard.control) + KVC_CONTROL_RENUMBER, 0);
}
