// baselines.cu: what the guard's kernels are measured against, and what the benches themselves need.
//
// bench_*  fill, flush, read: the ceiling and the floor of this machine
// base_*   the per-thread scheme: a plan in memory, one thread per planned entry to verify, one thread per request to write
//
// Written for these benches from the description of that scheme. The chain is the guard's own (P, mix64, stamps of 32
// bytes), so that both do the same work on the same stamps; the fold is 16 bytes at a time through splitmix64, in order.
typedef unsigned int u32;
typedef int i32;
typedef long long i64;
typedef unsigned long long u64;

#define MIX_1 0xBF58476D1CE4E5B9ull
#define MIX_2 0x94D049BB133111EBull
#define GOLDEN 0x9E3779B97F4A7C15ull
#define CHAIN_P 0xD1342543DE82EF95ull
#define NEVER 0x5EED5EEDu  // what no checksum is compared with in earnest: it keeps the loads alive

struct __align__(16) Stamp {
    u64 chain;
    i32 token, position, prev_slot;
    u32 step, owner, epoch;
};

static __device__ __forceinline__ u64 mix64(u64 x) {
    x = (x ^ (x >> 30)) * MIX_1;
    x = (x ^ (x >> 27)) * MIX_2;
    return x ^ (x >> 31);
}
static __device__ __forceinline__ u64 splitmix64(u64 x) { return mix64(x + GOLDEN); }
static __device__ __forceinline__ u64 link(u64 chain, i32 token, i32 position) {
    return chain * CHAIN_P + mix64((u64)(u32)token << 32 | (u32)position);
}
static __device__ __forceinline__ i64 thread_number() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
static __device__ __forceinline__ i64 n_threads() { return (i64)gridDim.x * blockDim.x; }

// ---- the machine ---------------------------------------------------------------------------------------------------------
extern "C" __global__ void bench_fill(u64* words, i64 n, u64 seed) {
    for (i64 i = thread_number(); i < n; i += n_threads()) words[i] = splitmix64(seed + (u64)i * GOLDEN);
}

extern "C" __global__ void bench_empty() {}

// 16-byte loads, grid-stride, U of them in flight a thread; n counts 16 bytes.
template <int U>
static __device__ __forceinline__ void read_all(const uint4* p, i64 n, u32* out) {
    const i64 stride = n_threads();
    u32 sum = 0;
    i64 i = thread_number();
    for (; i + (U - 1) * stride < n; i += U * stride) {
        uint4 v[U];
#pragma unroll
        for (int u = 0; u < U; ++u) v[u] = __ldcs(p + i + u * stride);
#pragma unroll
        for (int u = 0; u < U; ++u) sum += v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < n; i += stride) {
        const uint4 v = __ldcs(p + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == NEVER) *out = sum;
}
extern "C" __global__ void __launch_bounds__(512) bench_read_4(const uint4* p, i64 n, u32* out) { read_all<4>(p, n, out); }
extern "C" __global__ void __launch_bounds__(512) bench_read_8(const uint4* p, i64 n, u32* out) { read_all<8>(p, n, out); }
extern "C" __global__ void __launch_bounds__(512) bench_read_16(const uint4* p, i64 n, u32* out) { read_all<16>(p, n, out); }

// Reads more than L2 holds, with ordinary loads, so that nothing of before is left in it.
extern "C" __global__ void __launch_bounds__(512) bench_flush(const uint4* p, i64 n, u32* out) {
    u32 sum = 0;
    for (i64 i = thread_number(); i < n; i += n_threads()) {
        const uint4 v = p[i];
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == NEVER) *out = sum;
}

// ---- the per-thread scheme: verify -----------------------------------------------------------------------------------------
// One thread per request writes its entries one after the other; before[r] entries precede those of request r.
extern "C" __global__ void base_plan(i32 rows, const i32* table, i64 table_width, i32 page, const i32* prefix, const i32* tokens,
                                     i64 tokens_width, const i64* before, i64* slot, i32* position, i64* previous,
                                     i32* expected) {
    const i64 r = thread_number();
    if (r >= rows) return;
    i64 last = -1;
    for (i32 p = 0; p < prefix[r]; ++p) {
        const i64 at = before[r] + p;
        const i64 s = (i64)table[r * table_width + p / page] * page + p % page;
        slot[at] = s;
        position[at] = p;
        previous[at] = last;
        expected[at] = tokens[r * tokens_width + p];
        last = s;
    }
}

// One thread per planned entry, one half a launch.
extern "C" __global__ void __launch_bounds__(512)
    base_verify_stamps(i64 n, const i64* slot, const i32* position, const i64* previous, const i32* expected,
                       const Stamp* stamps, u64 anchor, u64* n_bad) {
    for (i64 i = thread_number(); i < n; i += n_threads()) {
        const Stamp stamp = stamps[slot[i]];
        const u64 before = previous[i] < 0 ? anchor : stamps[previous[i]].chain;
        const bool is_good = stamp.position == position[i] && stamp.token == expected[i] &&
                             stamp.chain == link(before, stamp.token, stamp.position);
        if (!is_good) atomicAdd(n_bad, 1ull);
    }
}

static __device__ __forceinline__ u64 fold(const uint4* row, i32 n_loads) {
    u64 h = 0;
    for (i32 i = 0; i < n_loads; ++i) {
        const uint4 v = row[i];
        h = splitmix64(h ^ ((u64)v.y << 32 | v.x));
        h = splitmix64(h ^ ((u64)v.w << 32 | v.z));
    }
    return h;
}

// One thread per slot; rows of n_loads x 16 bytes, one behind the other.
extern "C" __global__ void __launch_bounds__(512)
    base_fold_slots(i64 n, const i64* slot, const uint4* data, i32 n_loads, u64* folds) {
    for (i64 i = thread_number(); i < n; i += n_threads()) folds[slot[i]] = fold(data + slot[i] * n_loads, n_loads);
}
extern "C" __global__ void __launch_bounds__(512)
    base_verify_folds(i64 n, const i64* slot, const uint4* data, i32 n_loads, const u64* folds, u64* n_bad) {
    for (i64 i = thread_number(); i < n; i += n_threads()) {
        if (fold(data + slot[i] * n_loads, n_loads) != folds[slot[i]]) atomicAdd(n_bad, 1ull);
    }
}

// ---- the per-thread scheme: write ------------------------------------------------------------------------------------------
// One thread per request walks its new tokens; one half a launch.
extern "C" __global__ void base_write_stamps(i32 rows, const i32* query, const i32* tokens, const i64* slots, u64 anchor,
                                             u32 forward, Stamp* stamps) {
    const i64 r = thread_number();
    if (r >= rows) return;
    u64 chain = anchor;
    i64 last = -1;
    for (i32 t = query[r]; t < query[r + 1]; ++t) {
        const i32 position = t - query[r];
        chain = link(chain, tokens[t], position);
        stamps[slots[t]] = {chain, tokens[t], position, (i32)last, forward, (u32)r + 1, 0};
        last = slots[t];
    }
}

// The same walk, folding each token's bytes.
extern "C" __global__ void base_write_folds(i32 rows, const i32* query, const i64* slots, const uint4* data, i32 n_loads,
                                            u64* folds) {
    const i64 r = thread_number();
    if (r >= rows) return;
    for (i32 t = query[r]; t < query[r + 1]; ++t) folds[slots[t]] = fold(data + slots[t] * n_loads, n_loads);
}
