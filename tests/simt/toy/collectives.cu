// collectives.cu: toy kernels on shared memory, barriers, shuffles and votes, for the test of the CPU runtime.
#include "device.cuh"

#define TOY_THREADS 256
constexpr uint32_t N_COLUMNS = 12;

struct Params {
    uint64_t in;   // device address
    uint64_t out;  // device address
    uint64_t n;
    uint64_t mode;
};

KVC_DEVICE uint64_t warp_sum(uint64_t v) {
    for (uint32_t mask = 16; mask != 0; mask >>= 1) v += kvc_shfl_xor_u64(v, mask);
    return v;
}

// One partial sum per block: warps sum by shuffles, the first warp adds what they left in shared memory.
KVC_KERNEL(TOY_THREADS) kvc_toy_block_sum(KVC_PARAM Params p) {
    KVC_SHARED uint64_t partial[TOY_THREADS / 32];
    const uint64_t* in = (const uint64_t*)p.in;
    const uint64_t stride = (uint64_t)kvc_n_blocks() * TOY_THREADS;
    uint64_t sum = 0;
    for (uint64_t i = (uint64_t)kvc_block() * TOY_THREADS + kvc_thread(); i < p.n; i += stride) sum += in[i];
    sum = warp_sum(sum);
    if (kvc_lane() == 0) partial[kvc_warp_in_block()] = sum;
    kvc_sync_block();
    if (kvc_warp_in_block() == 0) {
        sum = warp_sum(kvc_lane() < TOY_THREADS / 32 ? partial[kvc_lane()] : 0);
        if (kvc_lane() == 0) ((uint64_t*)p.out)[kvc_block()] = sum;
    }
}

// Tree reduction through shared memory, one barrier per level.
KVC_KERNEL(TOY_THREADS) kvc_toy_tree_sum(KVC_PARAM Params p) {
    KVC_SHARED uint64_t value[TOY_THREADS];
    value[kvc_thread()] = ((const uint64_t*)p.in)[kvc_thread()];
    for (uint32_t half = TOY_THREADS / 2; half != 0; half >>= 1) {
        kvc_sync_block();
        if (kvc_thread() < half) value[kvc_thread()] += value[kvc_thread() + half];
    }
    if (kvc_thread() == 0) *(uint64_t*)p.out = value[0];
}

// One warp; a row per lane, a column per helper.
KVC_KERNEL(32) kvc_toy_warp_ops(KVC_PARAM Params p) {
    const uint32_t lane = kvc_lane();
    const uint64_t wide = ((const uint64_t*)p.in)[lane];
    const uint32_t narrow = (uint32_t)wide;
    uint64_t* row = (uint64_t*)p.out + (uint64_t)lane * N_COLUMNS;
    kvc_sync_warp();
    row[0] = kvc_ballot((wide & 1) != 0);
    row[1] = kvc_shfl_u32(narrow, lane + 1);
    row[2] = kvc_shfl_u64(wide, 31 - lane);
    row[3] = kvc_shfl_up_u32(narrow, 3);
    row[4] = kvc_shfl_up_u64(wide, 1);
    row[5] = kvc_shfl_xor_u64(wide, 5);
    row[6] = kvc_popcount(narrow);
    row[7] = kvc_lowest_bit(narrow | 0x80000000u);
    row[8] = kvc_shfl_up_u32(narrow, 0);
    row[9] = kvc_shfl_u64(wide, lane & 3);
    row[10] = kvc_thread();
    row[11] = kvc_warp_in_block();
}

// Warp w makes w + 1 rounds of shuffles; the block meets afterwards.
KVC_KERNEL(TOY_THREADS) kvc_toy_trip_counts(KVC_PARAM Params p) {
    KVC_SHARED uint32_t rounds[TOY_THREADS / 32];
    uint32_t round = 0;
    do {
        round = kvc_shfl_u32(round + kvc_lane(), 1);
    } while (kvc_ballot(round <= kvc_warp_in_block()) != 0);
    if (kvc_lane() == 0) rounds[kvc_warp_in_block()] = round;
    kvc_sync_block();
    if (kvc_thread() < TOY_THREADS / 32) ((uint64_t*)p.out)[kvc_thread()] = rounds[kvc_thread()];
}

// What the device would leave undefined, by mode.
KVC_KERNEL(TOY_THREADS) kvc_toy_misuse(KVC_PARAM Params p) {
    const bool is_low = kvc_lane() < 16;
    if (p.mode == 0 && is_low) kvc_ballot(true);
    if (p.mode == 1) is_low ? (void)kvc_ballot(true) : kvc_sync_warp();
    if (p.mode == 2) is_low ? (void)kvc_ballot(true) : kvc_sync_block();
    if (p.mode == 3 && is_low) kvc_sync_block();
    if (p.mode == 4 && kvc_warp_in_block() == 1) kvc_sync_block();
    if (p.mode == 5) kvc_load_once_u64((const char*)p.in + 4);
    if (p.mode == 6) kvc_lowest_bit((uint32_t)p.n);
    if (p.mode == 7) kvc_shfl_up_u32(0, (uint32_t)p.n);
    if (p.mode == 8) kvc_atomic_add_u64((uint64_t*)(p.out + 4), 1);
    if (p.mode == 9) while (kvc_load_volatile_u64((const uint64_t*)p.out) == 0) {}
    if (p.mode == 10) kvc_ballot(true);
}

// What shared memory holds before anything was written to it.
KVC_KERNEL(32) kvc_toy_unwritten_shared(KVC_PARAM Params p) {
    KVC_SHARED uint64_t word[32];
    ((uint64_t*)p.out)[kvc_lane()] = word[kvc_lane()];
    word[kvc_lane()] = 0;
}

// p.n ballots and nothing else, or as many barriers.
KVC_KERNEL(TOY_THREADS) kvc_toy_spend(KVC_PARAM Params p) {
    for (uint64_t i = 0; i < p.n; ++i) {
        if (p.mode == 0) kvc_ballot(true);
        if (p.mode == 1) kvc_sync_block();
    }
}
