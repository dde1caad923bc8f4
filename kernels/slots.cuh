// slots.cuh: from (row, position) to a slot of the pool, and from a unit of work to its row. No read leaves an array.
#pragma once
#include "mix.cuh"

enum KvcSlotStatus : uint32_t {
    KVC_SLOT_OK = 0,     // a slot of the pool that may hold KV
    KVC_SLOT_EMPTY = 1,  // negative, evicted or reserved: no KV can be there
    KVC_SLOT_OUT = 2,    // outside the pool or the table
};

struct KvcSlot {
    int64_t slot;  // valid when OK
    int64_t raw;   // what the engine's array held, for the report
    uint32_t status;
};

#define KVC_MAX_POSITIONS 0x7fffffff  // of a row: positions are 32-bit everywhere

template <typename T>
KVC_DEVICE const T* kvc_pointer(uint64_t address) { return (const T*)address; }
template <typename T>
KVC_DEVICE T* kvc_mutable_pointer(uint64_t address) { return (T*)address; }

KVC_DEVICE bool kvc_is_reserved(const Pool& pool, int64_t slot) {
    const int64_t block = slot / pool.page_size;
    for (uint32_t i = 0; i < pool.n_reserved; ++i) {
        if (pool.reserved[i] == block) return true;
    }
    return false;
}

// A slot as the engine names it (through the look-up table where the pool has one).
KVC_DEVICE KvcSlot kvc_engine_slot(const Pool& pool, int64_t named, int64_t raw) {
    if (named < 0) return {-1, raw, KVC_SLOT_EMPTY};
    int64_t slot = named;
    if (pool.slot_lut) {
        if (named >= pool.lut_length) return {-1, raw, KVC_SLOT_OUT};
        slot = kvc_pointer<int64_t>(pool.slot_lut)[named];
        if (slot < 0) return {-1, raw, KVC_SLOT_EMPTY};
    }
    if (slot >= pool.n_slots) return {-1, raw, KVC_SLOT_OUT};
    if (kvc_is_reserved(pool, slot)) return {-1, raw, KVC_SLOT_EMPTY};
    return {slot, raw, KVC_SLOT_OK};
}

// Entries of a row's table.
KVC_DEVICE int64_t kvc_table_entries(const Batch& batch, int32_t row) {
    if (batch.table_kind == KVC_TABLE_STATIC) return 1;
    if (batch.table_kind == KVC_TABLE_DENSE) return batch.table_width;
    const int32_t* indptr = kvc_pointer<int32_t>(batch.kv_indptr);
    const int64_t begin = indptr[row], end = indptr[row + 1];
    return begin < 0 || end > batch.table_width || end < begin ? 0 : end - begin;
}

KVC_DEVICE KvcSlot kvc_table_slot(const Pool& pool, const Batch& batch, int32_t row, int64_t position) {
    const int64_t index = position / batch.table_page;
    if (position < 0 || index >= kvc_table_entries(batch, row)) return {-1, position, KVC_SLOT_OUT};
    int64_t entry = row;
    if (batch.table_kind == KVC_TABLE_DENSE) {
        entry = kvc_pointer<int32_t>(batch.block_table)[(int64_t)row * batch.table_stride + index];
    } else if (batch.table_kind == KVC_TABLE_CSR) {
        entry = kvc_pointer<int32_t>(batch.block_table)[kvc_pointer<int32_t>(batch.kv_indptr)[row] + index];
    }
    if (entry < 0) return {-1, entry, KVC_SLOT_EMPTY};
    return kvc_engine_slot(pool, entry * batch.table_page + position % batch.table_page, entry);
}

KVC_DEVICE int64_t kvc_int_at(uint64_t array, uint32_t wide, int64_t i) {
    return wide ? kvc_pointer<int64_t>(array)[i] : (int64_t)kvc_pointer<int32_t>(array)[i];
}

// Where the engine writes new token t of the batch.
KVC_DEVICE KvcSlot kvc_write_slot(const Pool& pool, const Batch& batch, int64_t t) {
    const int64_t named = kvc_int_at(batch.slot_mapping, batch.wide_slots, t);
    return kvc_engine_slot(pool, named, named);
}

// ---- stamps ------------------------------------------------------------------------------------------------------------
KVC_DEVICE bool kvc_is_relative(const Stamp& stamp) { return stamp.prev_slot <= KVC_PREV_RELATIVE; }
// The slot of the stamp that this one continues, or negative.
KVC_DEVICE int32_t kvc_continued_slot(const Stamp& stamp) {
    return stamp.prev_slot <= KVC_PREV_RELATIVE_BASE ? KVC_PREV_RELATIVE_BASE - stamp.prev_slot : stamp.prev_slot;
}

// The warp's number in the grid's x dimension, and how many there are.
KVC_DEVICE int64_t kvc_global_warp() { return (int64_t)kvc_block() * KVC_WARPS + kvc_warp_in_block(); }
KVC_DEVICE int64_t kvc_global_warps() { return (int64_t)kvc_n_blocks() * KVC_WARPS; }

// The row and the chunk within it of a unit of work, from the units before each row (i64[rows + 1], ascending).
// The warp narrows the interval 32-fold a round. All lanes take part and get the same answer.
struct KvcUnit {
    int32_t row;
    int64_t chunk;
};
KVC_DEVICE KvcUnit kvc_find_unit(const int64_t* before, int32_t rows, int64_t unit) {
    int32_t low = 0, high = rows;  // before[low] <= unit < before[high]
    while (high - low > 1) {
        const int32_t step = (high - low + 31) / 32;
        const int32_t pivot = low + (int32_t)kvc_lane() * step;
        const uint32_t at_or_before = kvc_ballot(pivot < high && before[pivot < high ? pivot : low] <= unit);
        low += (int32_t)(kvc_popcount(at_or_before) - 1) * step;  // lane 0 always votes
        high = low + step < high ? low + step : high;
    }
    return {low, unit - before[low]};
}

KVC_DEVICE const int64_t* kvc_work(const Pool& pool, uint32_t which) {
    return kvc_pointer<int64_t>(pool.work) + (int64_t)which * (pool.max_requests + 1);
}
#define KVC_WORK_VERIFY 0u
#define KVC_WORK_WRITE 1u
#define KVC_WORK_DIGEST 2u

// No half was ever stamped.
KVC_DEVICE bool kvc_is_never_stamped(const Pool& pool, int64_t slot) {
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        if (kvc_pointer<Stamp>(pool.head[half])[slot].step || kvc_pointer<Stamp>(pool.tail[half])[slot].step) return false;
    }
    return true;
}

// What a slot's claim word holds when it is adopted: above any claim of a write, and highest for the lowest position.
KVC_DEVICE uint64_t kvc_adoption_claim(uint32_t forward, int64_t position) {
    return (uint64_t)forward << 32 | (0xffffffffu - (uint32_t)position);
}

KVC_DEVICE uint32_t kvc_share(int64_t slot, uint32_t n) {
    return (uint32_t)(((kvc_mix64((uint64_t)(slot / KVC_SHARE_RUN)) >> 32) * n) >> 32);
}

KVC_DEVICE uint64_t* kvc_state(const Guard& guard) { return kvc_mutable_pointer<uint64_t>(guard.state); }
KVC_DEVICE uint32_t kvc_forward_number(const Guard& guard) { return (uint32_t)kvc_state(guard)[KVC_STATE_FORWARD]; }
KVC_DEVICE bool kvc_is_judging(const Guard& guard) { return kvc_state(guard)[KVC_STATE_JUDGING] != 0; }
KVC_DEVICE uint32_t kvc_tag(uint32_t stage, uint32_t kind, uint32_t half) { return stage * 4 + kind * 2 + half; }
