"""The new tokens of a batch, in NumPy: which they are, what HEAD judges of their writes, what TAIL finds of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcanary import abi
from kvcanary.backends import ownership
from kvcanary.backends.reference_arrays import Array, BatchArrays, PoolArrays
from kvcanary.backends.reference_records import put_stamps, row_records, table_entry_records
from kvcanary.backends.reference_rows import expand
from kvcanary.backends.reference_slots import EMPTY, OK, OUT, Slots, is_kept, table_slots
from kvcanary.tags import Detail, Reason, Stage


class NewTokens(NamedTuple):
    """The new tokens of the live rows, i64[n] each: row, number in the row, flat token index, position."""

    row: Array
    nth: Array
    token: Array
    position: Array


def new_tokens(rows: Array) -> NewTokens:
    """Enumerate the new tokens of the live rows."""
    row, index = expand(np.where(rows["flags"] & abi.ROW_LIVE, rows["n_new"], 0))
    return NewTokens(row, index, rows["first_token"][row] + index, rows["prefix"][row].astype(np.int64) + index)


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
