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

// A division of 32-bit numbers by a power of two (shift) or by anything else (negative shift).
KVC_DEVICE uint32_t kvc_divide(uint32_t n, int32_t by, int32_t shift) { return shift >= 0 ? n >> shift : n / (uint32_t)by; }

// `slot` lies inside the pool.
KVC_DEVICE bool kvc_is_reserved(const Pool& pool, int64_t slot) {
    for (uint32_t i = 0; i < pool.n_reserved; ++i) {
        if ((uint32_t)slot - (uint32_t)pool.reserved[i] < (uint32_t)pool.page_size) return true;
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

// Whether a row's part of a CSR table is inside it.
KVC_DEVICE bool kvc_is_inside_table(const Batch& batch, int32_t row) {
    const int32_t* indptr = kvc_pointer<int32_t>(batch.kv_indptr);
    const int64_t begin = indptr[row], end = indptr[row + 1];
    return begin >= 0 && end <= batch.table_width && begin <= end;
}
// Entries of a row's table.
KVC_DEVICE int64_t kvc_table_entries(const Batch& batch, int32_t row) {
    if (batch.table_kind == KVC_TABLE_STATIC) return 1;
    if (batch.table_kind == KVC_TABLE_DENSE) return batch.table_width;
    const int32_t* indptr = kvc_pointer<int32_t>(batch.kv_indptr);
    return kvc_is_inside_table(batch, row) ? (int64_t)indptr[row + 1] - indptr[row] : 0;
}

// ---- rings ---------------------------------------------------------------------------------------------------------------
// Where a position is among the places of its request: itself, or a place of the ring.
KVC_DEVICE int64_t kvc_place(const Pool& pool, int64_t position) {
    if (!pool.ring_length || position < pool.sink) return position;
    return pool.sink + pool.ring_bubble + (position - pool.sink) % pool.ring_length;
}
// Places that positions [0, length) take.
KVC_DEVICE int64_t kvc_n_places(const Pool& pool, int64_t length) {
    if (!pool.ring_length || length <= pool.sink) return length;
    const int64_t behind = length - pool.sink;
    return (int64_t)pool.sink + pool.ring_bubble + (behind < pool.ring_length ? behind : pool.ring_length);
}
// Whether a position's place is still its own once a row has `length` tokens: not where the ring has gone round.
KVC_DEVICE bool kvc_is_kept(const Pool& pool, int64_t length, int64_t position) {
    return !pool.ring_length || position < pool.sink || position >= length - pool.ring_length;
}

KVC_DEVICE KvcSlot kvc_table_slot(const Pool& pool, const Batch& batch, int32_t row, int64_t position) {
    if (position < 0 || position > KVC_MAX_POSITIONS) return {-1, position, KVC_SLOT_OUT};
    const int64_t place = kvc_place(pool, position), index = kvc_divide((uint32_t)place, batch.table_page, batch.table_shift);
    if (index >= kvc_table_entries(batch, row)) return {-1, position, KVC_SLOT_OUT};
    int64_t entry = row;
    if (batch.table_kind == KVC_TABLE_DENSE) {
        entry = kvc_pointer<int32_t>(batch.block_table)[(int64_t)row * batch.table_stride + index];
    } else if (batch.table_kind == KVC_TABLE_CSR) {
        entry = kvc_pointer<int32_t>(batch.block_table)[kvc_pointer<int32_t>(batch.kv_indptr)[row] + index];
    }
    if (entry < 0) return {-1, entry, KVC_SLOT_EMPTY};
    return kvc_engine_slot(pool, entry * batch.table_page + (place - index * batch.table_page), entry);
}

// The same in fewer instructions for the common case, a pool without a ring: a row's table once, then entry and slot of a position
// in 32 bits.
struct TableRow {
    const int32_t* entries;  // null: no table, the block is the row
    uint32_t n_entries, row;
};
KVC_DEVICE TableRow kvc_table_row(const Batch& batch, int32_t row) {
    TableRow table = {nullptr, (uint32_t)kvc_table_entries(batch, row), (uint32_t)row};
    if (batch.table_kind == KVC_TABLE_DENSE) {
        table.entries = kvc_pointer<int32_t>(batch.block_table) + (int64_t)row * batch.table_stride;
    } else if (batch.table_kind == KVC_TABLE_CSR && table.n_entries) {
        table.entries = kvc_pointer<int32_t>(batch.block_table) + kvc_pointer<int32_t>(batch.kv_indptr)[row];
    }
    return table;
}
// The entry of a position; ~0 beyond the table.
KVC_DEVICE uint32_t kvc_fast_entry(const Batch& batch, const TableRow& table, uint32_t position) {
    const uint32_t i = kvc_divide(position, batch.table_page, batch.table_shift);
    if (i >= table.n_entries) return 0xffffffffu;
    return table.entries ? (uint32_t)table.entries[i] : table.row;
}
// The slot of a position by its entry, or -1 where it takes kvc_table_slot to tell: there is none, or it is reserved.
KVC_DEVICE int32_t kvc_fast_slot(const Pool& pool, const Batch& batch, uint32_t entry, uint32_t position) {
    if (entry >= batch.table_limit) return -1;
    const uint32_t i = kvc_divide(position, batch.table_page, batch.table_shift);
    int64_t slot = entry * (uint32_t)batch.table_page + (position - i * (uint32_t)batch.table_page);
    if (pool.slot_lut) {
        if (slot >= pool.lut_length) return -1;
        slot = kvc_pointer<int64_t>(pool.slot_lut)[slot];
        if (slot < 0 || slot >= pool.n_slots) return -1;
    }
    return kvc_is_reserved(pool, slot) ? -1 : (int32_t)slot;
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

// A slot that was moved or adopted, and whose bytes were not verified since. While a pool has none, nobody looks.
KVC_DEVICE bool kvc_is_fresh(uint64_t claim) { return (uint32_t)claim == KVC_CLAIM_FRESH; }
// A slot whose stamp was not written by a forward, but moved there or adopted by a call.
KVC_DEVICE bool kvc_was_moved(uint64_t claim) { return (uint32_t)claim == 0 || kvc_is_fresh(claim); }
// When a stamp came to its slot: the forward that wrote it or, if it was moved there, the forward before the move. (What a forward
// that never ended has stamped keeps that number when it is moved.)
KVC_DEVICE uint32_t kvc_arrival(uint64_t claim, uint32_t step) {
    const uint32_t moved = (uint32_t)(claim >> 32);
    return kvc_was_moved(claim) && moved > step ? moved : step;
}
// Whether the stamp before a slot's own (or the one that is there now) is younger. A move has the number of the forward before it,
// so that of two equal numbers the moved one is the younger, unless both were moved.
KVC_DEVICE bool kvc_is_rewritten(const Pool& pool, int64_t before, uint32_t before_step, int64_t slot, uint32_t step) {
    const uint64_t claim_before = kvc_pointer<uint64_t>(pool.claims)[before], claim = kvc_pointer<uint64_t>(pool.claims)[slot];
    const uint32_t came_before = kvc_arrival(claim_before, before_step), came = kvc_arrival(claim, step);
    return came_before > came || (came_before == came && kvc_was_moved(claim_before) && !kvc_was_moved(claim));
}
// Whether it is surely older, wherever the slot's stamp came from: of two moves of one number nobody knows.
KVC_DEVICE bool kvc_is_older(const Pool& pool, int64_t before, uint32_t before_step, uint32_t step) {
    const uint64_t claim = kvc_pointer<uint64_t>(pool.claims)[before];
    const uint32_t came = kvc_arrival(claim, before_step);
    return came < step || (came == step && !kvc_was_moved(claim));
}
KVC_DEVICE uint32_t* kvc_n_fresh(const Guard& guard, const Pool& pool) {
    return &kvc_mutable_pointer<PoolState>(guard.pool_states)[pool.index].n_fresh;
}

// The warp's number in the grid's x dimension, and how many there are.
KVC_DEVICE int64_t kvc_global_warp() { return (int64_t)kvc_block() * KVC_WARPS + kvc_warp_in_block(); }
KVC_DEVICE int64_t kvc_global_warps() { return (int64_t)kvc_n_blocks() * KVC_WARPS; }

KVC_DEVICE int64_t* kvc_work(const Pool& pool, uint32_t which) {
    return kvc_mutable_pointer<int64_t>(pool.work) + (int64_t)which * (pool.max_requests + 1);
}

// The row and the place within it of a unit of work, from the units before each row (i64[rows + 1], ascending; unit < n, the
// last of them). All lanes take part and get the same answer.
struct KvcUnit {
    int32_t row;
    int64_t chunk;
};
KVC_DEVICE KvcUnit kvc_find_unit(const int64_t* before, int32_t rows, int64_t unit, int64_t n) {
    const int32_t lane = (int32_t)kvc_lane();
    int32_t low = 0, high = rows;  // before[low] <= unit < before[high]
    // Rows are often of one size: look around the proportional place first.
    int32_t step = 1, from = (int32_t)(kvc_divide_roughly((float)unit, (float)n) * (float)rows) - 15;
    from = from > rows - 31 ? rows - 31 : from;
    from = from < 0 ? 0 : from;
    for (;;) {
        const int32_t pivot = from + lane * step;
        const bool is_inside = pivot <= high;
        const int64_t at = before[is_inside ? pivot : high];
        const uint32_t n_below = kvc_popcount(kvc_ballot(is_inside && at <= unit));  // ascending: the lowest lanes
        if (n_below == 0) {
            high = from;
        } else {
            low = from + (int32_t)(n_below - 1) * step;
            high = low + step < high && n_below < 32 ? low + step : high;
        }
        const uint64_t before_low = kvc_shfl_u64((uint64_t)at, n_below ? n_below - 1 : 0);
        if (high - low <= 1) return {low, n_below ? unit - (int64_t)before_low : unit};  // no row below the first place: row 0
        step = (high - low + 31) / 32;
        from = low;
    }
}

// What a slot's claim word holds when it is adopted: above any claim of a write, and highest for the lowest position.
KVC_DEVICE uint64_t kvc_adoption_claim(uint32_t forward, int64_t position) {
    return (uint64_t)forward << 32 | (0xffffffffu - (uint32_t)position);
}

// Units of `of` that n positions or tokens fill, the last perhaps in part. In 32 bits: a 64-bit division costs more than a load.
KVC_DEVICE uint32_t kvc_units(uint32_t n, uint32_t of) { return (n + of - 1) / of; }

// An even part of n units for each of `of` blocks, in order.
struct Share {
    int64_t first, last;
};
KVC_DEVICE Share kvc_even_share(int64_t n, uint32_t part, uint32_t of) { return {n * part / of, n * (part + 1) / of}; }

// New tokens of a row that a block stamps: few in short rows, so that many blocks share them; more in long ones, where each
// tile has to hash all tokens before it.
KVC_DEVICE uint32_t kvc_tile_length(int32_t n_new) { return n_new <= KVC_SHORT_ROW ? KVC_THREADS : KVC_WRITE_TILE; }
// A row of at most 32 is a warp's business instead.
KVC_DEVICE uint32_t kvc_tiles(int32_t n_new) {
    const uint32_t n = (uint32_t)n_new;
    return n <= 32 ? 0 : n <= KVC_SHORT_ROW ? kvc_units(n, KVC_THREADS) : kvc_units(n, KVC_WRITE_TILE);
}

KVC_DEVICE uint32_t kvc_share(int64_t slot, uint32_t n) {
    return (uint32_t)(((kvc_mix64((uint64_t)((uint32_t)slot / KVC_SHARE_RUN)) >> 32) * n) >> 32);
}
// Where few slots of a row are due, they are listed for kvc_digests_verify: entry 0 holds how many there are.
KVC_DEVICE Due* kvc_due_list(const Pool& pool) { return kvc_mutable_pointer<Due>(pool.due); }
KVC_DEVICE uint32_t kvc_n_listed(const Pool& pool) { return pool.due ? kvc_due_list(pool)[0].slot : 0; }
KVC_DEVICE bool kvc_is_listed(const Pool& pool, const Batch& batch, const Row& row) {
    return pool.due && batch.verify_data_every >= KVC_LIST_MIN_EVERY && !(row.flags & KVC_ROW_FULL_DATA);
}

// Positions of the sink that are verified apart from the others: they are the last unit of a row, whatever their number.
KVC_DEVICE int32_t kvc_n_sink(const Pool& pool, const Row& row) { return row.verify_start > pool.sink ? pool.sink : 0; }
// The positions of n units of a row from number `chunk` on, `length` in each: those of one unit where they are the sink's.
struct Range {
    int64_t first, last;
};
KVC_DEVICE Range kvc_unit_range(const Pool& pool, const Row& row, int64_t chunk, int64_t n, int64_t length) {
    const int64_t first = row.verify_start + chunk * length, last = first + n * length;
    if (first >= row.verify_end) return {0, kvc_n_sink(pool, row)};
    return {first, last < row.verify_end ? last : row.verify_end};
}

// Positions of a row's prefix in a unit of kvc_digests_verify: about as many slots fall due in each.
KVC_DEVICE uint32_t kvc_data_unit(const Batch& batch, const Row& row) {
    const uint32_t every = batch.verify_data_every < 128 ? batch.verify_data_every : 128;
    return row.flags & KVC_ROW_FULL_DATA ? KVC_DATA_UNIT : KVC_DATA_UNIT * every;
}
KVC_DEVICE uint32_t kvc_data_units(const Pool& pool, const Batch& batch, const Row& row) {
    if (!(row.flags & KVC_ROW_LIVE) || row.flags & KVC_ROW_PENDING) return 0;
    return kvc_units((uint32_t)(row.verify_end - row.verify_start), kvc_data_unit(batch, row)) + (kvc_n_sink(pool, row) > 0);
}

// ---- the guard's own words -------------------------------------------------------------------------------------------------
KVC_DEVICE uint64_t* kvc_state(const Guard& guard) { return kvc_mutable_pointer<uint64_t>(guard.state); }
KVC_DEVICE uint32_t kvc_forward_number(const Guard& guard) { return (uint32_t)kvc_state(guard)[KVC_STATE_FORWARD]; }
KVC_DEVICE bool kvc_is_judging(const Guard& guard) { return kvc_state(guard)[KVC_STATE_JUDGING] != 0; }
KVC_DEVICE uint32_t kvc_tag(uint32_t stage, uint32_t kind, uint32_t half) { return stage * 4 + kind * 2 + half; }
