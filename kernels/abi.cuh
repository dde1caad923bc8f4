// abi.cuh: the C twin of kvcanary/abi.py, rendered by it: python -m kvcanary.abi > kernels/abi.cuh
#pragma once
#include "device.cuh"

#define KVC_MIX_1 0xBF58476D1CE4E5B9ull
#define KVC_MIX_2 0x94D049BB133111EBull
#define KVC_MIX_1_INVERSE 0x96DE1B173F119089ull
#define KVC_MIX_2_INVERSE 0x319642B2D24D8EC3ull
#define KVC_CHAIN_P 0xD1342543DE82EF95ull
#define KVC_CHAIN_P_INVERSE 0x572B5EE77A54E3BDull
#define KVC_CHAIN_ANCHOR 0x0000000000C0FFEEull
#define KVC_DIGEST_SEED 0x9E3779B97F4A7C15ull
#define KVC_DIGEST_R 0x5851F42D4C957F2Dull
#define KVC_DIGEST_C0 0xA0761D6478BD642Full
#define KVC_DIGEST_C1 0xE7037ED1A0B428DBull
#define KVC_DIGEST_C2 0x8EBC6AF09C88C6E3ull
#define KVC_N_TAGS 12
#define KVC_THREADS 256
#define KVC_WARPS 8
#define KVC_VERIFY_UNIT 64
#define KVC_DATA_UNIT 16
#define KVC_LIST_MIN_EVERY 8
#define KVC_WRITE_TILE 1024
#define KVC_SHORT_ROW 16384
#define KVC_TAIL_CHUNK 32
#define KVC_SHARE_RUN 16
#define KVC_N_REGISTER_LENGTHS 16
#define KVC_N_ABORTED 58
#define KVC_MAX_RESERVED 8
#define KVC_PREV_NONE (-1)
#define KVC_PREV_RELATIVE (-2)
#define KVC_PREV_RELATIVE_BASE (-3)
#define KVC_PREV_IN_LIST 0
#define KVC_PREFIX_CACHE 4294967295
#define KVC_CLAIM_FRESH 2147483647
#define KVC_TABLE_DENSE 0
#define KVC_TABLE_CSR 1
#define KVC_TABLE_STATIC 2
#define KVC_ROW_LIVE 1
#define KVC_ROW_ANCHORED 2
#define KVC_ROW_FULL_DATA 4
#define KVC_ROW_PENDING 8
#define KVC_ROW_REGISTERED 16
#define KVC_ROW_OWNS_REGISTER 32
#define KVC_ROW_BAD_QUERY 64
#define KVC_ROW_BAD_LENGTH 128
#define KVC_ROW_BAD_REQUEST_SLOT 256
#define KVC_ROW_RELATIVE 512
#define KVC_ROW_KNOWS_LAST 1024
#define KVC_ROW_BAD_TABLE 2048
#define KVC_WORK_VERIFY 0
#define KVC_WORK_WRITE 1
#define KVC_WORK_TAIL 2
#define KVC_WORK_DATA 3
#define KVC_N_WORK 4
#define KVC_BLOCK_LIVE 1
#define KVC_BLOCK_SHARED 2
#define KVC_OP_ALLOCATE 0
#define KVC_OP_SHARE 1
#define KVC_OP_LEAVE 2
#define KVC_OP_UNSHARE 3
#define KVC_OP_FREE 4
#define KVC_OP_CLAIM 5
#define KVC_N_BLOCK_OPS 6
#define KVC_MAX_BLOCK_IDS 1000
#define KVC_MAX_LAYER_DIGESTS 15
#define KVC_STATE_FORWARD 0
#define KVC_STATE_FORWARD_DONE 1
#define KVC_STATE_STEP 2
#define KVC_STATE_STEP_DONE 3
#define KVC_STATE_JUDGING 4
#define KVC_STATE_PAUSE 5
#define KVC_STATE_CLAIMED 6
#define KVC_STATE_DROPPED 7
#define KVC_STATE_OBSERVATIONS 8
#define KVC_STATE_UNJUDGED_SLOTS 9
#define KVC_STATE_UNANCHORED_ROWS 10
#define KVC_STATE_DATA_SLOTS 11
#define KVC_STATE_ADOPTED_SLOTS 12
#define KVC_STATE_FORWARDS_JUDGED 13
#define KVC_STATE_UNOWNED_WRITES 14
#define KVC_STATE_SKIPPED_MOVES 15
#define KVC_STATE_SCRUB_SLOTS 16
#define KVC_STATE_SCRUB_ORPHANS 17
#define KVC_STATE_RESERVED_CHECKS 18
#define KVC_STATE_FORWARD_BASE 19
#define KVC_N_STATE_WORDS 24
#define KVC_RENUMBER_AT 2147483648
#define KVC_RENUMBER_KEEP 1073741824
#define KVC_LAST_FORWARD 4294967294
#define KVC_CONTROL_ALARM 0
#define KVC_CONTROL_RENUMBER 1
#define KVC_CONTROL_READ 8
#define KVC_N_CONTROL_WORDS 16
#define KVC_NO_TOKEN (-1)
#define KVC_DIGEST_PERIOD 128
#define KVC_STAGE_HEAD 0u
#define KVC_STAGE_TAIL 1u
#define KVC_STAGE_SWEEP 2u
#define KVC_REASON_CHAIN 1u
#define KVC_REASON_POSITION 2u
#define KVC_REASON_DATA 4u
#define KVC_REASON_WRITE_TOKEN 8u
#define KVC_REASON_WRITE_POSITION 16u
#define KVC_REASON_TOKEN 32u
#define KVC_REASON_UNWRITTEN 64u
#define KVC_REASON_STALE_EPOCH 128u
#define KVC_REASON_OUT_OF_RANGE 256u
#define KVC_REASON_FOREIGN_WRITE 512u
#define KVC_REASON_DUPLICATE_WRITE 1024u
#define KVC_REASON_NONFINITE_RESERVED 2048u
#define KVC_DETAIL_SLOT 0u
#define KVC_DETAIL_TABLE_ENTRY 1u
#define KVC_DETAIL_SLOT_MAPPING 2u
#define KVC_DETAIL_SEQ_LEN 3u
#define KVC_DETAIL_QUERY_START_LOC 4u
#define KVC_DETAIL_REQUEST_SLOT 5u
#define KVC_DETAIL_UNFINISHED 6u
#define KVC_DETAIL_SCRUB 7u
#define KVC_DETAIL_RESERVED 8u
#define KVC_DETAIL_KV_INDPTR 9u

struct alignas(32) Stamp {
    uint64_t chain;
    int32_t token;
    int32_t position;
    int32_t prev_slot;
    uint32_t step;
    uint32_t owner;
    uint32_t epoch;
};
static_assert(sizeof(Stamp) == 32, "the layout of kvcanary/abi.py");

struct Register {
    uint32_t request_id;
    uint32_t forwards;
    int32_t length;
    int32_t first_length;
    uint32_t is_relative;
    int32_t confirmed;
    uint64_t chain[16];
};
static_assert(sizeof(Register) == 152, "the layout of kvcanary/abi.py");

struct Plane {
    uint64_t base;
    int64_t page_stride;
    int64_t token_stride;
    int64_t chunk_stride;
    int64_t tok_hi_stride;
    uint32_t n_chunks;
    uint32_t chunk_bytes;
    uint32_t load_bytes;
    uint32_t byte_offset;
    uint32_t chunk_magic;
    uint32_t tok_split;
};
static_assert(sizeof(Plane) == 64, "the layout of kvcanary/abi.py");

struct Digest {
    uint32_t first_plane;
    uint32_t n_planes;
    uint32_t n_words;
    uint32_t half;
    uint32_t n_loads;
    uint32_t load_bytes;
};
static_assert(sizeof(Digest) == 24, "the layout of kvcanary/abi.py");

struct FloatPlane {
    Plane plane;
    uint32_t index;
    uint32_t half;
    uint32_t element_bytes;
    uint32_t piece_bytes;
    uint32_t mask;
    uint32_t nonfinite;
};
static_assert(sizeof(FloatPlane) == 88, "the layout of kvcanary/abi.py");

struct Row {
    uint64_t anchor;
    uint64_t last_mix;
    int32_t first_token;
    int32_t n_new;
    int32_t prefix;
    int32_t verify_start;
    int32_t verify_end;
    uint32_t flags;
    uint32_t request_id;
    int32_t request_slot;
    uint32_t share;
    int32_t bad_value;
};
static_assert(sizeof(Row) == 56, "the layout of kvcanary/abi.py");

struct Due {
    uint32_t slot;
    int32_t position;
    int32_t row;
    uint32_t unused;
};
static_assert(sizeof(Due) == 16, "the layout of kvcanary/abi.py");

struct BlockState {
    uint32_t epoch;
    uint32_t owner;
    uint32_t flags;
    uint32_t since;
};
static_assert(sizeof(BlockState) == 16, "the layout of kvcanary/abi.py");

struct PoolState {
    uint32_t head_forward;
    uint32_t tail_forward;
    uint32_t n_aborted;
    uint32_t aborted_floor;
    uint32_t aborted[58];
    uint32_t scrub_turn;
    uint32_t n_fresh;
    uint32_t step;
    uint32_t is_repeated;
};
static_assert(sizeof(PoolState) == 264, "the layout of kvcanary/abi.py");

struct Violation {
    uint64_t commit;
    uint64_t stored_chain;
    uint64_t expected_chain;
    uint64_t stored_digest;
    uint64_t found_digest;
    int64_t slot;
    uint32_t step;
    uint32_t forward;
    uint32_t tag;
    uint32_t reasons;
    int32_t pool;
    int32_t plane;
    int32_t position;
    int32_t row;
    uint32_t request_id;
    int32_t request_slot;
    int32_t stored_token;
    int32_t expected_token;
    int32_t stored_position;
    int32_t prev_slot;
    uint32_t stamp_owner;
    uint32_t stamp_step;
    uint32_t stamp_epoch;
    uint32_t detail;
    uint32_t flags;
    uint32_t block_owner;
    uint32_t block_epoch;
    uint32_t block_since;
    uint32_t block_flags;
    uint32_t unused;
};
static_assert(sizeof(Violation) == 144, "the layout of kvcanary/abi.py");

struct Guard {
    uint64_t state;
    uint64_t kernel_runs;
    uint64_t slot_runs;
    uint64_t data_runs;
    uint64_t scrub_runs;
    uint64_t control;
    uint64_t ring;
    uint64_t ring_capacity;
    uint64_t taint;
    uint64_t pool_states;
};
static_assert(sizeof(Guard) == 80, "the layout of kvcanary/abi.py");

struct Pool {
    int64_t n_slots;
    int64_t lut_length;
    uint64_t slot_lut;
    uint64_t head[2];
    uint64_t tail[2];
    uint64_t claims;
    uint64_t digests;
    uint64_t planes;
    uint64_t digest_units;
    uint64_t registers;
    uint64_t register_claims;
    uint64_t rows;
    uint64_t work;
    uint64_t blocks;
    uint64_t due;
    int32_t page_size;
    int32_t page_shift;
    int32_t n_blocks;
    int32_t window;
    int32_t token_offset;
    uint32_t kind;
    uint32_t index;
    uint32_t n_halves;
    uint32_t n_digests;
    uint32_t n_reserved;
    uint32_t max_requests;
    uint32_t due_capacity;
    uint32_t scrub_blocks;
    int32_t ring_length;
    int32_t ring_bubble;
    int32_t sink;
    uint32_t n_digest_parts;
    uint32_t digest_parts[9];
    int32_t reserved[8];
};
static_assert(sizeof(Pool) == 272, "the layout of kvcanary/abi.py");

struct Batch {
    uint64_t block_table;
    int64_t table_stride;
    uint64_t kv_indptr;
    uint64_t seq_lens;
    uint64_t query_start_loc;
    uint64_t kv_last_page_len;
    uint64_t input_ids;
    uint64_t slot_mapping;
    uint64_t request_slots;
    uint64_t request_ids;
    uint64_t salts;
    uint64_t prefix_chain;
    uint64_t token_history;
    int64_t history_length;
    uint64_t expected_tokens;
    uint64_t pending;
    uint64_t verify_all;
    int32_t rows;
    int32_t n_tokens;
    uint32_t table_kind;
    int32_t table_width;
    int32_t table_page;
    uint32_t table_limit;
    int32_t table_shift;
    uint32_t wide_ids;
    uint32_t wide_slots;
    uint32_t check_write_position;
    uint32_t adopt;
    uint32_t verify_data_every;
    uint32_t full_verify_min_tokens;
    uint32_t is_first_forward;
};
static_assert(sizeof(Batch) == 192, "the layout of kvcanary/abi.py");

struct BeginParams {
    Guard guard;
    Pool pool;
    Batch batch;
    uint32_t is_first_pool;
    uint32_t unused;
};
static_assert(sizeof(BeginParams) == 552, "the layout of kvcanary/abi.py");

struct StepParams {
    Guard guard;
    Pool pool;
    Batch batch;
};
static_assert(sizeof(StepParams) == 544, "the layout of kvcanary/abi.py");

struct LayerParams {
    Guard guard;
    Pool pool;
    Batch batch;
    uint32_t n_digests;
    uint32_t digests[15];
};
static_assert(sizeof(LayerParams) == 608, "the layout of kvcanary/abi.py");

struct SweepParams {
    Guard guard;
    Pool pool;
    uint64_t slots;
    uint64_t positions;
    uint64_t predecessors;
    uint64_t tokens;
    int64_t n;
};
static_assert(sizeof(SweepParams) == 392, "the layout of kvcanary/abi.py");

struct ReservedParams {
    Guard guard;
    Pool pool;
    uint64_t planes;
    uint32_t n_planes;
    uint32_t every;
};
static_assert(sizeof(ReservedParams) == 368, "the layout of kvcanary/abi.py");

struct LifecycleParams {
    uint64_t state;
    uint64_t blocks;
    uint32_t n_blocks;
    uint32_t owner;
    uint32_t ends[6];
    int32_t ids[1000];
};
static_assert(sizeof(LifecycleParams) == 4048, "the layout of kvcanary/abi.py");

struct RenumberParams {
    Guard guard;
    Pool pool;
    uint32_t n_pools;
    uint32_t unused;
};
static_assert(sizeof(RenumberParams) == 360, "the layout of kvcanary/abi.py");

struct MoveParams {
    Guard guard;
    Pool pool;
    uint64_t slots;
    uint64_t positions;
    uint64_t tokens;
    uint64_t chains;
    uint64_t stamps;
    uint64_t digests;
    uint64_t row_starts;
    uint64_t request_slots;
    uint64_t prefix_lens;
    int64_t n;
    int32_t n_rows;
    int32_t per_entry;
    uint32_t wide;
    uint32_t drops_digests;
};
static_assert(sizeof(MoveParams) == 448, "the layout of kvcanary/abi.py");
