"""What the calls for moves are given: lists of slots, positions, tokens, on the host or on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary.arrays import ArrayView, view_of
from kvcanary.errors import BatchError
from kvcanary.layout import KvPool

Array = npt.NDArray[Any]


class SlotLists:
    """The lists of one call, each as i64[n] NumPy array (checked) or as a view of device memory."""

    def __init__(self, call: str, pool: KvPool, blocks: bool) -> None:
        if not isinstance(blocks, bool):
            raise BatchError(f"{call}: blocks={blocks!r}: give True for lists of blocks, False for slots")
        self.call, self.pool, self.blocks = call, pool, blocks
        self.per_entry = pool.page_size if blocks else 1
        self.widths: set[int] = set()

    @property
    def is_wide(self) -> bool:
        """Whether the lists on the device are i64."""
        if len(self.widths) > 1:
            raise BatchError(f"{self.call}: some lists on the device are int32 and some int64: give one type")
        return 8 in self.widths

    def slots(self, name: str, values: Any, *, is_target: bool = False) -> Array | ArrayView:
        """Slots or blocks; ``is_target``: each once."""
        if values is None:
            raise BatchError(f"{self.call}: {name} is None: give a list of slots")
        pool = self.pool
        kind, n = ("blocks", pool.n_blocks) if self.blocks else ("slots", pool.n_slots)
        found = self.numbers(name, values, 0, n - 1, f"the {kind} of pool {pool.name!r}")
        if isinstance(found, ArrayView):
            return found
        assert isinstance(found, np.ndarray)
        blocks = found if self.blocks else found // pool.page_size
        reserved = np.flatnonzero(np.isin(blocks, pool.reserved_blocks))
        if len(reserved):
            i = reserved[0]
            raise BatchError(
                f"{self.call}: {name}[{i}]={found[i]} is in block {blocks[i]}, which pool {pool.name!r} reserves: "
                "leave padding out"
            )
        if is_target and len(np.unique(found)) < len(found):
            values_, first, counts = np.unique(found, return_index=True, return_counts=True)
            twice = int(values_[counts > 1][np.argmin(first[counts > 1])])
            raise BatchError(f"{self.call}: {name} has {twice} {int((found == twice).sum())} times: give each once")
        return found

    def numbers(self, name: str, values: Any, low: int, high: int, what: str = "") -> Any:
        """Integers in [low, high]; None stays None."""
        if values is None:
            return None
        found = self._resolve(name, values)
        if isinstance(found, np.ndarray) and len(found):
            bad = np.flatnonzero((found < low) | (found > high))
            if len(bad):
                of = f"{what} are" if what else "give"
                raise BatchError(f"{self.call}: {name}[{bad[0]}]={found[bad[0]]}: {of} {max(low, 0)} to {high}")
        return found

    def _resolve(self, name: str, values: Any) -> Array | ArrayView:
        is_raw = isinstance(values, tuple) and len(values) in (4, 5) and isinstance(values[1], (tuple, list))
        if isinstance(values, (Sequence, range)) and not is_raw:
            try:
                values = np.array(values) if len(values) else np.zeros(0, np.int64)
            except (TypeError, ValueError, OverflowError) as error:
                raise BatchError(f"{self.call}: {name} is no list of numbers ({error}): give integers") from error
        view = view_of(values, f"{self.call}: {name}", BatchError)
        if len(view.shape) != 1:
            raise BatchError(f"{self.call}: {name} has shape {view.shape}: give a flat list")
        if view.is_host and view.host is not None:
            host = view.host
            if host.dtype.kind == "V" and view.itemsize in (1, 2, 4, 8):
                host = host.view(f"i{view.itemsize}")
            if host.dtype.kind not in "iu":
                raise BatchError(f"{self.call}: {name} is {host.dtype}: give integers")
            return host.astype(np.int64)
        device = self.pool.device
        if device is not None and view.device != device:
            raise BatchError(
                f"{self.call}: {name} is on {view.device}, the pool on {device}: give it there or as a list"
            )
        if view.dtype not in ("", "int32", "int64") or view.itemsize not in (4, 8) or not view.is_contiguous:
            given = view.dtype or f"{view.itemsize} bytes wide"
            raise BatchError(f"{self.call}: {name} is {given}, strides {view.strides}: give contiguous int32 or int64")
        self.widths.add(view.itemsize)
        return view

    def in_one_width(self, values: Any) -> Any:
        """Arrays of the host as i32 or i64, whichever the lists on the device are; all else as it is."""
        if not isinstance(values, np.ndarray):
            return values
        return values.astype(np.int64 if self.is_wide else np.int32)

    def check_lengths(self, **lists: Any) -> None:
        """All of one length."""
        lengths = {name: length_of(values) for name, values in lists.items() if values is not None}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            raise BatchError(f"{self.call}: {told} entries: give lists of one length")

    def check_rows(self, starts: Any, prefixes: Any, registers: Any, n: int) -> None:
        """Rows that cover the entries, in ascending order."""
        if starts is None or prefixes is None:
            raise BatchError(f"{self.call}: row_starts and prefix_lens are needed: give [rows + 1] and [rows]")
        rows = length_of(prefixes)
        if length_of(starts) != rows + 1:
            raise BatchError(f"{self.call}: row_starts has {length_of(starts)} entries, {rows} rows need {rows + 1}")
        if registers is not None and length_of(registers) != rows:
            raise BatchError(f"{self.call}: request_slots has {length_of(registers)} entries, prefix_lens {rows}")
        is_covering = not isinstance(starts, np.ndarray) or (
            starts[0] == 0 and starts[-1] == n and bool((np.diff(starts) >= 0).all())
        )
        if not is_covering:
            raise BatchError(f"{self.call}: row_starts={starts.tolist()}: give ascending numbers from 0 to {n}")
        if isinstance(registers, np.ndarray):
            used = registers[registers >= 0]
            if len(np.unique(used)) < len(used):
                raise BatchError(f"{self.call}: request_slots={registers.tolist()}: give each once")


def length_of(values: Array | ArrayView) -> int:
    return int(values.shape[0])
