"""The stamps of the prefixes that a batch reads, in NumPy: where they are, what is wrong with them, what is adopted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcanary import abi, hashing
from kvcanary.backends import ownership
from kvcanary.backends.reference_arrays import Array, BatchArrays, PoolArrays
from kvcanary.backends.reference_records import put_stamps, row_records
from kvcanary.backends.reference_rows import expand
from kvcanary.backends.reference_slots import OK, Slots, is_kept, table_slots
from kvcanary.backends.reference_stamps import (
    continued_slots,
    is_aborted,
    is_older,
    is_outlived,
    is_relative,
    is_rewritten,
)
from kvcanary.tags import Detail, Reason, Stage


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
    row, index = expand(np.where(live, n_sink + rows["verify_end"] - rows["verify_start"], 0))
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


def history_tokens(pool: PoolArrays, batch: BatchArrays, rows: Array, row: Array, position: Array) -> Array:
    """The token that the engine's history has at each (row, position); NO_TOKEN where there is none."""
    if batch.token_history is None or not batch.token_history.size:
        return np.full(len(row), abi.NO_TOKEN)
    slot, at = rows["request_slot"][row], position + pool.token_offset
    inside = (slot >= 0) & (at >= 0) & (at < batch.token_history.shape[1])
    return np.where(inside, batch.token_history[np.where(inside, slot, 0), np.where(inside, at, 0)], abi.NO_TOKEN)


# ---- adoption --------------------------------------------------------------------------------------------------------
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
