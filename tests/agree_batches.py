"""The arrays of a forward, as an engine of some habits would hand them to the guard."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from agree import Arrays
from agree_state import Forward, Habits, Request, Row
from numpy.typing import NDArray

from kvcanary import KvPool
from kvcanary.hashing import prefix_chain

BIG = 1 << 20  # junk that no row reads


def place_of(pool: KvPool, position: int) -> int:
    """The place of a position among those of its request."""
    if position < pool.sink or not pool.ring_length:
        return position
    return pool.sink + pool.ring_bubble + (position - pool.sink) % pool.ring_length


def n_places(pool: KvPool, length: int) -> int:
    """Places of a request of this length: up to the highest that it ever had."""
    return 1 + max((place_of(pool, p) for p in range(length)), default=-1)


def table_pool(luts: Sequence[NDArray[np.int64] | None], i: int) -> int:
    """The pool whose tables place what is in pool i: the first one's, where it has a look-up table behind them."""
    return i if luts[i] is None else 0


class Batches:
    """Makes batches of rows; keeps the history of all request slots.

    Args:
        luts: the look-up table of each pool that has one, else None: such a pool shares the first one's tables.
        has_draft_pools: the history goes one token further.
    """

    def __init__(
        self,
        pools: Sequence[KvPool],
        luts: Sequence[NDArray[np.int64] | None],
        habits: Habits,
        rng: random.Random,
        history_shape: tuple[int, int],
        has_draft_pools: bool,
    ) -> None:
        self.pools, self.luts, self.habits, self.rng = pools, luts, habits, rng
        self.is_static = habits.table == "static"
        self.has_draft_pools = has_draft_pools
        self.history = np.full(history_shape, -1, np.int32)

    def _slots(self, i: int, request: Request, positions: range) -> list[int]:
        """Slots as the engine names them in the tables of pool i."""
        table = table_pool(self.luts, i)
        page, blocks = self.pools[table].page_size, request.blocks[table]
        places = [place_of(self.pools[table], p) for p in positions]
        return [blocks[p // page] * page + p % page for p in places]

    def forward(self, rows: list[Row], chosen: list[int], index: int, shift: int) -> Forward:
        habits, rng = self.habits, self.rng
        ids = [t for row in rows for t in self._ids(row, shift)]
        mappings: list[Any] = []
        written = {}
        for i in chosen:
            named = []
            for row in rows:
                positions = range(row.start, row.start + len(row.ids))
                named += self._slots(i, row.request, positions) if row.request else [self._pad_slot(i)] * len(row.ids)
            mappings.append(np.array(named, np.int64 if habits.wide_slots else np.int32))
            lut = self.luts[i]
            slots = mappings[-1][mappings[-1] >= 0].astype(np.int64)
            written[i] = slots if lut is None else lut[slots][lut[slots] >= 0]
        dtype = np.int64 if habits.wide_ids else np.int32
        arrays: Arrays = {
            "query_start_loc": np.cumsum([0, *(len(row.ids) for row in rows)]).astype(np.int32),
            "input_ids": np.array(ids, dtype),
            "slot_mapping": mappings if len(chosen) > 1 else mappings[0],
            **self._table_arrays(rows, chosen),
        }
        if habits.table != "csr_last_page" or rng.random() < 0.3:
            arrays["seq_lens"] = np.array([row.start + len(row.ids) for row in rows], np.int32)
        if habits.has_expected:
            arrays["expected_tokens"] = np.array([t if rng.random() < 0.8 else -1 for t in ids], dtype)
        arrays |= self._request_arrays(rows, shift)
        return Forward(arrays, index, chosen if len(chosen) < len(self.pools) else None, written)

    def _ids(self, row: Row, shift: int) -> list[int]:
        if not row.request or not shift:
            return row.ids
        text = [*row.request.tokens, 0]
        return text[row.start + shift : row.start + shift + len(row.ids)]

    def _pad_slot(self, i: int) -> int:
        reserved = self.pools[i].reserved_blocks if self.luts[i] is None else ()
        return self.rng.choice([-1, *(b * self.pools[i].page_size for b in reserved)])

    def _entries(self, row: Row, i: int, is_slots: bool) -> list[int]:
        """The row's table for pool i: as long as the row, with what it shows of evicted blocks."""
        pool = self.pools[table_pool(self.luts, i)]
        null = self.rng.choice((-1, *pool.reserved_blocks))
        length = n_places(pool, row.start + len(row.ids))
        shown = row.request.shown[table_pool(self.luts, i)][: -(-length // pool.page_size)] if row.request else []
        blocks = [null if b < 0 else b for b in shown] or [null] * -(-length // pool.page_size)
        if not is_slots:
            return blocks
        return [b * pool.page_size + p if b >= 0 else -1 for b in blocks for p in range(pool.page_size)][:length]

    def _table_arrays(self, rows: list[Row], chosen: list[int]) -> Arrays:
        kind, rng = self.habits.table, self.rng
        if self.is_static:
            return {}
        tables: dict[str, list[Any]] = {}
        for i in chosen:
            entries = [self._entries(row, i, kind == "slots") for row in rows]
            if kind.startswith("csr"):
                lists = [e + ([] if kind == "csr_last_page" else self._junk(rng.randint(0, 2))) for e in entries]
                tables.setdefault("kv_indptr", []).append(np.cumsum([0, *map(len, lists)]).astype(np.int32))
                flat = [b for e in lists for b in e] + self._junk(rng.randint(0, 3))
                tables.setdefault("kv_indices", []).append(np.array(flat, np.int32))
                page = self.pools[table_pool(self.luts, i)].page_size
                last = [
                    row.start + len(row.ids) - max(0, len(e) - 1) * page for row, e in zip(rows, entries, strict=True)
                ]
                if kind == "csr_last_page":
                    tables.setdefault("kv_last_page_len", []).append(np.array(last, np.int32))
                continue
            width, apart = max([1, *map(len, entries)]) + rng.randint(0, 2), rng.randint(0, 2)
            table = np.array(self._junk(len(rows) * (width + apart)), np.int32).reshape(len(rows), width + apart)
            for row, e in zip(table, entries, strict=True):
                row[: len(e)] = e
            tables.setdefault("block_table", []).append(table[:, :width])
        arrays: Arrays = {name: a if len(chosen) > 1 else a[0] for name, a in tables.items()}
        return arrays if kind != "slots" else {**arrays, "table_entries": "slots"}

    def _junk(self, n: int) -> list[int]:
        return [self.rng.choice((-1, 0, 1, 2, BIG)) for _ in range(n)]

    def _request_arrays(self, rows: list[Row], shift: int) -> Arrays:
        habits, rng, arrays = self.habits, self.rng, Arrays()
        requests = [row.request for row in rows]
        if habits.has_ids or habits.has_history:
            arrays["request_slots"] = np.array([r.slot if r else rng.choice((-1, 0)) for r in requests], np.int32)
        if habits.has_ids:
            arrays["request_ids"] = np.array([r.id if r else 0 for r in requests], np.uint32)
        if habits.has_salts:
            arrays["salts"] = np.array([r.salt if r else 9 for r in requests], np.uint64)
        if habits.chains != "none":
            chains = [
                prefix_chain(row.request.tokens[shift : row.start + shift], row.request.salt) if row.request else 0
                for row in rows
            ]
            hidden = [habits.chains == "some" and rng.random() < 0.5 for _ in requests]
            arrays["prefix_chain"] = np.array([0 if h else c for h, c in zip(hidden, chains, strict=True)], np.uint64)
        if habits.has_history:
            for row in rows:
                if row.request:
                    self._write_history(row.request, row.start)
            arrays["token_history"] = self.history.copy()
        for name, is_given in (("pending", habits.has_pending), ("verify_all", habits.has_verify_all)):
            if is_given:
                arrays[name] = np.array([rng.random() < 0.3 for _ in rows], np.uint8)
        return arrays

    def _write_history(self, request: Request, start: int) -> None:
        """The tokens of the request; generated ones may still be on their way, what lies behind is left over."""
        row = self.history[request.slot]
        n = min(request.known + self.has_draft_pools, len(request.tokens))
        row[:n] = request.tokens[:n]
        if not request.is_first and self.habits.has_ids and self.rng.random() < 0.3:
            row[max(1, start - 1) : n] = -1
