// memory.cu: toy kernels on loads, stores and atomics, for the test of the CPU runtime.
#include "device.cuh"

constexpr uint32_t TOY_THREADS = 256;

// Not the struct of the same name in the other source: each source is a module of its own.
struct Params {
    uint64_t in;   // device address
    uint64_t out;  // device address
    uint32_t n;
};

KVC_DEVICE uint64_t thread_in_grid() {
    return ((uint64_t)kvc_block_y() * kvc_n_blocks() + kvc_block()) * TOY_THREADS + kvc_thread();
}

// One thread; a column per load and store.
KVC_KERNEL(1) kvc_toy_copy(KVC_PARAM Params p) {
    const char* in = (const char*)p.in;
    uint64_t* out = (uint64_t*)p.out;
    out[0] = kvc_load_once_u64(in);
    out[1] = kvc_load_once_u32(in + 4);
    out[2] = kvc_load_once_u16(in + 2);
    out[3] = kvc_load_once_u8(in + 1);
    out[4] = kvc_load_volatile_u64((const uint64_t*)in);
    out[5] = kvc_load_volatile_u32((const uint32_t*)in);
    kvc_store_u128(out + 6, kvc_load_once_u128(in));
    kvc_store_volatile_u64(out + 8, 8);
    kvc_store_volatile_u32((uint32_t*)(out + 9), 9);
    kvc_fence_system();
}

// Each helper once per thread: out[0] sums 1, [1] keeps the highest thread, [2] sums 1 and [3] ors the low lanes' bits.
KVC_KERNEL(TOY_THREADS) kvc_toy_atomics(KVC_PARAM Params p) {
    uint64_t* out = (uint64_t*)p.out;
    kvc_atomic_add_u64(out, 1);
    kvc_atomic_max_u64(out + 1, thread_in_grid());
    kvc_atomic_add_u32((uint32_t*)(out + 2), 1);
    kvc_atomic_or_u32((uint32_t*)(out + 3), 1u << (kvc_lane() & 15));
}

// Adds the thread's index to out[0] by compare-and-swap and counts the failed attempts in out[1].
KVC_KERNEL(TOY_THREADS) kvc_toy_cas_sum(KVC_PARAM Params p) {
    uint64_t* out = (uint64_t*)p.out;
    uint64_t seen = kvc_load_volatile_u64(out);
    for (;;) {
        const uint64_t found = kvc_atomic_cas_u64(out, seen, seen + thread_in_grid());
        if (found == seen) break;
        kvc_atomic_add_u64(out + 1, 1);
        seen = found;
    }
}

// The order in which threads came by: out[thread in the grid] is the thread's ticket.
KVC_KERNEL(TOY_THREADS) kvc_toy_ticket(KVC_PARAM Params p) {
    ((uint64_t*)p.out)[thread_in_grid()] = kvc_atomic_add_u64((uint64_t*)p.in, 1);
}

// Writes n bytes, however long the buffer is.
KVC_KERNEL(TOY_THREADS) kvc_toy_fill(KVC_PARAM Params p) {
    KVC_SHARED uint8_t pattern[TOY_THREADS];
    pattern[kvc_thread()] = (uint8_t)kvc_thread();
    kvc_sync_block();
    for (uint32_t i = kvc_thread(); i < p.n; i += TOY_THREADS) ((uint8_t*)p.out)[i] = pattern[(i + 1) % TOY_THREADS];
}

// Writes to shared memory at index n.
KVC_KERNEL(TOY_THREADS) kvc_toy_shared_index(KVC_PARAM Params p) {
    KVC_SHARED uint32_t word[TOY_THREADS];
    word[p.n] = kvc_thread();
    kvc_sync_block();
    *(uint32_t*)p.out = word[p.n];
}
