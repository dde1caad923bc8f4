// stamps.cu: HEAD stamps and registers of the new tokens.
//
// kvc_stamps_write  a warp per short row, a block per tile of a longer one: HEAD stamps of both halves by an affine scan, and
//                   the register of the request
//
// Launched after kvc_begin, on whose rows, claims and work lists it builds.
#include "report.cuh"

// ---- kvc_stamps_write ------------------------------------------------------------------------------------------------------
// chain -> a * chain + b: what a run of tokens does to a chain.
struct Affine {
    uint64_t a, b;
};
KVC_DEVICE Affine kvc_then(const Affine& first, const Affine& second) {
    return {first.a * second.a, second.a * first.b + second.b};
}

// What all threads before this one do to the chain; *total is what all do. All threads of the block take part.
KVC_DEVICE Affine kvc_block_exclusive_affine(Affine own, Affine* total) {
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
    Affine of_warps = {1, 0}, all = {1, 0};
    for (uint32_t w = 0; w < KVC_WARPS; ++w) {
        if (w < kvc_warp_in_block()) of_warps = kvc_then(of_warps, of_warp[w]);
        all = kvc_then(all, of_warp[w]);
    }
    kvc_sync_block();
    *total = all;
    return kvc_then(of_warps, before);
}

KVC_DEVICE void kvc_report_bad_row(const StepParams& p, const Row& row, int32_t index) {
    Violation v = kvc_row_violation(p.pool, row, index, kvc_tag(KVC_STAGE_HEAD, p.pool.kind, 0));
    v.reasons = KVC_REASON_OUT_OF_RANGE;
    v.slot = row.bad_value;
    v.position = row.prefix;
    v.detail = row.flags & KVC_ROW_BAD_QUERY    ? KVC_DETAIL_QUERY_START_LOC
               : row.flags & KVC_ROW_BAD_TABLE  ? KVC_DETAIL_KV_INDPTR
               : row.flags & KVC_ROW_BAD_LENGTH ? KVC_DETAIL_SEQ_LEN
                                                : KVC_DETAIL_REQUEST_SLOT;
    kvc_report(p.guard, p.pool, v);
}

// WRITE_TOKEN, WRITE_POSITION, FOREIGN_WRITE and OUT_OF_RANGE of one new token, which the fast path below did not find healthy.
KVC_NOINLINE void kvc_judge_write(const StepParams& p, int32_t index, int64_t i) {
    const Row row = kvc_pointer<Row>(p.pool.rows)[index];
    const int64_t t = row.first_token + i;
    const int32_t token = (int32_t)kvc_int_at(p.batch.input_ids, p.batch.wide_ids, t);
    const KvcSlot target = kvc_write_slot(p.pool, p.batch, t), home = kvc_table_slot(p.pool, p.batch, index, row.prefix + i);
    Violation v = kvc_row_violation(p.pool, row, index, kvc_tag(KVC_STAGE_HEAD, p.pool.kind, 0));
    v.slot = target.slot;
    if (target.status == KVC_SLOT_OUT) {
        v.reasons |= KVC_REASON_OUT_OF_RANGE;
        v.detail = KVC_DETAIL_SLOT_MAPPING;
        v.slot = target.raw;
    } else if (p.batch.check_write_position && (home.status != KVC_SLOT_OK || home.slot != target.slot)) {
        v.reasons |= KVC_REASON_WRITE_POSITION;
    }
    uint32_t epoch = 0;
    if (p.pool.blocks && target.status == KVC_SLOT_OK) {
        const BlockState block = kvc_block_state(p.pool, target.slot);
        const bool has_ids = p.batch.request_ids;
        if (kvc_may_not_write(block, has_ids, row.request_id)) v.reasons |= KVC_REASON_FOREIGN_WRITE;
        if (kvc_is_unowned(block)) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_UNOWNED_WRITES, 1);
        epoch = kvc_epoch_of_write(block, has_ids, row.request_id);
    }
    if (p.batch.expected_tokens) {
        const int64_t expected = kvc_int_at(p.batch.expected_tokens, p.batch.wide_ids, t);
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
        v.stamp_epoch = epoch;
    }
    v.prev_slot = home.status == KVC_SLOT_OK ? (int32_t)home.slot : -1;  // where the table says the write belongs
    kvc_report(p.guard, p.pool, v);
}

// What the register of a row's request slot held before this forward.
struct RegisterBefore {
    uint32_t forwards;
    int32_t length, first_length, confirmed;
};
KVC_DEVICE RegisterBefore kvc_register_before(const Pool& pool, const Row& row) {
    if (row.request_slot < 0) return {0, 0, 0, 0};
    const Register& reg = kvc_pointer<Register>(pool.registers)[row.request_slot];
    return {reg.forwards, reg.length, reg.first_length, reg.confirmed};
}

// Whether the row begins the register of its request slot, which was another request's or nobody's.
KVC_DEVICE bool kvc_begins_register(const Pool& pool, const Row& row) {
    return !(row.flags & KVC_ROW_REGISTERED) && kvc_pointer<Register>(pool.registers)[row.request_slot].request_id != row.request_id;
}
// A request that begins a register leaves those that no row of this forward claims: they are out of date. (It was preempted and
// resumes in another slot; when it comes back to the first, its text has gone on.) Registers first, first + stride, ...
KVC_NOINLINE void kvc_forget_elsewhere(const Pool& pool, uint32_t request_id, uint32_t forward, uint32_t first, uint32_t stride) {
    Register* registers = kvc_mutable_pointer<Register>(pool.registers);
    const uint64_t* claims = kvc_pointer<uint64_t>(pool.register_claims);
    for (uint32_t slot = first; slot < pool.max_requests; slot += stride) {
        if (registers[slot].request_id == request_id && claims[slot] >> 32 != forward) registers[slot].request_id = 0;
    }
}

// The chain after new token i: keep it in the register of the row's request slot.
KVC_DEVICE void kvc_keep_in_register(const StepParams& p, const Row& row, int64_t i, uint64_t chain, bool is_relative,
                                     const RegisterBefore& was) {
    Register& reg = kvc_mutable_pointer<Register>(p.pool.registers)[row.request_slot];
    const int32_t length = row.prefix + (int32_t)i + 1;
    if (i >= (int64_t)row.n_new - KVC_N_REGISTER_LENGTHS) reg.chain[length % KVC_N_REGISTER_LENGTHS] = chain;
    if (i + 1 < row.n_new) return;
    const bool continues = row.flags & KVC_ROW_REGISTERED;
    const int64_t oldest = (int64_t)was.length - (KVC_N_REGISTER_LENGTHS - 1);
    if (row.n_new < KVC_N_REGISTER_LENGTHS) reg.chain[row.prefix % KVC_N_REGISTER_LENGTHS] = row.anchor;
    // A start that came out of the cache is nothing to hold a later forward against.
    const int32_t first = row.prefix + (row.flags & KVC_ROW_ANCHORED ? 0 : 1);
    reg.first_length = !continues ? first : oldest > was.first_length ? (int32_t)oldest : was.first_length;
    reg.forwards = continues ? was.forwards + 1 : 1;
    reg.is_relative = is_relative;
    reg.length = length;
    // All new tokens of a first forward or of a long chunk, else the first of them: the others may be drafts, and in a further
    // forward of the step all of them may be.
    const bool is_known = !continues || row.n_new > KVC_N_REGISTER_LENGTHS;
    const int32_t known = continues && was.confirmed < row.prefix ? was.confirmed : row.prefix;
    const bool is_repeated = kvc_pointer<PoolState>(p.guard.pool_states)[p.pool.index].is_repeated;
    reg.confirmed = is_repeated ? known : row.prefix + (is_known ? row.n_new : 1);
    reg.request_id = row.request_id;
}

// Where the chain of a row that brings new tokens comes from.
struct Start {
    bool is_relative;
    int32_t prev_slot;  // relative: what the stamp of the row's first new token says of its predecessor
};
// Of a row whose chain nothing outside the cache anchors, from its prefix on.
KVC_NOINLINE Start kvc_unanchored_start(const StepParams& p, int32_t index, uint32_t forward) {
    const Row row = kvc_pointer<Row>(p.pool.rows)[index];
    const uint32_t last = (uint32_t)row.prefix - 1;
    const TableRow table = kvc_table_row(p.batch, index);
    const int32_t before = p.pool.ring_length ? (int32_t)kvc_table_slot(p.pool, p.batch, index, last).slot
                                              : kvc_fast_slot(p.pool, p.batch, kvc_fast_entry(p.batch, table, last), last);
    const bool is_slot = before >= 0;
    // Another row of this launch may be writing the stamp of a slot that is claimed in this forward.
    const bool is_rewritten = is_slot && kvc_pointer<uint64_t>(p.pool.claims)[before] >> 32 == forward;
    const bool is_from_stamp = !(row.flags & KVC_ROW_ANCHORED);
    if (!(row.flags & KVC_ROW_RELATIVE || (is_from_stamp && is_rewritten))) return {false, 0};
    if (!is_slot || is_rewritten) return {true, KVC_PREV_RELATIVE};
    const Stamp stamp = kvc_pointer<Stamp>(p.pool.head[0])[before];
    const bool is_there = stamp.step && !kvc_is_outlived(p.pool, before, stamp);
    const bool continues = is_there && stamp.token != KVC_NO_TOKEN && stamp.chain == row.anchor;
    return {true, continues ? KVC_PREV_RELATIVE_BASE - before : KVC_PREV_RELATIVE};
}
KVC_DEVICE Start kvc_start_of(const StepParams& p, const Row& row, int32_t index, uint32_t forward) {
    if (row.prefix == 0 || (row.flags & (KVC_ROW_ANCHORED | KVC_ROW_RELATIVE)) == KVC_ROW_ANCHORED) return {false, 0};
    return kvc_unanchored_start(p, index, forward);
}

// What the engine's arrays say of a new token, all under way at once: nothing here is looked at yet.
struct TokenWords {
    int64_t token, named, named_before;  // named_before: where the row's new token before it is written, if there is one
    uint32_t own, before;                // table entries of its position and of the one before it
};
KVC_DEVICE TokenWords kvc_token_words(const StepParams& p, const Row& row, const TableRow& table, int64_t i) {
    const Batch& batch = p.batch;
    const int64_t t = row.first_token + i;
    const uint32_t position = (uint32_t)(row.prefix + i);
    return {kvc_int_at(batch.input_ids, batch.wide_ids, t), kvc_int_at(batch.slot_mapping, batch.wide_slots, t),
            kvc_int_at(batch.slot_mapping, batch.wide_slots, i > 0 ? t - 1 : t), kvc_fast_entry(batch, table, position),
            kvc_fast_entry(batch, table, position - 1)};  // before 0: beyond any table
}

struct NewToken {
    int32_t token, prev_slot;
    KvcSlot target;
    uint64_t claim;
    uint32_t epoch;
    bool is_odd;  // to be judged in full
};
KVC_DEVICE NewToken kvc_new_token(const StepParams& p, const Row& row, int32_t index, int64_t i, const TokenWords& words,
                                  const Start& start) {
    const Batch& batch = p.batch;
    const uint32_t position = (uint32_t)(row.prefix + i);
    NewToken n = {(int32_t)words.token, 0, kvc_engine_slot(p.pool, words.named, words.named), 0, 0, false};
    if (n.target.status == KVC_SLOT_OK) n.claim = kvc_pointer<uint64_t>(p.pool.claims)[n.target.slot];
    int32_t home, before;
    if (p.pool.ring_length) {
        home = (int32_t)kvc_table_slot(p.pool, batch, index, position).slot;
        const bool is_kept = kvc_is_kept(p.pool, (int64_t)row.prefix + row.n_new, (int64_t)position - 1);
        before = is_kept ? (int32_t)kvc_table_slot(p.pool, batch, index, (int64_t)position - 1).slot : KVC_PREV_NONE;
    } else {
        home = kvc_fast_slot(p.pool, batch, words.own, position);
        before = kvc_fast_slot(p.pool, batch, words.before, position - 1);
    }
    n.is_odd = n.target.status == KVC_SLOT_OUT || batch.expected_tokens ||
               (batch.check_write_position && (home < 0 || home != n.target.slot));
    if (p.pool.blocks && n.target.status == KVC_SLOT_OK) {
        const BlockState block = kvc_block_state(p.pool, n.target.slot);
        n.epoch = kvc_epoch_of_write(block, batch.request_ids, row.request_id);
        n.is_odd |= kvc_is_unowned(block) || kvc_may_not_write(block, batch.request_ids, row.request_id);
    }
    // Where the predecessor has no place, or one before the window, the table may still name a block that is another's by now.
    const bool has_before = i > 0 ? words.named_before >= 0 : row.prefix > row.verify_start;
    n.prev_slot = has_before ? before : KVC_PREV_NONE;  // reserved: the same
    if (start.is_relative) {
        n.prev_slot = i == 0 ? start.prev_slot : n.prev_slot >= 0 ? KVC_PREV_RELATIVE_BASE - n.prev_slot : KVC_PREV_RELATIVE;
    }
    return n;
}

KVC_DEVICE bool kvc_owns_register(const Pool& pool, const Row& row, int32_t index, uint32_t forward) {
    return row.request_id && row.request_slot >= 0 &&
           kvc_pointer<uint64_t>(pool.register_claims)[row.request_slot] == ((uint64_t)forward << 32 | (uint64_t)(index + 1));
}

// Stamps a new token whose chain is known, and judges its place; returns whether it was stamped.
KVC_DEVICE bool kvc_stamp_token(const StepParams& p, const Row& row, int32_t index, int64_t i, const NewToken& n, uint64_t chain,
                                uint32_t forward, bool is_judging) {
    if (n.target.status == KVC_SLOT_EMPTY) return false;
    if (is_judging && n.is_odd) kvc_judge_write(p, index, i);
    const uint64_t claim = (uint64_t)forward << 32 | (uint64_t)(row.first_token + i + 1);
    if (n.target.status != KVC_SLOT_OK || n.claim != claim) return false;
    const Stamp stamp = {chain, n.token, (int32_t)(row.prefix + i), n.prev_slot, forward, row.request_id, n.epoch};
    for (uint32_t half = 0; half < p.pool.n_halves; ++half) {
        kvc_mutable_pointer<Stamp>(p.pool.head[half])[n.target.slot] = stamp;
    }
    return true;
}

// A row of at most 32 new tokens, by a warp, a lane each; returns whether this lane has stamped one.
KVC_DEVICE bool kvc_write_short_row(const StepParams& p, const Row& row, int32_t index, uint32_t forward, bool is_judging) {
    const uint32_t lane = kvc_lane();
    const bool is_token = lane < (uint32_t)row.n_new;
    if (row.n_new == 0) return false;
    // A lane without a token reads the last one's words: no load is conditional, so that all are under way at once.
    const TokenWords words = kvc_token_words(p, row, kvc_table_row(p.batch, index), is_token ? lane : row.n_new - 1);
    const bool owns_register = kvc_owns_register(p.pool, row, index, forward);
    const RegisterBefore was = kvc_register_before(p.pool, row);
    const bool begins = owns_register && kvc_begins_register(p.pool, row);
    kvc_sync_warp();  // all lanes have read the register, which one of them rewrites below
    if (begins) kvc_forget_elsewhere(p.pool, row.request_id, forward, lane, 32);
    const Start start = kvc_start_of(p, row, index, forward);
    NewToken n = {0, 0, {-1, 0, KVC_SLOT_EMPTY}, 0, 0, false};
    if (is_token) n = kvc_new_token(p, row, index, lane, words, start);
    Affine all = is_token ? Affine{KVC_CHAIN_P, kvc_token_mix(n.token, (int32_t)(row.prefix + lane))} : Affine{1, 0};
    for (uint32_t d = 1; d < (uint32_t)row.n_new; d <<= 1) {
        const Affine below = {kvc_shfl_up_u64(all.a, d), kvc_shfl_up_u64(all.b, d)};
        if (lane >= d) all = kvc_then(below, all);
    }
    if (!is_token) return false;
    const uint64_t chain = all.a * row.anchor + all.b;
    const bool is_stamped = kvc_stamp_token(p, row, index, lane, n, chain, forward, is_judging);
    if (owns_register) kvc_keep_in_register(p, row, lane, chain, start.is_relative, was);
    return is_stamped;
}

// This thread's token of those from `base` on; past the end, the last: nothing is read beyond it.
KVC_DEVICE int64_t kvc_tile_token(int64_t base, int64_t end) {
    const int64_t i = base + kvc_thread();
    return i < end ? i : end - 1;
}

// A tile of a longer row: 256 tokens at a time, a thread each. All threads of the block take part; returns how many stamps this
// thread wrote.
KVC_DEVICE uint32_t kvc_write_tile(const StepParams& p, int32_t index, int64_t tile, uint32_t forward, bool is_judging) {
    const Pool& pool = p.pool;
    const Row row = kvc_pointer<Row>(pool.rows)[index];
    if (!(row.flags & KVC_ROW_LIVE)) return 0;
    const uint64_t ids = p.batch.input_ids;
    const uint32_t wide = p.batch.wide_ids;
    const int32_t first_token = row.first_token, prefix = row.prefix;
    const auto token_of = [=](uint32_t j) { return (int32_t)kvc_int_at(ids, wide, first_token + (int64_t)j); };
    const int64_t length = kvc_tile_length(row.n_new), begin = tile * length;
    const int64_t end = begin + length < row.n_new ? begin + length : row.n_new;
    const bool owns_register = kvc_owns_register(pool, row, index, forward);
    if (owns_register && end == row.n_new && kvc_begins_register(pool, row)) {
        kvc_forget_elsewhere(pool, row.request_id, forward, kvc_thread(), KVC_THREADS);
    }
    const TableRow table = kvc_table_row(p.batch, index);
    const Start start = kvc_start_of(p, row, index, forward);
    TokenWords words = kvc_token_words(p, row, table, kvc_tile_token(begin, end));
    uint64_t carry = begin ? kvc_block_chain(row.anchor, (uint32_t)begin, prefix, token_of) : row.anchor;
    uint32_t n_written = 0;
    for (int64_t base = begin; base < end; base += KVC_THREADS) {
        const int64_t i = base + kvc_thread();
        const bool is_token = i < end;
        NewToken n = {0, 0, {-1, 0, KVC_SLOT_EMPTY}, 0, 0, false};
        if (is_token) n = kvc_new_token(p, row, index, i, words, start);
        words = kvc_token_words(p, row, table, kvc_tile_token(base + KVC_THREADS, end));
        const uint64_t mix = kvc_token_mix(n.token, (int32_t)(prefix + i));
        Affine all;
        const Affine before = kvc_block_exclusive_affine(is_token ? Affine{KVC_CHAIN_P, mix} : Affine{1, 0}, &all);
        const uint64_t chain = (before.a * carry + before.b) * KVC_CHAIN_P + mix;
        carry = all.a * carry + all.b;
        if (!is_token) continue;
        n_written += kvc_stamp_token(p, row, index, i, n, chain, forward, is_judging);
        if (owns_register && i >= row.n_new - KVC_N_REGISTER_LENGTHS) {
            kvc_keep_in_register(p, row, i, chain, start.is_relative, kvc_register_before(pool, row));
        }
    }
    return n_written;
}

// How many chunks of each row's prefix kvc_digests_verify has to look through: it needs flags that kvc_begin has set.
KVC_DEVICE void kvc_scan_data_work(const Pool& pool, const Batch& batch) {
    const int32_t per_thread = batch.rows / KVC_THREADS + 1;
    const int32_t first = (int32_t)kvc_thread() * per_thread;
    uint64_t sum[1] = {0}, total[1];
    for (int32_t r = first; r < first + per_thread && r < batch.rows; ++r) {
        sum[0] += (uint64_t)kvc_data_units(pool, batch, kvc_pointer<Row>(pool.rows)[r]);
    }
    kvc_block_exclusive_sums(sum, total);
    int64_t* before = kvc_work(pool, KVC_WORK_DATA);
    for (int32_t r = first; r < first + per_thread && r <= batch.rows; ++r) {
        before[r] = (int64_t)sum[0];
        if (r < batch.rows) sum[0] += (uint64_t)kvc_data_units(pool, batch, kvc_pointer<Row>(pool.rows)[r]);
    }
}

// What is to be said of the rows themselves. All threads of the block take part.
KVC_DEVICE void kvc_judge_rows(const StepParams& p) {
    const uint32_t bad = KVC_ROW_BAD_LENGTH | KVC_ROW_BAD_REQUEST_SLOT, unjudged = KVC_ROW_BAD_QUERY | KVC_ROW_BAD_TABLE;
    uint64_t n_unanchored = 0;
    for (int32_t r = (int32_t)kvc_thread(); r < p.batch.rows; r += KVC_THREADS) {
        const uint32_t flags = kvc_pointer<Row>(p.pool.rows)[r].flags;
        const bool is_live = flags & KVC_ROW_LIVE;
        if (flags & unjudged || (is_live && flags & bad)) kvc_report_bad_row(p, kvc_pointer<Row>(p.pool.rows)[r], r);
        n_unanchored += is_live && !(flags & KVC_ROW_ANCHORED);
    }
    n_unanchored = kvc_warp_sum(n_unanchored);
    if (kvc_lane() == 0 && n_unanchored) kvc_atomic_add_u64(kvc_state(p.guard) + KVC_STATE_UNANCHORED_ROWS, n_unanchored);
}

// Stamps this block's share of the tiles and of the short rows; returns how many stamps this thread wrote. All threads of the
// block take part.
KVC_DEVICE uint32_t kvc_write_rows(const StepParams& p, uint32_t forward, bool is_judging, uint32_t n_writers) {
    const int32_t rows = p.batch.rows;
    const int64_t* tiles = kvc_work(p.pool, KVC_WORK_WRITE);
    const int64_t n_tiles = tiles[rows];
    uint32_t n = 0;
    int64_t r = kvc_global_warp();
    Row row = {};
    if (r < rows) row = kvc_pointer<Row>(p.pool.rows)[r];  // under way while the tiles are looked at
    for (int64_t u = kvc_block(); u < n_tiles; u += n_writers) {
        const KvcUnit unit = kvc_find_unit(tiles, rows, u, n_tiles);
        n += kvc_write_tile(p, unit.row, unit.chunk, forward, is_judging);
    }
    while (r < rows) {
        if (row.n_new <= 32 && row.flags & KVC_ROW_LIVE) n += kvc_write_short_row(p, row, (int32_t)r, forward, is_judging);
        r += (int64_t)n_writers * KVC_WARPS;
        if (r < rows) row = kvc_pointer<Row>(p.pool.rows)[r];
    }
    return n;
}

// A block per tile of longer rows, then a warp per row of at most 32 new tokens: each tile recomputes the cheap hash of the
// tokens before it, so tiles do not wait for each other. The last block prepares the digests and judges the rows instead.
KVC_KERNEL(KVC_THREADS) kvc_stamps_write(KVC_PARAM StepParams p) {
    KVC_SHARED uint32_t n_written[KVC_WARPS];
    uint64_t* state = kvc_state(p.guard);
    const uint32_t forward = kvc_forward_number(p.guard);
    const bool is_judging = kvc_is_judging(p.guard);
    const uint32_t n_writers = kvc_n_blocks() - 1;
    if (kvc_block() == n_writers) {
        if (kvc_thread() == 0) {
            kvc_count_launch(p.guard, p.pool, KVC_STAGE_HEAD);
            state[KVC_STATE_FORWARD_DONE] = forward;
            state[KVC_STATE_STEP_DONE] = state[KVC_STATE_STEP];
        }
        if (p.pool.n_digests) kvc_scan_data_work(p.pool, p.batch);
        if (is_judging) kvc_judge_rows(p);
    } else {
        uint32_t n = (uint32_t)kvc_warp_sum(kvc_write_rows(p, forward, is_judging, n_writers));
        if (kvc_lane() == 0) n_written[kvc_warp_in_block()] = n;
        kvc_sync_block();
        if (kvc_thread() == 0) {
            for (uint32_t w = 1; w < KVC_WARPS; ++w) n += n_written[w];
            kvc_count_entries(p.guard, p.pool, KVC_STAGE_HEAD, n);
        }
    }
}
