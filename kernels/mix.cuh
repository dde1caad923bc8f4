// mix.cuh: the arithmetic of chain and digest (kvcanary/hashing.py states the formulas), all mod 2^64.
#pragma once
#include "abi.cuh"

KVC_DEVICE uint64_t kvc_mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * KVC_MIX_1;
    x = (x ^ (x >> 27)) * KVC_MIX_2;
    return x ^ (x >> 31);
}

// The x of which v is mix64(x).
KVC_DEVICE uint64_t kvc_unmix64(uint64_t v) {
    v = (v ^ (v >> 31) ^ (v >> 62)) * KVC_MIX_2_INVERSE;
    v = (v ^ (v >> 27) ^ (v >> 54)) * KVC_MIX_1_INVERSE;
    return v ^ (v >> 30) ^ (v >> 60);
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
// Thread i walks j = i, i + 256, ... by Horner's rule in P^256; what is left of the power is at most P^255. It does so eight
// tokens at a time, and loads the fewer than eight of its end beforehand: past the end, the last one again.
// All threads of the block take part and get the result.
template <typename TokenOf>
KVC_DEVICE uint64_t kvc_block_chain(uint64_t start, uint32_t n, int32_t first, TokenOf token_of) {
    constexpr uint32_t AT_ONCE = 8, STRIDE = KVC_THREADS, SPAN = (AT_ONCE - 1) * STRIDE;
    const uint32_t own = kvc_thread(), n_own = own < n ? (n - own + STRIDE - 1) / STRIDE : 0;
    const uint32_t end = own + n_own / AT_ONCE * AT_ONCE * STRIDE;  // of whole eights
    int32_t rest[AT_ONCE - 1];
#pragma unroll
    for (uint32_t u = 0; u < AT_ONCE - 1; ++u) rest[u] = token_of(end + u * STRIDE < n ? end + u * STRIDE : n - 1);
    const uint64_t stride_power = kvc_pow(KVC_CHAIN_P, STRIDE);
    const uint64_t rest_power = n_own ? kvc_pow(KVC_CHAIN_P, (n - 1 - own) % STRIDE) : 0;
    const uint64_t whole_power = kvc_pow(KVC_CHAIN_P, n);
    uint64_t sum = 0;
#pragma unroll 1
    for (uint32_t j = own; j < end; j += SPAN + STRIDE) {
        int32_t tokens[AT_ONCE];
#pragma unroll
        for (uint32_t u = 0; u < AT_ONCE; ++u) tokens[u] = token_of(j + u * STRIDE);
#pragma unroll
        for (uint32_t u = 0; u < AT_ONCE; ++u) {
            sum = sum * stride_power + kvc_token_mix(tokens[u], first + (int32_t)(j + u * STRIDE));
        }
    }
#pragma unroll
    for (uint32_t u = 0; u < AT_ONCE - 1; ++u) {
        const uint64_t longer = sum * stride_power + kvc_token_mix(rest[u], first + (int32_t)(end + u * STRIDE));
        if (end + u * STRIDE < n) sum = longer;
    }
    return start * whole_power + kvc_block_sum(sum * rest_power);
}
