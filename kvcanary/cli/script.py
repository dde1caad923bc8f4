"""What the self-test plays: a few requests that grow in two pools, with or without damage on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary import layouts
from kvcanary.backends import Resident
from kvcanary.layout import KvPool
from kvcanary.ledger import BlockChanges, BlockLedger
from kvcanary.tags import PoolKind

Array: TypeAlias = npt.NDArray[Any]

PAGE_SIZE, N_BLOCKS, MAX_BLOCKS = 8, 48, 7
N_ROWS, N_TOKENS, MAX_LEN = 6, 64, PAGE_SIZE * MAX_BLOCKS
WINDOW = 20
PENDING_ROW, PENDING_STEP = 2, 3  # whose KV is still on its way at HEAD of this step
N_LOADED = 10  # positions of row 5 that came from outside, so that the guard never saw them written
# New tokens of each row at each step: prefills of several sizes, decodes, and rows that are padding.
N_NEW = (
    (30, 1, 17, 9, 0, 0),
    (1, 1, 1, 1, 24, 0),
    (1, 18, 1, 1, 1, 2),
    *((1, 1, 1, 1, 1, 1),) * 5,
)


def pools_over(planes: Sequence[Any]) -> list[KvPool]:
    """A FULL and a sliding-window pool of different layouts and types over copies of `Script.planes`."""
    full = layouts.nhd(k=list(planes[0:2]), v=list(planes[2:4]), dtype="bfloat16", name="full")
    kind: dict[str, Any] = {"kind": PoolKind.SWA, "window": WINDOW, "dtype": "float8_e5m2"}
    window = layouts.hnd(k=[planes[4]], v=[planes[5]], name="window", **kind)
    return [full, window]


class Script:
    """The memory of an engine, step after step; the same seed gives the same bytes.

    Attributes:
        planes: the arrays of `pools_over`.
        arrays: keywords of a StepBatch, changed in place.
        step: the step at hand, from 0.
        block_changes: who owns which blocks from this step on, of both pools alike.
    """

    def __init__(self, *, is_damaged: bool, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._is_damaged = is_damaged
        nhd, hnd = (N_BLOCKS, PAGE_SIZE, 2, 12), (N_BLOCKS, 3, PAGE_SIZE, 20)
        self.planes: list[Array] = [*np.zeros((4, *nhd), np.uint16), *np.zeros((2, *hnd), np.uint8)]
        self._table = 1 + self._rng.permutation(N_BLOCKS - 1)[: N_ROWS * MAX_BLOCKS].reshape(N_ROWS, MAX_BLOCKS)
        self._tokens = self._rng.integers(0, 50_000, (N_ROWS, MAX_LEN)).astype(np.int32)
        self._slots_of_rows = self._rng.permutation(N_ROWS)
        self._lengths = np.zeros(N_ROWS, np.int64)
        self.step = 0
        self._ledger = BlockLedger(N_BLOCKS, (0,))
        self.block_changes: list[BlockChanges] = []
        history = np.zeros((N_ROWS, MAX_LEN), np.int32)
        history[self._slots_of_rows] = self._tokens
        self.arrays: dict[str, Array] = {
            "block_table": np.zeros((N_ROWS, MAX_BLOCKS), np.int32),
            "seq_lens": np.zeros(N_ROWS, np.int32),
            "query_start_loc": np.zeros(N_ROWS + 1, np.int32),
            "input_ids": np.zeros(N_TOKENS, np.int32),
            "slot_mapping": np.full(N_TOKENS, -1, np.int64),
            "request_slots": self._slots_of_rows.astype(np.int32),
            "request_ids": np.arange(11, 11 + N_ROWS, dtype=np.uint32),
            "token_history": history,
            "pending": np.zeros(N_ROWS, np.uint8),
        }

    def steps(self) -> Iterator[int]:
        """Fill the arrays for each step, and damage what is due in it."""
        for step, n_new in enumerate(N_NEW):
            self.step = step
            self.block_changes = []
            self._fill(n_new)
            if step == 0:
                self._own()
            if self._is_damaged:
                self._damage()
            yield step

    def write(self) -> None:
        """The model: random bytes into every plane of the slots that the slot mapping names."""
        slots = self.arrays["slot_mapping"]
        for slot in slots[(slots >= 0) & (slots < N_BLOCKS * PAGE_SIZE)].tolist():
            for plane in self.planes:
                self._bytes_of(plane, slot)[...] = self._rng.integers(0, 1 << 8, plane.shape[-1], np.uint8)

    def resident(self) -> Resident:
        """Resident slots for a sweep: what the requests hold; in the damaged script, with an error here and there."""
        rows = np.repeat(np.arange(N_ROWS), self._lengths)
        positions = np.concatenate([np.arange(n) for n in self._lengths])
        slots = self._slot(rows, positions)
        before = np.where(positions > 0, self._slot(rows, np.maximum(positions - 1, 0)), -1)
        tokens = self._tokens[rows, positions]
        if self._is_damaged:
            tokens[3] += 1
            positions[5] += 1
            slots[7] = N_BLOCKS * PAGE_SIZE
            slots[9], slots[10] = slots[10], slots[9]
        return Resident(*(a.astype(np.int32) for a in (slots, positions, before, tokens)))

    def slots(self, row: int) -> Array:
        """The slots of a row's tokens so far: i64[n]."""
        found: Array = self._slot(row, np.arange(self._lengths[row]))
        return found

    def unused_slots(self) -> Array:
        """The slots of blocks that no row has: i64[n]."""
        blocks = np.setdiff1d(np.arange(1, N_BLOCKS), self._table)
        return (blocks[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)

    def _slot(self, row: Any, position: Any) -> Any:
        return self._table[row, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE

    def _bytes_of(self, plane: Array, slot: int) -> Array:
        block, offset = divmod(slot, PAGE_SIZE)
        return plane[block, offset] if plane.shape[1] == PAGE_SIZE else plane[block, :, offset]

    def _fill(self, n_new: Sequence[int]) -> None:
        a = self.arrays
        a["block_table"][...] = self._table
        a["slot_mapping"].fill(-1)
        a["pending"][PENDING_ROW] = self.step == PENDING_STEP
        first = 0
        for row, n in enumerate(n_new):
            if self._is_damaged and n and row == 5 and not self._lengths[row]:
                self._lengths[row] = N_LOADED
            positions = np.arange(self._lengths[row], self._lengths[row] + n)
            a["input_ids"][first : first + n] = self._tokens[row, positions]
            a["slot_mapping"][first : first + n] = self._slot(row, positions)
            first += n
            self._lengths[row] += n
            a["seq_lens"][row], a["query_start_loc"][row + 1] = self._lengths[row], first

    def _own(self) -> None:
        """Each request owns the blocks of its row; one that was shared no more, and some in their second epoch."""
        for row, owner in enumerate(self.arrays["request_ids"].tolist()):
            self.block_changes.append(self._ledger.allocate(self._table[row], owner))
        first = int(self.arrays["request_ids"][0])
        self.block_changes += [
            self._ledger.share(self._table[-1, :2], first),
            self._ledger.free(self._table[-1, :1], first),
            self._ledger.free(self._table[0], first),
            self._ledger.allocate(self._table[0], first),
        ]

    def _damage(self) -> None:
        table, slots = self.arrays["block_table"], self.arrays["slot_mapping"]
        if self.step == 3:  # bits flip in every plane, in half of the slots of two requests
            for row in (0, 2):
                for position in range(0, int(self._lengths[row]) - 1, 2):
                    for plane in self.planes:
                        self._bytes_of(plane, int(self._slot(row, position)))[0, position % 12] ^= 1 << position % 8
        elif self.step == 4:  # a request reads another one's blocks
            table[0] = table[2]
        elif self.step == 5:  # a write is lost, another one goes to the slot of a third request
            slots[1], slots[3] = -1, slots[4]
        elif self.step == 6:  # entries that name no slot
            table[4, 0], table[4, 1], slots[2] = N_BLOCKS + 3, -1, N_BLOCKS * PAGE_SIZE + 5
            for plane in (self.planes[1], self.planes[3], self.planes[4]):  # and NaN in the reserved block
                self._bytes_of(plane, PAGE_SIZE - 3)[-1, 5:] = (1 << 8 * plane.itemsize) - 1
        elif self.step == 7:  # a request goes on with blocks that it has lost to another one
            blocks, owner = self._table[2], int(self.arrays["request_ids"][2])
            self.block_changes += [self._ledger.free(blocks, owner), self._ledger.allocate(blocks, owner + 50)]
