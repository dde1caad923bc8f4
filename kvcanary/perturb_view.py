"""What a batch uses of a pool, copied to the host: live rows, the slots that they read, the entries that name them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kvcanary.backends import Backend
from kvcanary.backends.reference_arrays import Array, BatchArrays, PoolArrays
from kvcanary.backends.reference_rows import row_length
from kvcanary.backends.reference_slots import EMPTY, OK, table_entries, table_slots, write_slots
from kvcanary.batch import BoundBatch
from kvcanary.layout import KvPool
from kvcanary.prove import host_copy, pool_facts


class Used(NamedTuple):
    """Positions of rows, and the slot that the table gives for each: i64[n], all inside the pool."""

    row: Array
    position: Array
    slot: Array
    entry: Array  #: the table's entry for it


class Stamped(NamedTuple):
    """What the guard knows of some slots, [n] each."""

    vouched: Array  #: bool: written under the guard, HEAD and TAIL by one forward: its bytes can be judged
    forward: Array  #: u32: in which forward
    position: Array
    owner: Array  #: u32: the request that wrote it, 0 unknown


@dataclass(frozen=True, eq=False)
class BatchView:
    """One bound batch in one pool, as its arrays are now.

    Attributes:
        rows: i64[n] live rows: with new tokens that go to real slots, and not waiting for their KV.
        prefix: i64[n], tokens of each live row before this forward; ``length`` after it.
    """

    index: int
    pool: KvPool
    bound: BoundBatch
    arrays: BatchArrays
    facts: PoolArrays
    rows: Array
    prefix: Array
    length: Array

    @classmethod
    def read(cls, backend: Backend, pool: KvPool, index: int, bound: BoundBatch) -> BatchView:
        """Copy what locates rows and slots to the host; waits for the device and allocates."""
        arrays = replace(
            host_copy(backend, bound),
            query_start_loc=backend.read_array(bound.views["query_start_loc"]),
            input_ids=backend.read_array(bound.views["input_ids"]),
            slot_mapping=backend.read_array(bound.views["slot_mapping"]),
        )
        facts = pool_facts(backend, pool, index)
        start, end = (arrays.query_start_loc[s].astype(np.int64) for s in (slice(None, -1), slice(1, None)))
        length = np.array([row_length(arrays, r) for r in range(bound.rows)], np.int64)
        live = (start >= 0) & (end > start) & (end <= bound.n_tokens) & (end - start <= length)
        real = write_slots(facts, arrays, np.arange(bound.n_tokens)).status != EMPTY
        before = np.concatenate([[0], np.cumsum(real)])
        at_end, at_start = (before[np.clip(edge, 0, bound.n_tokens)] for edge in (end, start))
        live &= at_end > at_start
        if "pending" in bound.views:
            live &= backend.read_array(bound.views["pending"]) == 0
        rows = np.flatnonzero(live)
        return cls(index, pool, bound, arrays, facts, rows, (length - (end - start))[rows], length[rows])

    def used(self, ends: Array) -> Used:
        """The positions of the live rows in front of ``ends`` (i64[n]) that a query there sees."""
        starts = np.zeros_like(ends) if self.pool.window is None else np.maximum(0, ends - self.pool.window + 1)
        if self.pool.ring_length:  # what the new tokens of this forward overwrite is not seen either
            starts = np.maximum(starts, self.length - self.pool.ring_length)
        return self._slots(self.rows, starts, ends)

    def touched(self) -> Array:
        """bool[n_slots]: what any row holds, windows or not, and what this forward writes."""
        rows = np.arange(self.bound.rows)
        lengths = np.array([row_length(self.arrays, r) for r in range(self.bound.rows)], np.int64)
        touched = self.written_now()
        touched[self._slots(rows, np.zeros_like(lengths), np.maximum(lengths, 0)).slot] = True
        return touched

    def written_now(self) -> Array:
        """bool[n_slots]: what the new tokens of this forward are written to."""
        written = np.zeros(self.pool.n_slots, bool)
        target = self.targets(np.arange(self.bound.n_tokens))
        written[target[target >= 0]] = True
        return written

    def targets(self, tokens: Array) -> Array:
        """The slots that new tokens are written to: i64[n], -1 where that is no slot of the pool."""
        return write_slots(self.facts, self.arrays, tokens).slot

    def request_id(self, row: int) -> int:
        """The request of a row, 0 unknown."""
        return self.arrays.request_id(row)

    def _slots(self, rows: Array, starts: Array, ends: Array) -> Used:
        capacity = table_entries(self.arrays, rows) * self.arrays.table_page
        ends = ends if self.pool.ring_length else np.minimum(ends, capacity)
        counts = np.maximum(0, ends - starts)
        row = np.repeat(rows, counts)
        position = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - starts, counts)
        at = table_slots(self.facts, self.arrays, row, position)
        ok = at.status == OK
        return Used(row[ok], position[ok], at.slot[ok], at.raw[ok])


def read_stamped(backend: Backend, pool: int, slots: Array) -> Stamped:
    """What the stamps of some slots (i64[n]) say; waits for the device."""
    stamps = backend.read_stamps(pool, slots)
    head = stamps[0][0]
    vouched = np.ones(len(slots), bool)
    for h, t in stamps:
        vouched &= (h["step"] != 0) & (h["step"] == t["step"])
    return Stamped(vouched, head["step"], head["position"].astype(np.int64), head["owner"])
