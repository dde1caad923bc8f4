"""Where positions and new tokens are in a pool, in NumPy: look-up table, block table, ring and slot mapping."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from kvcanary import abi
from kvcanary.backends.reference_arrays import Array, BatchArrays, PoolArrays

OK, EMPTY, OUT = 0, 1, 2  # slot status


class Slots(NamedTuple):
    """slot: i64[n] (-1 unless OK), raw: i64[n] what the engine's array held, status: i8[n]."""

    slot: Array
    raw: Array
    status: Array


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
