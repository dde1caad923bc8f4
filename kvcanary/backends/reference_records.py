"""Records of violations, in NumPy: empty ones, what was found in a slot, bad rows and table entries."""

from __future__ import annotations

import numpy as np

from kvcanary import abi
from kvcanary.backends.reference_arrays import Array, PoolArrays
from kvcanary.backends.reference_slots import OUT, Slots
from kvcanary.backends.reference_stamps import continued_slots
from kvcanary.tags import Detail, Reason, Stage


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
