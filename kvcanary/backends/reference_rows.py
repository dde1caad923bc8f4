"""Facts of the rows of a batch, in NumPy: their tokens, claims, registers, and where their chains come from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcanary import abi, hashing
from kvcanary.backends.reference_arrays import Array, BatchArrays, PoolArrays
from kvcanary.backends.reference_slots import EMPTY, OK, is_inside, n_places, table_entries, table_slots, write_slots
from kvcanary.backends.reference_stamps import is_fresh, is_outlived, is_relative

MAX_POSITIONS = (1 << 31) - 1  # of a row: positions are 32-bit everywhere


def find_rows(pool: PoolArrays, batch: BatchArrays, forward: int) -> Array:
    """Facts of each row of the batch, its anchor and its claims: ROW[rows] (kvc_begin)."""
    out = np.zeros(batch.rows, abi.ROW)
    for r in range(batch.rows):
        out[r] = _find_row(pool, batch, r, forward)
    return out


def _find_row(pool: PoolArrays, batch: BatchArrays, r: int, forward: int) -> Array:
    row = abi.zeros_of(abi.ROW)
    row["request_slot"] = batch.request_slots[r] if batch.request_slots is not None else -1
    row["request_id"] = batch.request_id(r)
    q0, q1 = int(batch.query_start_loc[r]), int(batch.query_start_loc[r + 1])
    if q0 < 0 or q1 < q0 or q1 > batch.n_tokens:
        row["flags"], row["bad_value"] = abi.ROW_BAD_QUERY, q1
        return row
    if batch.seq_lens is None and batch.kv_indptr is not None:
        begin, end = (int(n) for n in batch.kv_indptr[r : r + 2])
        if not is_inside(begin, end, batch.table_width):
            if (write_slots(pool, batch, np.arange(q0, q1)).status != EMPTY).any():  # else it is padding
                row["flags"], row["bad_value"] = abi.ROW_BAD_TABLE, end
            return row
    entries = int(table_entries(batch, np.array([r]))[0])
    length = min(row_length(batch, r), MAX_POSITIONS)
    if q1 - q0 > length:
        return row  # padding
    if q1 > q0 and (np.diff(batch.query_start_loc[: r + 1].astype(np.int64)) < 0).any():
        row["flags"], row["bad_value"] = abi.ROW_BAD_QUERY, q1  # its tokens may be an earlier row's too
        return row
    prefix, capacity = length - (q1 - q0), entries * batch.table_page
    fits = n_places(pool, length) <= capacity
    end = prefix if fits else min(prefix, capacity)
    row["first_token"], row["n_new"], row["prefix"] = q0, q1 - q0, prefix
    row["verify_end"] = end
    row["verify_start"] = min(verify_start(pool, prefix, length), end)
    flags = 0
    if not fits:
        flags, row["bad_value"] = abi.ROW_BAD_LENGTH, length
    if claim_slots(pool, batch, np.arange(q0, q1), forward):
        flags |= abi.ROW_LIVE
        flags = _identify_row(pool, batch, r, row, flags, forward)
    row["flags"] = flags
    return row


def verify_start(pool: PoolArrays, prefix: int, length: int) -> int:
    """The first position that is verified, beside those of the sink; 0 where there is nothing between it and them."""
    start = prefix - pool.window + 1 if pool.window else 0
    if pool.ring_length:
        start = max(start, length - pool.ring_length)
    return start if min(start, prefix) > pool.sink else 0


def row_length(batch: BatchArrays, r: int) -> int:
    """Tokens of a row after this forward, from ``seq_lens`` or the CSR table."""
    if batch.seq_lens is not None:
        return int(batch.seq_lens[r])
    assert batch.kv_last_page_len is not None
    entries = int(table_entries(batch, np.array([r]))[0])
    return (entries - 1) * batch.table_page + int(batch.kv_last_page_len[r]) if entries else 0


def claim_slots(pool: PoolArrays, batch: BatchArrays, tokens: Array, forward: int) -> bool:
    """Claim the slots of new tokens, the highest token index wins; returns whether any of them is a real slot."""
    target = write_slots(pool, batch, tokens)
    ok = target.status == OK
    claim = np.uint64(forward << 32) | (tokens[ok] + 1).astype(np.uint64)
    if pool.state["n_fresh"]:  # a slot that is written is not fresh any more
        pool.state["n_fresh"] -= np.uint32(is_fresh(pool, np.unique(target.slot[ok])).sum())
    np.maximum.at(pool.claims, target.slot[ok], claim)
    return bool((target.status != EMPTY).any())


def _identify_row(pool: PoolArrays, batch: BatchArrays, r: int, row: Array, flags: int, forward: int) -> int:
    if row["request_slot"] >= pool.max_requests:
        flags |= abi.ROW_BAD_REQUEST_SLOT
        row["bad_value"] = row["request_slot"]
    if row["request_slot"] < 0 or flags & abi.ROW_BAD_REQUEST_SLOT:
        row["request_slot"] = -1
    has_register = bool(row["request_id"]) and row["request_slot"] >= 0
    row["share"] = 0 if has_register else forward
    flags |= anchor_row(pool, batch, r, row)
    row["share"] %= batch.verify_data_every
    is_first = has_register and not flags & abi.ROW_REGISTERED
    is_asked = batch.verify_all is not None and bool(batch.verify_all[r])
    if is_first or is_asked or row["n_new"] > batch.full_verify_min_tokens:
        flags |= abi.ROW_FULL_DATA
    if batch.pending is not None and batch.pending[r]:
        flags |= abi.ROW_PENDING
    if has_register:
        claim = np.uint64(forward << 32 | r + 1)
        slot = int(row["request_slot"])
        pool.register_claims[slot] = max(pool.register_claims[slot], claim)
    return flags


def expand(counts: Array) -> tuple[Array, Array]:
    """(group, index within the group) of each of ``counts`` members."""
    group = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    return group, index


# ---- registers and anchors -------------------------------------------------------------------------------------------
def forget_elsewhere(pool: PoolArrays, request_id: int, forward: int) -> None:
    """A request that begins a register leaves those that no row of this forward claims: they are out of date.

    It was preempted and resumes in another slot; when it comes back to the first, its text has gone on.
    """
    is_claimed = pool.register_claims >> np.uint64(32) == forward
    pool.registers["request_id"][~is_claimed & (pool.registers["request_id"] == request_id)] = 0


def is_register_outdated(pool: PoolArrays, batch: BatchArrays, r: int, reg: Array, prefix: int) -> bool:
    """Whether a register has another chain at the prefix than the slot before it, at a length that drafts may have had.

    The text has gone on elsewhere, and its KV came back.
    """
    if prefix <= reg["confirmed"] or reg["is_relative"]:
        return False
    at = table_slots(pool, batch, np.array([r]), np.array([prefix - 1]))
    stamp = pool.head[0][at.slot]
    is_there = (at.status == OK) & (stamp["step"] != 0) & (stamp["token"] != abi.NO_TOKEN)
    is_there &= ~is_outlived(pool, np.maximum(at.slot, 0), stamp)
    return bool((is_there & (stamp["chain"] != reg["chain"][prefix % abi.N_REGISTER_LENGTHS]))[0])


def anchor_row(pool: PoolArrays, batch: BatchArrays, r: int, row: Array) -> int:
    """Set the row's ``anchor`` (from the best source there is) and ``share``; returns flags."""
    salt = int(batch.salts[r]) if batch.salts is not None else 0
    prefix, slot = int(row["prefix"]), int(row["request_slot"])
    row["anchor"] = hashing.mix64_int(abi.CHAIN_ANCHOR ^ salt)
    if prefix == 0:
        return abi.ROW_ANCHORED
    if row["request_id"] and slot >= 0:
        reg = pool.registers[slot]
        oldest = max(int(reg["first_length"]), int(reg["length"]) - abi.N_REGISTER_LENGTHS + 1)
        is_known = reg["request_id"] == row["request_id"] and oldest <= prefix <= int(reg["length"])
        if is_known and not is_register_outdated(pool, batch, r, reg, prefix):
            row["anchor"] = reg["chain"][prefix % abi.N_REGISTER_LENGTHS]
            row["share"] = reg["forwards"]
            flags = abi.ROW_ANCHORED | abi.ROW_REGISTERED | (abi.ROW_RELATIVE if reg["is_relative"] else 0)
            if prefix - 1 >= oldest:
                one_less = int(reg["chain"][(prefix - 1) % abi.N_REGISTER_LENGTHS])
                row["last_mix"] = (int(row["anchor"]) - one_less * abi.CHAIN_P) % (1 << 64)
                flags |= abi.ROW_KNOWS_LAST
            return flags
    if batch.prefix_chain is not None and batch.prefix_chain[r]:
        row["anchor"] = batch.prefix_chain[r]
        return abi.ROW_ANCHORED
    if batch.token_history is not None and slot >= 0:
        history = batch.token_history[slot, max(pool.token_offset, 0) : pool.token_offset + prefix]
        if pool.token_offset >= 0 and len(history) == prefix and (history >= 0).all():
            row["anchor"] = hashing.chain_scan(int(row["anchor"]), history, 0)[-1]
            return abi.ROW_ANCHORED
    before = table_slots(pool, batch, np.array([r]), np.array([prefix - 1]))
    stamp = pool.head[0][before.slot]
    is_needed = prefix > row["verify_start"]  # before a window, it may be another's by now
    if before.status[0] == OK and is_needed and stamp["step"][0] and not is_outlived(pool, before.slot, stamp)[0]:
        row["anchor"] = stamp["chain"][0]
        if stamp["token"][0] != abi.NO_TOKEN and not is_relative(stamp)[0]:
            return 0
    return abi.ROW_RELATIVE


def keep_in_register(pool: PoolArrays, row: Array, r: int, chain: Array, relative: bool, forward: int) -> None:
    """The chains after row ``r``'s new tokens, u64[n_new], into its request slot's register, if that is its own."""
    slot = int(row["request_slot"])
    if not row["request_id"] or slot < 0 or pool.register_claims[slot] != np.uint64(forward << 32 | r + 1):
        return
    reg, n, prefix = pool.registers[slot], abi.N_REGISTER_LENGTHS, int(row["prefix"])
    continues = bool(row["flags"] & abi.ROW_REGISTERED)
    if not continues and reg["request_id"] != row["request_id"]:
        forget_elsewhere(pool, int(row["request_id"]), forward)
    oldest = int(reg["length"]) - n + 1
    if len(chain) < n:
        reg["chain"][prefix % n] = row["anchor"]
    last = np.arange(max(0, len(chain) - n), len(chain))
    reg["chain"][(prefix + last + 1) % n] = chain[last]
    # A start that came out of the cache is nothing to hold a later forward against.
    first = prefix if row["flags"] & abi.ROW_ANCHORED else prefix + 1
    # All new tokens of a first forward or of a long chunk, else the first of them: the others may be drafts, and in
    # a further forward of the step all of them may be.
    is_known = not continues or len(chain) > n
    known = min(int(reg["confirmed"]), prefix) if continues else prefix
    reg["confirmed"] = known if pool.state["is_repeated"] else prefix + (len(chain) if is_known else 1)
    reg["first_length"] = max(oldest, int(reg["first_length"])) if continues else first
    reg["forwards"] = reg["forwards"] + 1 if continues else 1
    reg["is_relative"] = relative
    reg["length"], reg["request_id"] = prefix + len(chain), row["request_id"]


# ---- starts of chains ------------------------------------------------------------------------------------------------
class Starts(NamedTuple):
    """Per row: whether its chain is relative (bool[rows]), and prev_slot of the stamp of its first new token."""

    relative: Array
    prev_slot: Array


def starts_of(pool: PoolArrays, batch: BatchArrays, rows: Array, forward: int) -> Starts:
    """Where the chains of rows that bring new tokens come from."""
    index, prefix, flags = np.arange(len(rows)), rows["prefix"].astype(np.int64), rows["flags"]
    before = table_slots(pool, batch, index, prefix - 1)
    is_slot, slot = (prefix > 0) & (before.status == OK), np.maximum(before.slot, 0)
    rewritten = is_slot & (pool.claims[slot] >> np.uint64(32) == forward)
    relative = (flags & abi.ROW_RELATIVE != 0) | ((flags & abi.ROW_ANCHORED == 0) & rewritten)
    relative &= prefix > 0
    stamp = pool.head[0][slot]
    continues = is_slot & ~rewritten & (stamp["step"] != 0) & (stamp["token"] != abi.NO_TOKEN)
    continues &= ~is_outlived(pool, slot, stamp)
    continues &= stamp["chain"] == rows["anchor"]
    # Before a window, the table may still name a block that is another's by now.
    absolute = np.where(is_slot & (prefix > rows["verify_start"]), slot, abi.PREV_NONE)
    return Starts(
        relative,
        np.where(relative, np.where(continues, abi.PREV_RELATIVE_BASE - slot, abi.PREV_RELATIVE), absolute),
    )
