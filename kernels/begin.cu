// begin.cu: what a forward is about, found out once for the launches after it.
//
// kvc_begin  a block per row: facts of the row, its anchor, claims on the slots it writes; one block more numbers the forward
//            and adds up what lies before each row
//
// The first launch of a forward, made by kvcanary/backends/device.py.
#include "report.cuh"

// ---- facts of a row ------------------------------------------------------------------------------------------------------
struct RowExtent {
    int64_t first_token, n_new, length, prefix, capacity, verify_start, verify_end, bad_value;
    uint32_t flags;  // BAD_QUERY, BAD_TABLE or BAD_LENGTH
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
    if (!batch.seq_lens && !kvc_is_inside_table(batch, row)) {  // how long it is cannot be known
        e.flags = KVC_ROW_BAD_TABLE;
        e.bad_value = kvc_pointer<int32_t>(batch.kv_indptr)[row + 1];
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
    const bool fits = kvc_n_places(pool, e.length) <= e.capacity;
    if (!fits) {
        e.flags = KVC_ROW_BAD_LENGTH;
        e.bad_value = e.length;
    }
    int64_t start = pool.window ? e.prefix - pool.window + 1 : 0;
    if (pool.ring_length && start < e.length - pool.ring_length) start = e.length - pool.ring_length;
    // Nothing lies between the sink and the window, or all of the prefix is the sink's.
    if (start <= pool.sink || e.prefix <= pool.sink) start = 0;
    e.verify_end = fits || e.prefix < e.capacity ? e.prefix : e.capacity;
    e.verify_start = start < e.verify_end ? start : e.verify_end;
    return e;
}

// The same, but BAD_QUERY also where query_start_loc descends before the row: its tokens may then be an earlier row's too, and
// a token that two rows stamp has no one stamp. All threads of the block take part.
KVC_DEVICE RowExtent kvc_ordered_row_extent(const Pool& pool, const Batch& batch, int32_t row) {
    const RowExtent e = kvc_row_extent(pool, batch, row);
    if (e.n_new == 0) return e;
    const int32_t* query = kvc_pointer<int32_t>(batch.query_start_loc);
    bool descends = false;
    for (int32_t r = (int32_t)kvc_thread(); r < row; r += KVC_THREADS) descends |= query[r + 1] < query[r];
    if (!kvc_sync_block_or(descends)) return e;
    RowExtent bad = {};
    bad.flags = KVC_ROW_BAD_QUERY;
    bad.bad_value = query[row + 1];
    return bad;
}

// What the later launches have to do for a row: units to verify, tiles to write, chunks of new tokens.
struct RowWork {
    uint32_t verify, write, tail;
};
KVC_DEVICE RowWork kvc_row_work(const Pool& pool, const Batch& batch, int32_t row) {
    const RowExtent e = kvc_row_extent(pool, batch, row);
    const uint32_t n_new = (uint32_t)e.n_new, n_prefix = (uint32_t)(e.verify_end - e.verify_start);
    const uint32_t n_sink = e.verify_start > pool.sink && pool.sink;  // a unit of its own
    return {kvc_units(n_prefix, KVC_VERIFY_UNIT) + n_sink, kvc_tiles((int32_t)n_new), kvc_units(n_new, KVC_TAIL_CHUNK)};
}

// What they have to do before each row. A thread sums up a run of neighbouring rows.
KVC_DEVICE void kvc_scan_work(const Pool& pool, const Batch& batch) {
    const int32_t per_thread = batch.rows / KVC_THREADS + 1;  // rows + 1 places to fill
    const int32_t first = (int32_t)kvc_thread() * per_thread;
    RowWork of_first = {0, 0, 0};  // mostly the only one
    if (first < batch.rows) of_first = kvc_row_work(pool, batch, first);
    uint64_t sums[3] = {of_first.verify, of_first.write, of_first.tail}, totals[3];
    for (int32_t row = first + 1; row < first + per_thread && row < batch.rows; ++row) {
        const RowWork work = kvc_row_work(pool, batch, row);
        sums[0] += work.verify;
        sums[1] += work.write;
        sums[2] += work.tail;
    }
    kvc_block_exclusive_sums(sums, totals);
    int64_t* verify = kvc_work(pool, KVC_WORK_VERIFY);
    int64_t* write = kvc_work(pool, KVC_WORK_WRITE);
    int64_t* tail = kvc_work(pool, KVC_WORK_TAIL);
    for (int32_t row = first; row < first + per_thread && row <= batch.rows; ++row) {
        verify[row] = (int64_t)sums[0];
        write[row] = (int64_t)sums[1];
        tail[row] = (int64_t)sums[2];
        if (row + 1 == first + per_thread || row == batch.rows) break;
        const RowWork work = row == first ? of_first : kvc_row_work(pool, batch, row);
        sums[0] += work.verify;
        sums[1] += work.write;
        sums[2] += work.tail;
    }
}

// Whether the register has another chain at the prefix than the slot before it, at a length that perhaps only drafts had: the text
// has gone on elsewhere, and its KV came back.
KVC_DEVICE bool kvc_is_register_outdated(const Pool& pool, const Batch& batch, int32_t index, const Register& reg, int32_t prefix) {
    if (prefix <= reg.confirmed || reg.is_relative) return false;
    const KvcSlot last = kvc_table_slot(pool, batch, index, prefix - 1);
    if (last.status != KVC_SLOT_OK) return false;
    const Stamp stamp = kvc_pointer<Stamp>(pool.head[0])[last.slot];
    const bool is_there = stamp.step && stamp.token != KVC_NO_TOKEN && !kvc_is_outlived(pool, last.slot, stamp);
    return is_there && stamp.chain != reg.chain[prefix % KVC_N_REGISTER_LENGTHS];
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
            if (!kvc_is_register_outdated(pool, batch, index, reg, prefix)) {
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
        bool is_unknown = false;
        for (int64_t p = kvc_thread(); p < prefix; p += KVC_THREADS) is_unknown |= history[p] < 0;
        if (!kvc_sync_block_or(is_unknown)) {
            row.anchor = kvc_block_chain(row.anchor, (uint32_t)prefix, 0, [=](uint32_t p) { return history[p]; });
            row.flags |= KVC_ROW_ANCHORED;
            return;
        }
    }
    const KvcSlot before = kvc_table_slot(pool, batch, index, prefix - 1);
    row.flags |= KVC_ROW_RELATIVE;
    if (before.status == KVC_SLOT_OK && prefix > row.verify_start) {  // before a window, it may be another's by now
        const Stamp stamp = kvc_pointer<Stamp>(pool.head[0])[before.slot];
        if (stamp.step && !kvc_is_outlived(pool, before.slot, stamp)) {
            row.anchor = stamp.chain;
            if (stamp.token != KVC_NO_TOKEN && !kvc_is_relative(stamp)) row.flags &= ~(uint32_t)KVC_ROW_RELATIVE;
        }
    }
}

// Claim the slots of the row's new tokens: the highest token index wins. The blocks of grid.y share the tokens. A slot that is
// written is not fresh any more.
KVC_DEVICE void kvc_claim_slots(const Guard& guard, const Pool& pool, const Batch& batch, const RowExtent& e, uint32_t forward) {
    const bool any_fresh = kvc_load_volatile_u32(kvc_n_fresh(guard, pool)) != 0;
    uint32_t n_written = 0;
    uint64_t* claims = kvc_mutable_pointer<uint64_t>(pool.claims);
    const int64_t stride = (int64_t)kvc_n_blocks_y() * KVC_THREADS;
    for (int64_t i = (int64_t)kvc_block_y() * KVC_THREADS + kvc_thread(); i < e.n_new; i += stride) {
        const int64_t t = e.first_token + i;
        const KvcSlot target = kvc_write_slot(pool, batch, t);
        if (target.status != KVC_SLOT_OK) continue;
        const uint64_t claim = (uint64_t)forward << 32 | (uint64_t)(t + 1);
        if (any_fresh) {
            n_written += kvc_is_fresh(kvc_atomic_max_u64(claims + target.slot, claim));
        } else {
            kvc_atomic_max_u64(claims + target.slot, claim);  // whose result nobody waits for
        }
    }
    if (n_written) kvc_atomic_add_u32(kvc_n_fresh(guard, pool), 0u - n_written);
}

// Whether any new token of the row has a real slot, or one outside the pool; mostly the first 256 tokens tell.
KVC_DEVICE bool kvc_is_live(const Pool& pool, const Batch& batch, int64_t first_token, int64_t n_new) {
    for (int64_t base = 0; base < n_new; base += KVC_THREADS) {
        const int64_t i = base + kvc_thread();
        bool is_real = false;
        if (i < n_new) is_real = kvc_write_slot(pool, batch, first_token + i).status != KVC_SLOT_EMPTY;
        if (kvc_sync_block_or(is_real)) return true;
    }
    return false;
}

KVC_DEVICE void kvc_number_forward(const BeginParams& p, uint32_t forward) {
    uint64_t* state = kvc_state(p.guard);
    if (p.is_first_pool) {
        const uint64_t is_judging = state[KVC_STATE_PAUSE] == 0 && forward < KVC_LAST_FORWARD;
        if (forward >= KVC_RENUMBER_AT) {
            kvc_store_volatile_u64(kvc_mutable_pointer<uint64_t>(p.guard.control) + KVC_CONTROL_RENUMBER, forward);
        }
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
    pool_state.is_repeated = pool_state.step == (uint32_t)state[KVC_STATE_STEP];
    pool_state.step = (uint32_t)state[KVC_STATE_STEP];
    if (p.pool.scrub_blocks && p.batch.is_first_forward && state[KVC_STATE_PAUSE] == 0) pool_state.scrub_turn += 1;
}

// The number after this one. The last one stays, as 0 would mean that nothing was ever written.
KVC_DEVICE uint32_t kvc_next_forward(uint64_t done) { return done < KVC_LAST_FORWARD ? (uint32_t)done + 1 : KVC_LAST_FORWARD; }

// ---- kvc_begin -----------------------------------------------------------------------------------------------------------
// A block per row, and more along grid.y that only claim slots where rows bring many tokens. The chain of a first forward may
// need the row's whole history: the block walks it together.
KVC_KERNEL(KVC_THREADS) kvc_begin(KVC_PARAM BeginParams p) {
    const Pool& pool = p.pool;
    const Batch& batch = p.batch;
    uint64_t* state = kvc_state(p.guard);
    // FORWARD is changed by the last block of this very launch; FORWARD_DONE only by a later one.
    const uint32_t forward =
        p.is_first_pool ? kvc_next_forward(state[KVC_STATE_FORWARD_DONE]) : (uint32_t)state[KVC_STATE_FORWARD];
    const int32_t index = (int32_t)kvc_block();
    const bool is_last = kvc_block() == kvc_n_blocks() - 1;
    if (kvc_block_y() > 0) {
        if (index < batch.rows) kvc_claim_slots(p.guard, pool, batch, kvc_ordered_row_extent(pool, batch, index), forward);
        return;
    }
    if (p.is_first_pool && batch.is_first_forward) {
        uint32_t* taint = kvc_mutable_pointer<uint32_t>(p.guard.taint);
        const uint32_t n = kvc_n_blocks() * KVC_THREADS;
        for (uint32_t i = (uint32_t)index * KVC_THREADS + kvc_thread(); i < pool.max_requests; i += n) taint[i] = 0;
    }
    if (is_last) {
        if (kvc_thread() == 0) {
            kvc_number_forward(p, forward);
            if (pool.due) kvc_due_list(pool)[0].slot = 0;
        }
        kvc_scan_work(pool, batch);
    }
    if (index >= batch.rows) return;
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
    if (row.request_id == KVC_PREFIX_CACHE) row.request_id = 0;
    kvc_claim_slots(p.guard, pool, batch, e, forward);
    if (e.flags & KVC_ROW_BAD_TABLE) {
        const int32_t* query = kvc_pointer<int32_t>(batch.query_start_loc);
        const bool is_padding = !kvc_is_live(pool, batch, query[index], query[index + 1] - query[index]);
        if (is_padding) row.flags = row.bad_value = 0;
    } else if (kvc_is_live(pool, batch, e.first_token, e.n_new)) {
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
