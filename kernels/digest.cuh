// digest.cuh: digests of up to 32 slots at a time, by a warp.
//
// d = mix64(sum_i w_i K_i + n C0 + digest C1 + position C2), with K_i = k[i mod 128] R^(i div 128). The sum is order-free: a
// group of 1 to 32 lanes shares a slot, lane l takes the 16 bytes at 16 l, and, of planes over 512 bytes, every 512 bytes further
// on. So a lane needs the same four constants all the way, and Horner's rule in R from its last load down. Eight loads a lane
// are in flight, of as many slots as have their turn. What is the same for a whole slot is done once, by the lane whose slot it
// is: its address, its stored digest, the finish of its sum. Planes that are not so regular (several in one digest, loads below
// 8 bytes) go the general way, a warp a slot.
#pragma once
#include "report.cuh"

#define KVC_PIECES 8  // 16-byte loads of a lane that are in flight at once: fewer starve the memory, more or more warps crowd it

// k[0..127] in shared memory, for the general way.
KVC_DEVICE uint64_t* kvc_constants() {
    KVC_SHARED uint64_t k[KVC_DIGEST_PERIOD];
    return k;
}
KVC_DEVICE uint64_t kvc_constant_of(uint32_t i) { return kvc_mix64(KVC_DIGEST_SEED + i) | 1; }
// Asks for all that tells what the pool's digests are: later it is near. All threads of the block take part.
KVC_DEVICE void kvc_ask_for_digests(const Pool& pool) {
#pragma unroll 1
    for (uint32_t i = kvc_thread(); i < pool.n_digests; i += KVC_THREADS) {
        kvc_prefetch(kvc_pointer<Digest>(pool.digest_units) + i);
        kvc_prefetch(kvc_pointer<Plane>(pool.planes) + i);  // there are at least as many planes
    }
}
// Made by the block. All threads take part.
KVC_DEVICE void kvc_make_constants() {
    for (uint32_t i = kvc_thread(); i < KVC_DIGEST_PERIOD; i += KVC_THREADS) kvc_constants()[i] = kvc_constant_of(i);
    kvc_sync_block();
}
KVC_DEVICE void kvc_begin_digests(const Pool& pool) {
    kvc_ask_for_digests(pool);
    kvc_make_constants();
}

// The slot of a lane.
struct LaneSlot {
    int64_t slot;  // negative: none
    uint32_t block, token;
    int32_t position;
};
KVC_DEVICE LaneSlot kvc_lane_slot(const Pool& pool, int64_t slot, int64_t position) {
    if (slot < 0) return {-1, 0, 0, 0};
    const uint32_t block = kvc_divide((uint32_t)slot, pool.page_size, pool.page_shift);
    return {slot, block, (uint32_t)slot - block * (uint32_t)pool.page_size, (int32_t)position};
}

KVC_DEVICE uint64_t* kvc_digest_at(const Pool& pool, uint32_t index, int64_t slot) {
    return kvc_mutable_pointer<uint64_t>(pool.digests) + (int64_t)index * pool.n_slots + slot;
}

KVC_DEVICE uint64_t kvc_finish_digest(const Pool& pool, uint64_t sum, uint32_t index, int32_t position) {
    const uint32_t n_words = kvc_pointer<Digest>(pool.digest_units)[index].n_words;
    const uint64_t d = kvc_mix64(sum + n_words * KVC_DIGEST_C0 + index * KVC_DIGEST_C1 + (uint32_t)position * KVC_DIGEST_C2);
    return d ? d : 1;
}

// Of a plane without a split of its tokens; those with one go the general way.
KVC_DEVICE uint64_t kvc_slot_address(const Plane& plane, uint32_t block, uint32_t token) {
    return plane.base + (uint64_t)(block * plane.page_stride + token * plane.token_stride);
}
// What a split of the tokens adds: runs of tok_split tokens are tok_hi_stride apart, in place of as far as their tokens reach.
KVC_DEVICE uint64_t kvc_split_offset(const Plane& plane, uint32_t token) {
    return (uint64_t)((int64_t)(token / plane.tok_split) * (plane.tok_hi_stride - plane.tok_split * plane.token_stride));
}
KVC_DEVICE uint64_t kvc_any_slot_address(const Plane& plane, uint32_t block, uint32_t token) {
    return kvc_slot_address(plane, block, token) + (plane.tok_split ? kvc_split_offset(plane, token) : 0);
}

// ---- regular planes ------------------------------------------------------------------------------------------------------
// A sum mod 2^64 of 32-bit words times 64-bit constants, the products of the constants' upper halves apart: two multiply-adds.
struct Sum {
    uint64_t low;
    uint32_t high;
    KVC_DEVICE_MEMBER void add(uint32_t word, uint64_t k) {
        low += (uint64_t)word * (uint32_t)k;
        high += word * (uint32_t)(k >> 32);
    }
    KVC_DEVICE_MEMBER uint64_t total() const { return low + ((uint64_t)high << 32); }
};

// Sixteen bytes of a slot, in one load or, where planes are aligned to 8 bytes only, in two.
template <bool IS_WIDE>
struct Piece;
template <>
struct Piece<true> {
    kvc_u128 v;
    KVC_DEVICE_MEMBER void read(uint64_t slot, uint64_t offset, uint64_t) { v = kvc_load_once_u128((const void*)(slot + offset)); }
};
template <>
struct Piece<false> {
    kvc_u128 v;
    KVC_DEVICE_MEMBER void read(uint64_t slot, uint64_t offset, uint64_t second) {
        const uint64_t a = kvc_load_once_u64((const void*)(slot + offset)), b = kvc_load_once_u64((const void*)(slot + second));
        v = {(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b, (uint32_t)(b >> 32)};
    }
};
KVC_DEVICE void kvc_add_piece(Sum& sum, const kvc_u128& v, const uint64_t (&k)[4]) {
    sum.add(v.x, k[0]);
    sum.add(v.y, k[1]);
    sum.add(v.z, k[2]);
    sum.add(v.w, k[3]);
}

// Where the load from byte `byte` on lies, from the slot's first byte; past the end, where the last load does.
template <bool IS_WIDE>
KVC_DEVICE uint64_t kvc_byte_offset(const Digest& unit, const Plane& plane, uint32_t byte) {
    constexpr uint32_t BYTES = IS_WIDE ? 16 : 8;
    uint32_t load = byte / BYTES;
    if (load >= unit.n_loads) load = unit.n_loads - 1;
    if (plane.n_chunks == 1) return (uint64_t)load * BYTES;
    const uint32_t chunk = plane.chunk_magic ? (uint32_t)(((uint64_t)load * plane.chunk_magic) >> 32) : load;
    const uint32_t rest = load - chunk * (plane.chunk_bytes / BYTES);
    return (uint64_t)((int64_t)chunk * plane.chunk_stride) + (uint64_t)rest * BYTES;
}

// Totals over groups of LANES lanes of U sums each (U <= LANES, or U == 1): the lanes of a group end up with the totals of the U
// in ascending order, LANES / U neighbours with the same one. Halving what is left to add at each step costs
// U - 1 + log2(LANES / U) shuffles instead of U log2(LANES).
template <int LANES, int U>
KVC_DEVICE uint64_t kvc_group_sum(uint64_t (&sum)[U]) {
#pragma unroll
    for (int n = U / 2, half = LANES / 2; n >= 1; n /= 2, half /= 2) {
        const bool is_upper = kvc_lane() & (uint32_t)half;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const uint64_t given = is_upper ? sum[i] : sum[i + n];
            const uint64_t kept = is_upper ? sum[i + n] : sum[i];
            sum[i] = kept + kvc_shfl_xor_u64(given, (uint32_t)half);
        }
    }
#pragma unroll
    for (int half = LANES / U / 2; half; half /= 2) sum[0] += kvc_shfl_xor_u64(sum[0], (uint32_t)half);
    return sum[0];
}

// The sums of the lanes' slots over ROUNDS pieces a lane of one plane, from piece `first` (a multiple of 32) on, as if they were
// the plane's first: `start` is the address of this lane's slot, 0 = none. LANES lanes share a slot, U slots of each group have
// their turn. All lanes take part; the sum of each slot goes to its lane. No load is conditional: where there is no slot, another
// one is read again, and past the end of the plane its last bytes, which do not count. All loads of a turn are issued together:
// neighbouring slots are neighbours in memory, which likes to be read in one go.
//
// HAS_REST: 32 / U lanes a slot take one piece more each, the plane's last.
template <int LANES, int ROUNDS, int U, bool IS_WIDE, bool HAS_REST = false>
KVC_DEVICE uint64_t kvc_sums_shape(const Digest& unit, const Plane& plane, uint64_t start, uint32_t first) {
    constexpr int GROUPS = 32 / LANES, AT_ONCE = U * GROUPS, SHARE = U > 1 ? LANES / U : LANES;
    constexpr int REST_LANES = 32 / U;
    static_assert(U == 1 || U <= LANES, "kvc_group_sum");
    static_assert(!HAS_REST || (IS_WIDE && LANES == 32), "the slots of a turn are as many as the groups that take their rests");
    const uint32_t lane = kvc_lane() % LANES, group = kvc_lane() / LANES;
    const uint32_t there = kvc_ballot(start != 0);
    if (there == 0) return 0;
    const uint64_t some = kvc_shfl_u64(start, kvc_lowest_bit(there));
    if (start == 0) start = some;
    const int n_slots = 32 - (int)kvc_leading_zeros(there);  // places up to the last slot

    uint64_t offset[ROUNDS], second[ROUNDS], k[4];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        offset[r] = kvc_byte_offset<IS_WIDE>(unit, plane, 16 * (first + lane + 32u * r));
        second[r] = IS_WIDE ? 0 : kvc_byte_offset<IS_WIDE>(unit, plane, 16 * (first + lane + 32u * r) + 8);
    }
    // In the last round, some lanes may have nothing: of one round, that is in the constants; of several, their words are dropped.
    const uint32_t n_bytes = unit.n_loads * (IS_WIDE ? 16 : 8), last = 16 * (first + lane + 32u * (ROUNDS - 1));
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) k[j] = ROUNDS > 1 || HAS_REST || last + 4 * j < n_bytes ? kvc_constants()[4 * lane + j] : 0;
    const uint32_t rest_lane = kvc_lane() % REST_LANES, rest_byte = 16 * (32u * ROUNDS + rest_lane);
    const uint64_t rest_offset = HAS_REST ? kvc_byte_offset<IS_WIDE>(unit, plane, rest_byte) : 0;

    const uint64_t rest_power = ROUNDS == 1 ? KVC_DIGEST_R : KVC_DIGEST_R * KVC_DIGEST_R;
    uint64_t rest_k[4];
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) rest_k[j] = HAS_REST && rest_byte < n_bytes ? kvc_constants()[4 * rest_lane + j] : 0;

    uint64_t mine = 0;
#pragma unroll 1
    for (int base = 0; base < n_slots; base += AT_ONCE) {
        Piece<IS_WIDE> pieces[U][ROUNDS];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const uint64_t slot = kvc_shfl_u64(start, ((uint32_t)(base + u * GROUPS) + group) & 31);
#pragma unroll
            for (int r = 0; r < ROUNDS; ++r) pieces[u][r].read(slot, offset[r], second[r]);
        }
        Piece<IS_WIDE> rest;
        if (HAS_REST) rest.read(kvc_shfl_u64(start, ((uint32_t)base + kvc_lane() / REST_LANES) & 31), rest_offset, 0);
        uint64_t totals[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            Sum sum = {0, 0};
            if (ROUNDS > 1 && !HAS_REST && last >= n_bytes) pieces[u][ROUNDS - 1].v = {0, 0, 0, 0};
            kvc_add_piece(sum, pieces[u][ROUNDS - 1].v, k);
#pragma unroll
            for (int r = ROUNDS - 2; r >= 0; --r) {
                sum = {sum.total() * KVC_DIGEST_R, 0};
                kvc_add_piece(sum, pieces[u][r].v, k);
            }
            totals[u] = sum.total();
        }
        const uint64_t total = kvc_group_sum<LANES, U>(totals);
        // Slot u * GROUPS + g of a pass: in group g, in the u-th of U parts of it.
        const uint32_t place = kvc_lane() - (uint32_t)base;
        const uint64_t found = kvc_shfl_u64(total, (place % GROUPS * LANES + place / GROUPS * SHARE) & 31);
        uint64_t more = 0;
        if (HAS_REST) {
            uint64_t sums[1];
            Sum sum = {0, 0};
            kvc_add_piece(sum, rest.v, rest_k);
            sums[0] = sum.total();
            more = kvc_shfl_u64(kvc_group_sum<REST_LANES, 1>(sums), place * REST_LANES & 31) * rest_power;
        }
        if (place < AT_ONCE) mine = found + more;
    }
    return mine;
}

// Planes of more than 2 KiB: a slot after the other, four rounds at a time.
template <bool IS_WIDE>
KVC_DEVICE uint64_t kvc_sums_long(const Digest& unit, const Plane& plane, uint64_t start) {
    const uint32_t lane = kvc_lane(), n_bytes = unit.n_loads * (IS_WIDE ? 16 : 8), n_rounds = (n_bytes + 511) / 512;
    uint64_t k[4], mine = 0;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) k[j] = kvc_constants()[4 * lane + j];
    for (uint32_t left = kvc_ballot(start != 0); left; left &= left - 1) {
        const uint32_t owner = kvc_lowest_bit(left);
        const uint64_t slot = kvc_shfl_u64(start, owner);
        Sum sum = {0, 0};
        for (int top = (int)((n_rounds - 1) / 4 * 4); top >= 0; top -= 4) {
            Piece<IS_WIDE> pieces[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const uint32_t byte = 16 * (lane + 32u * (uint32_t)(top + r));
                const uint64_t second = IS_WIDE ? 0 : kvc_byte_offset<IS_WIDE>(unit, plane, byte + 8);
                pieces[r].read(slot, kvc_byte_offset<IS_WIDE>(unit, plane, byte), second);
            }
#pragma unroll
            for (int r = 3; r >= 0; --r) {
                const uint32_t byte = 16 * (lane + 32u * (uint32_t)(top + r));
                sum = {sum.total() * KVC_DIGEST_R, 0};
#pragma unroll
                for (uint32_t j = 0; j < 4; ++j) {
                    const uint32_t word = j == 0 ? pieces[r].v.x : j == 1 ? pieces[r].v.y : j == 2 ? pieces[r].v.z : pieces[r].v.w;
                    sum.add(byte + 4 * j < n_bytes ? word : 0, k[j]);
                }
            }
        }
        const uint64_t total = kvc_warp_sum(sum.total());
        if (lane == owner) mine = total;
    }
    return mine;
}

// A plane is taken in rounds of 32 pieces, one a lane. Where the last one would leave most lanes idle, fewer lanes a slot take
// what is left: together with the rounds, where the slots of a turn leave no more than one piece for each lane, else after them.
// Both out of line: so that all kernels have these loops once, and the loops the registers for themselves.
KVC_DEVICE uint32_t kvc_rounds(const Digest& unit) {
    return unit.n_loads / 32 + (unit.n_loads % 32 > 8 && unit.n_loads > 32);
}
KVC_DEVICE bool kvc_has_rest_in_rounds(const Digest& unit) {
    const uint32_t n_rounds = kvc_rounds(unit);
    return (n_rounds == 1 && unit.n_loads - 33 < 4) || (n_rounds == 2 && unit.n_loads - 65 < 8);
}
KVC_NOINLINE uint64_t kvc_sums_of_rounds(const Digest* at_unit, const Plane* at_plane, uint64_t start) {
    const Digest unit = *at_unit;
    const Plane plane = *at_plane;
    if (unit.load_bytes == 8) {
        return kvc_sums_long<false>(unit, plane, start);
    }
    if (unit.n_loads > 128) return kvc_sums_long<true>(unit, plane, start);
    if (kvc_has_rest_in_rounds(unit)) {
        if (unit.n_loads < 64) return kvc_sums_shape<32, 1, KVC_PIECES, true, true>(unit, plane, start, 0);
        return kvc_sums_shape<32, 2, KVC_PIECES / 2, true, true>(unit, plane, start, 0);
    }
    switch (kvc_rounds(unit)) {
        case 4: return kvc_sums_shape<32, 4, KVC_PIECES / 4, true>(unit, plane, start, 0);
        case 3: return kvc_sums_shape<32, 3, KVC_PIECES / 4, true>(unit, plane, start, 0);
        case 2: return kvc_sums_shape<32, 2, KVC_PIECES / 2, true>(unit, plane, start, 0);
        default: return kvc_sums_shape<32, 1, KVC_PIECES, true>(unit, plane, start, 0);
    }
}
// From piece `first` on, of which there are at most 32.
KVC_NOINLINE uint64_t kvc_sums_of_rest(const Digest* at_unit, const Plane* at_plane, uint64_t start, uint32_t first) {
    const Digest unit = *at_unit;
    const Plane plane = *at_plane;
    const uint32_t n = unit.n_loads - first;
    if (n > 16) return kvc_sums_shape<32, 1, KVC_PIECES, true>(unit, plane, start, first);
    if (n > 8) return kvc_sums_shape<16, 1, KVC_PIECES, true>(unit, plane, start, first);
    if (n > 4) return kvc_sums_shape<8, 1, KVC_PIECES, true>(unit, plane, start, first);
    if (n > 2) return kvc_sums_shape<4, 1, 4, true>(unit, plane, start, first);
    if (n > 1) return kvc_sums_shape<2, 1, 2, true>(unit, plane, start, first);
    return kvc_sums_shape<1, 1, 1, true>(unit, plane, start, first);
}

// ---- any planes ----------------------------------------------------------------------------------------------------------
KVC_DEVICE uint64_t kvc_load_up_to_8(uint64_t address, uint32_t n_bytes) {
    const void* p = (const void*)address;
    return n_bytes == 8   ? kvc_load_once_u64(p)
           : n_bytes == 4 ? kvc_load_once_u32(p)
           : n_bytes == 2 ? kvc_load_once_u16(p)
                          : kvc_load_once_u8(p);
}

KVC_DEVICE uint64_t kvc_constant(uint32_t word) {
    return kvc_constants()[word % KVC_DIGEST_PERIOD] * kvc_pow(KVC_DIGEST_R, word / KVC_DIGEST_PERIOD);
}

// This lane's part of the sum over one plane of any alignment and any place in a group: loads of 8, 4, 2 or 1 bytes, each
// inside one chunk. A load below a word adds its bytes shifted to their place: the sum is linear.
KVC_DEVICE uint64_t kvc_plane_sum(const Plane& plane, uint64_t start) {
    const uint32_t size = plane.load_bytes < 8 ? plane.load_bytes : 8;
    const uint32_t per_chunk = plane.chunk_bytes / size, n = plane.n_chunks * per_chunk;
    uint64_t sum = 0;
#pragma unroll 4
    for (uint32_t load = kvc_lane(); load < n; load += 32) {
        const uint32_t chunk = load / per_chunk;
        const uint64_t address = start + (uint64_t)((int64_t)chunk * plane.chunk_stride) + (load - chunk * per_chunk) * size;
        const uint64_t v = kvc_load_up_to_8(address, size);
        const uint32_t byte = plane.byte_offset + load * size, word = byte / 4;
        sum += (v << (8 * (byte % 4)) & 0xffffffffull) * kvc_constant(word);
        if (size == 8) sum += (v >> 32) * kvc_constant(word + 1);
    }
    return sum;
}

// The lanes' slots one after the other. All lanes take part; the sum of each slot goes to its lane.
KVC_NOINLINE uint64_t kvc_sums_general(const Pool& pool, uint32_t index, int64_t slot, uint32_t block_of, uint32_t token_of) {
    const Digest unit = kvc_pointer<Digest>(pool.digest_units)[index];
    uint64_t mine = 0;
    for (uint32_t left = kvc_ballot(slot >= 0); left; left &= left - 1) {
        const uint32_t owner = kvc_lowest_bit(left);
        const uint32_t block = kvc_shfl_u32(block_of, owner), token = kvc_shfl_u32(token_of, owner);
        uint64_t sum = 0;
        for (uint32_t i = 0; i < unit.n_planes; ++i) {
            const Plane plane = kvc_pointer<Plane>(pool.planes)[unit.first_plane + i];
            sum += kvc_plane_sum(plane, kvc_any_slot_address(plane, block, token));
        }
        sum = kvc_warp_sum(sum);
        if (kvc_lane() == owner) mine = sum;
    }
    return mine;
}

// Planes of at most 16 bytes a slot: a lane reads its own slot's. They are all latency, so they are loaded a digest ahead.
struct Crumb {
    uint64_t a, b;
};
KVC_DEVICE bool kvc_is_crumb(const Pool& pool, uint32_t index) {
    const Digest* unit = kvc_pointer<Digest>(pool.digest_units) + index;
    return unit->n_loads * unit->load_bytes - 1u < 16;
}
KVC_DEVICE Crumb kvc_load_crumb(const Pool& pool, uint32_t index, const LaneSlot& at) {
    const Digest unit = kvc_pointer<Digest>(pool.digest_units)[index];
    const Plane plane = kvc_pointer<Plane>(pool.planes)[unit.first_plane];
    if (at.slot < 0) return {0, 0};
    const uint64_t start = kvc_slot_address(plane, at.block, at.token);
    const uint64_t second = unit.load_bytes == 8 ? kvc_byte_offset<false>(unit, plane, 8) : 8;  // of 8 bytes, the same again
    return {kvc_load_once_u64((const void*)start), kvc_load_once_u64((const void*)(start + second))};
}
KVC_DEVICE uint64_t kvc_crumb_sum(const Pool& pool, uint32_t index, const Crumb& crumb) {
    const Digest* unit = kvc_pointer<Digest>(pool.digest_units) + index;
    const uint64_t* k = kvc_constants();
    Sum sum = {0, 0};
    sum.add((uint32_t)crumb.a, k[0]);
    sum.add((uint32_t)(crumb.a >> 32), k[1]);
    if (unit->n_loads * unit->load_bytes > 8) {
        sum.add((uint32_t)crumb.b, k[2]);
        sum.add((uint32_t)(crumb.b >> 32), k[3]);
    }
    return sum.total();
}

KVC_DEVICE uint64_t kvc_sums(const Pool& pool, uint32_t index, const LaneSlot& at) {
    const Digest* unit = kvc_pointer<Digest>(pool.digest_units) + index;
    if (unit->n_loads == 0) return kvc_sums_general(pool, index, at.slot, at.block, at.token);
    const Plane* plane = kvc_pointer<Plane>(pool.planes) + unit->first_plane;
    const uint64_t start = at.slot >= 0 ? kvc_slot_address(*plane, at.block, at.token) : 0;
    const uint32_t n_loads = unit->n_loads, n_rounds = kvc_rounds(*unit);
    const bool is_narrow = unit->load_bytes == 8;
    uint64_t sum = n_rounds || is_narrow ? kvc_sums_of_rounds(unit, plane, start) : 0;
    if (n_loads <= 128 && n_loads > 32 * n_rounds && !is_narrow && !kvc_has_rest_in_rounds(*unit)) {
        sum += kvc_sums_of_rest(unit, plane, start, 32 * n_rounds) * kvc_pow(KVC_DIGEST_R, n_rounds);
    }
    return sum;
}

// ---- what to do with the slots -------------------------------------------------------------------------------------------
// Some of [first, last) of the pool's digests.
struct DigestRange {
    uint32_t first, last;
};
// Those that this block's grid.y takes: a part that the pool tells, or an even one of another number of parts.
KVC_DEVICE DigestRange kvc_digest_range(const Pool& pool) {
    if (kvc_n_blocks_y() == pool.n_digest_parts) {
        return {pool.digest_parts[kvc_block_y()], pool.digest_parts[kvc_block_y() + 1]};
    }
    const uint32_t per_y = (pool.n_digests + kvc_n_blocks_y() - 1) / kvc_n_blocks_y();
    const uint32_t first = kvc_block_y() * per_y, last = first + per_y;
    return {first < pool.n_digests ? first : pool.n_digests, last < pool.n_digests ? last : pool.n_digests};
}

// Neighbours that a warp takes at once, as a shift: about 4 KiB of a plane. The next neighbours are the next warp's: the warps of a
// block read the same few pages of memory at any time, which memory likes better than eight places of their own.
KVC_DEVICE uint32_t kvc_run_shift(const Pool& pool, uint32_t index) {
    const uint32_t n_words = kvc_pointer<Digest>(pool.digest_units)[index].n_words;
    return n_words >= 512 ? 1 : n_words >= 256 ? 2 : n_words >= 128 ? 3 : 4;
}
KVC_DEVICE uint32_t kvc_place_in_block(uint32_t shift) {
    const uint32_t lane = kvc_lane();
    return ((lane >> shift) * KVC_WARPS << shift) + (kvc_warp_in_block() << shift) + (lane & ((1u << shift) - 1));
}

// The sums of the lanes' slots over each digest of a range, in order: then.after(digest, then.before(digest), sum). All lanes
// take part.
template <typename Then>
KVC_DEVICE void kvc_each_sum(const Pool& pool, const DigestRange& range, const LaneSlot& at, Then then) {
    bool is_crumb = range.first < range.last && kvc_is_crumb(pool, range.first);
    Crumb crumb = {0, 0};
    if (is_crumb) crumb = kvc_load_crumb(pool, range.first, at);
#pragma unroll 1
    for (uint32_t d = range.first; d < range.last; ++d) {
        const bool is_now = is_crumb;
        const Crumb now = crumb;
        is_crumb = d + 1 < range.last && kvc_is_crumb(pool, d + 1);
        if (is_crumb) crumb = kvc_load_crumb(pool, d + 1, at);
        const uint64_t stored = then.before(d);
        then.after(d, stored, is_now ? kvc_crumb_sum(pool, d, now) : kvc_sums(pool, d, at));
    }
}

// Stores the digests of the lanes' slots, of those whose claim is the wanted one. All lanes take part.
struct StoreDigest {
    const Pool& pool;
    const LaneSlot& at;
    const uint64_t &claim, &wanted;
    KVC_DEVICE_MEMBER uint64_t before(uint32_t) const { return 0; }
    KVC_DEVICE_MEMBER void after(uint32_t d, uint64_t, uint64_t sum) const {
        if (at.slot < 0 || claim != wanted) return;
        *kvc_digest_at(pool, d, at.slot) = kvc_finish_digest(pool, sum, d, at.position);
    }
};
KVC_DEVICE void kvc_store_digests(const Pool& pool, const DigestRange& range, const LaneSlot& at, uint64_t claim, uint64_t wanted) {
    kvc_each_sum(pool, range, at, StoreDigest{pool, at, claim, wanted});
}

// Compares the digests of the lanes' slots with the stored ones (0 = there is none). All lanes take part; returns whether any
// of this lane's differs, and counts those compared.
struct CompareDigest {
    const Pool& pool;
    const LaneSlot& at;
    uint32_t& n_compared;
    bool& is_odd;
    // Loaded ahead of the sum, whose latency hides it.
    KVC_DEVICE_MEMBER uint64_t before(uint32_t d) const {
        return kvc_load_u64_if(kvc_digest_at(pool, d, at.slot), at.slot >= 0);
    }
    KVC_DEVICE_MEMBER void after(uint32_t d, uint64_t stored, uint64_t sum) const {
        n_compared += stored != 0;
        is_odd |= stored && kvc_finish_digest(pool, sum, d, at.position) != stored;
    }
};
KVC_DEVICE bool kvc_compare_digests(const Pool& pool, const DigestRange& range, const LaneSlot& at, uint32_t& n_compared) {
    bool is_odd = false;
    kvc_each_sum(pool, range, at, CompareDigest{pool, at, n_compared, is_odd});
    return is_odd;
}

// Judges the lanes' slots in full after kvc_compare_digests has found a difference: a difference counts only where HEAD and TAIL
// stamps are of one earlier forward, and at the position that the stamp tells. All lanes take part; `about` is the lane's own.
KVC_NOINLINE void kvc_judge_digests(const Guard& guard, const Pool& pool, DigestRange range, LaneSlot at, uint32_t forward,
                                    const Violation& about) {
#pragma unroll 1
    for (uint32_t d = range.first; d < range.last; ++d) {
        const uint32_t half = kvc_pointer<Digest>(pool.digest_units)[d].half;
        const uint64_t sum = kvc_sums_general(pool, d, at.slot, at.block, at.token);
        const uint64_t stored = at.slot >= 0 ? *kvc_digest_at(pool, d, at.slot) : 0;
        if (stored == 0 || kvc_finish_digest(pool, sum, d, at.position) == stored) continue;
        const Stamp head = kvc_pointer<Stamp>(pool.head[half])[at.slot];
        const uint32_t tail_step = kvc_pointer<Stamp>(pool.tail[half])[at.slot].step;
        if (head.step == 0 || head.step == forward || tail_step != head.step) continue;
        if (kvc_is_outlived(pool, at.slot, head)) continue;
        const uint64_t found = kvc_finish_digest(pool, sum, d, head.position);
        if (found == stored) continue;  // at a wrong place, which is for the stamps to say
        Violation v = about;
        v.reasons = KVC_REASON_DATA;
        v.tag += half;
        v.position = at.position;
        v.slot = at.slot;
        v.plane = (int32_t)d;
        kvc_put_stamp(v, head);
        v.stored_digest = stored;
        v.found_digest = found;
        kvc_report(guard, pool, v);
    }
}

KVC_DEVICE bool kvc_is_first_thread() { return kvc_block() == 0 && kvc_block_y() == 0 && kvc_thread() == 0; }
