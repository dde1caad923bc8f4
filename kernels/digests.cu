// digests.cu: which bytes are in each slot. The KV bytes themselves are read only here.
//
// kvc_digests_verify  HEAD: digests of the prefix slots that fall due, against the stored ones
// kvc_digests_write   TAIL: digests of the new tokens' bytes
// kvc_digests_adopt   HEAD, option: stamps and digests of prefix slots that nobody ever stamped
// kvc_digests_sweep   digests of resident slots that the host handed in
//
// A warp computes one digest: the sum is order-free, so lane l takes every 32nd load of 16 bytes, coalesced, and the same
// four constants serve it for the whole plane: after 128 words the constants repeat times R (Horner's rule). grid.y splits
// the digests of a slot, so that a slot with many planes is worked on by many warps at once.
#include "report.cuh"

// ---- one digest ------------------------------------------------------------------------------------------------------------
KVC_DEVICE uint64_t kvc_digest_constant(uint32_t word) {  // K of any word
    return (kvc_mix64(KVC_DIGEST_SEED + word % KVC_DIGEST_PERIOD) | 1) * kvc_pow(KVC_DIGEST_R, word / KVC_DIGEST_PERIOD);
}

struct LaneConstants {
    uint64_t k[4];  // of the four words that this lane loads, before the powers of R
};
KVC_DEVICE LaneConstants kvc_lane_constants() {
    LaneConstants c;
    for (uint32_t j = 0; j < 4; ++j) c.k[j] = kvc_mix64(KVC_DIGEST_SEED + 4 * kvc_lane() + j) | 1;
    return c;
}

KVC_DEVICE uint64_t kvc_plane_offset(const Plane& plane, int64_t slot, int32_t page_size) {
    return plane.base + (uint64_t)((slot / page_size) * plane.page_stride + (slot % page_size) * plane.token_stride);
}

KVC_DEVICE uint64_t kvc_words_16(uint64_t address, const LaneConstants& c) {
    const kvc_u128 v = kvc_load_once_u128((const void*)address);
    return v.x * c.k[0] + v.y * c.k[1] + v.z * c.k[2] + v.w * c.k[3];
}

// This lane's part of sum_i w_i K_i of a plane of 16-byte loads that starts a digest. Horner from the last load down:
// load l + 32 t carries R^t.
KVC_DEVICE uint64_t kvc_plane_sum_16(const Plane& plane, uint64_t start, const LaneConstants& c) {
    const uint32_t per_chunk = plane.chunk_bytes / 16, n = plane.n_chunks * per_chunk, lane = kvc_lane();
    if (lane >= n) return 0;
    uint64_t sum = 0;
    uint32_t t = (n - 1 - lane) / 32 + 1;
    if (plane.n_chunks == 1) {
#pragma unroll 4
        for (; t > 0; --t) sum = sum * KVC_DIGEST_R + kvc_words_16(start + 16ull * (lane + 32 * (t - 1)), c);
        return sum;
    }
#pragma unroll 4
    for (; t > 0; --t) {
        const uint32_t load = lane + 32 * (t - 1), chunk = load / per_chunk;
        const uint64_t address = start + (uint64_t)((int64_t)chunk * plane.chunk_stride) + 16ull * (load - chunk * per_chunk);
        sum = sum * KVC_DIGEST_R + kvc_words_16(address, c);
    }
    return sum;
}

KVC_DEVICE uint64_t kvc_load_up_to_8(uint64_t address, uint32_t n_bytes) {
    const void* p = (const void*)address;
    return n_bytes == 8   ? kvc_load_once_u64(p)
           : n_bytes == 4 ? kvc_load_once_u32(p)
           : n_bytes == 2 ? kvc_load_once_u16(p)
                          : kvc_load_once_u8(p);
}

// The same for any alignment and any place in a group: loads of 16, 8, 4, 2 or 1 bytes, each inside one chunk. A load below a
// word adds its bytes shifted to their place: the sum is linear.
KVC_DEVICE uint64_t kvc_plane_sum_any(const Plane& plane, uint64_t start) {
    const uint32_t size = plane.load_bytes < 8 ? plane.load_bytes : 8;
    const uint32_t per_chunk = plane.chunk_bytes / size, n = plane.n_chunks * per_chunk;
    uint64_t sum = 0;
    for (uint32_t load = kvc_lane(); load < n; load += 32) {
        const uint32_t chunk = load / per_chunk;
        const uint64_t address = start + (uint64_t)((int64_t)chunk * plane.chunk_stride) + (load - chunk * per_chunk) * size;
        const uint64_t v = kvc_load_up_to_8(address, size);
        const uint32_t byte = plane.byte_offset + load * size, word = byte / 4;
        sum += (v << (8 * (byte % 4)) & 0xffffffffull) * kvc_digest_constant(word);
        if (size == 8) sum += (v >> 32) * kvc_digest_constant(word + 1);
    }
    return sum;
}

// The digest of one slot; all lanes take part and get it.
KVC_DEVICE uint64_t kvc_slot_digest(const Pool& pool, uint32_t index, int64_t slot, int32_t position, const LaneConstants& c) {
    const Digest unit = kvc_pointer<Digest>(pool.digest_units)[index];
    uint64_t sum = 0;
    for (uint32_t i = 0; i < unit.n_planes; ++i) {
        const Plane plane = kvc_pointer<Plane>(pool.planes)[unit.first_plane + i];
        const uint64_t start = kvc_plane_offset(plane, slot, pool.page_size);
        const bool is_fast = plane.load_bytes == 16 && plane.byte_offset == 0;
        sum += is_fast ? kvc_plane_sum_16(plane, start, c) : kvc_plane_sum_any(plane, start);
    }
    sum = kvc_warp_sum(sum) + unit.n_words * KVC_DIGEST_C0 + index * KVC_DIGEST_C1 + (uint32_t)position * KVC_DIGEST_C2;
    const uint64_t digest = kvc_mix64(sum);
    return digest ? digest : 1;
}

KVC_DEVICE uint64_t* kvc_digest_at(const Pool& pool, uint32_t index, int64_t slot) {
    return kvc_mutable_pointer<uint64_t>(pool.digests) + (int64_t)index * pool.n_slots + slot;
}

// The digests that this block's grid.y takes: [first, last).
struct DigestRange {
    uint32_t first, last;
};
KVC_DEVICE DigestRange kvc_digest_range(const Pool& pool) {
    const uint32_t per_y = (pool.n_digests + kvc_n_blocks_y() - 1) / kvc_n_blocks_y();
    const uint32_t first = kvc_block_y() * per_y, last = first + per_y;
    return {first < pool.n_digests ? first : pool.n_digests, last < pool.n_digests ? last : pool.n_digests};
}

KVC_DEVICE bool kvc_is_first_thread() { return kvc_block() == 0 && kvc_block_y() == 0 && kvc_thread() == 0; }

// ---- verification of a slot --------------------------------------------------------------------------------------------------
// What the stamps say of a slot's data: bit `half` set = this half may be judged, and at which position it was written.
struct Judgeable {
    uint32_t halves;
    int32_t position[2];
};
KVC_DEVICE Judgeable kvc_judgeable(const Pool& pool, int64_t slot, uint32_t forward) {
    Judgeable j = {0, {0, 0}};
#pragma unroll  // constant indices keep the positions in registers
    for (uint32_t half = 0; half < 2; ++half) {
        if (half >= pool.n_halves) break;
        const Stamp& head = kvc_pointer<Stamp>(pool.head[half])[slot];
        const uint32_t step = head.step;
        j.position[half] = head.position;
        if (step && step != forward && kvc_pointer<Stamp>(pool.tail[half])[slot].step == step) j.halves |= 1u << half;
    }
    return j;
}

// All lanes take part. Returns how many digests were compared; lane 0 reports.
KVC_DEVICE uint64_t kvc_verify_slot(const Guard& guard, const Pool& pool, const DigestRange& range, int64_t slot,
                                    const Judgeable& judgeable, const LaneConstants& c, const Violation& about) {
    uint64_t n_compared = 0;
    for (uint32_t d = range.first; d < range.last; ++d) {
        const uint32_t half = kvc_pointer<Digest>(pool.digest_units)[d].half;
        if (!(judgeable.halves >> half & 1)) continue;
        const uint64_t stored = *kvc_digest_at(pool, d, slot);
        if (!stored) continue;
        n_compared += 1;
        const uint64_t found = kvc_slot_digest(pool, d, slot, half ? judgeable.position[1] : judgeable.position[0], c);
        if (found == stored || kvc_lane() != 0) continue;
        Violation v = about;
        v.reasons = KVC_REASON_DATA;
        v.tag = about.tag + half;
        v.slot = slot;
        v.plane = (int32_t)d;
        kvc_put_stamp(v, kvc_pointer<Stamp>(pool.head[half])[slot]);
        v.stored_digest = stored;
        v.found_digest = found;
        kvc_report(guard, pool, v);
    }
    return n_compared;
}

KVC_DEVICE uint64_t kvc_verify_chunk_data(const StepParams& p, const KvcUnit& unit, const DigestRange& range, uint32_t forward,
                                          const LaneConstants& c) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
    if (!(row.flags & KVC_ROW_LIVE) || row.flags & KVC_ROW_PENDING) return 0;
    const int64_t begin = row.verify_start + unit.chunk * KVC_VERIFY_CHUNK;
    const int64_t end = begin + KVC_VERIFY_CHUNK < row.verify_end ? begin + KVC_VERIFY_CHUNK : row.verify_end;
    uint64_t n_compared = 0;
    for (int64_t base = begin; base < end; base += 32) {
        const int64_t position = base + kvc_lane();
        KvcSlot at = {-1, 0, KVC_SLOT_EMPTY};
        if (position < end) at = kvc_table_slot(pool, p.batch, unit.row, position);
        Judgeable own = {0, {0, 0}};
        if (at.status == KVC_SLOT_OK &&
            (row.flags & KVC_ROW_FULL_DATA || kvc_share(at.slot, p.batch.verify_data_every) == row.share)) {
            own = kvc_judgeable(pool, at.slot, forward);
        }
        for (uint32_t due = kvc_ballot(own.halves != 0); due; due &= due - 1) {
            const uint32_t lane = kvc_lowest_bit(due);
            const int64_t slot = (int64_t)kvc_shfl_u64((uint64_t)at.slot, lane);
            const Judgeable its = {kvc_shfl_u32(own.halves, lane),
                                   {(int32_t)kvc_shfl_u32((uint32_t)own.position[0], lane),
                                    (int32_t)kvc_shfl_u32((uint32_t)own.position[1], lane)}};
            Violation about = kvc_row_violation(pool, row, unit.row, kvc_tag(KVC_STAGE_HEAD, pool.kind, 0));
            about.position = (int32_t)(base + lane);
            n_compared += kvc_verify_slot(p.guard, pool, range, slot, its, c, about);
        }
    }
    return n_compared;
}

// A warp per 128 positions and digest range; of those positions it hashes the slots whose share is due.
KVC_KERNEL(KVC_THREADS) kvc_digests_verify(KVC_PARAM StepParams p) {
    if (!kvc_is_judging(p.guard)) return;
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(p.pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    const DigestRange range = kvc_digest_range(p.pool);
    const LaneConstants c = kvc_lane_constants();
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, p.pool, KVC_STAGE_HEAD);
    uint64_t n_compared = 0;
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        n_compared += kvc_verify_chunk_data(p, kvc_find_unit(work, p.batch.rows, u), range, forward, c);
    }
    if (kvc_lane() == 0 && n_compared) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_DATA_SLOTS, n_compared);
}

// ---- new tokens ----------------------------------------------------------------------------------------------------------
// A warp per 32 new tokens and digest range.
KVC_KERNEL(KVC_THREADS) kvc_digests_write(KVC_PARAM StepParams p) {
    const Pool& pool = p.pool;
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(pool, KVC_WORK_DIGEST);
    const int64_t n_units = work[p.batch.rows];
    const DigestRange range = kvc_digest_range(pool);
    const LaneConstants c = kvc_lane_constants();
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_TAIL);
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        const KvcUnit unit = kvc_find_unit(work, p.batch.rows, u);
        const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
        if (!(row.flags & KVC_ROW_LIVE)) continue;
        const int64_t i = unit.chunk * KVC_DIGEST_CHUNK + kvc_lane();
        KvcSlot target = {-1, 0, KVC_SLOT_EMPTY};
        if (i < row.n_new) target = kvc_write_slot(pool, p.batch, row.first_token + i);
        const bool is_winner =
            target.status == KVC_SLOT_OK &&
            kvc_pointer<uint64_t>(pool.claims)[target.slot] == ((uint64_t)forward << 32 | (uint64_t)(row.first_token + i + 1));
        for (uint32_t due = kvc_ballot(is_winner); due; due &= due - 1) {
            const uint32_t lane = kvc_lowest_bit(due);
            const int64_t slot = (int64_t)kvc_shfl_u64((uint64_t)target.slot, lane);
            const int32_t position = (int32_t)(row.prefix + unit.chunk * KVC_DIGEST_CHUNK + lane);
            for (uint32_t d = range.first; d < range.last; ++d) {
                const uint64_t digest = kvc_slot_digest(pool, d, slot, position, c);
                if (kvc_lane() == 0) *kvc_digest_at(pool, d, slot) = digest;
            }
        }
    }
}

// ---- adoption ------------------------------------------------------------------------------------------------------------
// A warp per 128 positions, all digests (grid.y is 1): a slot is stamped only after its digests are there. kvc_stamps_verify
// has claimed the slots; two rows that have a slot at the same position both adopt it, and write the same.
KVC_DEVICE void kvc_adopt_chunk(const StepParams& p, const KvcUnit& unit, uint32_t forward, const LaneConstants& c) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
    if (!(row.flags & KVC_ROW_LIVE) || row.flags & KVC_ROW_PENDING) return;
    const int64_t begin = row.verify_start + unit.chunk * KVC_VERIFY_CHUNK;
    const int64_t end = begin + KVC_VERIFY_CHUNK < row.verify_end ? begin + KVC_VERIFY_CHUNK : row.verify_end;
    for (int64_t base = begin; base < end; base += 32) {
        const int64_t position = base + kvc_lane();
        KvcSlot at = {-1, 0, KVC_SLOT_EMPTY};
        if (position < end) at = kvc_table_slot(pool, p.batch, unit.row, position);
        const bool is_mine = at.status == KVC_SLOT_OK && kvc_pointer<uint64_t>(pool.claims)[at.slot] ==
                                                            kvc_adoption_claim(forward, position);
        for (uint32_t due = kvc_ballot(is_mine); due; due &= due - 1) {
            const uint32_t lane = kvc_lowest_bit(due);
            const int64_t slot = (int64_t)kvc_shfl_u64((uint64_t)at.slot, lane);
            for (uint32_t d = 0; d < pool.n_digests; ++d) {
                const uint64_t digest = kvc_slot_digest(pool, d, slot, (int32_t)(base + lane), c);
                if (kvc_lane() == 0) *kvc_digest_at(pool, d, slot) = digest;
            }
        }
        kvc_sync_warp();
        if (is_mine) {
            const Stamp stamp = {0, KVC_NO_TOKEN, (int32_t)position, KVC_PREV_NONE, forward, 0, 0};
            for (uint32_t half = 0; half < pool.n_halves; ++half) {
                kvc_mutable_pointer<Stamp>(pool.head[half])[at.slot] = stamp;
                kvc_mutable_pointer<Stamp>(pool.tail[half])[at.slot] = stamp;
            }
        }
    }
}

KVC_KERNEL(KVC_THREADS) kvc_digests_adopt(KVC_PARAM StepParams p) {
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(p.pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    const LaneConstants c = kvc_lane_constants();
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        kvc_adopt_chunk(p, kvc_find_unit(work, p.batch.rows, u), forward, c);
    }
}

// ---- sweep ---------------------------------------------------------------------------------------------------------------
// A warp per resident slot and digest range.
KVC_KERNEL(KVC_THREADS) kvc_digests_sweep(KVC_PARAM SweepParams p) {
    const Pool& pool = p.pool;
    const DigestRange range = kvc_digest_range(pool);
    const LaneConstants c = kvc_lane_constants();
    if (kvc_is_first_thread()) kvc_count_data_launch(p.guard, pool, KVC_STAGE_SWEEP);
    uint64_t n_compared = 0;
    for (int64_t i = kvc_global_warp(); i < p.n; i += kvc_global_warps()) {
        const int64_t slot = kvc_pointer<int32_t>(p.slots)[i];
        if (slot < 0 || slot >= pool.n_slots || kvc_is_reserved(pool, slot)) continue;
        Violation about = kvc_no_violation();
        about.pool = (int32_t)pool.index;
        about.tag = kvc_tag(KVC_STAGE_SWEEP, pool.kind, 0);
        about.position = kvc_pointer<int32_t>(p.positions)[i];
        n_compared += kvc_verify_slot(p.guard, pool, range, slot, kvc_judgeable(pool, slot, 0), c, about);
    }
    if (kvc_lane() == 0 && n_compared) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_DATA_SLOTS, n_compared);
}
