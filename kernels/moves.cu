// moves.cu: KV that changed its place, or came from elsewhere: its stamps and digests are carried, never made from its bytes.
//
// kvc_moves_gather    slots -> image: the portable part of their stamps, and their digests
// kvc_moves_scatter   image -> slots: the same with a local part of their new place
// kvc_moves_commit    image -> image: the accepted paths of draft trees, at the positions where they belong; registers
// kvc_moves_localize  in place: a local part for stamps that the engine itself has copied
// kvc_moves_adopt     stamps for KV that came without any
// kvc_moves_digest    digests of the bytes that are there: of what was adopted, or changed on purpose
//
// A copy gathers all sources before it scatters, so its lists may overlap. The launches of kvcanary/backends/device_moves.py,
// between forwards.
#include "digest.cuh"

// ---- lists ---------------------------------------------------------------------------------------------------------------
// Entry i of a list of slots, or of blocks of `per_entry` slots; -1 where that is no slot of the pool, or a reserved one.
KVC_DEVICE int64_t kvc_listed_slot(const MoveParams& p, int64_t i) {
    const int64_t at = i / p.per_entry, named = kvc_int_at(p.slots, p.wide, at);
    if (named < 0 || named >= p.pool.n_slots) return -1;
    const int64_t slot = named * p.per_entry + (i - at * p.per_entry);
    return slot >= p.pool.n_slots || kvc_is_reserved(p.pool, slot) ? -1 : slot;
}

KVC_DEVICE int64_t kvc_first_entry() { return (int64_t)kvc_block() * KVC_THREADS + kvc_thread(); }
KVC_DEVICE int64_t kvc_entry_stride() { return (int64_t)kvc_n_blocks() * KVC_THREADS; }

// What this warp's lanes have skipped. All lanes take part.
KVC_DEVICE void kvc_count_skipped(const Guard& guard, uint64_t n) {
    n = kvc_warp_sum(n);
    if (kvc_lane() == 0 && n) kvc_atomic_add_u64(kvc_state(guard) + KVC_STATE_SKIPPED_MOVES, n);
}

// ---- stamps --------------------------------------------------------------------------------------------------------------
// The image of plane `plane` (HEAD of each half, then TAIL).
KVC_DEVICE Stamp* kvc_image(const MoveParams& p, uint32_t plane) { return kvc_mutable_pointer<Stamp>(p.stamps) + (int64_t)plane * p.n; }
KVC_DEVICE uint64_t* kvc_image_digests(const MoveParams& p, uint32_t d) {
    return kvc_mutable_pointer<uint64_t>(p.digests) + (int64_t)d * p.n;
}
KVC_DEVICE Stamp* kvc_plane(const Pool& pool, uint32_t plane) {
    return kvc_mutable_pointer<Stamp>(plane < pool.n_halves ? pool.head[plane] : pool.tail[plane - pool.n_halves]);
}

// The forward that a stamp made now is of: the last one begun, so that the next one judges it. Before the first there is none:
// the move takes its number, as 0 would mean that nothing was ever written. Whoever reads the word finds 0 or 1: the same.
KVC_DEVICE uint32_t kvc_move_step(const Guard& guard) {
    const uint32_t forward = (uint32_t)kvc_load_volatile_u64(kvc_state(guard) + KVC_STATE_FORWARD);
    if (forward == 0 && kvc_is_first_thread()) {
        kvc_store_volatile_u64(kvc_state(guard) + KVC_STATE_FORWARD, 1);
        kvc_store_volatile_u64(kvc_state(guard) + KVC_STATE_FORWARD_DONE, 1);
    }
    return forward ? forward : 1;
}

// Whether both stages have stamped each half of a slot in one forward.
KVC_DEVICE bool kvc_is_whole(const Pool& pool, int64_t slot) {
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        const uint32_t step = kvc_pointer<Stamp>(pool.head[half])[slot].step;
        if (step == 0 || kvc_pointer<Stamp>(pool.tail[half])[slot].step != step) return false;
    }
    return true;
}

// Its bytes are to be verified by the next forward that reads them; or, if there is nothing to verify, are not.
KVC_DEVICE void kvc_mark_fresh(const Guard& guard, const Pool& pool, int64_t slot, uint32_t step, bool is_fresh) {
    const uint64_t claim = (uint64_t)step << 32 | (is_fresh && pool.n_digests ? KVC_CLAIM_FRESH : 0u);
    uint64_t* word = kvc_mutable_pointer<uint64_t>(pool.claims) + slot;
    uint64_t before = *word;
    for (;;) {  // a list with duplicates is the engine's error, but must not lose count
        const uint64_t seen = kvc_atomic_cas_u64(word, before, claim);
        if (seen == before) break;
        before = seen;
    }
    const uint32_t change = (uint32_t)kvc_is_fresh(claim) - (uint32_t)kvc_is_fresh(before);
    if (change) kvc_atomic_add_u32(kvc_n_fresh(guard, pool), change);
}

// ---- gather --------------------------------------------------------------------------------------------------------------
// The portable part of a stamp. Where it continues the previous entry of the list, that can be said wherever the list goes,
// unless the predecessor was rewritten since: then nobody links the two.
KVC_DEVICE Stamp kvc_portable(const MoveParams& p, uint32_t plane, int64_t i, int64_t slot) {
    const Stamp* stamps = kvc_plane(p.pool, plane);
    const Stamp stamp = slot >= 0 ? stamps[slot] : Stamp{};
    if (stamp.step == 0) return {};
    // Not written since its block was allocated, or by somebody else: a new epoch at the new place would hide that.
    if (p.pool.blocks && stamp.epoch != kvc_block_epoch(p.pool, slot)) return {};
    const int64_t before = i > 0 ? kvc_listed_slot(p, i - 1) : -1;
    const uint32_t before_step = before >= 0 ? stamps[before].step : 0;
    const bool is_in_list = before_step && kvc_continued_slot(stamp) == before &&
                            !kvc_is_rewritten(p.pool, before, before_step, slot, stamp.step);
    const int32_t prev = kvc_is_relative(stamp) ? (is_in_list ? KVC_PREV_RELATIVE_BASE - KVC_PREV_IN_LIST : KVC_PREV_RELATIVE)
                                                : (is_in_list ? KVC_PREV_IN_LIST : KVC_PREV_NONE);
    return {stamp.chain, stamp.token, stamp.position, prev, stamp.step, 0, 0};
}

// A thread per entry; grid.y shares the stamp planes and digests.
KVC_KERNEL(KVC_THREADS) kvc_moves_gather(KVC_PARAM MoveParams p) {
    const uint32_t n_planes = 2 * p.pool.n_halves, n_parts = n_planes + p.pool.n_digests;
    uint64_t n_skipped = 0;
    for (uint32_t part = kvc_block_y(); part < n_parts; part += kvc_n_blocks_y()) {
        for (int64_t i = kvc_first_entry(); i < p.n; i += kvc_entry_stride()) {
            const int64_t slot = kvc_listed_slot(p, i);
            if (part < n_planes) {
                kvc_image(p, part)[i] = kvc_portable(p, part, i, slot);
            } else {
                kvc_image_digests(p, part - n_planes)[i] = slot >= 0 ? *kvc_digest_at(p.pool, part - n_planes, slot) : 0;
            }
            n_skipped += part == 0 && slot < 0;
        }
    }
    kvc_count_skipped(p.guard, n_skipped);
}

// ---- scatter -------------------------------------------------------------------------------------------------------------
// A portable stamp with the local part of its new slot; never written stays so.
KVC_DEVICE Stamp kvc_localized(const MoveParams& p, const Stamp& stamp, int64_t i, int64_t slot, uint32_t step) {
    if (stamp.step == 0) return {};
    const bool is_relative = kvc_is_relative(stamp);
    const int32_t before = kvc_continued_slot(stamp) == KVC_PREV_IN_LIST && i > 0 ? (int32_t)kvc_listed_slot(p, i - 1) : -1;
    const int32_t prev = is_relative ? (before >= 0 ? KVC_PREV_RELATIVE_BASE - before : KVC_PREV_RELATIVE)
                                     : (before >= 0 ? before : KVC_PREV_NONE);
    return {stamp.chain, stamp.token, stamp.position, prev, step, 0, kvc_block_epoch(p.pool, slot)};
}

// Both stages of one half. Where they are not of one forward they keep their steps: unfinished, wherever they go.
KVC_DEVICE bool kvc_scatter_half(const MoveParams& p, uint32_t half, int64_t i, int64_t slot, uint32_t step) {
    const Stamp head = kvc_image(p, half)[i], tail = kvc_image(p, half + p.pool.n_halves)[i];
    const bool is_whole = head.step && head.step == tail.step;
    kvc_plane(p.pool, half)[slot] = kvc_localized(p, head, i, slot, is_whole ? step : head.step);
    kvc_plane(p.pool, half + p.pool.n_halves)[slot] = kvc_localized(p, tail, i, slot, is_whole ? step : tail.step);
    return is_whole;
}

// A thread per entry; grid.y shares the digests, its first part has the stamps.
KVC_KERNEL(KVC_THREADS) kvc_moves_scatter(KVC_PARAM MoveParams p) {
    const Pool& pool = p.pool;
    const uint32_t step = kvc_move_step(p.guard), n_parts = 1 + pool.n_digests;
    uint64_t n_skipped = 0;
    for (uint32_t part = kvc_block_y(); part < n_parts; part += kvc_n_blocks_y()) {
        for (int64_t i = kvc_first_entry(); i < p.n; i += kvc_entry_stride()) {
            const int64_t slot = kvc_listed_slot(p, i);
            if (slot < 0) {
                n_skipped += part == 0;
                continue;
            }
            if (part > 0) {
                const uint32_t d = part - 1, half = kvc_pointer<Digest>(pool.digest_units)[d].half;
                *kvc_digest_at(pool, d, slot) = kvc_image(p, half)[i].step ? kvc_image_digests(p, d)[i] : 0;
                continue;
            }
            bool is_whole = true;
            for (uint32_t half = 0; half < pool.n_halves; ++half) is_whole &= kvc_scatter_half(p, half, i, slot, step);
            kvc_mark_fresh(p.guard, pool, slot, step, is_whole);
        }
    }
    kvc_count_skipped(p.guard, n_skipped);
}

// ---- commit --------------------------------------------------------------------------------------------------------------
// Where the chain of a row's path begins.
struct PathStart {
    uint64_t chain;    // before the path's first token
    bool is_relative;  // nobody knows that chain
    bool is_registered;
};
// From the register; where the tree was so large that the register no longer has it, from the stamp of the path's first node,
// if that was the tree's first: only its chain was continued from the prefix.
KVC_DEVICE PathStart kvc_path_start(const Register* reg, const Stamp& first, int32_t prefix) {
    if (reg && reg->request_id) {
        const int64_t oldest = (int64_t)reg->length - (KVC_N_REGISTER_LENGTHS - 1);
        if (prefix <= reg->length && prefix >= reg->first_length && prefix >= oldest) {
            return {reg->chain[prefix % KVC_N_REGISTER_LENGTHS], reg->is_relative != 0, true};
        }
    }
    if (first.step && first.position == prefix) {
        const uint64_t before = (first.chain - kvc_token_mix(first.token, prefix)) * KVC_CHAIN_P_INVERSE;
        return {before, kvc_is_relative(first), false};
    }
    return {0, true, false};
}

// The digest of the same bytes `shift` positions further on: the sum under mix64 is linear in the position, and mix64 a bijection.
// Of a stored 1 nobody knows whether it was 0 before: then there is no digest any more.
KVC_DEVICE uint64_t kvc_shift_digest(uint64_t digest, int32_t from, int32_t to) {
    if (digest <= 1 || from == to) return from == to ? digest : 0;
    const uint64_t sum = kvc_unmix64(digest) + (uint32_t)to * KVC_DIGEST_C2 - (uint32_t)from * KVC_DIGEST_C2;
    const uint64_t d = kvc_mix64(sum);
    return d ? d : 1;
}

// What the register knows after the path.
KVC_DEVICE void kvc_register_path(Register& reg, const PathStart& start, int32_t prefix, int32_t length) {
    const int64_t oldest = (int64_t)reg.length - (KVC_N_REGISTER_LENGTHS - 1);
    if (!start.is_registered) reg.first_length = prefix + 1;
    else if (oldest > reg.first_length) reg.first_length = (int32_t)oldest;
    reg.is_relative = start.is_relative;
    reg.length = reg.confirmed = length;
}

// A path by a warp: its few entries one after the other, the digests of each by the lanes.
KVC_DEVICE bool kvc_commit_path(const MoveParams& p, int64_t first, int64_t last, int64_t prefix, int64_t request_slot) {
    const Pool& pool = p.pool;
    if (first < 0 || last < first || last > p.n) return false;
    if (prefix < 0 || prefix > KVC_MAX_POSITIONS - (last - first)) return false;  // not the sum, which may overflow
    if (first == last) return true;
    const uint32_t lane = kvc_lane();
    const bool has_register = request_slot >= 0 && request_slot < (int64_t)pool.max_requests;
    Register* reg = has_register ? kvc_mutable_pointer<Register>(pool.registers) + request_slot : nullptr;
    const PathStart start = kvc_path_start(reg, kvc_image(p, 0)[first], (int32_t)prefix);
    const bool keeps = reg && reg->request_id;
    kvc_sync_warp();  // the register has been read by all lanes
    uint64_t chain = start.chain;
    for (int64_t i = first; i < last; ++i) {
        const int32_t position = (int32_t)(prefix + (i - first));
        const Stamp head = kvc_image(p, 0)[i];
        chain = kvc_link(chain, head.token, position);
        kvc_sync_warp();  // all lanes have read the stamp that one of them changes
        for (uint32_t d = lane; d < pool.n_digests; d += 32) {
            kvc_image_digests(p, d)[i] = kvc_shift_digest(kvc_image_digests(p, d)[i], head.position, position);
        }
        Stamp* stamp = lane < 2 * pool.n_halves ? kvc_image(p, lane) + i : nullptr;
        if (stamp && stamp->step) {
            const int32_t none = start.is_relative ? KVC_PREV_RELATIVE : KVC_PREV_NONE;
            const int32_t in_list = start.is_relative ? KVC_PREV_RELATIVE_BASE - KVC_PREV_IN_LIST : KVC_PREV_IN_LIST;
            stamp->chain = chain;
            // By the same shift in each plane: where they differed, they still do.
            stamp->position = (int32_t)((uint32_t)stamp->position + ((uint32_t)position - (uint32_t)head.position));
            stamp->prev_slot = i == first ? none : in_list;
        }
        if (keeps && lane == 0 && i >= last - KVC_N_REGISTER_LENGTHS) reg->chain[(position + 1) % KVC_N_REGISTER_LENGTHS] = chain;
    }
    if (keeps && lane == 0) kvc_register_path(*reg, start, (int32_t)prefix, (int32_t)(prefix + (last - first)));
    return true;
}

// A warp per row.
KVC_KERNEL(KVC_THREADS) kvc_moves_commit(KVC_PARAM MoveParams p) {
    uint64_t n_skipped = 0;
    for (int64_t r = kvc_global_warp(); r < p.n_rows; r += kvc_global_warps()) {
        const int64_t first = kvc_int_at(p.row_starts, p.wide, r), last = kvc_int_at(p.row_starts, p.wide, r + 1);
        const int64_t prefix = kvc_int_at(p.prefix_lens, p.wide, r);
        const int64_t request_slot = p.request_slots ? kvc_int_at(p.request_slots, p.wide, r) : -1;
        n_skipped += !kvc_commit_path(p, first, last, prefix, request_slot) && kvc_lane() == 0;
    }
    kvc_count_skipped(p.guard, n_skipped);
}

// ---- in place ------------------------------------------------------------------------------------------------------------
// A thread per entry.
KVC_KERNEL(KVC_THREADS) kvc_moves_localize(KVC_PARAM MoveParams p) {
    const Pool& pool = p.pool;
    const uint32_t step = kvc_move_step(p.guard);
    uint64_t n_skipped = 0;
    for (int64_t i = kvc_first_entry(); i < p.n; i += kvc_entry_stride()) {
        const int64_t slot = kvc_listed_slot(p, i);
        if (slot < 0) {
            n_skipped += 1;
            continue;
        }
        const bool is_whole = kvc_is_whole(pool, slot);
        for (uint32_t half = 0; half < pool.n_halves; ++half) {
            Stamp head = kvc_plane(pool, half)[slot], tail = kvc_plane(pool, half + pool.n_halves)[slot];
            // The steps are another guard's: they only tell whether the stages are of one forward.
            if (head.step != tail.step) tail = {};
            for (uint32_t stage = 0; stage < 2; ++stage) {
                Stamp& stamp = stage ? tail : head;
                if (stamp.step == 0) {
                    stamp = {};
                } else {
                    const int32_t prev = kvc_is_relative(stamp) ? KVC_PREV_RELATIVE : KVC_PREV_NONE;
                    stamp = {stamp.chain, stamp.token, stamp.position, prev, step, 0, kvc_block_epoch(pool, slot)};
                }
            }
            kvc_plane(pool, half)[slot] = head;
            kvc_plane(pool, half + pool.n_halves)[slot] = tail;
        }
        for (uint32_t d = 0; p.drops_digests && d < pool.n_digests; ++d) *kvc_digest_at(pool, d, slot) = 0;
        kvc_mark_fresh(p.guard, pool, slot, step, is_whole && !p.drops_digests);
    }
    kvc_count_skipped(p.guard, n_skipped);
}

// A thread per entry. A token without a chain stands for itself: it is judged, its links are not.
KVC_KERNEL(KVC_THREADS) kvc_moves_adopt(KVC_PARAM MoveParams p) {
    const Pool& pool = p.pool;
    const uint32_t step = kvc_move_step(p.guard);
    uint64_t n_skipped = 0;
    for (int64_t i = kvc_first_entry(); i < p.n; i += kvc_entry_stride()) {
        const int64_t slot = kvc_listed_slot(p, i), position = kvc_int_at(p.positions, p.wide, i);
        if (slot < 0 || position < 0 || position > KVC_MAX_POSITIONS) {
            n_skipped += 1;
            continue;
        }
        const int64_t token = p.tokens ? kvc_int_at(p.tokens, p.wide, i) : -1;
        const uint64_t chain = p.chains && token >= 0 ? kvc_pointer<uint64_t>(p.chains)[i] : 0;
        const int32_t prev = token >= 0 && chain == 0 ? KVC_PREV_RELATIVE : KVC_PREV_NONE;
        const Stamp stamp = {chain, token >= 0 ? (int32_t)token : KVC_NO_TOKEN, (int32_t)position, prev, step, 0,
                             kvc_block_epoch(pool, slot)};
        for (uint32_t plane = 0; plane < 2 * pool.n_halves; ++plane) kvc_plane(pool, plane)[slot] = stamp;
        kvc_mark_fresh(p.guard, pool, slot, step, true);
    }
    kvc_count_skipped(p.guard, n_skipped);
}

// A warp per 32 entries and digest range. The position is that of the list, or the stamp's: without a whole stamp there is none.
KVC_DEVICE LaneSlot kvc_slot_to_digest(const MoveParams& p, int64_t i) {
    const int64_t slot = i < p.n ? kvc_listed_slot(p, i) : -1;
    if (slot < 0) return kvc_lane_slot(p.pool, -1, 0);
    if (p.positions) {
        const int64_t position = kvc_int_at(p.positions, p.wide, i);
        return kvc_lane_slot(p.pool, position < 0 || position > KVC_MAX_POSITIONS ? -1 : slot, position);
    }
    return kvc_lane_slot(p.pool, kvc_is_whole(p.pool, slot) ? slot : -1, kvc_pointer<Stamp>(p.pool.head[0])[slot].position);
}
KVC_KERNEL(KVC_THREADS, 2) kvc_moves_digest(KVC_PARAM MoveParams p) {
    const DigestRange range = kvc_digest_range(p.pool);
    uint64_t n_skipped = 0;
    kvc_begin_digests(p.pool);
    for (int64_t base = kvc_global_warp() * 32; base < p.n; base += kvc_global_warps() * 32) {
        const LaneSlot at = kvc_slot_to_digest(p, base + kvc_lane());
        // With positions, kvc_moves_adopt has counted them.
        n_skipped += base + kvc_lane() < p.n && at.slot < 0 && p.positions == 0 && kvc_block_y() == 0;
        if (kvc_ballot(at.slot >= 0)) kvc_store_digests(p.pool, range, at, 0, 0);
    }
    kvc_count_skipped(p.guard, n_skipped);
}
