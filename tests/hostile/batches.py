"""Batches of one shape, as a captured graph has them: bound once, their contents plausible or noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from agree import Arrays
from numpy.typing import NDArray

from kvcanary import KvPool

from .values import Noise

Array = NDArray[Any]
N_TOKENS = 6  # vocabulary: different requests often say the same
_OPTIONAL = (
    *("request_ids", "salts", "prefix_chain", "token_history", "expected_tokens", "pending", "verify_all"),
    "request_slots",
)
_PER_ROW = {"request_ids": np.uint32, "salts": np.uint64, "prefix_chain": np.uint64, "pending": np.uint8}
# Of values alone, which are compared and never looked up: noise in them reaches nothing new.
_VALUES_ALONE = ("salts", "prefix_chain")


class Shape:
    """The shapes and types of a batch's arrays; `plausible` and `spoiled` give contents.

    Args:
        chosen: numbers of the pools that its forwards write.
        reached: by request slot, the length of the request there, for forwards that go on.
    """

    def __init__(
        self, rng: random.Random, pools: Sequence[KvPool], chosen: Sequence[int], reached: Array, max_tokens: int
    ) -> None:
        max_requests = len(reached)
        self.pools, self.chosen = [pools[i] for i in chosen], list(chosen)
        self.max_requests = max_requests
        self.rows = rng.choice((0, 1, max_requests, rng.randint(1, max_requests)))
        self.n_tokens = rng.choice((0, 1, 3, self.rows, 33, rng.randint(0, max_tokens)))
        self.n_tokens = min(self.n_tokens, max_tokens)
        kinds = ["blocks", "slots", "csr", "csr_last_page"]
        is_static = all(not p.reserved_blocks and self.rows <= p.n_blocks and p.lut_view is None for p in self.pools)
        self.table = rng.choice([*kinds, "static"] if is_static else kinds)
        self.width, self.apart = rng.choice((0, 1, 2, 5, 9)), rng.choice((0, 0, 1, 3))
        self.ids, self.slots = (rng.choice((np.int32, np.int64)) for _ in range(2))
        self.history_length = rng.choice((2, 1, 20, 40))
        self.optional = {name for name in _OPTIONAL if rng.random() < (0.8 if name.startswith("request") else 0.5)}
        if self.optional & {"request_ids", "token_history"}:
            self.optional.add("request_slots")
        self.reached = reached
        self.has_lengths = self.table != "csr_last_page" or rng.random() < 0.5

    @property
    def near(self) -> list[int]:
        """Numbers that the guard compares this batch's values with."""
        sizes = [n for p in self.pools for n in (p.n_slots, p.n_blocks, p.page_size, self.width * p.page_size)]
        return [*sizes, self.rows, self.n_tokens, self.width, self.max_requests, self.history_length, 16, 32, 128]

    def plausible(self, noise: Noise) -> Arrays:
        """Contents that a somewhat confused engine could hand in."""
        rng, rows, n = noise.rng, self.rows, self.n_tokens
        starts = np.concatenate([[0], np.sort(rng.integers(0, n + 1, rows))]) if rows else np.zeros(1)
        n_new = np.diff(starts).astype(np.int64)
        arrays: Arrays = {
            "query_start_loc": starts.astype(np.int32),
            "input_ids": rng.integers(0, N_TOKENS, n).astype(self.ids),
        }
        page = max(p.page_size for p in self.pools)
        room = max(2, self.width * (1 if self.table == "slots" else page))
        lengths = n_new + rng.integers(0, room, rows)
        slots = rng.permutation(self.max_requests)[:rows]
        goes_on = noise.maybe(0.8)
        if goes_on:
            lengths = n_new + self.reached[slots]
            self.reached[slots] = np.where(lengths < room, lengths, 0)
        row, nth = np.repeat(np.arange(rows), n_new), np.arange(int(n_new.sum())) - np.repeat(starts[:-1], n_new)
        position = (lengths - n_new)[row] + nth.astype(np.int64)
        tables = [self._table(noise, pool) for pool in self.pools]
        mappings = [self._mapping(noise, p, t, row, position) for p, t in zip(self.pools, tables, strict=True)]
        arrays["slot_mapping"] = _per_pool(mappings)
        for name in tables[0]:
            arrays[name] = _per_pool([t[name] for t in tables])
        if self.table == "slots":
            arrays["table_entries"] = "slots"
        if self.has_lengths:
            arrays["seq_lens"] = lengths.astype(np.int32)
        arrays |= self._optional_arrays(noise)
        if "request_slots" in arrays:
            arrays["request_slots"] = slots.astype(np.int32)
        if "request_ids" in arrays and goes_on:
            arrays["request_ids"] = slots.astype(np.uint32) + np.uint32(1)
        return arrays

    def _table(self, noise: Noise, pool: KvPool) -> Arrays:
        if self.table == "static":
            return {}
        high = pool.n_slots if self.table == "slots" else pool.n_blocks
        if self.table in ("blocks", "slots"):
            wide = noise.rng.integers(0, high, (self.rows, self.width + self.apart)).astype(np.int32)
            return {"block_table": wide[:, : self.width]}
        ends = np.sort(noise.rng.integers(0, self.width * max(1, self.rows) + 1, self.rows)).astype(np.int32)
        indices = noise.rng.integers(0, high, self.width * max(1, self.rows)).astype(np.int32)
        table: Arrays = {"kv_indptr": np.concatenate([np.zeros(1, np.int32), ends]), "kv_indices": indices}
        if self.table == "csr_last_page":
            table["kv_last_page_len"] = noise.rng.integers(0, pool.page_size + 1, self.rows).astype(np.int32)
        return table

    def _mapping(self, noise: Noise, pool: KvPool, table: Arrays, row: Array, position: Array) -> Array:
        """Where the table says, if it can be said at a glance; else anywhere."""
        named = noise.rng.integers(-1, pool.n_slots, self.n_tokens)
        page = 1 if self.table == "slots" else pool.page_size
        if "block_table" in table and self.width:
            index = np.minimum(position // page, self.width - 1)
            named[: len(row)] = table["block_table"][row, index].astype(np.int64) * page + position % page
        elif self.table == "static":
            named[: len(row)] = row * page + position % page
        return named.astype(self.slots)

    def _optional_arrays(self, noise: Noise) -> Arrays:
        rng, rows, arrays = noise.rng, self.rows, Arrays()
        for name in sorted(self.optional):
            if name == "request_slots":
                arrays[name] = np.zeros(rows, np.int32)
            elif name == "token_history":
                shape = (self.max_requests, self.history_length)
                arrays[name] = rng.integers(-1, N_TOKENS, shape).astype(np.int32)
            elif name == "expected_tokens":
                arrays[name] = rng.integers(-1, N_TOKENS, self.n_tokens).astype(self.ids)
            else:
                high = 5 if name == "request_ids" else 2
                arrays[name] = rng.integers(0, high, rows).astype(_PER_ROW.get(name, np.uint8))
        return arrays

    def spoiled(self, noise: Noise, arrays: Arrays) -> Arrays:
        """The same with noise in some of the arrays; at times in all of them."""
        given = [name for name, value in arrays.items() if isinstance(value, (list, np.ndarray))]
        likely = [name for name in given if name not in _VALUES_ALONE]
        n = len(given) if noise.maybe(0.1) else 1 + min(noise.below(5), len(given) - 1)
        names = given if n == len(given) else noise.rng.choice(likely, min(n, len(likely)), replace=False).tolist()
        spoiled = dict(arrays)
        for name in names:
            value = arrays[name]
            if isinstance(value, list):
                spoiled[name] = [self._noise_like(noise, v) for v in value]
            else:
                spoiled[name] = self._noise_like(noise, value)
        return spoiled

    def _noise_like(self, noise: Noise, value: Array) -> Array:
        found = noise.fill(value.shape, value.dtype, value)
        if value.ndim == 2 and not value.flags.c_contiguous:
            wide = np.zeros((value.shape[0], value.strides[0] // value.itemsize), value.dtype)
            wide[:, : value.shape[1]] = found
            return wide[:, : value.shape[1]]
        return found


def _per_pool(values: list[Any]) -> Any:
    return values if len(values) > 1 else values[0]
