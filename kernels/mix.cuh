// mix.cuh: the arithmetic of chain and digest (kvcanary/hashing.py states the formulas), all mod 2^64.
#pragma once
#include "abi.cuh"

KVC_DEVICE uint64_t kvc_mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * KVC_MIX_1;
    x = (x ^ (x >> 27)) * KVC_MIX_2;
    return x ^ (x >> 31);
}

KVC_DEVICE uint64_t kvc_anchor(uint64_t salt) { return kvc_mix64(salt ^ KVC_CHAIN_ANCHOR); }

KVC_DEVICE uint64_t kvc_token_mix(int32_t token, int32_t position) {
    return kvc_mix64(((uint64_t)(uint32_t)token << 32) | (uint32_t)position);
}

KVC_DEVICE uint64_t kvc_link(uint64_t chain, int32_t token, int32_t position) {
    return chain * KVC_CHAIN_P + kvc_token_mix(token, position);
}

KVC_DEVICE uint64_t kvc_pow(uint64_t base, uint64_t exponent) {
    uint64_t result = 1;
    for (; exponent; exponent >>= 1, base *= base) {
        if (exponent & 1) result *= base;
    }
    return result;
}

KVC_DEVICE uint64_t kvc_warp_sum(uint64_t v) {
    for (uint32_t mask = 16; mask; mask >>= 1) v += kvc_shfl_xor_u64(v, mask);
    return v;
}

// Sum over the block, given to every thread. All threads of the block take part.
KVC_DEVICE uint64_t kvc_block_sum(uint64_t v) {
    KVC_SHARED uint64_t sums[KVC_WARPS];
    v = kvc_warp_sum(v);
    if (kvc_lane() == 0) sums[kvc_warp_in_block()] = v;
    kvc_sync_block();
    uint64_t total = 0;
    for (uint32_t w = 0; w < KVC_WARPS; ++w) total += sums[w];
    kvc_sync_block();  // sums may be written again
    return total;
}

// Exclusive prefix sums over the block, N at once, in place; totals are those of all threads. All threads take part.
template <int N>
KVC_DEVICE void kvc_block_exclusive_sums(uint64_t (&v)[N], uint64_t (&totals)[N]) {
    KVC_SHARED uint64_t sums[N][KVC_WARPS];
    const uint32_t lane = kvc_lane(), warp = kvc_warp_in_block();
    uint64_t inclusive[N];
    for (int k = 0; k < N; ++k) {
        inclusive[k] = v[k];
        for (uint32_t d = 1; d < 32; d <<= 1) {
            const uint64_t below = kvc_shfl_up_u64(inclusive[k], d);
            if (lane >= d) inclusive[k] += below;
        }
        if (lane == 31) sums[k][warp] = inclusive[k];
    }
    kvc_sync_block();
    for (int k = 0; k < N; ++k) {
        uint64_t before = 0;
        totals[k] = 0;
        for (uint32_t w = 0; w < KVC_WARPS; ++w) {
            if (w < warp) before += sums[k][w];
            totals[k] += sums[k][w];
        }
        v[k] = before + inclusive[k] - v[k];
    }
    kvc_sync_block();  // sums may be written again
}

// The chain after n >= 1 tokens that continue `start`: start P^n + sum_j m_j P^(n-1-j), m_j = mix of token_of(j) at first + j.
// Thread i walks j = i, i + 256, ... by Horner's rule in P^256; what is left of the power is at most P^255. Tokens are loaded
// eight at a time, without a condition and ahead of their turn: past the end, the last one again.
// All threads of the block take part and get the result.
template <typename TokenOf>
KVC_DEVICE uint64_t kvc_block_chain(uint64_t start, int64_t n, int32_t first, TokenOf token_of) {
    constexpr int AHEAD = 8;
    int32_t tokens[AHEAD];
    const auto load = [&](int64_t base) {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int64_t j = base + u * KVC_THREADS;
            tokens[u] = token_of(j < n ? j : n - 1);
        }
    };
    int64_t base = kvc_thread();
    load(base);
    const uint64_t stride_power = kvc_pow(KVC_CHAIN_P, KVC_THREADS);
    const uint64_t rest_power = base < n ? kvc_pow(KVC_CHAIN_P, (uint64_t)(n - 1 - base) % KVC_THREADS) : 0;
    const uint64_t whole_power = kvc_pow(KVC_CHAIN_P, (uint64_t)n);
    uint64_t sum = 0;
    while (base < n) {
        uint64_t mixes[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) mixes[u] = kvc_token_mix(tokens[u], first + (int32_t)(base + u * KVC_THREADS));
        const int64_t now = base;
        base += AHEAD * KVC_THREADS;
        if (base < n) load(base);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            if (now + u * KVC_THREADS < n) sum = sum * stride_power + mixes[u];
        }
    }
    return start * whole_power + kvc_block_sum(sum * rest_power);
}
