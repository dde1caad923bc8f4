"""The host's end of the violation ring: where records lie, which are complete, and in which order they are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.tags import N_HALVES, N_POOL_KINDS


def in_order(records: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Records in an order that is the same on every device: by forward, HEAD before TAIL, then by rows and positions.

    In the ring, those of one forward stand as a GPU's threads came. Records without a row, the patrol's, come last.
    """
    stage = records["tag"] // (N_POOL_KINDS * N_HALVES)
    keys = [records[name] for name in ("reasons", "plane", "tag", "slot", "position")]
    keys += [records["row"].astype(np.uint32), records["pool"], stage]
    return records[np.lexsort([*keys, records["forward"], records["step"]])]


def places_of(first: int, n: int, capacity: int) -> npt.NDArray[np.intp]:
    """Places in a ring of ``capacity`` (and one for record 0) of ``n`` records from number ``first`` on."""
    records = np.arange(n, dtype=np.uint64) + np.uint64(first)  # unsigned to the end
    places = np.where(records == 0, np.uint64(0), 1 + (records - np.uint64(1)) % np.uint64(capacity))
    return places.astype(np.intp)


class RingReader:
    """The host's end of the violation ring; one reader per ring, not thread-safe.

    Record 0 of a lifetime has place 0, record c >= 1 has place ``1 + (c - 1) % capacity``. Record c is complete when
    its commit word is c + 1; the alarm word says the same a moment later, so it decides nothing here.

    Args:
        violation_log: VIOLATION[capacity + 1], written by the device.
        control: u64[N_CONTROL_WORDS]; this end writes CONTROL_READ, which tells the writers how much room there is.
        capacity: records.
    """

    def __init__(self, violation_log: npt.NDArray[Any], control: npt.NDArray[np.uint64], capacity: int) -> None:
        assert violation_log.dtype == abi.VIOLATION
        assert violation_log.shape == (capacity + 1,)
        self._log = violation_log
        self._commits = violation_log["commit"]
        self._control = control
        self._capacity = capacity
        self._n_read = int(control[abi.CONTROL_READ])

    @property
    def n_read(self) -> int:
        """Records read so far, by this reader and those before it."""
        return self._n_read

    @property
    def has_new(self) -> bool:
        """Whether the next record is complete: one NumPy read."""
        c = self._n_read
        return bool(self._commits[0 if c == 0 else 1 + (c - 1) % self._capacity] == c + 1)

    def read(self, limit: int | None = None) -> npt.NDArray[Any]:
        """Copy the complete records that are next in order, then hand their places back: VIOLATION[n].

        Stops at a record that is claimed but not yet complete; never blocks. Up to ``capacity`` records, or ``limit``.
        """
        if not self.has_new:
            return np.empty(0, abi.VIOLATION)
        n = self._capacity if limit is None else min(limit, self._capacity)
        places = places_of(self._n_read, n, self._capacity)
        # Commit words first, rows after: the writer made the row visible before its commit word.
        is_open = self._commits[places] != np.arange(n, dtype=np.uint64) + np.uint64(self._n_read + 1)
        n_complete = int(is_open.argmax()) if is_open.any() else n
        out = self._log[places[:n_complete]]
        self._n_read += n_complete
        self._control[abi.CONTROL_READ] = self._n_read
        return out
