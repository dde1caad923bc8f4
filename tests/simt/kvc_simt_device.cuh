// kvc_simt_device.cuh: the names of device.cuh on a CPU, so that a test build runs the kernel sources as they are.
//
// Where the device would trap or leave the result undefined (a misaligned access, a shuffle distance past the warp, the
// lowest bit of 0), the launch fails with a text. Atomics and volatile accesses are points where other threads may run,
// so that a retry loop sees its word change.
#pragma once

#include <simt.hpp>

#include <atomic>
#include <cstdint>
#include <cstring>

#define KVC_KERNEL(...) static void
#define KVC_DEVICE [[maybe_unused]] static inline
#define KVC_DEVICE_MEMBER inline
#define KVC_NOINLINE [[maybe_unused]] static
#define KVC_PARAM const
#define KVC_FULL_WARP 0xffffffffu

// A section of its own lets the runtime fill shared memory with junk before each block. The address sanitizer guards
// only variables that are in no such section, and there the guard is worth more. alignas goes before KVC_SHARED.
#if defined(__ELF__) && !defined(KVC_SIMT_ASAN)
#define KVC_SHARED static __attribute__((section("kvc_shared")))
#else
#define KVC_SHARED static
#endif

struct alignas(16) kvc_u128 { uint32_t x, y, z, w; };

namespace kvc_simt {

inline void check_aligned(const char* what, const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("%s of %zu bytes at misaligned address %p", what, bytes, p);
}

template <typename T>
T load(const void* p) {
    check_aligned("load", p, sizeof(T));
    return *static_cast<const T*>(p);
}

// The word, which other threads may be given time to change first.
template <typename T>
T* shared_word(T* p) {
    check_aligned("atomic or volatile access", p, sizeof(T));
    preempt();
    return p;
}

inline uint64_t shfl(State kind, uint64_t v, uint32_t lane) { return meet(kind, v).value[lane & (kWarp - 1)]; }

inline uint64_t shfl_up(State kind, uint64_t v, uint32_t delta) {
    if (delta >= kWarp) fail("shuffle up by %u lanes, allowed 0 to 31", delta);
    const uint32_t lane = here.thread % kWarp;
    return meet(kind, v).value[lane < delta ? lane : lane - delta];
}

inline uint64_t shfl_xor(State kind, uint64_t v, uint32_t mask) {
    if (mask >= kWarp) fail("shuffle with lane mask %u, allowed 0 to 31", mask);
    const uint32_t lane = here.thread % kWarp;
    return meet(kind, v).value[lane ^ mask];
}

}  // namespace kvc_simt

// ---- indices -------------------------------------------------------------------------------------------------------
KVC_DEVICE uint32_t kvc_thread() { return kvc_simt::here.thread; }
KVC_DEVICE uint32_t kvc_block() { return kvc_simt::here.block; }
KVC_DEVICE uint32_t kvc_block_y() { return kvc_simt::here.block_y; }
KVC_DEVICE uint32_t kvc_n_blocks() { return kvc_simt::here.n_blocks; }
KVC_DEVICE uint32_t kvc_n_blocks_y() { return kvc_simt::here.n_blocks_y; }
KVC_DEVICE uint32_t kvc_lane() { return kvc_simt::here.thread & 31u; }
KVC_DEVICE uint32_t kvc_warp_in_block() { return kvc_simt::here.thread >> 5; }

// ---- collectives ---------------------------------------------------------------------------------------------------
KVC_DEVICE void kvc_sync_block() { kvc_simt::sync_block(); }
KVC_DEVICE bool kvc_sync_block_or(bool predicate) {
    static bool any;
    kvc_simt::sync_block();
    any = false;
    kvc_simt::sync_block();
    any |= predicate;
    kvc_simt::sync_block();
    return any;
}
KVC_DEVICE void kvc_sync_warp() { kvc_simt::meet(kvc_simt::State::sync_warp, 0); }
KVC_DEVICE uint32_t kvc_ballot(bool predicate) { return kvc_simt::meet(kvc_simt::State::ballot, predicate).ballot; }
KVC_DEVICE uint32_t kvc_shfl_u32(uint32_t v, uint32_t lane) {
    return static_cast<uint32_t>(kvc_simt::shfl(kvc_simt::State::shfl_u32, v, lane));
}
KVC_DEVICE uint64_t kvc_shfl_u64(uint64_t v, uint32_t lane) {
    return kvc_simt::shfl(kvc_simt::State::shfl_u64, v, lane);
}
KVC_DEVICE uint32_t kvc_shfl_up_u32(uint32_t v, uint32_t delta) {
    return static_cast<uint32_t>(kvc_simt::shfl_up(kvc_simt::State::shfl_up_u32, v, delta));
}
KVC_DEVICE uint64_t kvc_shfl_up_u64(uint64_t v, uint32_t delta) {
    return kvc_simt::shfl_up(kvc_simt::State::shfl_up_u64, v, delta);
}
KVC_DEVICE uint64_t kvc_shfl_xor_u64(uint64_t v, uint32_t mask) {
    return kvc_simt::shfl_xor(kvc_simt::State::shfl_xor_u64, v, mask);
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------
KVC_DEVICE float kvc_divide_roughly(float a, float b) { return a / b; }

// ---- bits ----------------------------------------------------------------------------------------------------------
KVC_DEVICE uint32_t kvc_popcount(uint32_t v) { return static_cast<uint32_t>(__builtin_popcount(v)); }
KVC_DEVICE uint32_t kvc_leading_zeros(uint32_t v) { return v ? static_cast<uint32_t>(__builtin_clz(v)) : 32; }
KVC_DEVICE uint32_t kvc_lowest_bit(uint32_t v) {
    if (v == 0) kvc_simt::fail("lowest set bit of 0");
    return static_cast<uint32_t>(__builtin_ctz(v));
}

// ---- loads ---------------------------------------------------------------------------------------------------------
KVC_DEVICE uint64_t kvc_load_once_u64(const void* p) { return kvc_simt::load<uint64_t>(p); }
KVC_DEVICE kvc_u128 kvc_load_u128_if(const void* p, bool predicate) {
    return predicate ? kvc_simt::load<kvc_u128>(p) : kvc_u128{0, 0, 0, 0};
}
KVC_DEVICE uint64_t kvc_load_u64_if(const void* p, bool predicate) {
    return predicate ? kvc_simt::load<uint64_t>(p) : 0;
}
KVC_DEVICE uint32_t kvc_load_u32_if(const void* p, bool predicate) {
    return predicate ? kvc_simt::load<uint32_t>(p) : 0;
}
KVC_DEVICE kvc_u128 kvc_load_once_u128(const void* p) { return kvc_simt::load<kvc_u128>(p); }
KVC_DEVICE uint32_t kvc_load_once_u32(const void* p) { return kvc_simt::load<uint32_t>(p); }
KVC_DEVICE uint32_t kvc_load_once_u16(const void* p) { return kvc_simt::load<uint16_t>(p); }
KVC_DEVICE uint32_t kvc_load_once_u8(const void* p) { return kvc_simt::load<uint8_t>(p); }
KVC_DEVICE void kvc_prefetch(const void* p) { (void)*(const volatile char*)p; }  // a sanitizer sees a bad address
KVC_DEVICE uint64_t kvc_load_volatile_u64(const uint64_t* p) {
    return __atomic_load_n(kvc_simt::shared_word(p), __ATOMIC_RELAXED);
}
KVC_DEVICE uint32_t kvc_load_volatile_u32(const uint32_t* p) {
    return __atomic_load_n(kvc_simt::shared_word(p), __ATOMIC_RELAXED);
}

// ---- stores --------------------------------------------------------------------------------------------------------
KVC_DEVICE void kvc_store_u128(void* p, kvc_u128 v) {
    kvc_simt::check_aligned("store", p, sizeof v);
    *static_cast<kvc_u128*>(p) = v;
}
KVC_DEVICE void kvc_store_volatile_u64(uint64_t* p, uint64_t v) {
    __atomic_store_n(kvc_simt::shared_word(p), v, __ATOMIC_RELAXED);
}
KVC_DEVICE void kvc_store_volatile_u32(uint32_t* p, uint32_t v) {
    __atomic_store_n(kvc_simt::shared_word(p), v, __ATOMIC_RELAXED);
}

// ---- atomics and fences --------------------------------------------------------------------------------------------
KVC_DEVICE uint64_t kvc_atomic_add_u64(uint64_t* p, uint64_t v) {
    return __atomic_fetch_add(kvc_simt::shared_word(p), v, __ATOMIC_RELAXED);
}
KVC_DEVICE uint64_t kvc_atomic_max_u64(uint64_t* p, uint64_t v) {
    uint64_t seen = __atomic_load_n(kvc_simt::shared_word(p), __ATOMIC_RELAXED);
    while (seen < v && !__atomic_compare_exchange_n(p, &seen, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return seen;
}
KVC_DEVICE uint64_t kvc_atomic_cas_u64(uint64_t* p, uint64_t expected, uint64_t desired) {
    uint64_t* word = kvc_simt::shared_word(p);
    __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
KVC_DEVICE uint32_t kvc_atomic_add_u32(uint32_t* p, uint32_t v) {
    return __atomic_fetch_add(kvc_simt::shared_word(p), v, __ATOMIC_RELAXED);
}
KVC_DEVICE uint32_t kvc_atomic_or_u32(uint32_t* p, uint32_t v) {
    return __atomic_fetch_or(kvc_simt::shared_word(p), v, __ATOMIC_RELAXED);
}
KVC_DEVICE void kvc_fence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
