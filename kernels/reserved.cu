// reserved.cu: hygiene of the blocks that hold no request's data. Padding and dummy rows may write there, and whatever gathers
// such a block (a padded lane, an unused table entry) multiplies its values with 0: NaN and Inf survive that.
//
// kvc_reserved_check  HEAD of a step's first forward, option, every few steps: the elements of every reserved block in every plane
//                     of floats
//
// Which step it is, the device knows: a captured launch does nothing in the others.
#include "digest.cuh"

// ---- elements ------------------------------------------------------------------------------------------------------------
// Up to 16 bytes of a chunk. An element is not always aligned to its size: then a piece is one element, in several loads.
struct Elements {
    uint64_t low, high;
};
KVC_DEVICE Elements kvc_load_elements(const FloatPlane& f, uint64_t address) {
    const uint32_t n = f.plane.load_bytes;
    if (n == 16) {
        const kvc_u128 v = kvc_load_once_u128((const void*)address);
        return {v.x | (uint64_t)v.y << 32, v.z | (uint64_t)v.w << 32};
    }
    Elements found = {0, 0};
    for (uint32_t byte = 0; byte < f.piece_bytes; byte += n) found.low |= kvc_load_up_to_8(address + byte, n) << (8 * byte);
    return found;
}

// The first element that is not finite: its bits (never 0), and its offset in the piece. Bits 0: there is none.
struct NonFinite {
    uint32_t bits, byte;
};
KVC_DEVICE NonFinite kvc_find_nonfinite(const FloatPlane& f, const Elements& v) {
    const uint32_t element = f.element_bytes == 4 ? 0xffffffffu : (1u << (8 * f.element_bytes)) - 1;
    for (uint32_t byte = 0; byte < f.piece_bytes; byte += f.element_bytes) {
        const uint32_t bits = (uint32_t)((byte < 8 ? v.low : v.high) >> (8 * (byte & 7))) & element;
        if ((bits & f.mask) == f.nonfinite) return {bits, byte};
    }
    return {0, 0};
}

// The first such element of a block among the pieces of this thread, which are every 256th, in
// ascending order: slot << 32 | its offset in the slot.
struct Place {
    uint64_t at;
    uint32_t bits;  // 0: there is none
};
KVC_DEVICE Place kvc_find_in_block(const FloatPlane& f, uint64_t start, uint32_t n_slots) {
    const uint32_t per_chunk = f.plane.chunk_bytes / f.piece_bytes, per_slot = per_chunk * f.plane.n_chunks;
    const uint32_t more_slots = KVC_THREADS / per_slot, more_pieces = KVC_THREADS % per_slot;
    uint32_t slot = kvc_thread() / per_slot, piece = kvc_thread() % per_slot;
    while (slot < n_slots) {
        const uint32_t chunk = f.plane.n_chunks == 1 ? 0 : piece / per_chunk, rest = piece - chunk * per_chunk;
        uint64_t in_block = (uint64_t)(slot * f.plane.token_stride + chunk * f.plane.chunk_stride);
        if (f.plane.tok_split) in_block += kvc_split_offset(f.plane, slot);
        const uint64_t address = start + in_block + rest * f.piece_bytes;
        const NonFinite found = kvc_find_nonfinite(f, kvc_load_elements(f, address));
        if (found.bits) return {(uint64_t)slot << 32 | (piece * f.piece_bytes + found.byte), found.bits};
        slot += more_slots;
        piece += more_pieces;
        if (piece >= per_slot) {
            piece -= per_slot;
            slot += 1;
        }
    }
    return {0, 0};
}

KVC_NOINLINE void kvc_report_nonfinite(const Guard& guard, const Pool& pool, const FloatPlane& f, int64_t first_slot,
                                       const Place& place) {
    Violation v = kvc_no_violation();
    v.pool = (int32_t)pool.index;
    v.tag = kvc_tag(KVC_STAGE_HEAD, pool.kind, f.half);
    v.detail = KVC_DETAIL_RESERVED;
    v.reasons = KVC_REASON_NONFINITE_RESERVED;
    v.slot = first_slot + (int64_t)(place.at >> 32);
    v.position = -1;
    v.plane = (int32_t)f.index;
    v.stored_digest = place.bits;
    v.found_digest = (uint32_t)place.at;
    kvc_report(guard, pool, v);
}

// ---- kvc_reserved_check --------------------------------------------------------------------------------------------------
// The complement of the lowest place that any thread of the block has found, 0 = none.
KVC_DEVICE uint64_t* kvc_lowest_place() {
    KVC_SHARED uint64_t complement;
    return &complement;
}

// A block per reserved block and plane of floats.
KVC_KERNEL(KVC_THREADS) kvc_reserved_check(KVC_PARAM ReservedParams p) {
    const Pool& pool = p.pool;
    uint64_t* state = kvc_state(p.guard);
    if (!kvc_is_judging(p.guard) || state[KVC_STATE_STEP] % p.every) return;
    const uint32_t n = p.n_planes * pool.n_reserved;
    if (kvc_is_first_thread()) kvc_atomic_add_u64(state + KVC_STATE_RESERVED_CHECKS, n);
    uint64_t* lowest = kvc_lowest_place();
    for (uint32_t unit = kvc_block(); unit < n; unit += kvc_n_blocks()) {
        const FloatPlane f = kvc_pointer<FloatPlane>(p.planes)[unit / pool.n_reserved];
        const int64_t first_slot = pool.reserved[unit % pool.n_reserved];
        const uint32_t block = kvc_divide((uint32_t)first_slot, pool.page_size, pool.page_shift);
        if (kvc_thread() == 0) *lowest = 0;
        kvc_sync_block();
        const Place place = kvc_find_in_block(f, kvc_slot_address(f.plane, block, 0), (uint32_t)pool.page_size);
        if (place.bits) kvc_atomic_max_u64(lowest, ~place.at);
        kvc_sync_block();
        if (place.bits && *lowest == ~place.at) kvc_report_nonfinite(p.guard, pool, f, first_slot, place);
        kvc_sync_block();  // before it is cleared for the next
    }
}
