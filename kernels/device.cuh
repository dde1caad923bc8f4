// device.cuh: every intrinsic and every PTX line of the kernels, behind a name that says what is wanted of it.
//
// The kernels call nothing of the CUDA language beyond the built-in indices, __shared__ and the helpers below, so that a
// test build can put a CPU implementation of this one header in its place (KVC_SIMT) and run the same kernel sources.
#pragma once

#if defined(KVC_SIMT)
#include <kvc_simt_device.cuh>
#else

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

// KVC_KERNEL(threads) or KVC_KERNEL(threads, least blocks a multiprocessor is to hold)
#define KVC_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define KVC_DEVICE static __device__ __forceinline__
#define KVC_DEVICE_MEMBER __device__ __forceinline__
#define KVC_NOINLINE static __device__ __noinline__
#define KVC_SHARED __shared__
#define KVC_PARAM const __grid_constant__
#define KVC_FULL_WARP 0xffffffffu

struct __align__(16) kvc_u128 { uint32_t x, y, z, w; };

// ---- indices -------------------------------------------------------------------------------------------------------
KVC_DEVICE uint32_t kvc_thread() { return threadIdx.x; }
KVC_DEVICE uint32_t kvc_block() { return blockIdx.x; }
KVC_DEVICE uint32_t kvc_block_y() { return blockIdx.y; }
KVC_DEVICE uint32_t kvc_n_blocks() { return gridDim.x; }
KVC_DEVICE uint32_t kvc_n_blocks_y() { return gridDim.y; }
KVC_DEVICE uint32_t kvc_lane() { return threadIdx.x & 31u; }
KVC_DEVICE uint32_t kvc_warp_in_block() { return threadIdx.x >> 5; }

// ---- collectives: all 32 lanes of the warp, or all threads of the block, take part ------------------------------------
KVC_DEVICE void kvc_sync_block() { __syncthreads(); }
// Whether any thread of the block says so.
KVC_DEVICE bool kvc_sync_block_or(bool predicate) { return __syncthreads_or(predicate) != 0; }
KVC_DEVICE void kvc_sync_warp() { __syncwarp(KVC_FULL_WARP); }
KVC_DEVICE uint32_t kvc_ballot(bool predicate) { return __ballot_sync(KVC_FULL_WARP, predicate); }
KVC_DEVICE uint32_t kvc_shfl_u32(uint32_t v, uint32_t lane) { return __shfl_sync(KVC_FULL_WARP, v, (int)lane); }
KVC_DEVICE uint64_t kvc_shfl_u64(uint64_t v, uint32_t lane) {
    return (uint64_t)__shfl_sync(KVC_FULL_WARP, (unsigned long long)v, (int)lane);
}
// The value of the lane `delta` below; lanes below `delta` get their own back.
KVC_DEVICE uint32_t kvc_shfl_up_u32(uint32_t v, uint32_t delta) { return __shfl_up_sync(KVC_FULL_WARP, v, delta); }
KVC_DEVICE uint64_t kvc_shfl_up_u64(uint64_t v, uint32_t delta) {
    return (uint64_t)__shfl_up_sync(KVC_FULL_WARP, (unsigned long long)v, delta);
}
KVC_DEVICE uint64_t kvc_shfl_xor_u64(uint64_t v, uint32_t mask) {
    return (uint64_t)__shfl_xor_sync(KVC_FULL_WARP, (unsigned long long)v, (int)mask);
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------------
// About a / b: a few units in the last place off, and without the slow path of an exact division.
KVC_DEVICE float kvc_divide_roughly(float a, float b) { return __fdividef(a, b); }

// ---- bits --------------------------------------------------------------------------------------------------------------
KVC_DEVICE uint32_t kvc_popcount(uint32_t v) { return (uint32_t)__popc((int)v); }
KVC_DEVICE uint32_t kvc_leading_zeros(uint32_t v) { return (uint32_t)__clz((int)v); }
// Index of the lowest set bit; v must not be 0.
KVC_DEVICE uint32_t kvc_lowest_bit(uint32_t v) { return (uint32_t)__ffs((int)v) - 1u; }

// ---- loads: the cache intent is in the name ------------------------------------------------------------------------------
// Engine data read once per launch (KV bytes): no place in L1 is worth it.
KVC_DEVICE kvc_u128 kvc_load_once_u128(const void* p) {
    kvc_u128 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
KVC_DEVICE uint64_t kvc_load_once_u64(const void* p) {
    unsigned long long v;
    asm volatile("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(p));
    return v;
}
KVC_DEVICE uint32_t kvc_load_once_u32(const void* p) { return *(const uint32_t*)p; }
KVC_DEVICE uint32_t kvc_load_once_u16(const void* p) { return *(const uint16_t*)p; }
KVC_DEVICE uint32_t kvc_load_once_u8(const void* p) { return *(const uint8_t*)p; }
// The guard's own arrays, whose neighbours share lines; or zeros without touching memory: no branch, so that several such loads
// are under way at once.
KVC_DEVICE kvc_u128 kvc_load_u128_if(const void* p, bool predicate) {
    kvc_u128 v;
    asm volatile(
        "{ .reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @q ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((uint32_t)predicate));
    return v;
}
KVC_DEVICE uint64_t kvc_load_u64_if(const void* p, bool predicate) {
    unsigned long long v;
    asm volatile("{ .reg .pred q; setp.ne.u32 q, %2, 0; mov.u64 %0, 0; @q ld.global.u64 %0, [%1]; }"
                 : "=&l"(v) : "l"(p), "r"((uint32_t)predicate));
    return v;
}
KVC_DEVICE uint32_t kvc_load_u32_if(const void* p, bool predicate) {
    uint32_t v;
    asm volatile("{ .reg .pred q; setp.ne.u32 q, %2, 0; mov.u32 %0, 0; @q ld.global.u32 %0, [%1]; }"
                 : "=&r"(v) : "l"(p), "r"((uint32_t)predicate));
    return v;
}
// Asks for the line of an address that will be read soon. The address must be valid.
KVC_DEVICE void kvc_prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }
// Words that other blocks of the same launch, or the host, may change under us: never from L1, never merged.
KVC_DEVICE uint64_t kvc_load_volatile_u64(const uint64_t* p) { return *(const volatile uint64_t*)p; }
KVC_DEVICE uint32_t kvc_load_volatile_u32(const uint32_t* p) { return *(const volatile uint32_t*)p; }

// ---- stores ------------------------------------------------------------------------------------------------------------
KVC_DEVICE void kvc_store_u128(void* p, kvc_u128 v) { *(kvc_u128*)p = v; }
KVC_DEVICE void kvc_store_volatile_u64(uint64_t* p, uint64_t v) { *(volatile uint64_t*)p = v; }
KVC_DEVICE void kvc_store_volatile_u32(uint32_t* p, uint32_t v) { *(volatile uint32_t*)p = v; }

// ---- atomics on device memory, and fences ----------------------------------------------------------------------------------
KVC_DEVICE uint64_t kvc_atomic_add_u64(uint64_t* p, uint64_t v) {
    return (uint64_t)atomicAdd((unsigned long long*)p, (unsigned long long)v);
}
KVC_DEVICE uint64_t kvc_atomic_max_u64(uint64_t* p, uint64_t v) {
    return (uint64_t)atomicMax((unsigned long long*)p, (unsigned long long)v);
}
KVC_DEVICE uint64_t kvc_atomic_cas_u64(uint64_t* p, uint64_t expected, uint64_t desired) {
    return (uint64_t)atomicCAS((unsigned long long*)p, (unsigned long long)expected, (unsigned long long)desired);
}
KVC_DEVICE uint32_t kvc_atomic_add_u32(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
KVC_DEVICE uint32_t kvc_atomic_or_u32(uint32_t* p, uint32_t v) { return atomicOr(p, v); }
// Everything this thread wrote before is visible to the host and to all devices before anything it writes after.
KVC_DEVICE void kvc_fence_system() { __threadfence_system(); }

#endif  // KVC_SIMT
