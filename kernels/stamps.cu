// stamps.cu: who is in each slot. HEAD and TAIL of a forward, and the sweep.
//
// kvc_begin          a block per row: facts of the row, its anchor, claims on the slots it writes; block 0 numbers the forward
// kvc_stamps_write   a block per tile of 1024 new tokens of a row: HEAD stamps of both halves by an affine scan, the register
// kvc_stamps_verify  a warp per 128 consecutive positions of a row: HEAD stamps of both halves against table, register, history
// kvc_stamps_tail    the same for TAIL stamps of the prefix, then the new tokens: looked up through the table, TAIL stamps written
// kvc_stamps_sweep   a warp per 32 resident slots that the host handed in
//
// Launched by kvcanary/backends/device.py in this order, all on the engine's stream; each sees what the one before it wrote.
#include "report.cuh"

// ---- kvc_begin -----------------------------------------------------------------------------------------------------------
struct RowExtent {
    int64_t first_token, n_new, length, prefix, capacity, verify_start, verify_end, bad_value;
    uint32_t flags;  // BAD_QUERY or BAD_LENGTH
};

// What the engine's metadata say of a row, clamped so that nothing derived from it leaves an array or 32 bits.
KVC_DEVICE RowExtent kvc_row_extent(const Pool& pool, const Batch& batch, int32_t row) {
    RowExtent e = {};
    const int32_t* query = kvc_pointer<int32_t>(batch.query_start_loc);
    const int64_t q0 = query[row], q1 = query[row + 1];
    if (q0 < 0 || q1 < q0 || q1 > batch.n_tokens) {
        e.flags = KVC_ROW_BAD_QUERY;
        e.bad_value = q1;
        return e;
    }
    const int64_t entries = kvc_table_entries(batch, row);
    e.capacity = entries * batch.table_page;
    if (batch.seq_lens) {
        e.length = kvc_pointer<int32_t>(batch.seq_lens)[row];
    } else {
        e.length = entries ? (entries - 1) * batch.table_page + kvc_pointer<int32_t>(batch.kv_last_page_len)[row] : 0;
    }
    if (e.length > KVC_MAX_POSITIONS) e.length = KVC_MAX_POSITIONS;
    if (q1 - q0 > e.length) return e;  // padding
    e.first_token = q0;
    e.n_new = q1 - q0;
    e.prefix = e.length - e.n_new;
    if (e.length > e.capacity) {
        e.flags = KVC_ROW_BAD_LENGTH;
        e.bad_value = e.length;
    }
    const int64_t start = pool.window ? e.prefix - pool.window + 1 : 0;
    e.verify_end = e.prefix < e.capacity ? e.prefix : e.capacity;
    e.verify_start = start < 0 ? 0 : start < e.verify_end ? start : e.verify_end;
    return e;
}

// The same, but BAD_QUERY also where query_start_loc descends before the row: its tokens may then be an earlier row's too, and
// a token that two rows stamp has no one stamp. All threads of the block take part.
KVC_DEVICE RowExtent kvc_ordered_row_extent(const Pool& pool, const Batch& batch, int32_t row) {
    const RowExtent e = kvc_row_extent(pool, batch, row);
    if (e.n_new == 0) return e;
    const int32_t* query = kvc_pointer<int32_t>(batch.query_start_loc);
    uint64_t n_descents = 0;
    for (int32_t r = (int32_t)kvc_thread(); r < row; r += KVC_THREADS) n_descents += query[r + 1] < query[r];
    if (kvc_block_sum(n_descents) == 0) return e;
    RowExtent bad = {};
    bad.flags = KVC_ROW_BAD_QUERY;
    bad.bad_value = query[row + 1];
    return bad;
}

// Units of work before each row, for the three granularities of the later launches.
KVC_DEVICE void kvc_scan_work(const Pool& pool, const Batch& batch) {
    int64_t* work = kvc_mutable_pointer<int64_t>(pool.work);
    uint64_t carry[3] = {0, 0, 0};
    const uint64_t unit[3] = {KVC_VERIFY_CHUNK, KVC_WRITE_TILE, KVC_DIGEST_CHUNK};
    for (int32_t base = 0; base <= batch.rows; base += KVC_THREADS) {
        const int32_t row = base + (int32_t)kvc_thread();
        RowExtent e = {};
        if (row < batch.rows) e = kvc_row_extent(pool, batch, row);
        for (int which = 0; which < 3; ++which) {
            const uint64_t n = (uint64_t)(which == 0 ? e.verify_end - e.verify_start : e.n_new);
            uint64_t total;
            const uint64_t before = kvc_block_exclusive_sum((n + unit[which] - 1) / unit[which], &total);
            if (row <= batch.rows) work[(int64_t)which * (pool.max_requests + 1) + row] = (int64_t)(carry[which] + before);
            carry[which] += total;
        }
    }
}

// The chain at the row's prefix, from the best source there is: salt, register, prefix_chain, token_history, or (unanchored)
// the predecessor's stamp. All threads of the block take part; thread 0's `row` is filled in.
KVC_DEVICE void kvc_anchor_row(const Pool& pool, const Batch& batch, int32_t index, Row& row) {
    const uint64_t salt = batch.salts ? kvc_pointer<uint64_t>(batch.salts)[index] : 0;
    const int32_t prefix = row.prefix;
    row.anchor = kvc_anchor(salt);
    if (prefix == 0) {
        row.flags |= KVC_ROW_ANCHORED;
        return;
    }
    if (row.request_id && row.request_slot >= 0) {
        const Register& reg = kvc_pointer<Register>(pool.registers)[row.request_slot];
        const int64_t oldest = (int64_t)reg.length - (KVC_N_REGISTER_LENGTHS - 1);
        if (reg.request_id == row.request_id && prefix <= reg.length && prefix >= reg.first_length && prefix >= oldest) {
            row.anchor = reg.chain[prefix % KVC_N_REGISTER_LENGTHS];
            row.share = reg.forwards;
            row.flags |= KVC_ROW_ANCHORED | KVC_ROW_REGISTERED | (reg.is_relative ? KVC_ROW_RELATIVE : 0);
            if (prefix - 1 >= reg.first_length && prefix - 1 >= oldest) {
                row.last_mix = row.anchor - reg.chain[(prefix - 1) % KVC_N_REGISTER_LENGTHS] * KVC_CHAIN_P;
                row.flags |= KVC_ROW_KNOWS_LAST;
            }
            return;
        }
    }
    if (batch.prefix_chain && kvc_pointer<uint64_t>(batch.prefix_chain)[index]) {
        row.anchor = kvc_pointer<uint64_t>(batch.prefix_chain)[index];
        row.flags |= KVC_ROW_ANCHORED;
        return;
    }
    if (batch.token_history && row.request_slot >= 0 && pool.token_offset >= 0 &&
        (int64_t)prefix + pool.token_offset <= batch.history_length) {
        const int32_t* history =
            kvc_pointer<int32_t>(batch.token_history) + row.request_slot * batch.history_length + pool.token_offset;
        uint64_t unknown = 0;
        for (int64_t p = kvc_thread(); p < prefix; p += KVC_THREADS) unknown += history[p] < 0;
        if (kvc_block_sum(unknown) == 0) {
            row.anchor = kvc_block_chain(row.anchor, prefix, [=](int64_t p) { return kvc_token_mix(history[p], (int32_t)p); });
            row.flags |= KVC_ROW_ANCHORED;
            return;
        }
    }
    const KvcSlot before = kvc_table_slot(pool, batch, index, prefix - 1);
    row.flags |= KVC_ROW_RELATIVE;
    if (before.status == KVC_SLOT_OK && prefix > row.verify_start) {  // before a window, it may be another's by now
        const Stamp stamp = kvc_pointer<Stamp>(pool.head[0])[before.slot];
        if (stamp.step) {
            row.anchor = stamp.chain;
            if (stamp.token != KVC_NO_TOKEN && !kvc_is_relative(stamp)) row.flags &= ~(uint32_t)KVC_ROW_RELATIVE;
        }
    }
}

// Claim the slots of the row's new tokens: the highest token index wins. The blocks of grid.y share the tokens.
KVC_DEVICE void kvc_claim_slots(const Pool& pool, const Batch& batch, const RowExtent& e, uint32_t forward) {
    uint64_t* claims = kvc_mutable_pointer<uint64_t>(pool.claims);
    const int64_t stride = (int64_t)kvc_n_blocks_y() * KVC_THREADS;
    for (int64_t i = (int64_t)kvc_block_y() * KVC_THREADS + kvc_thread(); i < e.n_new; i += stride) {
        const int64_t t = e.first_token + i;
        const KvcSlot target = kvc_write_slot(pool, batch, t);
        if (target.status == KVC_SLOT_OK) kvc_atomic_max_u64(claims + target.slot, (uint64_t)forward << 32 | (uint64_t)(t + 1));
    }
}

// Whether any new token of the row has a real slot, or one outside the pool; mostly the first 256 tokens tell.
KVC_DEVICE bool kvc_is_live(const Pool& pool, const Batch& batch, const RowExtent& e) {
    for (int64_t base = 0; base < e.n_new; base += KVC_THREADS) {
        const int64_t i = base + kvc_thread();
        uint64_t is_real = 0;
        if (i < e.n_new) is_real = kvc_write_slot(pool, batch, e.first_token + i).status != KVC_SLOT_EMPTY;
        if (kvc_block_sum(is_real)) return true;
    }
    return false;
}

KVC_DEVICE void kvc_number_forward(const BeginParams& p, uint32_t forward) {
    uint64_t* state = kvc_state(p.guard);
    if (p.is_first_pool) {
        const uint64_t is_judging = state[KVC_STATE_PAUSE] == 0;
        state[KVC_STATE_FORWARD] = forward;
        state[KVC_STATE_STEP] = state[KVC_STATE_STEP_DONE] + (p.batch.is_first_forward ? 1 : 0);
        state[KVC_STATE_JUDGING] = is_judging;
        state[KVC_STATE_FORWARDS_JUDGED] += is_judging;
    }
    PoolState& pool_state = kvc_mutable_pointer<PoolState>(p.guard.pool_states)[p.pool.index];
    if (pool_state.head_forward != pool_state.tail_forward) {  // the forward before never reached TAIL
        uint32_t& place = pool_state.aborted[pool_state.n_aborted % KVC_N_ABORTED];
        if (pool_state.n_aborted >= KVC_N_ABORTED) pool_state.aborted_floor = place;
        place = pool_state.head_forward;
        pool_state.n_aborted += 1;
    }
    pool_state.head_forward = forward;
}

// A block per row, and more along grid.y that only claim slots where rows bring many tokens. The chain of a first forward may
// need the row's whole history: the block walks it together.
KVC_KERNEL(KVC_THREADS) kvc_begin(KVC_PARAM BeginParams p) {
    const Pool& pool = p.pool;
    const Batch& batch = p.batch;
    uint64_t* state = kvc_state(p.guard);
    // FORWARD is changed by block 0 of this very launch; FORWARD_DONE only by a later one.
    const uint32_t forward = (uint32_t)(p.is_first_pool ? state[KVC_STATE_FORWARD_DONE] + 1 : state[KVC_STATE_FORWARD]);
    const int32_t index = (int32_t)kvc_block();
    if (kvc_block_y() > 0) {
        if (index < batch.rows) kvc_claim_slots(pool, batch, kvc_ordered_row_extent(pool, batch, index), forward);
        return;
    }
    if (p.is_first_pool && batch.is_first_forward) {
        uint32_t* taint = kvc_mutable_pointer<uint32_t>(p.guard.taint);
        const uint32_t n = kvc_n_blocks() * KVC_THREADS;
        for (uint32_t i = (uint32_t)index * KVC_THREADS + kvc_thread(); i < pool.max_requests; i += n) taint[i] = 0;
    }
    if (index == 0) {
        kvc_scan_work(pool, batch);
        if (kvc_thread() == 0) kvc_number_forward(p, forward);
    }
    if (index >= batch.rows) return;  // a batch without rows still numbers its forward
    const RowExtent e = kvc_ordered_row_extent(pool, batch, index);
    Row row = {};
    row.first_token = (int32_t)e.first_token;
    row.n_new = (int32_t)e.n_new;
    row.prefix = (int32_t)e.prefix;
    row.verify_start = (int32_t)e.verify_start;
    row.verify_end = (int32_t)e.verify_end;
    row.flags = e.flags;
    row.bad_value = (int32_t)e.bad_value;
    row.request_slot = batch.request_slots ? kvc_pointer<int32_t>(batch.request_slots)[index] : -1;
    row.request_id = batch.request_ids ? kvc_pointer<uint32_t>(batch.request_ids)[index] : 0;
    kvc_claim_slots(pool, batch, e, forward);
    if (kvc_is_live(pool, batch, e)) {
        row.flags |= KVC_ROW_LIVE;
        if (row.request_slot >= (int32_t)pool.max_requests) {
            row.flags |= KVC_ROW_BAD_REQUEST_SLOT;
            row.bad_value = row.request_slot;
        }
        if (row.request_slot < 0 || row.flags & KVC_ROW_BAD_REQUEST_SLOT) row.request_slot = -1;
        const bool has_register = row.request_id && row.request_slot >= 0;
        row.share = has_register ? 0 : forward;
        kvc_anchor_row(pool, batch, index, row);
        row.share %= batch.verify_data_every;
        const bool is_first = has_register && !(row.flags & KVC_ROW_REGISTERED);
        const bool is_asked = batch.verify_all && kvc_pointer<uint8_t>(batch.verify_all)[index];
        if (is_first || is_asked || (uint32_t)row.n_new > batch.full_verify_min_tokens) row.flags |= KVC_ROW_FULL_DATA;
        if (batch.pending && kvc_pointer<uint8_t>(batch.pending)[index]) row.flags |= KVC_ROW_PENDING;
        if (has_register && kvc_thread() == 0) {
            kvc_atomic_max_u64(kvc_mutable_pointer<uint64_t>(pool.register_claims) + row.request_slot,
                               (uint64_t)forward << 32 | (uint64_t)(index + 1));
        }
    }
    if (kvc_thread() == 0) kvc_mutable_pointer<Row>(pool.rows)[index] = row;
}

// ---- kvc_stamps_write ------------------------------------------------------------------------------------------------------
#define KVC_TOKENS_PER_THREAD (KVC_WRITE_TILE / KVC_THREADS)

// chain -> a * chain + b: what a run of tokens does to a chain.
struct Affine {
    uint64_t a, b;
};
KVC_DEVICE Affine kvc_then(const Affine& first, const Affine& second) {
    return {first.a * second.a, second.a * first.b + second.b};
}

// What all threads before this one do to the chain. All threads of the block take part.
KVC_DEVICE Affine kvc_block_exclusive_affine(Affine own) {
    KVC_SHARED Affine of_warp[KVC_WARPS];
    const uint32_t lane = kvc_lane();
    Affine inclusive = own;
    for (uint32_t d = 1; d < 32; d <<= 1) {
        const Affine below = {kvc_shfl_up_u64(inclusive.a, d), kvc_shfl_up_u64(inclusive.b, d)};
        if (lane >= d) inclusive = kvc_then(below, inclusive);
    }
    if (lane == 31) of_warp[kvc_warp_in_block()] = inclusive;
    Affine before = {kvc_shfl_up_u64(inclusive.a, 1), kvc_shfl_up_u64(inclusive.b, 1)};
    if (lane == 0) before = {1, 0};
    kvc_sync_block();
    Affine of_warps = {1, 0};
    for (uint32_t w = 0; w < kvc_warp_in_block(); ++w) of_warps = kvc_then(of_warps, of_warp[w]);
    kvc_sync_block();
    return kvc_then(of_warps, before);
}

KVC_DEVICE void kvc_report_bad_row(const StepParams& p, const Row& row, int32_t index) {
    Violation v = kvc_row_violation(p.pool, row, index, kvc_tag(KVC_STAGE_HEAD, p.pool.kind, 0));
    v.reasons = KVC_REASON_OUT_OF_RANGE;
    v.slot = row.bad_value;
    v.position = row.prefix;
    v.detail = row.flags & KVC_ROW_BAD_QUERY    ? KVC_DETAIL_QUERY_START_LOC
               : row.flags & KVC_ROW_BAD_LENGTH ? KVC_DETAIL_SEQ_LEN
                                                : KVC_DETAIL_REQUEST_SLOT;
    kvc_report(p.guard, p.pool, v);
}

// WRITE_TOKEN, WRITE_POSITION and OUT_OF_RANGE of one new token, judged as it is stamped.
KVC_DEVICE void kvc_judge_write(const StepParams& p, const Row& row, int32_t index, int64_t i, int32_t token,
                                const KvcSlot& target, const KvcSlot& home) {
    Violation v = kvc_row_violation(p.pool, row, index, kvc_tag(KVC_STAGE_HEAD, p.pool.kind, 0));
    v.slot = target.slot;
    if (target.status == KVC_SLOT_OUT) {
        v.reasons |= KVC_REASON_OUT_OF_RANGE;
        v.detail = KVC_DETAIL_SLOT_MAPPING;
        v.slot = target.raw;
    } else if (p.batch.check_write_position && (home.status != KVC_SLOT_OK || home.slot != target.slot)) {
        v.reasons |= KVC_REASON_WRITE_POSITION;
    }
    if (p.batch.expected_tokens) {
        const int64_t expected = kvc_int_at(p.batch.expected_tokens, p.batch.wide_ids, row.first_token + i);
        if (expected >= 0 && (int32_t)expected != token) {
            v.reasons |= KVC_REASON_WRITE_TOKEN;
            v.expected_token = (int32_t)expected;
        }
    }
    if (!v.reasons) return;
    v.position = (int32_t)(row.prefix + i);
    v.stored_token = token;
    if (target.status == KVC_SLOT_OK) {  // the stamp that is being written
        v.stamp_owner = row.request_id;
        v.stamp_step = kvc_forward_number(p.guard);
    }
    v.prev_slot = home.status == KVC_SLOT_OK ? (int32_t)home.slot : -1;  // where the table says the write belongs
    kvc_report(p.guard, p.pool, v);
}

// The chain after new token i: keep it in the register of the row's request slot.
KVC_DEVICE void kvc_keep_in_register(const StepParams& p, const Row& row, int64_t i, uint64_t chain, bool is_relative) {
    Register& reg = kvc_mutable_pointer<Register>(p.pool.registers)[row.request_slot];
    const int32_t length = row.prefix + (int32_t)i + 1;
    if (i >= (int64_t)row.n_new - KVC_N_REGISTER_LENGTHS) reg.chain[length % KVC_N_REGISTER_LENGTHS] = chain;
    if (i + 1 < row.n_new) return;
    const bool continues = row.flags & KVC_ROW_REGISTERED;
    const int64_t oldest = (int64_t)reg.length - (KVC_N_REGISTER_LENGTHS - 1);
    if (row.n_new < KVC_N_REGISTER_LENGTHS) reg.chain[row.prefix % KVC_N_REGISTER_LENGTHS] = row.anchor;
    // A start that came out of the cache is nothing to hold a later forward against.
    const int32_t first = row.prefix + (row.flags & KVC_ROW_ANCHORED ? 0 : 1);
    reg.first_length = !continues ? first : oldest > reg.first_length ? (int32_t)oldest : reg.first_length;
    reg.forwards = continues ? reg.forwards + 1 : 1;
    reg.is_relative = is_relative;
    reg.length = length;
    reg.request_id = row.request_id;
}

// Where the chain of a row that brings new tokens comes from.
struct Start {
    bool is_relative;
    int32_t prev_slot;  // what the stamp of the row's first new token says of its predecessor
};
KVC_DEVICE Start kvc_start_of(const StepParams& p, const Row& row, int32_t index, uint32_t forward) {
    if (row.prefix == 0) return {false, KVC_PREV_NONE};
    const KvcSlot before = kvc_table_slot(p.pool, p.batch, index, row.prefix - 1);
    const bool is_slot = before.status == KVC_SLOT_OK;
    // Another row of this launch may be writing the stamp of a slot that is claimed in this forward.
    const bool is_rewritten = is_slot && kvc_pointer<uint64_t>(p.pool.claims)[before.slot] >> 32 == forward;
    const bool is_from_stamp = !(row.flags & KVC_ROW_ANCHORED);
    if (!(row.flags & KVC_ROW_RELATIVE || (is_from_stamp && is_rewritten))) {
        return {false, is_slot ? (int32_t)before.slot : KVC_PREV_NONE};
    }
    if (!is_slot || is_rewritten) return {true, KVC_PREV_RELATIVE};
    const Stamp stamp = kvc_pointer<Stamp>(p.pool.head[0])[before.slot];
    const bool continues = stamp.step && stamp.token != KVC_NO_TOKEN && stamp.chain == row.anchor;
    return {true, continues ? KVC_PREV_RELATIVE_BASE - (int32_t)before.slot : KVC_PREV_RELATIVE};
}

// One tile of a row. All threads of the block take part; returns the stamps this thread wrote.
KVC_DEVICE uint64_t kvc_write_tile(const StepParams& p, const KvcUnit& unit, uint32_t forward, bool is_judging) {
    const Pool& pool = p.pool;
    const Batch& batch = p.batch;
    const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
    if (!(row.flags & KVC_ROW_LIVE)) return 0;
    const uint64_t ids = batch.input_ids;
    const uint32_t wide = batch.wide_ids;
    const int32_t first_token = row.first_token, prefix = row.prefix;
    const auto mix_of = [=](int64_t j) {
        return kvc_token_mix((int32_t)kvc_int_at(ids, wide, first_token + j), (int32_t)(prefix + j));
    };
    const int64_t tile_start = unit.chunk * KVC_WRITE_TILE;
    const uint64_t carry = tile_start ? kvc_block_chain(row.anchor, tile_start, mix_of) : row.anchor;
    const int64_t begin = tile_start + (int64_t)kvc_thread() * KVC_TOKENS_PER_THREAD;
    Affine own = {1, 0};
    for (int64_t i = begin; i < begin + KVC_TOKENS_PER_THREAD && i < row.n_new; ++i) {
        own = kvc_then(own, {KVC_CHAIN_P, mix_of(i)});
    }
    const Affine before = kvc_block_exclusive_affine(own);
    uint64_t chain = before.a * carry + before.b;

    const uint64_t* claims = kvc_pointer<uint64_t>(pool.claims);
    const bool owns_register =
        row.request_id && row.request_slot >= 0 &&
        kvc_pointer<uint64_t>(pool.register_claims)[row.request_slot] == ((uint64_t)forward << 32 | (uint64_t)(unit.row + 1));
    const Start start = kvc_start_of(p, row, unit.row, forward);
    uint64_t n_written = 0;
    for (int64_t i = begin; i < begin + KVC_TOKENS_PER_THREAD && i < row.n_new; ++i) {
        const int64_t t = first_token + i;
        const int32_t token = (int32_t)kvc_int_at(ids, wide, t);
        const int32_t position = (int32_t)(prefix + i);
        chain = kvc_link(chain, token, position);
        if (owns_register) kvc_keep_in_register(p, row, i, chain, start.is_relative);
        const KvcSlot target = kvc_write_slot(pool, batch, t);
        if (target.status == KVC_SLOT_EMPTY) continue;
        if (is_judging) {
            kvc_judge_write(p, row, unit.row, i, token, target, kvc_table_slot(pool, batch, unit.row, position));
        }
        if (target.status != KVC_SLOT_OK || claims[target.slot] != ((uint64_t)forward << 32 | (uint64_t)(t + 1))) continue;
        int32_t prev_slot = start.prev_slot;
        if (i > 0) {
            const KvcSlot previous = kvc_table_slot(pool, batch, unit.row, position - 1);
            const bool is_slot = previous.status == KVC_SLOT_OK;
            prev_slot = is_slot ? (int32_t)previous.slot : KVC_PREV_NONE;
            if (start.is_relative) prev_slot = is_slot ? KVC_PREV_RELATIVE_BASE - prev_slot : KVC_PREV_RELATIVE;
        }
        const Stamp stamp = {chain, token, position, prev_slot, forward, row.request_id, 0};
        for (uint32_t half = 0; half < pool.n_halves; ++half) {
            kvc_mutable_pointer<Stamp>(pool.head[half])[target.slot] = stamp;
        }
        n_written += 1;
    }
    return n_written;
}

// A block per tile; each tile recomputes the cheap hash of the tokens before it, so tiles do not wait for each other.
KVC_KERNEL(KVC_THREADS) kvc_stamps_write(KVC_PARAM StepParams p) {
    uint64_t* state = kvc_state(p.guard);
    const uint32_t forward = kvc_forward_number(p.guard);
    const bool is_judging = kvc_is_judging(p.guard);
    const int64_t* work = kvc_work(p.pool, KVC_WORK_WRITE);
    const int64_t n_units = work[p.batch.rows];
    uint64_t n_written = 0;
    for (int64_t u = kvc_block(); u < n_units; u += kvc_n_blocks()) {
        n_written += kvc_write_tile(p, kvc_find_unit(work, p.batch.rows, u), forward, is_judging);
    }
    n_written = kvc_block_sum(n_written);
    if (kvc_thread() == 0) kvc_count_entries(p.guard, p.pool, KVC_STAGE_HEAD, n_written);
    if (kvc_block() == 0 && kvc_thread() == 0) {
        kvc_count_launch(p.guard, p.pool, KVC_STAGE_HEAD);
        state[KVC_STATE_FORWARD_DONE] = forward;
        state[KVC_STATE_STEP_DONE] = state[KVC_STATE_STEP];
    }
    if (!is_judging) return;
    const uint32_t bad = KVC_ROW_BAD_QUERY | KVC_ROW_BAD_LENGTH | KVC_ROW_BAD_REQUEST_SLOT;
    for (int64_t r = (int64_t)kvc_block() * KVC_THREADS + kvc_thread(); r < p.batch.rows;
         r += (int64_t)kvc_n_blocks() * KVC_THREADS) {
        const Row& row = kvc_pointer<Row>(p.pool.rows)[r];
        const bool is_live = row.flags & KVC_ROW_LIVE;
        if (row.flags & KVC_ROW_BAD_QUERY || (is_live && row.flags & bad)) kvc_report_bad_row(p, row, (int32_t)r);
        if (is_live && !(row.flags & KVC_ROW_ANCHORED)) kvc_atomic_add_u64(state + KVC_STATE_UNANCHORED_ROWS, 1);
    }
}

// ---- verification of prefix stamps, HEAD and TAIL ------------------------------------------------------------------------
// What a position contributes to the judgement of the next one.
struct Link {
    uint64_t chain;
    uint32_t step;  // 0: there is no stamp to link to
};
KVC_DEVICE Link kvc_link_from_below(const Link& own) { return {kvc_shfl_up_u64(own.chain, 1), kvc_shfl_up_u32(own.step, 1)}; }

KVC_DEVICE bool kvc_is_aborted(const Guard& guard, const Pool& pool, uint32_t forward) {
    const PoolState& s = kvc_pointer<PoolState>(guard.pool_states)[pool.index];
    if (forward <= s.aborted_floor) return true;
    for (uint32_t i = 0; i < KVC_N_ABORTED && i < s.n_aborted; ++i) {
        if (s.aborted[i] == forward) return true;
    }
    return false;
}

// The stamp of a slot as the stage sees it, and whether the stage may judge it.
struct SeenStamp {
    Stamp stamp;
    bool is_judged;
    bool is_unfinished;  // TAIL: the forward of the HEAD stamp was completed, but this TAIL stamp is not of it
    bool is_left;        // TAIL: the forward of the HEAD stamp never reached TAIL
};
KVC_DEVICE SeenStamp kvc_see_stamp(const Guard& guard, const Pool& pool, uint32_t stage, uint32_t half, int64_t slot,
                                   uint32_t forward) {
    const Stamp head = kvc_pointer<Stamp>(pool.head[half])[slot];
    if (stage == KVC_STAGE_HEAD) return {head, true, false, false};
    if (head.step == forward || head.step == 0) return {head, false, false, false};  // being written; reported at HEAD
    SeenStamp seen = {kvc_pointer<Stamp>(pool.tail[half])[slot], true, false, false};
    if (seen.stamp.step != head.step) {
        seen.is_judged = false;
        seen.is_left = kvc_is_aborted(guard, pool, head.step);
        seen.is_unfinished = !seen.is_left;
    }
    return seen;
}
KVC_DEVICE bool kvc_is_linkable(const SeenStamp& seen) { return seen.is_judged && seen.stamp.token != KVC_NO_TOKEN; }
KVC_DEVICE Link kvc_link_of(const SeenStamp& seen) {
    return {seen.stamp.chain, kvc_is_linkable(seen) && !kvc_is_relative(seen.stamp) ? seen.stamp.step : 0};
}

// What a relative stamp at a position of a row links to: the stamp that it continued, if the table still has it there and
// it was not rewritten since. (Rare: relative chains need a row without history, register and prefix_chain.)
KVC_DEVICE Link kvc_relative_link(const StepParams& p, int32_t index, uint32_t stage, uint32_t half, int64_t position,
                                  const Stamp& stamp, uint32_t forward) {
    const int32_t continued = kvc_continued_slot(stamp);
    const KvcSlot before = kvc_table_slot(p.pool, p.batch, index, position - 1);
    if (continued < 0 || before.status != KVC_SLOT_OK || before.slot != continued) return {0, 0};
    const SeenStamp seen = kvc_see_stamp(p.guard, p.pool, stage, half, before.slot, forward);
    return {seen.stamp.chain, kvc_is_linkable(seen) && seen.stamp.step <= stamp.step ? seen.stamp.step : 0};
}

// TOKEN: the token that the engine's history has at this position; negative = not judged.
KVC_DEVICE int32_t kvc_history_token(const Pool& pool, const Batch& batch, const Row& row, int64_t position) {
    const int64_t at = position + pool.token_offset;
    if (!batch.token_history || row.request_slot < 0 || at < 0 || at >= batch.history_length) return KVC_NO_TOKEN;
    return kvc_pointer<int32_t>(batch.token_history)[row.request_slot * batch.history_length + at];
}

// Whether the last prefix stamp is what is known of it outside the cache: its chain, or, between relative chains, its token.
KVC_DEVICE bool kvc_ends_as_anchored(const Row& row, const Stamp& stamp) {
    if (!(row.flags & KVC_ROW_ANCHORED)) return true;
    if (!(row.flags & KVC_ROW_RELATIVE || kvc_is_relative(stamp))) return stamp.chain == row.anchor;
    return !(row.flags & KVC_ROW_KNOWS_LAST) || kvc_token_mix(stamp.token, stamp.position) == row.last_mix;
}

// UNWRITTEN, POSITION, TOKEN and CHAIN of one written or unwritten slot. `may_link` says that the link into it is judged.
KVC_DEVICE void kvc_judge_stamp(const StepParams& p, const Row& row, int32_t index, uint32_t tag, int64_t position,
                                int64_t slot, const SeenStamp& seen, const Link& previous, bool may_link) {
    const Stamp& stamp = seen.stamp;
    Violation v = kvc_row_violation(p.pool, row, index, tag);
    if (seen.is_unfinished) {
        v.reasons = KVC_REASON_UNWRITTEN;
        v.detail = KVC_DETAIL_UNFINISHED;
    } else if (stamp.step == 0) {
        v.reasons = KVC_REASON_UNWRITTEN;
    } else {
        const int32_t expected = kvc_history_token(p.pool, p.batch, row, position);
        const bool is_known = stamp.token != KVC_NO_TOKEN;
        if (stamp.position != (int32_t)position) v.reasons |= KVC_REASON_POSITION;
        if (expected >= 0 && is_known && stamp.token != expected) {
            v.reasons |= KVC_REASON_TOKEN;
            v.expected_token = expected;
        }
        if (position == 0) {
            const uint64_t salt = p.batch.salts ? kvc_pointer<uint64_t>(p.batch.salts)[index] : 0;
            v.expected_chain = kvc_link(kvc_anchor(salt), stamp.token, 0);
            if (is_known && stamp.chain != v.expected_chain) v.reasons |= KVC_REASON_CHAIN;
        } else if (may_link && previous.step && is_known) {
            v.expected_chain = kvc_link(previous.chain, stamp.token, stamp.position);
            if (stamp.chain != v.expected_chain) v.reasons |= KVC_REASON_CHAIN;
        }
        if (position == row.prefix - 1 && is_known && !kvc_ends_as_anchored(row, stamp)) {
            v.reasons |= KVC_REASON_CHAIN;
            v.expected_chain = row.anchor;
        }
    }
    if (!v.reasons) return;
    v.position = (int32_t)position;
    v.slot = slot;
    kvc_put_stamp(v, stamp);
    if (!(v.reasons & KVC_REASON_CHAIN)) v.expected_chain = 0;
    kvc_report(p.guard, p.pool, v);
}

KVC_DEVICE void kvc_report_table_entry(const StepParams& p, const Row& row, int32_t index, uint32_t tag, int64_t position,
                                       const KvcSlot& entry) {
    Violation v = kvc_row_violation(p.pool, row, index, tag);
    v.reasons = entry.status == KVC_SLOT_OUT ? KVC_REASON_OUT_OF_RANGE : KVC_REASON_UNWRITTEN;
    v.detail = KVC_DETAIL_TABLE_ENTRY;
    v.slot = entry.raw;
    v.position = (int32_t)position;
    kvc_report(p.guard, p.pool, v);
}

// A warp walks up to 128 positions of a row, 32 at a time; each lane gets its predecessor's link from the lane below.
KVC_DEVICE void kvc_verify_chunk(const StepParams& p, const KvcUnit& unit, uint32_t stage, uint32_t forward) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
    if (!(row.flags & KVC_ROW_LIVE)) return;
    const uint32_t lane = kvc_lane();
    const int64_t begin = row.verify_start + unit.chunk * KVC_VERIFY_CHUNK;
    const int64_t end = begin + KVC_VERIFY_CHUNK < row.verify_end ? begin + KVC_VERIFY_CHUNK : row.verify_end;
    Link carried[2] = {{0, 0}, {0, 0}};  // of the position before the 32 at hand
    if (begin > 0) {
        const KvcSlot before = kvc_table_slot(pool, p.batch, unit.row, begin - 1);
#pragma unroll  // constant indices keep `carried` in registers
        for (uint32_t half = 0; half < 2; ++half) {
            if (half >= pool.n_halves || before.status != KVC_SLOT_OK) break;
            carried[half] = kvc_link_of(kvc_see_stamp(p.guard, pool, stage, half, before.slot, forward));
        }
    }
    uint64_t n_left = 0;
    for (int64_t base = begin; base < end; base += 32) {
        const int64_t position = base + lane;
        const bool is_inside = position < end;
        KvcSlot at = {-1, 0, KVC_SLOT_EMPTY};
        if (is_inside) at = kvc_table_slot(pool, p.batch, unit.row, position);
        const bool is_slot = is_inside && at.status == KVC_SLOT_OK;
        if (is_inside && !is_slot) {
            kvc_report_table_entry(p, row, unit.row, kvc_tag(stage, pool.kind, 0), position, at);
        }
        // Adoption takes a slot that no half was ever stamped for; it is not reported then.
        const bool is_adopted =
            is_slot && stage == KVC_STAGE_HEAD && p.batch.adopt && kvc_is_never_stamped(pool, at.slot);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            if (half >= pool.n_halves) break;
            SeenStamp seen = {};
            Link own = {0, 0};
            if (is_slot) {
                seen = kvc_see_stamp(p.guard, pool, stage, half, at.slot, forward);
                own = kvc_link_of(seen);
                if (half == 0) n_left += seen.is_left;
            }
            Link previous = kvc_link_from_below(own);
            if (lane == 0) previous = carried[half];
            carried[half] = {kvc_shfl_u64(own.chain, 31), kvc_shfl_u32(own.step, 31)};
            if (!is_slot || is_adopted || !(seen.is_judged || seen.is_unfinished)) continue;
            if (position > 0 && kvc_is_relative(seen.stamp)) {
                previous = kvc_relative_link(p, unit.row, stage, half, position, seen.stamp, forward);
            }
            // Before a window lie blocks that may belong to others by now: judge the link into its first position only if
            // the predecessor was not rewritten after the stamp that continued it.
            const bool may_link =
                position > row.verify_start || (previous.step <= seen.stamp.step && previous.step < forward);
            kvc_judge_stamp(p, row, unit.row, kvc_tag(stage, pool.kind, half), position, at.slot, seen, previous, may_link);
        }
    }
    n_left = kvc_warp_sum(n_left);
    if (lane == 0 && n_left) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_UNJUDGED_SLOTS, n_left);
    if (lane == 0 && end > begin) kvc_count_entries(p.guard, pool, stage, (uint64_t)(end - begin));
}

// Claims the slots that kvc_digests_adopt will take: rows may share one, and a broken table may name it at two positions;
// the lowest position has it. Returns the slots that nobody had claimed before.
KVC_DEVICE uint64_t kvc_claim_unknown(const StepParams& p, const KvcUnit& unit, uint32_t forward) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
    if (!(row.flags & KVC_ROW_LIVE) || row.flags & KVC_ROW_PENDING) return 0;
    const int64_t begin = row.verify_start + unit.chunk * KVC_VERIFY_CHUNK;
    const int64_t end = begin + KVC_VERIFY_CHUNK < row.verify_end ? begin + KVC_VERIFY_CHUNK : row.verify_end;
    uint64_t n_claimed = 0;
    for (int64_t position = begin + kvc_lane(); position < end; position += 32) {
        const KvcSlot at = kvc_table_slot(pool, p.batch, unit.row, position);
        if (at.status != KVC_SLOT_OK || !kvc_is_never_stamped(pool, at.slot)) continue;
        const uint64_t claim = kvc_adoption_claim(forward, position);
        const uint64_t before = kvc_atomic_max_u64(kvc_mutable_pointer<uint64_t>(pool.claims) + at.slot, claim);
        n_claimed += before < claim && before >> 32 != forward;
    }
    return n_claimed;
}

// A warp per 128 positions, both halves in one pass, no plan: a unit finds its row by searching the prefix sums of kvc_begin.
KVC_KERNEL(KVC_THREADS) kvc_stamps_verify(KVC_PARAM StepParams p) {
    const uint32_t forward = kvc_forward_number(p.guard);
    const int64_t* work = kvc_work(p.pool, KVC_WORK_VERIFY);
    const int64_t n_units = work[p.batch.rows];
    if (p.batch.adopt) {
        uint64_t n_claimed = 0;
        for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
            n_claimed += kvc_claim_unknown(p, kvc_find_unit(work, p.batch.rows, u), forward);
        }
        if (n_claimed) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_ADOPTED_SLOTS, n_claimed);
    }
    if (!kvc_is_judging(p.guard)) return;
    if (kvc_block() == 0 && kvc_thread() == 0) kvc_count_launch(p.guard, p.pool, KVC_STAGE_HEAD);
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        kvc_verify_chunk(p, kvc_find_unit(work, p.batch.rows, u), KVC_STAGE_HEAD, forward);
    }
}

// ---- kvc_stamps_tail -----------------------------------------------------------------------------------------------------
// DUPLICATE_WRITE of a loser, and the look-up of the token's place through the table as it is now.
KVC_DEVICE void kvc_judge_new_token(const StepParams& p, const Row& row, int32_t index, int64_t i, const KvcSlot& target,
                                    bool is_loser, uint32_t forward) {
    const Pool& pool = p.pool;
    const uint32_t tag = kvc_tag(KVC_STAGE_TAIL, pool.kind, 0);
    const int64_t t = row.first_token + i, position = row.prefix + i;
    if (is_loser) {
        Violation v = kvc_row_violation(pool, row, index, tag);
        v.reasons = KVC_REASON_DUPLICATE_WRITE;
        v.slot = target.slot;
        v.position = (int32_t)position;
        kvc_put_stamp(v, kvc_pointer<Stamp>(pool.head[0])[target.slot]);
        v.expected_token = (int32_t)kvc_int_at(p.batch.input_ids, p.batch.wide_ids, t);
        kvc_report(p.guard, pool, v);
    }
    if (target.raw < 0) return;  // the engine says that this token has no place
    const KvcSlot home = kvc_table_slot(pool, p.batch, index, position);
    if (home.status != KVC_SLOT_OK) {
        kvc_report_table_entry(p, row, index, tag, position, home);
        return;
    }
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        const Stamp stamp = kvc_pointer<Stamp>(pool.head[half])[home.slot];
        if (stamp.step == forward) continue;
        Violation v = kvc_row_violation(pool, row, index, kvc_tag(KVC_STAGE_TAIL, pool.kind, half));
        v.reasons = KVC_REASON_UNWRITTEN;
        v.slot = home.slot;
        v.position = (int32_t)position;
        kvc_put_stamp(v, stamp);
        kvc_report(p.guard, pool, v);
    }
}

// A lane per new token of a chunk of 32.
KVC_DEVICE void kvc_finish_chunk(const StepParams& p, const KvcUnit& unit, uint32_t forward, bool is_judging) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[unit.row];
    if (!(row.flags & KVC_ROW_LIVE)) return;
    const int64_t i = unit.chunk * KVC_DIGEST_CHUNK + kvc_lane();
    bool is_written = false;
    if (i < row.n_new) {
        const int64_t t = row.first_token + i;
        const KvcSlot target = kvc_write_slot(pool, p.batch, t);
        const bool is_slot = target.status == KVC_SLOT_OK;
        is_written =
            is_slot && kvc_pointer<uint64_t>(pool.claims)[target.slot] == ((uint64_t)forward << 32 | (uint64_t)(t + 1));
        for (uint32_t half = 0; half < pool.n_halves && is_written; ++half) {
            kvc_mutable_pointer<Stamp>(pool.tail[half])[target.slot] = kvc_pointer<Stamp>(pool.head[half])[target.slot];
        }
        if (is_judging) kvc_judge_new_token(p, row, unit.row, i, target, is_slot && !is_written, forward);
    }
    const uint32_t n_written = kvc_popcount(kvc_ballot(is_written));
    if (kvc_lane() == 0) kvc_count_entries(p.guard, pool, KVC_STAGE_TAIL, n_written);
}

// First the chunks of the prefix, then those of the new tokens; a slot written in this forward is in the second kind only.
KVC_KERNEL(KVC_THREADS) kvc_stamps_tail(KVC_PARAM StepParams p) {
    const uint32_t forward = kvc_forward_number(p.guard);
    const bool is_judging = kvc_is_judging(p.guard);
    const int64_t* verify = kvc_work(p.pool, KVC_WORK_VERIFY);
    const int64_t* digest = kvc_work(p.pool, KVC_WORK_DIGEST);
    const int64_t n_verify = is_judging ? verify[p.batch.rows] : 0;
    const int64_t n_units = n_verify + digest[p.batch.rows];
    if (kvc_block() == 0 && kvc_thread() == 0) {
        kvc_count_launch(p.guard, p.pool, KVC_STAGE_TAIL);
        kvc_mutable_pointer<PoolState>(p.guard.pool_states)[p.pool.index].tail_forward = forward;
    }
    for (int64_t u = kvc_global_warp(); u < n_units; u += kvc_global_warps()) {
        if (u < n_verify) {
            kvc_verify_chunk(p, kvc_find_unit(verify, p.batch.rows, u), KVC_STAGE_TAIL, forward);
        } else {
            kvc_finish_chunk(p, kvc_find_unit(digest, p.batch.rows, u - n_verify), forward, is_judging);
        }
    }
}

// ---- kvc_stamps_sweep ----------------------------------------------------------------------------------------------------
// A lane per resident slot: HEAD stamp against the provider's position, predecessor and token; TAIL against HEAD.
KVC_DEVICE void kvc_sweep_slot(const SweepParams& p, int64_t i) {
    const Pool& pool = p.pool;
    const int64_t slot = kvc_pointer<int32_t>(p.slots)[i];
    const int32_t position = kvc_pointer<int32_t>(p.positions)[i];
    const int64_t before = kvc_pointer<int32_t>(p.predecessors)[i];
    const int32_t expected = p.tokens ? kvc_pointer<int32_t>(p.tokens)[i] : KVC_NO_TOKEN;
    for (uint32_t half = 0; half < pool.n_halves; ++half) {
        Violation v = kvc_no_violation();
        v.tag = kvc_tag(KVC_STAGE_SWEEP, pool.kind, half);
        v.pool = (int32_t)pool.index;
        v.slot = slot;
        v.position = position;
        if (slot < 0 || slot >= pool.n_slots || kvc_is_reserved(pool, slot)) {
            v.detail = KVC_DETAIL_TABLE_ENTRY;
            v.reasons = slot >= pool.n_slots ? KVC_REASON_OUT_OF_RANGE : KVC_REASON_UNWRITTEN;
            if (half == 0) kvc_report(p.guard, pool, v);
            continue;
        }
        const Stamp stamp = kvc_pointer<Stamp>(pool.head[half])[slot];
        const uint32_t tail_step = kvc_pointer<Stamp>(pool.tail[half])[slot].step;
        const bool is_known = stamp.token != KVC_NO_TOKEN;
        if (stamp.step == 0) {
            v.reasons = KVC_REASON_UNWRITTEN;
        } else {
            if (stamp.position != position) v.reasons |= KVC_REASON_POSITION;
            if (expected >= 0 && is_known && stamp.token != expected) {
                v.reasons |= KVC_REASON_TOKEN;
                v.expected_token = expected;
            }
            if (before >= 0 && before < pool.n_slots && is_known) {
                const Stamp previous = kvc_pointer<Stamp>(pool.head[half])[before];
                const bool may_link = kvc_is_relative(stamp)
                                          ? kvc_continued_slot(stamp) == before && previous.step <= stamp.step
                                          : !kvc_is_relative(previous);
                v.expected_chain = kvc_link(previous.chain, stamp.token, stamp.position);
                if (may_link && previous.step && previous.token != KVC_NO_TOKEN && stamp.chain != v.expected_chain) {
                    v.reasons |= KVC_REASON_CHAIN;
                }
            }
            if (tail_step != stamp.step && !kvc_is_aborted(p.guard, pool, stamp.step)) {
                v.reasons |= KVC_REASON_UNWRITTEN;
                v.detail = KVC_DETAIL_UNFINISHED;
            }
        }
        if (!v.reasons) continue;
        kvc_put_stamp(v, stamp);
        if (!(v.reasons & KVC_REASON_CHAIN)) v.expected_chain = 0;
        kvc_report(p.guard, pool, v);
    }
}

KVC_KERNEL(KVC_THREADS) kvc_stamps_sweep(KVC_PARAM SweepParams p) {
    if (kvc_block() == 0 && kvc_thread() == 0) {
        kvc_count_launch(p.guard, p.pool, KVC_STAGE_SWEEP);
        kvc_count_entries(p.guard, p.pool, KVC_STAGE_SWEEP, (uint64_t)p.n);
    }
    for (int64_t i = (int64_t)kvc_block() * KVC_THREADS + kvc_thread(); i < p.n; i += (int64_t)kvc_n_blocks() * KVC_THREADS) {
        kvc_sweep_slot(p, i);
    }
}
