"""The semantics of the guard in NumPy: what the kernels must agree with bit for bit.

Pure functions from the engine's arrays and the guard's arrays to facts and violation records; `host.py` calls them in
the order of a step. Names follow ``kernels/``: each function here is the twin of the device function of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary import abi, hashing
from kvcanary.backends import ownership
from kvcanary.tags import Detail, Reason, Stage

Array: TypeAlias = npt.NDArray[Any]
OK, EMPTY, OUT = 0, 1, 2  # slot status
MAX_POSITIONS = (1 << 31) - 1  # of a row: positions are 32-bit everywhere


@dataclass
class PoolArrays:
    """The guard's arrays of one pool, and what it knows of the pool.

    Attributes:
        head, tail: STAMP[n_slots] per half.
        claims: u64[n_slots]: forward << 32 | token index + 1 of the last winner.
        digests: u64[n_digests, n_slots]; 0 = none.
        registers: REGISTER[max_requests].
        register_claims: u64[max_requests].
        state: one POOL_STATE.
        slot_lut: i64[n] or None.
        blocks: BLOCK_STATE[n_blocks] or None: block ownership is not judged.
        scrub_blocks: blocks of a turn of the patrol; 0 = none.
    """

    index: int
    kind: int
    n_slots: int
    page_size: int
    window: int
    token_offset: int
    reserved: Array
    slot_lut: Array | None
    head: list[Array]
    tail: list[Array]
    claims: Array
    digests: Array
    registers: Array
    register_claims: Array
    state: Array
    max_requests: int
    blocks: Array | None = None
    scrub_blocks: int = 0
    ring_length: int = 0
    ring_bubble: int = 0
    sink: int = 0

    def tag(self, stage: Stage, half: int = 0) -> int:
        return stage * 4 + self.kind * 2 + half

    def block_states(self, slots: Array) -> Array:
        """The words of the slots' blocks: BLOCK_STATE[n]; of any block where a slot is negative."""
        assert self.blocks is not None
        states: Array = self.blocks[np.maximum(slots, 0) // self.page_size]
        return states


@dataclass
class BatchArrays:
    """The engine's arrays of one batch for one pool, as NumPy arrays; None = not given."""

    rows: int
    n_tokens: int
    table_kind: int
    table_page: int
    table_width: int
    block_table: Array | None
    kv_indptr: Array | None
    kv_last_page_len: Array | None
    seq_lens: Array | None
    query_start_loc: Array
    input_ids: Array
    slot_mapping: Array
    request_slots: Array | None
    request_ids: Array | None
    salts: Array | None
    prefix_chain: Array | None
    token_history: Array | None
    expected_tokens: Array | None
    pending: Array | None
    verify_all: Array | None
    check_write_position: bool
    adopt: bool
    verify_data_every: int
    full_verify_min_tokens: int
    is_first_forward: bool


class Slots(NamedTuple):
    """slot: i64[n] (-1 unless OK), raw: i64[n] what the engine's array held, status: i8[n]."""

    slot: Array
    raw: Array
    status: Array


# ---- slots -----------------------------------------------------------------------------------------------------------
def engine_slots(pool: PoolArrays, named: Array, raw: Array) -> Slots:
    """Slots as the engine names them (through the look-up table where the pool has one)."""
    slot = named.astype(np.int64)
    status = np.zeros(len(slot), np.int8)
    status[slot < 0] = EMPTY
    if pool.slot_lut is not None:
        n = len(pool.slot_lut)
        status[slot >= n] = OUT
        slot = np.where(status == OK, pool.slot_lut[np.clip(slot, 0, max(n - 1, 0))] if n else -1, -1)
        status[(status == OK) & (slot < 0)] = EMPTY
    status[(status == OK) & (slot >= pool.n_slots)] = OUT
    status[(status == OK) & np.isin(slot // pool.page_size, pool.reserved)] = EMPTY
    return Slots(np.where(status == OK, slot, -1), raw.astype(np.int64), status)


class HasRing(Protocol):
    """A pool, as far as the places of a request go."""

    @property
    def ring_length(self) -> int: ...
    @property
    def ring_bubble(self) -> int: ...
    @property
    def sink(self) -> int: ...


def place_of(pool: HasRing, positions: Array) -> Array:
    """Where each position is among the places of its request: itself, or a place of the ring: i64[n]."""
    if not pool.ring_length:
        return positions
    behind = positions - pool.sink
    return np.where(behind < 0, positions, pool.sink + pool.ring_bubble + behind % pool.ring_length)


def n_places(pool: PoolArrays, length: int) -> int:
    """Places that positions [0, length) take."""
    if not pool.ring_length or length <= pool.sink:
        return length
    return pool.sink + pool.ring_bubble + min(length - pool.sink, pool.ring_length)


def is_kept(pool: PoolArrays, rows: Array, row: Array, positions: Array) -> Array:
    """Whether each position's place is still its own after this forward, not that of a later one: bool[n]."""
    if not pool.ring_length:
        return np.ones(len(positions), bool)
    length = rows["prefix"][row].astype(np.int64) + rows["n_new"][row]
    kept: Array = (positions < pool.sink) | (positions >= length - pool.ring_length)
    return kept


def table_entries(batch: BatchArrays, rows: Array) -> Array:
    """Entries of each row's table: i64[n]."""
    if batch.table_kind == abi.TABLE_STATIC:
        return np.ones(len(rows), np.int64)
    if batch.table_kind == abi.TABLE_DENSE:
        return np.full(len(rows), batch.table_width, np.int64)
    assert batch.kv_indptr is not None
    begin, end = batch.kv_indptr[rows].astype(np.int64), batch.kv_indptr[rows + 1].astype(np.int64)
    return np.where(is_inside(begin, end, batch.table_width), end - begin, 0)


def is_inside(begin: Any, end: Any, n: int) -> Any:
    """Whether [begin, end) is a part of [0, n)."""
    return (begin >= 0) & (end <= n) & (begin <= end)


def table_slots(pool: PoolArrays, batch: BatchArrays, rows: Array, positions: Array) -> Slots:
    """The slot that the block table gives for each (row, position)."""
    places = place_of(pool, positions)
    index = places // batch.table_page
    outside = (positions < 0) | (index >= table_entries(batch, rows))
    index = np.where(outside, 0, index)
    if batch.table_kind == abi.TABLE_STATIC:
        entry = rows.astype(np.int64)
    else:
        assert batch.block_table is not None
        if batch.table_kind == abi.TABLE_CSR:
            assert batch.kv_indptr is not None
            flat = np.where(outside, 0, batch.kv_indptr[rows].astype(np.int64) + index)
            entry = batch.block_table[flat].astype(np.int64) if batch.table_width else np.zeros(len(rows), np.int64)
        else:
            entry = batch.block_table[rows, index].astype(np.int64) if batch.table_width else np.zeros_like(index)
    named = np.where(entry < 0, -1, entry * batch.table_page + places % batch.table_page)
    found = engine_slots(pool, named, entry)
    return Slots(
        np.where(outside, -1, found.slot),
        np.where(outside, positions, found.raw),
        np.where(outside, OUT, found.status).astype(np.int8),
    )


def write_slots(pool: PoolArrays, batch: BatchArrays, tokens: Array) -> Slots:
    """Where the engine writes each new token of the batch."""
    named = batch.slot_mapping[tokens].astype(np.int64)
    return engine_slots(pool, named, named)


# ---- rows ------------------------------------------------------------------------------------------------------------
def find_rows(pool: PoolArrays, batch: BatchArrays, forward: int) -> Array:
    """Facts of each row of the batch, its anchor and its claims: ROW[rows] (kvc_begin)."""
    out = np.zeros(batch.rows, abi.ROW)
    for r in range(batch.rows):
        out[r] = _find_row(pool, batch, r, forward)
    return out


def _find_row(pool: PoolArrays, batch: BatchArrays, r: int, forward: int) -> Array:
    row = abi.zeros_of(abi.ROW)
    row["request_slot"] = batch.request_slots[r] if batch.request_slots is not None else -1
    row["request_id"] = batch.request_ids[r] if batch.request_ids is not None else 0
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


# ---- relative chains -------------------------------------------------------------------------------------------------
def is_relative(stamps: Array) -> Array:
    """Whether the chain of each stamp is relative: bool[n]."""
    relative: Array = stamps["prev_slot"] <= abi.PREV_RELATIVE
    return relative


def continued_slots(stamps: Array) -> Array:
    """The slot of the stamp that each one continues, or negative: i32[n]."""
    prev = stamps["prev_slot"]
    return np.where(prev <= abi.PREV_RELATIVE_BASE, abi.PREV_RELATIVE_BASE - prev, prev)


def block_epochs(pool: PoolArrays, slots: Array) -> Array:
    """The epoch that a stamp made now for each slot gets: u32[n]; of any block where a slot is negative."""
    if pool.blocks is None:
        return np.zeros(len(slots), np.uint32)
    epochs: Array = pool.block_states(slots)["epoch"]
    return epochs


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


# ---- violations ------------------------------------------------------------------------------------------------------
def new_records(n: int, pool: PoolArrays, tag: int) -> Array:
    """``n`` empty records of a pool: VIOLATION[n]."""
    v = np.zeros(n, abi.VIOLATION)
    for name in ("plane", "row", "request_slot", "stored_position", "prev_slot"):
        v[name] = -1
    v["stored_token"] = v["expected_token"] = abi.NO_TOKEN
    v["pool"], v["tag"] = pool.index, tag
    return v


def row_records(n: int, pool: PoolArrays, tag: int, rows: Array, index: Array) -> Array:
    """Empty records that name their row and request."""
    v = new_records(n, pool, tag)
    v["row"] = index
    for name in ("request_id", "request_slot", "flags"):
        v[name] = rows[name][index]
    return v


def put_stamps(v: Array, stamps: Array) -> None:
    """Fill in what was found in the slot."""
    for ours, theirs in (("stored_chain", "chain"), ("stored_token", "token"), ("stored_position", "position")):
        v[ours] = stamps[theirs]
    v["prev_slot"] = continued_slots(stamps)
    v["stamp_owner"], v["stamp_step"], v["stamp_epoch"] = stamps["owner"], stamps["step"], stamps["epoch"]


def bad_rows(pool: PoolArrays, rows: Array) -> Array:
    """OUT_OF_RANGE of rows whose metadata cannot be: VIOLATION[n]."""
    flags, live = rows["flags"], rows["flags"] & abi.ROW_LIVE != 0
    bad = flags & (abi.ROW_BAD_LENGTH | abi.ROW_BAD_REQUEST_SLOT) != 0
    index = np.flatnonzero((flags & (abi.ROW_BAD_QUERY | abi.ROW_BAD_TABLE) != 0) | (live & bad))
    v = row_records(len(index), pool, pool.tag(Stage.HEAD), rows, index)
    v["reasons"], v["slot"], v["position"] = Reason.OUT_OF_RANGE, rows["bad_value"][index], rows["prefix"][index]
    names = {
        abi.ROW_BAD_QUERY: Detail.QUERY_START_LOC,
        abi.ROW_BAD_TABLE: Detail.KV_INDPTR,
        abi.ROW_BAD_LENGTH: Detail.SEQ_LEN,
    }
    is_of = [flags[index] & flag != 0 for flag in names]
    v["detail"] = np.select(is_of, [int(detail) for detail in names.values()], int(Detail.REQUEST_SLOT))
    return v


def table_entry_records(pool: PoolArrays, tag: int, rows: Array, index: Array, positions: Array, at: Slots) -> Array:
    """OUT_OF_RANGE or UNWRITTEN of table entries that name no slot."""
    v = row_records(len(index), pool, tag, rows, index)
    v["reasons"] = np.where(at.status == OUT, Reason.OUT_OF_RANGE, Reason.UNWRITTEN)
    v["detail"], v["slot"], v["position"] = Detail.TABLE_ENTRY, at.raw, positions
    return v


class NewTokens(NamedTuple):
    """The new tokens of the live rows, i64[n] each: row, number in the row, flat token index, position."""

    row: Array
    nth: Array
    token: Array
    position: Array


def new_tokens(rows: Array) -> NewTokens:
    """Enumerate the new tokens of the live rows."""
    row, index = _expand(np.where(rows["flags"] & abi.ROW_LIVE, rows["n_new"], 0))
    return NewTokens(row, index, rows["first_token"][row] + index, rows["prefix"][row].astype(np.int64) + index)


def _expand(counts: Array) -> tuple[Array, Array]:
    """(group, index within the group) of each of ``counts`` members."""
    group = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    return group, index


def judge_writes(
    pool: PoolArrays, batch: BatchArrays, rows: Array, new: NewTokens, target: Slots, forward: int
) -> Array:
    """WRITE_TOKEN, WRITE_POSITION, FOREIGN_WRITE and OUT_OF_RANGE of the new tokens: VIOLATION[n]."""
    home = table_slots(pool, batch, new.row, new.position)
    token = batch.input_ids[new.token].astype(np.int64).astype(np.int32)
    v = row_records(len(new.row), pool, pool.tag(Stage.HEAD), rows, new.row)
    out = target.status == OUT
    v["slot"] = np.where(out, target.raw, target.slot)
    v["detail"] = np.where(out, Detail.SLOT_MAPPING, Detail.SLOT)
    v["reasons"] = np.where(out, Reason.OUT_OF_RANGE, 0)
    if batch.check_write_position:
        strayed = ~out & ((home.status != OK) | (home.slot != target.slot))
        v["reasons"] |= np.where(strayed, Reason.WRITE_POSITION, 0).astype(np.uint32)
    if batch.expected_tokens is not None:
        expected = batch.expected_tokens[new.token].astype(np.int64)
        wrong = (expected >= 0) & (expected.astype(np.int32) != token)
        v["reasons"] |= np.where(wrong, Reason.WRITE_TOKEN, 0).astype(np.uint32)
        v["expected_token"] = np.where(wrong, expected, abi.NO_TOKEN)
    v["position"], v["stored_token"] = new.position, token
    v["stamp_owner"], v["stamp_step"] = np.where(out, 0, v["request_id"]), np.where(out, 0, forward)
    v["prev_slot"] = np.where(home.status == OK, home.slot, -1)
    if pool.blocks is not None:
        block, ok = pool.block_states(target.slot), target.status == OK
        foreign = ok & ownership.may_not_write(block, batch.request_ids is not None, v["request_id"])
        v["reasons"] |= np.where(foreign, Reason.FOREIGN_WRITE, 0).astype(np.uint32)
        v["stamp_epoch"] = np.where(ok & ~foreign, block["epoch"], 0)
    bad: Array = v[(v["reasons"] != 0) & (target.status != EMPTY)]
    return bad


def judge_new_tokens(
    pool: PoolArrays, batch: BatchArrays, rows: Array, new: NewTokens, target: Slots, won: Array, forward: int
) -> list[Array]:
    """TAIL: DUPLICATE_WRITE of the losers, and the new tokens looked up through the table as it is now."""
    # That a ring has gone round within one forward is no clash.
    losers = np.flatnonzero((target.status == OK) & ~won & is_kept(pool, rows, new.row, new.position))
    lost = row_records(len(losers), pool, pool.tag(Stage.TAIL), rows, new.row[losers])
    lost["reasons"], lost["slot"] = Reason.DUPLICATE_WRITE, target.slot[losers]
    lost["position"] = new.position[losers]
    put_stamps(lost, pool.head[0][target.slot[losers]])
    lost["expected_token"] = batch.input_ids[new.token[losers]].astype(np.int64).astype(np.int32)
    placed = np.flatnonzero((target.raw >= 0) & ~is_spared(pool, rows, new, target))
    row, position = new.row[placed], new.position[placed]
    home = table_slots(pool, batch, row, position)
    no_slot = home.status != OK
    entries = Slots(home.slot[no_slot], home.raw[no_slot], home.status[no_slot])
    out = [lost, table_entry_records(pool, pool.tag(Stage.TAIL), rows, row[no_slot], position[no_slot], entries)]
    for half in range(len(pool.head)):
        stamps = pool.head[half][np.maximum(home.slot, 0)]
        missing = ~no_slot & (stamps["step"] != forward)
        v = row_records(int(missing.sum()), pool, pool.tag(Stage.TAIL, half), rows, row[missing])
        v["reasons"], v["slot"], v["position"] = Reason.UNWRITTEN, home.slot[missing], position[missing]
        put_stamps(v, stamps[missing])
        out.append(v)
    return out


def is_spared(pool: PoolArrays, rows: Array, new: NewTokens, target: Slots) -> Array:
    """New tokens that the engine writes to a reserved block, and that no later query will see: bool[n]."""
    length = rows["prefix"][new.row].astype(np.int64) + rows["n_new"][new.row]
    is_past = (new.position <= length - pool.window) & (new.position >= pool.sink) & bool(pool.window)
    spared: Array = is_past & (target.status == EMPTY)
    return spared


# ---- prefix stamps ---------------------------------------------------------------------------------------------------
class Entries(NamedTuple):
    """Positions of a verified range (row and position i64[n]), where the table puts them, and the slot before each."""

    row: Array
    position: Array
    at: Slots
    before: Slots


def entries_of(pool: PoolArrays, batch: BatchArrays, rows: Array) -> Entries:
    """Enumerate the positions that HEAD and TAIL verify: the sink and [window start, prefix) of the live rows."""
    live = rows["flags"] & abi.ROW_LIVE != 0
    n_sink = np.where(rows["verify_start"] > pool.sink, pool.sink, 0)
    row, index = _expand(np.where(live, n_sink + rows["verify_end"] - rows["verify_start"], 0))
    behind = rows["verify_start"][row].astype(np.int64) + index - n_sink[row]
    position = np.where(index < n_sink[row], index, behind)
    return Entries(row, position, table_slots(pool, batch, row, position), table_slots(pool, batch, row, position - 1))


class Seen(NamedTuple):
    """Stamps as a stage sees them; ``judged``, ``unfinished`` and ``left`` are bool[n]."""

    stamp: Array
    judged: Array
    unfinished: Array
    left: Array


def see_stamps(pool: PoolArrays, stage: Stage, half: int, at: Slots, forward: int) -> Seen:
    """The stamp of each slot and whether the stage may judge it (all False where there is no slot)."""
    ok = at.status == OK
    slot = np.maximum(at.slot, 0)
    head = pool.head[half][slot]
    no = np.zeros(len(slot), bool)
    if stage == Stage.HEAD:
        return Seen(head, ok, no, no)
    settled = np.flatnonzero(ok & (head["step"] != forward) & (head["step"] != 0))
    stamp, differs = head.copy(), no.copy()
    stamp[settled] = pool.tail[half][slot[settled]]
    differs[settled] = stamp["step"][settled] != head["step"][settled]
    left = differs & is_aborted(pool, head["step"])
    judged = no.copy()
    judged[settled] = ~differs[settled]
    return Seen(stamp, judged, differs & ~left, left)


def is_aborted(pool: PoolArrays, forwards: Array) -> Array:
    """Whether each forward is known never to have reached TAIL."""
    n = min(int(pool.state["n_aborted"]), abi.N_ABORTED)
    known: Array = (forwards <= pool.state["aborted_floor"]) | np.isin(forwards, pool.state["aborted"][:n])
    return known


def judge_stamps(
    pool: PoolArrays, batch: BatchArrays, rows: Array, entries: Entries, stage: Stage, half: int, forward: int
) -> Array:
    """UNWRITTEN, STALE_EPOCH, POSITION, TOKEN and CHAIN of the prefix stamps of one half: VIOLATION[n]."""
    row, position, at, before = entries
    seen, previous = (see_stamps(pool, stage, half, s, forward) for s in (at, before))
    stamp, anchor = seen.stamp, rows["anchor"][row]
    v = row_records(len(row), pool, pool.tag(stage, half), rows, row)
    expected = history_tokens(pool, batch, rows, row, position)
    written = seen.judged & (stamp["step"] != 0)
    known = written & (stamp["token"] != abi.NO_TOKEN)

    reasons = np.where(seen.unfinished | (seen.judged & (stamp["step"] == 0)), Reason.UNWRITTEN, 0)
    reasons |= np.where(written & (stamp["position"] != position), Reason.POSITION, 0)
    wrong_token = known & (expected >= 0) & (stamp["token"] != expected)
    reasons |= np.where(wrong_token, Reason.TOKEN, 0)

    prev = previous.stamp
    may_follow = previous.judged & (prev["token"] != abi.NO_TOKEN) & ~is_outlived(pool, before.slot, prev)
    prev_step = np.where(may_follow, prev["step"], 0)
    relative = is_relative(stamp) & (position > 0)
    kept = ~is_rewritten(pool, before.slot, prev_step, at.slot, stamp["step"])
    follows = (continued_slots(stamp) == before.slot) & (before.status == OK) & kept
    prev_step = np.where(np.where(relative, follows, ~is_relative(prev)), prev_step, 0)
    salts = batch.salts[row].astype(np.uint64) if batch.salts is not None else np.zeros(len(row), np.uint64)
    starts = known & (position == 0) & ~is_relative(stamp)
    # Before a window, only the very predecessor that it continued, and if that is surely older: the table may name
    # anything there, and a moved stamp may have left its own behind.
    is_later = is_older(pool, before.slot, prev_step, stamp["step"])
    is_later &= (prev_step != 0) & (prev_step < forward) & (continued_slots(stamp) == before.slot)
    may_link = (position > rows["verify_start"][row]) | (position < pool.sink) | is_later
    may_link &= is_kept(pool, rows, row, position - 1)
    links = known & (position > 0) & may_link & (prev_step != 0)
    chain = np.where(
        starts,
        hashing.link(hashing.anchor(salts), stamp["token"], np.zeros_like(position)),
        hashing.link(prev["chain"], stamp["token"], stamp["position"]),
    )
    broken = (starts | links) & (stamp["chain"] != chain)
    ends = known & (position == rows["prefix"][row] - 1) & (rows["flags"][row] & abi.ROW_ANCHORED != 0)
    by_chain = (rows["flags"][row] & abi.ROW_RELATIVE == 0) & ~is_relative(stamp)
    by_token = ~by_chain & (rows["flags"][row] & abi.ROW_KNOWS_LAST != 0)
    mix = hashing.token_mix(stamp["token"], stamp["position"])
    unanchored = ends & by_chain & (stamp["chain"] != anchor)
    unanchored |= ends & by_token & (mix != rows["last_mix"][row])
    reasons |= np.where(broken | unanchored, Reason.CHAIN, 0)

    if pool.blocks is not None:
        block = pool.block_states(at.slot)
        foreign = ownership.may_not_read(block, batch.request_ids is not None, rows["request_id"][row])
        stale = np.where((seen.judged | seen.unfinished) & foreign, Reason.STALE_EPOCH, 0)
        reasons |= stale | np.where(written & (stamp["step"] != forward), ownership.epoch_reasons(block, stamp), 0)

    v["reasons"], v["position"], v["slot"] = reasons, position, at.slot
    v["detail"] = np.where(seen.unfinished, Detail.UNFINISHED, Detail.SLOT)
    v["expected_token"] = np.where(wrong_token, expected, abi.NO_TOKEN)
    v["expected_chain"] = np.where(unanchored, anchor, np.where(broken, chain, 0))
    put_stamps(v, stamp)
    bad: Array = v[(reasons != 0) & ~adoptable(pool, batch, rows, row, at)]
    return bad


def is_outlived(pool: PoolArrays, slots: Array, stamps: Array) -> Array:
    """Stamps of an epoch that is over: they say nothing of what the block holds now: bool[n]."""
    if pool.blocks is None:
        return np.zeros(len(stamps), bool)
    outlived: Array = (stamps["epoch"] != 0) & (stamps["epoch"] != pool.block_states(slots)["epoch"])
    return outlived


def adoptable(pool: PoolArrays, batch: BatchArrays, rows: Array, row: Array, at: Slots) -> Array:
    """What adoption takes, and what is not reported: slots not stamped since their block was allocated: bool[n].

    Only where adoption is asked for, and if the row may read the block.
    """
    slot = np.maximum(at.slot, 0)
    unknown: Array = (at.status == OK) & batch.adopt
    for plane in (*pool.head, *pool.tail):
        stamps = plane[slot]
        unknown &= (stamps["step"] == 0) | is_outlived(pool, slot, stamps)
    if pool.blocks is not None:
        has_ids = batch.request_ids is not None
        unknown &= ~ownership.may_not_read(pool.block_states(slot), has_ids, rows["request_id"][row])
    return unknown


def adoption_claims(forward: int, positions: Array) -> Array:
    """What a slot's claim word holds when it is adopted: the highest for the lowest position."""
    claims: Array = np.uint64(forward << 32) | (np.int64(0xFFFFFFFF) - positions).astype(np.uint64)
    return claims


def history_tokens(pool: PoolArrays, batch: BatchArrays, rows: Array, row: Array, position: Array) -> Array:
    """The token that the engine's history has at each (row, position); NO_TOKEN where there is none."""
    if batch.token_history is None or not batch.token_history.size:
        return np.full(len(row), abi.NO_TOKEN)
    slot, at = rows["request_slot"][row], position + pool.token_offset
    inside = (slot >= 0) & (at >= 0) & (at < batch.token_history.shape[1])
    return np.where(inside, batch.token_history[np.where(inside, slot, 0), np.where(inside, at, 0)], abi.NO_TOKEN)


# ---- data ------------------------------------------------------------------------------------------------------------
def judgeable(pool: PoolArrays, half: int, slots: Array, forward: int) -> Array:
    """Whether the data of each slot may be judged: HEAD and TAIL stamps are of one earlier forward: bool[n].

    Nor are bytes of an epoch that is over: nobody's any more, they may be overwritten at any time.
    """
    step = pool.head[half]["step"][slots]
    may: Array = (step != 0) & (step != forward) & (pool.tail[half]["step"][slots] == step)
    may &= ~is_outlived(pool, slots, pool.head[half][slots])
    return may


def due_slots(pool: PoolArrays, batch: BatchArrays, rows: Array, entries: Entries) -> Array:
    """Which entries' data fall due in this forward: bool[n]."""
    flags = rows["flags"][entries.row]
    share = hashing.share_of(np.maximum(entries.at.slot, 0), abi.SHARE_RUN, batch.verify_data_every)
    due: Array = (flags & abi.ROW_FULL_DATA != 0) | (share == rows["share"][entries.row])
    if pool.state["n_fresh"]:
        slots = np.maximum(entries.at.slot, 0)
        stamps = pool.head[0][slots]
        # Of a stamp that says nothing of what the block holds now, there is nothing to verify: adoption may take it.
        due |= is_fresh(pool, slots) & (stamps["step"] != 0) & ~is_outlived(pool, slots, stamps)
    due &= (entries.at.status == OK) & (flags & abi.ROW_PENDING == 0)
    return due


def is_fresh(pool: PoolArrays, slots: Array) -> Array:
    """Whether each slot was moved or adopted, and its bytes were not verified since: bool[n]."""
    fresh: Array = pool.claims[slots] & np.uint64(0xFFFFFFFF) == abi.CLAIM_FRESH
    return fresh


def was_moved(pool: PoolArrays, slots: Array) -> Array:
    """Slots whose stamps were moved there or adopted by a call: bool[n]; anything where a slot is no slot."""
    claims = pool.claims[np.clip(slots, 0, pool.n_slots - 1)] & np.uint64(0xFFFFFFFF)
    moved: Array = (claims == 0) | (claims == abi.CLAIM_FRESH)
    return moved


def arrivals(pool: PoolArrays, slots: Array, steps: Array) -> Array:
    """When stamps came to their slots: the forward that wrote them or, of moved ones, the forward before the move.

    What a forward that never ended has stamped keeps that number when it is moved. Anything where a slot is no slot.
    """
    numbers = pool.claims[np.clip(slots, 0, pool.n_slots - 1)] >> np.uint64(32)
    came: Array = np.where(was_moved(pool, slots), np.maximum(numbers, steps.astype(np.uint64)), steps)
    return came


def is_older(pool: PoolArrays, before: Array, before_steps: Array, steps: Array) -> Array:
    """Whether the stamps in ``before`` are surely older than those of ``steps``, wherever these came from: bool[n].

    Of two moves of one number nobody knows.
    """
    came = arrivals(pool, before, before_steps)
    older: Array = (came < steps) | ((came == steps) & ~was_moved(pool, before))
    return older


def is_rewritten(pool: PoolArrays, before: Array, before_steps: Array, slots: Array, steps: Array) -> Array:
    """Whether the stamps in ``before`` are younger than those in ``slots``: bool[n]; anything where a slot is negative.

    A move has the number of the forward before it, so that of two equal numbers the moved one is the younger, unless
    both were moved.
    """
    came_before, came = arrivals(pool, before, before_steps), arrivals(pool, slots, steps)
    later = was_moved(pool, before) & ~was_moved(pool, slots)
    younger: Array = (came_before > came) | ((came_before == came) & later)
    return younger


def settle_fresh(pool: PoolArrays, rows: Array, entries: Entries) -> None:
    """After HEAD has verified their bytes, the fresh slots of the prefixes are so no more."""
    verified = (entries.at.status == OK) & (rows["flags"][entries.row] & abi.ROW_PENDING == 0)
    slots = np.unique(entries.at.slot[verified])
    slots = slots[is_fresh(pool, slots)]
    pool.claims[slots] &= ~np.uint64(0xFFFFFFFF)
    pool.state["n_fresh"] -= np.uint32(len(slots))


# ---- sweep -----------------------------------------------------------------------------------------------------------
def judge_resident(pool: PoolArrays, resident: Any, half: int, inside: Array) -> Array:
    """UNWRITTEN, STALE_EPOCH, POSITION, TOKEN and CHAIN of resident slots of one half: VIOLATION[n].

    Args:
        inside: bool[n], those that lie inside the pool.
    """
    slots, positions, before = (np.asarray(a)[inside].astype(np.int64) for a in resident[:3])
    expected = np.full(len(slots), abi.NO_TOKEN) if resident.tokens is None else np.asarray(resident.tokens)[inside]
    stamp, tail_step = pool.head[half][slots], pool.tail[half]["step"][slots]
    written = stamp["step"] != 0
    known = written & (stamp["token"] != abi.NO_TOKEN)
    reasons = np.where(written, 0, Reason.UNWRITTEN)
    reasons |= np.where(written & (stamp["position"] != positions), Reason.POSITION, 0)
    wrong_token = known & (expected >= 0) & (stamp["token"] != expected)
    reasons |= np.where(wrong_token, Reason.TOKEN, 0)
    has_before = (before >= 0) & (before < pool.n_slots)
    prev = pool.head[half][np.where(has_before, before, 0)]
    chain = hashing.link(prev["chain"], stamp["token"], stamp["position"])
    follows = (continued_slots(stamp) == before) & ~is_rewritten(pool, before, prev["step"], slots, stamp["step"])
    links = known & has_before & np.where(is_relative(stamp), follows, ~is_relative(prev))
    links &= (prev["step"] != 0) & (prev["token"] != abi.NO_TOKEN)
    links &= ~is_outlived(pool, np.where(has_before, before, 0), prev)
    broken = links & (stamp["chain"] != chain)
    reasons |= np.where(broken, Reason.CHAIN, 0)
    # A forward that failed in this very step is not among the failed ones before the next one begins.
    is_open = (stamp["step"] == pool.state["head_forward"]) & (pool.state["head_forward"] != pool.state["tail_forward"])
    unfinished = written & (tail_step != stamp["step"]) & ~is_aborted(pool, stamp["step"]) & ~is_open
    reasons |= np.where(unfinished, Reason.UNWRITTEN, 0)
    if pool.blocks is not None:
        reasons |= np.where(written, ownership.epoch_reasons(pool.block_states(slots), stamp), 0)
    v = new_records(len(slots), pool, pool.tag(Stage.SWEEP, half))
    v["reasons"], v["slot"], v["position"] = reasons, slots, positions
    v["detail"] = np.where(unfinished, Detail.UNFINISHED, Detail.SLOT)
    v["expected_token"] = np.where(wrong_token, expected, abi.NO_TOKEN)
    v["expected_chain"] = np.where(broken, chain, 0)
    put_stamps(v, stamp)
    bad: Array = v[reasons != 0]
    return bad
