"""What crosses to the device: structures, constants and their C twin.

This module is the only truth; ``kernels/abi.cuh`` is its rendering by :func:`c_header` (a test compares the two;
``python -m kvcanary.abi > kernels/abi.cuh`` renders it anew). All structures are C-aligned, little-endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcanary.tags import N_TAGS, CanaryLaunchTag, Detail, Reason, Stage

# ---- constants of the chain and the digest (kvcanary/hashing.py has the formulas) ------------------------------------
MIX_1 = 0xBF58476D1CE4E5B9  # splitmix64's finalizer
MIX_2 = 0x94D049BB133111EB
MIX_1_INVERSE = pow(MIX_1, -1, 1 << 64)
MIX_2_INVERSE = pow(MIX_2, -1, 1 << 64)
CHAIN_P = 0xD1342543DE82EF95
CHAIN_P_INVERSE = pow(CHAIN_P, -1, 1 << 64)
CHAIN_ANCHOR = 0xC0FFEE
DIGEST_SEED = 0x9E3779B97F4A7C15
DIGEST_R = 0x5851F42D4C957F2D
DIGEST_C0 = 0xA0761D6478BD642F
DIGEST_C1 = 0xE7037ED1A0B428DB
DIGEST_C2 = 0x8EBC6AF09C88C6E3
DIGEST_PERIOD = 128  # words after which the constants repeat, times R
MAX_PLANE_BYTES = 64 * 1024

# ---- sizes -----------------------------------------------------------------------------------------------------------
THREADS = 256  # of every kernel
WARPS = THREADS // 32
VERIFY_UNIT = 64  # consecutive positions of a row whose stamps a warp verifies at once: what warps share out
DATA_UNIT = 16  # slots that fall due, about, in a unit of kvc_digests_verify
MAX_DIGEST_PARTS = 8  # of a pool's digests, for blocks to work on side by side
LIST_MIN_EVERY = 8  # verify_data_every from which on the slots that fall due are listed
WRITE_TILE = 1024  # consecutive new tokens of a long row that a block stamps; 256 of a short one
SHORT_ROW = 16384  # new tokens
TAIL_CHUNK = 32  # consecutive new tokens of one request that a warp finishes
SHARE_RUN = 16  # slots of a physical run that fall due together
N_REGISTER_LENGTHS = 16  # lengths whose chain a register keeps
N_ABORTED = 58  # forwards without TAIL that a pool remembers
MAX_RESERVED = 8  # reserved blocks of a pool
MAX_SINK = 128  # tokens of a sink
PREV_NONE = -1  # stamp.prev_slot: there is no predecessor, or it is not known where it is
# A chain is relative where nobody knew the chain at its row's prefix (the predecessor was adopted, never written, being
# written in the same forward): it says nothing beyond the slots that continue it. Its stamps have these prev_slots:
PREV_RELATIVE = -2  # the first of them: it continues no stamp
PREV_RELATIVE_BASE = -3  # the others: PREV_RELATIVE_BASE - slot of the stamp that it continues
PREV_IN_LIST = 0  # in an image of moved slots, this in place of a slot: the previous entry of the list
PREFIX_CACHE = 0xFFFFFFFF  # an owner of blocks without rows: as a row's request (-1, where ids are signed) it is nobody
# Lower half of a claim word: token index + 1 of a write (at most 2^30), or from 2^31 on an adoption, or this:
CLAIM_FRESH = 0x7FFFFFFF  # moved here or adopted, and its bytes were not verified since

# ---- table kinds -----------------------------------------------------------------------------------------------------
TABLE_DENSE = 0  # block_table[row, position / table_page]
TABLE_CSR = 1  # block_table[kv_indptr[row] + position / table_page]
TABLE_STATIC = 2  # block = row

# ---- row flags -------------------------------------------------------------------------------------------------------
ROW_LIVE = 1  # has a real slot among its new tokens, or none but is judged; clear = padding
ROW_ANCHORED = 2  # the chain at the prefix is known from outside the cache
ROW_FULL_DATA = 4  # the whole prefix is digested at HEAD
ROW_PENDING = 8  # KV still being loaded: no data is judged at HEAD
ROW_REGISTERED = 16  # continues the register of its request slot
ROW_OWNS_REGISTER = 32  # writes the register of its request slot
ROW_BAD_QUERY = 64  # query_start_loc is not inside the batch
ROW_BAD_LENGTH = 128  # seq_len goes beyond the table row
ROW_BAD_REQUEST_SLOT = 256
ROW_RELATIVE = 512  # its chain is relative
ROW_KNOWS_LAST = 1024  # the register knows the token before its new ones: last_mix
ROW_BAD_TABLE = 2048  # the length is to come from kv_indptr, which is not inside kv_indices

# ---- work lists: prefix sums over the rows of a batch ----------------------------------------------------------------
WORK_VERIFY = 0  # units of prefix positions
WORK_WRITE = 1  # tiles of new tokens, of rows with more than 32
WORK_TAIL = 2  # chunks of new tokens
WORK_DATA = 3  # units of prefix positions whose bytes may fall due
N_WORK = 4

# ---- block ownership: flags of a BLOCK_STATE, and what kvc_blocks_update does to each part of its list of ids --------
BLOCK_LIVE = 1  # somebody holds it
BLOCK_SHARED = 2  # others than its primary owner hold it, or there is no primary any more
OP_ALLOCATE = 0  # a new epoch, under a primary owner
OP_SHARE = 1  # one holder more, who may only read
OP_LEAVE = 2  # the primary lets go, others still hold it
OP_UNSHARE = 3  # only the primary is left
OP_FREE = 4  # nobody holds it any more
OP_CLAIM = 5  # its only holder is its primary owner from now on
N_BLOCK_OPS = 6
MAX_BLOCK_IDS = 1000  # ids of one launch, passed by value: with the rest, parameters may have 4096 bytes

MAX_LAYER_DIGESTS = 15  # of one launch of kvc_digests_layer

# ---- device state: one flat u64 array, header words first ------------------------------------------------------------
STATE_FORWARD = 0  # number of the forward in progress, or of the last one; a move before the first one makes it 1
STATE_FORWARD_DONE = 1  # the same, published after every block of kvc_begin has read it
STATE_STEP = 2  # first forwards begun = outer steps seen by the device
STATE_STEP_DONE = 3
STATE_JUDGING = 4  # 0 while paused; latched by kvc_begin for the whole forward
STATE_PAUSE = 5  # written by pause() and resume()
STATE_CLAIMED = 6  # violation records claimed
STATE_DROPPED = 7  # violations that found the ring full
STATE_OBSERVATIONS = 8  # claimed + dropped
STATE_UNJUDGED_SLOTS = 9  # prefix slots left by a forward that never reached TAIL: data and TAIL not judged
STATE_UNANCHORED_ROWS = 10  # rows with a prefix whose chain nobody outside the cache knows
STATE_DATA_SLOTS = 11  # (slot, digest) pairs compared
STATE_ADOPTED_SLOTS = 12
STATE_FORWARDS_JUDGED = 13  # forwards begun while not paused
STATE_UNOWNED_WRITES = 14  # new tokens written to blocks that nobody owned (lifecycle)
STATE_SKIPPED_MOVES = 15  # entries of moves that named no slot, or one that could not be refreshed
STATE_SCRUB_SLOTS = 16  # written slots that the patrol has checked
STATE_SCRUB_ORPHANS = 17  # written slots that it passed over, because nobody holds their block
STATE_RESERVED_CHECKS = 18  # (plane, reserved block) pairs that were looked through for NaN and Inf
STATE_FORWARD_BASE = 19  # what was taken off the number of the forward by renumbering; their sum is how many there were
N_STATE_WORDS = 24

# ---- numbers of forwards: 32 bits in stamps, so that they are moved down now and then (kernels/renumber.cu) ----------
RENUMBER_AT = 1 << 31  # from this number on, kvc_begin asks for it
RENUMBER_KEEP = 1 << 30  # forwards whose numbers keep their order
LAST_FORWARD = (1 << 32) - 2  # if nobody answers: this number stays, and nothing is judged any more

# ---- mapped control block, u64 words, each on a cache line of its own ------------------------------------------------
CONTROL_ALARM = 0  # device -> host: some record was committed (a hint)
CONTROL_RENUMBER = 1  # device -> host: not 0 while the numbers of forwards are to be moved down
CONTROL_READ = 8  # host -> device: records read so far
N_CONTROL_WORDS = 16

STAMP = np.dtype(
    [
        ("chain", "<u8"),
        ("token", "<i4"),
        ("position", "<i4"),
        ("prev_slot", "<i4"),
        ("step", "<u4"),
        ("owner", "<u4"),
        ("epoch", "<u4"),
    ]
)
REGISTER = np.dtype(
    [
        ("request_id", "<u4"),
        ("forwards", "<u4"),
        ("length", "<i4"),
        ("first_length", "<i4"),
        ("is_relative", "<u4"),
        ("confirmed", "<i4"),  # tokens that the engine knew before the forward: what lies behind may be drafts
        ("chain", "<u8", (N_REGISTER_LENGTHS,)),
    ]
)
PLANE = np.dtype(
    [
        ("base", "<u8"),
        ("page_stride", "<i8"),
        ("token_stride", "<i8"),
        ("chunk_stride", "<i8"),
        ("tok_hi_stride", "<i8"),
        ("n_chunks", "<u4"),
        ("chunk_bytes", "<u4"),
        ("load_bytes", "<u4"),
        ("byte_offset", "<u4"),
        ("chunk_magic", "<u4"),  # load l lies in chunk l * magic >> 32, or, if 0, in chunk l
        ("tok_split", "<u4"),  # token t lies at t / split * tok_hi_stride + t % split * token_stride; 0 = not split
    ]
)
DIGEST = np.dtype(
    [
        ("first_plane", "<u4"),
        ("n_planes", "<u4"),
        ("n_words", "<u4"),
        ("half", "<u4"),
        ("n_loads", "<u4"),  # of a slot, of load_bytes each; 0 = planes that need the general way
        ("load_bytes", "<u4"),  # 8 or 16
    ]
)
FLOAT_PLANE = np.dtype(
    [
        ("plane", PLANE),  # all its bytes
        ("index", "<u4"),  # in KvPool.ordered_planes
        ("half", "<u4"),
        ("element_bytes", "<u4"),
        ("piece_bytes", "<u4"),  # whole loads and whole elements: the larger of the two
        ("mask", "<u4"),
        ("nonfinite", "<u4"),  # an element is NaN or Inf if these are its bits under the mask
    ]
)
ROW = np.dtype(
    [
        ("anchor", "<u8"),
        ("last_mix", "<u8"),  # token_mix of position prefix - 1
        ("first_token", "<i4"),
        ("n_new", "<i4"),
        ("prefix", "<i4"),
        ("verify_start", "<i4"),
        ("verify_end", "<i4"),
        ("flags", "<u4"),
        ("request_id", "<u4"),
        ("request_slot", "<i4"),
        ("share", "<u4"),
        ("bad_value", "<i4"),
    ]
)
DUE = np.dtype([("slot", "<u4"), ("position", "<i4"), ("row", "<i4"), ("unused", "<u4")])
BLOCK_STATE = np.dtype(
    [
        ("epoch", "<u4"),  # allocations so far; 0 = never allocated
        ("owner", "<u4"),  # primary: who allocated it and still holds it; 0 = none
        ("flags", "<u4"),  # BLOCK_*
        ("since", "<u4"),  # the last forward begun when it got this owner, or none
    ]
)
POOL_STATE = np.dtype(
    [
        ("head_forward", "<u4"),
        ("tail_forward", "<u4"),
        ("n_aborted", "<u4"),
        ("aborted_floor", "<u4"),
        ("aborted", "<u4", (N_ABORTED,)),
        ("scrub_turn", "<u4"),  # turns of the patrol begun; the first is 1
        ("n_fresh", "<u4"),  # slots whose claim word says CLAIM_FRESH
        ("step", "<u4"),  # the newest in which the pool ran
        ("is_repeated", "<u4"),  # its newest forward was not the first of that step: one of drafts, perhaps
    ]
)
VIOLATION = np.dtype(
    [
        ("commit", "<u8"),
        ("stored_chain", "<u8"),
        ("expected_chain", "<u8"),
        ("stored_digest", "<u8"),
        ("found_digest", "<u8"),
        ("slot", "<i8"),
        ("step", "<u4"),
        ("forward", "<u4"),
        ("tag", "<u4"),
        ("reasons", "<u4"),
        ("pool", "<i4"),
        ("plane", "<i4"),
        ("position", "<i4"),
        ("row", "<i4"),
        ("request_id", "<u4"),
        ("request_slot", "<i4"),
        ("stored_token", "<i4"),
        ("expected_token", "<i4"),
        ("stored_position", "<i4"),
        ("prev_slot", "<i4"),
        ("stamp_owner", "<u4"),
        ("stamp_step", "<u4"),
        ("stamp_epoch", "<u4"),
        ("detail", "<u4"),
        ("flags", "<u4"),
        ("block_owner", "<u4"),  # the BLOCK_STATE of the slot's block; all 0 without lifecycle
        ("block_epoch", "<u4"),
        ("block_since", "<u4"),
        ("block_flags", "<u4"),
        ("unused", "<u4"),
    ]
)
NO_TOKEN = -1  # stored_token / expected_token: not known or not judged

# By-value kernel parameters. Pointers are "<u8"; a null pointer means that the input is not given.
GUARD = np.dtype(
    [
        ("state", "<u8"),  # u64[N_STATE_WORDS + counters]
        ("kernel_runs", "<u8"),  # u64[pools, N_TAGS]
        ("slot_runs", "<u8"),  # u64[pools, N_TAGS]
        ("data_runs", "<u8"),  # u64[pools, 3]
        ("scrub_runs", "<u8"),  # u64[pools]
        ("control", "<u8"),  # u64[N_CONTROL_WORDS], mapped
        ("ring", "<u8"),  # VIOLATION[ring_capacity + 1], mapped; record 0 has place 0
        ("ring_capacity", "<u8"),
        ("taint", "<u8"),  # u32[max_requests]
        ("pool_states", "<u8"),  # POOL_STATE[pools]
    ]
)
POOL = np.dtype(
    [
        ("n_slots", "<i8"),
        ("lut_length", "<i8"),
        ("slot_lut", "<u8"),  # i64[lut_length] or null
        ("head", "<u8", (2,)),  # STAMP[n_slots] for K and V; V null without a V half
        ("tail", "<u8", (2,)),
        ("claims", "<u8"),  # u64[n_slots]: forward << 32 | index + 1
        ("digests", "<u8"),  # u64[n_digests, n_slots]
        ("planes", "<u8"),  # PLANE[n_planes]
        ("digest_units", "<u8"),  # DIGEST[n_digests]
        ("registers", "<u8"),  # REGISTER[max_requests]
        ("register_claims", "<u8"),  # u64[max_requests]: forward << 32 | row + 1
        ("rows", "<u8"),  # ROW[max_requests]
        ("work", "<u8"),  # i64[4, max_requests + 1]: what lies before each row, see WORK_*
        ("blocks", "<u8"),  # BLOCK_STATE[n_blocks]; null: block ownership is not judged
        ("due", "<u8"),  # DUE[due_capacity + 1], entry 0 counts; null: none are listed
        ("page_size", "<i4"),
        ("page_shift", "<i4"),  # log2 of page_size; negative = not a power of two
        ("n_blocks", "<i4"),
        ("window", "<i4"),  # 0 = none
        ("token_offset", "<i4"),
        ("kind", "<u4"),
        ("index", "<u4"),
        ("n_halves", "<u4"),
        ("n_digests", "<u4"),
        ("n_reserved", "<u4"),
        ("max_requests", "<u4"),
        ("due_capacity", "<u4"),
        ("scrub_blocks", "<u4"),  # of a turn of the patrol; 0 = none
        ("ring_length", "<i4"),  # 0 = none, see `place_of` in backends/reference_slots.py
        ("ring_bubble", "<i4"),
        ("sink", "<i4"),
        ("n_digest_parts", "<u4"),
        ("digest_parts", "<u4", (MAX_DIGEST_PARTS + 1,)),  # part i is of digests [digest_parts[i], digest_parts[i + 1])
        ("reserved", "<i4", (MAX_RESERVED,)),  # first slot of each reserved block
    ]
)
BATCH = np.dtype(
    [
        ("block_table", "<u8"),
        ("table_stride", "<i8"),  # entries between two rows
        ("kv_indptr", "<u8"),
        ("seq_lens", "<u8"),
        ("query_start_loc", "<u8"),
        ("kv_last_page_len", "<u8"),
        ("input_ids", "<u8"),
        ("slot_mapping", "<u8"),
        ("request_slots", "<u8"),
        ("request_ids", "<u8"),
        ("salts", "<u8"),
        ("prefix_chain", "<u8"),
        ("token_history", "<u8"),
        ("history_length", "<i8"),
        ("expected_tokens", "<u8"),
        ("pending", "<u8"),
        ("verify_all", "<u8"),
        ("rows", "<i4"),
        ("n_tokens", "<i4"),
        ("table_kind", "<u4"),
        ("table_width", "<i4"),  # entries of a dense row, or of all CSR rows together
        ("table_page", "<i4"),  # positions per entry
        ("table_limit", "<u4"),  # entries below it are in the pool or the slot_lut
        ("table_shift", "<i4"),  # log2 of table_page; negative = not a power of two
        ("wide_ids", "<u4"),  # input_ids and expected_tokens are i64
        ("wide_slots", "<u4"),  # slot_mapping is i64
        ("check_write_position", "<u4"),
        ("adopt", "<u4"),
        ("verify_data_every", "<u4"),
        ("full_verify_min_tokens", "<u4"),
        ("is_first_forward", "<u4"),
    ]
)
PARAMS: dict[str, np.dtype[Any]] = {
    "BeginParams": np.dtype(
        [("guard", GUARD), ("pool", POOL), ("batch", BATCH), ("is_first_pool", "<u4"), ("unused", "<u4")]
    ),
    "StepParams": np.dtype([("guard", GUARD), ("pool", POOL), ("batch", BATCH)]),
    "LayerParams": np.dtype(
        [
            ("guard", GUARD),
            ("pool", POOL),
            ("batch", BATCH),
            ("n_digests", "<u4"),
            ("digests", "<u4", (MAX_LAYER_DIGESTS,)),  # indices of the layer's
        ]
    ),
    "SweepParams": np.dtype(
        [
            ("guard", GUARD),
            ("pool", POOL),
            ("slots", "<u8"),  # i32[n]
            ("positions", "<u8"),  # i32[n]
            ("predecessors", "<u8"),  # i32[n], -1 = none
            ("tokens", "<u8"),  # i32[n] or null
            ("n", "<i8"),
        ]
    ),
    "ReservedParams": np.dtype(
        [
            ("guard", GUARD),
            ("pool", POOL),
            ("planes", "<u8"),  # FLOAT_PLANE[n_planes]
            ("n_planes", "<u4"),
            ("every", "<u4"),  # steps
        ]
    ),
    "LifecycleParams": np.dtype(
        [
            ("state", "<u8"),  # GUARD.state
            ("blocks", "<u8"),  # BLOCK_STATE[n_blocks]
            ("n_blocks", "<u4"),
            ("owner", "<u4"),
            ("ends", "<u4", (N_BLOCK_OPS,)),  # op o is done to ids[ends[o - 1]] up to ids[ends[o]]
            ("ids", "<i4", (MAX_BLOCK_IDS,)),
        ]
    ),
    "RenumberParams": np.dtype([("guard", GUARD), ("pool", POOL), ("n_pools", "<u4"), ("unused", "<u4")]),
    # Lists are i32, or all of them i64 (wide); entry i of n is slot i % per_entry of slots[i / per_entry].
    "MoveParams": np.dtype(
        [
            ("guard", GUARD),
            ("pool", POOL),
            ("slots", "<u8"),
            ("positions", "<u8"),
            ("tokens", "<u8"),  # negative = unknown; or null
            ("chains", "<u8"),  # u64[n], 0 = unknown; or null
            ("stamps", "<u8"),  # the image: STAMP[2 * n_halves, n], HEAD of each half, then TAIL; see PREV_IN_LIST
            ("digests", "<u8"),  # u64[n_digests, n] of it
            ("row_starts", "<u8"),  # rows of a commit: entries row_starts[r] to row_starts[r + 1]
            ("request_slots", "<u8"),  # negative = none
            ("prefix_lens", "<u8"),  # positions before the row's first entry
            ("n", "<i8"),
            ("n_rows", "<i4"),
            ("per_entry", "<i4"),
            ("wide", "<u4"),
            ("drops_digests", "<u4"),  # kvc_moves_localize: the digests did not come along
        ]
    ),
}

_STRUCTS: dict[str, np.dtype[Any]] = {
    "Stamp": STAMP,
    "Register": REGISTER,
    "Plane": PLANE,
    "Digest": DIGEST,
    "FloatPlane": FLOAT_PLANE,
    "Row": ROW,
    "Due": DUE,
    "BlockState": BLOCK_STATE,
    "PoolState": POOL_STATE,
    "Violation": VIOLATION,
    "Guard": GUARD,
    "Pool": POOL,
    "Batch": BATCH,
    **PARAMS,
}
_U64_CONSTANTS = tuple(n for n in globals() if n.startswith(("MIX_", "CHAIN_", "DIGEST_")))
_INT_PREFIXES = (
    "CLAIM_",
    "TABLE_",
    "WORK_",
    "ROW_",
    "BLOCK_",
    "OP_",
    "STATE_",
    "CONTROL_",
    "PREV_",
    "N_",
    "MAX_RESERVED",
    "MAX_BLOCK_IDS",
    "MAX_LAYER_DIGESTS",
    "NO_TOKEN",
)
_INT_NAMES = (
    "SHARE_RUN",
    "PREFIX_CACHE",
    "THREADS",
    "WARPS",
    "VERIFY_UNIT",
    "DATA_UNIT",
    "LIST_MIN_EVERY",
    "WRITE_TILE",
    "SHORT_ROW",
    "TAIL_CHUNK",
    "RENUMBER_AT",
    "RENUMBER_KEEP",
    "LAST_FORWARD",
)
_C_TYPES = {"<u8": "uint64_t", "<i8": "int64_t", "<u4": "uint32_t", "<i4": "int32_t"}


def zeros_of(dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """One zeroed structure, as a 0-d array whose fields can be assigned and whose ``[()]`` is the by-value scalar."""
    return np.zeros((), dtype)


def due_capacity(n_slots: int, n_digests: int, verify_data_every: int) -> int:
    """Entries of a pool's list of slots that fall due, 0 = no list: twice what falls due of a pool in full use."""
    if n_digests == 0 or verify_data_every < LIST_MIN_EVERY:
        return 0
    return 2 * n_slots // verify_data_every + 1024


def log2_or_negative(n: int) -> int:
    """The shift that divides by ``n``; -1 if ``n`` is not a power of two."""
    return n.bit_length() - 1 if n & (n - 1) == 0 else -1


def c_header() -> str:
    """Render ``kernels/abi.cuh``."""
    out = [
        "// abi.cuh: the C twin of kvcanary/abi.py, rendered by it: python -m kvcanary.abi > kernels/abi.cuh",
        "#pragma once",
        '#include "device.cuh"',
        "",
    ]
    names = globals()
    for name in _U64_CONSTANTS:
        if name == "DIGEST_PERIOD":
            continue
        out.append(f"#define KVC_{name} 0x{names[name]:016X}ull")
    ints = [n for n in names if (n.startswith(_INT_PREFIXES) and isinstance(names[n], int)) or n in _INT_NAMES]
    for name in dict.fromkeys([*ints, "DIGEST_PERIOD"]):
        value = names[name]
        out.append(f"#define KVC_{name} {f'({value})' if value < 0 else value}")
    for enum, prefix in ((Stage, "STAGE"), (Reason, "REASON"), (Detail, "DETAIL")):
        out.extend(f"#define KVC_{prefix}_{m.name} {m.value}u" for m in enum)
    assert len(CanaryLaunchTag) == N_TAGS
    for name, dtype in _STRUCTS.items():
        out.extend(["", *_render(name, dtype)])
    return "\n".join(out) + "\n"


def _render(name: str, dtype: np.dtype[Any]) -> list[str]:
    assert dtype.fields is not None
    align = "alignas(32) " if name == "Stamp" else ""
    lines = [f"struct {align}{name} {{"]
    for field, (sub, *_rest) in dtype.fields.items():
        base, shape = (sub.subdtype[0], sub.subdtype[1]) if sub.subdtype else (sub, ())
        c_type = next((s for s, d in _STRUCTS.items() if d == base), None) or _C_TYPES[base.str]
        lines.append(f"    {c_type} {field}{''.join(f'[{n}]' for n in shape)};")
    lines.append("};")
    lines.append(f'static_assert(sizeof({name}) == {dtype.itemsize}, "the layout of kvcanary/abi.py");')
    return lines


if __name__ == "__main__":
    print(c_header(), end="")
