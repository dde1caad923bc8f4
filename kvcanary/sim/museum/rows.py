"""Rows of a scenario's batches, and the arrays made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_REQUESTS, MAX_LEN, WIDTH = 16, 128, 6  # request slots; tokens of a history; blocks of a table row
MAX_TOKENS = 192
A, B, C, D, X = 1, 2, 3, 4, 5  # requests of the recipes; their ids are also their request slots
BYSTANDERS = (13, 14)


def text_of(request: int) -> list[int]:
    """The tokens of a request, different from everybody else's at every position."""
    return [1000 * request + i for i in range(MAX_LEN)]


@dataclass(frozen=True)
class Row:
    """A row of a batch: new tokens [start, end) of a request.

    Attributes:
        request: its id, and its request slot unless ``request_slot`` is another; 0 = nobody's (padding, a dummy).
        table: its blocks.
        text: its tokens; None = `text_of` the request.
        slots: where the engine writes; None = where the table says.
        kv_slots: where the model's kernels write; None = ``slots``.
        late_table: what the table row holds from the model on, if somebody overwrites it in between.
        salt: adapter and tenant.
        history: the scheduler's record of its tokens; None = the whole text; -1 = not known yet.
        pending: its KV is still being loaded.
        noise: which batch composition the bytes were computed in: it shows in them as rounding does.
    """

    request: int
    start: int
    end: int
    table: Sequence[int]
    text: Sequence[int] | None = None
    slots: Sequence[int] | None = None
    kv_slots: Sequence[int] | None = None
    late_table: Sequence[int] | None = None
    salt: int = 0
    history: Sequence[int] | None = None
    pending: bool = False
    noise: int = 0
    request_slot: int = 0

    @property
    def served_in(self) -> int:
        """The request slot; -1 = none."""
        return self.request_slot or self.request or -1

    @property
    def tokens(self) -> list[int]:
        """The new ones."""
        return list(self.text if self.text is not None else text_of(self.request))[self.start : self.end]

    def targets(self, page: int) -> list[int]:
        """Slots of the new tokens, as the engine names them."""
        if self.slots is not None:
            return list(self.slots)
        return [self.table[p // page] * page + p % page for p in range(self.start, self.end)]


def padding(slot: int = -1, kv_slot: int | None = None) -> Row:
    """A row of a CUDA graph's bucket that no request fills; it is mapped to ``slot``."""
    return Row(0, 0, 1, [0], [0], slots=[slot], kv_slots=None if kv_slot is None else [kv_slot])


def arrays_of(rows: Sequence[Row], page: int) -> dict[str, Array]:
    """The arrays of a `StepBatch`, without the history, which outlives a batch."""
    table = np.zeros((len(rows), WIDTH), np.int32)
    for r, row in enumerate(rows):
        table[r, : len(row.table)] = row.table
    tokens = [t for row in rows for t in row.tokens]
    return {
        "block_table": table,
        "seq_lens": np.array([row.end for row in rows], np.int32),
        "query_start_loc": np.cumsum([0, *(row.end - row.start for row in rows)]).astype(np.int32),
        "input_ids": np.array(tokens, np.int32),
        "slot_mapping": np.array([s for row in rows for s in row.targets(page)], np.int64),
        "request_slots": np.array([row.served_in for row in rows], np.int32),
        "request_ids": np.array([row.request for row in rows], np.uint32),
        "salts": np.array([row.salt for row in rows], np.uint64),
        "pending": np.array([row.pending for row in rows], np.uint8),
    }


def late_table_of(rows: Sequence[Row], table: Array) -> Array:
    """The table as it is from the model on."""
    late = table.copy()
    for r, row in enumerate(rows):
        if row.late_table is not None:
            late[r, : len(row.late_table)] = row.late_table
    return late


def fill_history(history: Array, rows: Sequence[Row]) -> None:
    """What the scheduler knows of each request's tokens."""
    for row in rows:
        if row.request:
            known = row.history
            if known is None:
                known = row.text if row.text is not None else text_of(row.request)
            history[row.served_in] = -1
            history[row.served_in, : min(len(known), MAX_LEN)] = known[:MAX_LEN]
