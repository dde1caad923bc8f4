"""Guards of which one is told the same in other words: with more padding, or with its requests in another order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from agree import Array, Arrays, PoolSpec, Side, SimtSide
from agree_twins import Twins

from kvcanary import StepBatch, abi

N_SPARE_ROWS, N_SPARE_TOKENS = 3, 12
_LOW = np.uint64(0xFFFFFFFF)
_BY_ROW = ("seq_lens", "request_slots", "request_ids", "salts", "prefix_chain", "pending", "verify_all")


class Change(NamedTuple):
    """A batch in other words.

    Attributes:
        arrays: of the changed batch.
        row_of: i64[rows of the changed batch], the row that each one was; -1 = padding that was not there.
    """

    arrays: Arrays
    row_of: Array


class ChangedSide(SimtSide):
    """Kernels that are given changed batches; what they say of rows is told as of the unchanged ones."""

    row_of: Array

    def start(self, *args: Any) -> None:
        super().start(*args)
        self.row_of = np.zeros(0, np.int64)

    def rows(self, pool: int, n: int) -> Array:
        found = super().rows(pool, len(self.row_of))
        rows = np.zeros(n, abi.ROW)
        rows[self.row_of[self.row_of >= 0]] = found[self.row_of >= 0]
        return rows

    def taint(self) -> Array:
        found = np.array(self.manager.taint)
        taint, known = np.zeros_like(found), self.row_of >= 0
        taint[self.row_of[known]] = found[: len(self.row_of)][known]
        assert not found[: len(self.row_of)][~known].any() and not found[len(self.row_of) :].any()
        return taint

    def new_records(self, is_acknowledged: bool) -> Array:
        records = super().new_records(is_acknowledged)
        named = records["row"] >= 0
        records["row"][named] = self.row_of[records["row"][named]]
        return records


class ChangedTwins(Twins):
    """Twins of a side and a `ChangedSide`, over pools that have rows and tokens to spare."""

    def __init__(
        self, specs: Sequence[PoolSpec], sides: Sequence[Side], max_requests: int, max_new_tokens: int, **config: Any
    ) -> None:
        self._max_requests = max_requests + N_SPARE_ROWS
        super().__init__(specs, sides, self._max_requests, max_new_tokens + N_SPARE_TOKENS, **config)
        self.rng = random.Random(0)
        self.n_changed = 0
        self._rows = 0
        self._chosen: Sequence[int] = ()  # pools of the forward at hand
        self.is_inner = False  # not a step's first forward: its taint adds to that one's, row by row

    def forward(self, arrays: Arrays, **options: Any) -> Array:
        self._chosen = options.get("pools") or range(len(self.pools))
        self.is_inner = options.get("index", 0) > 0
        return super().forward(arrays, **options)

    def bind(self, arrays: Arrays) -> list[StepBatch]:
        if "token_history" in arrays:  # one row per request slot, of which there are more than the engine uses
            history = arrays["token_history"]
            spare = np.full((max(0, self._max_requests - len(history)), history.shape[1]), 3, np.int32)
            arrays = {**arrays, "token_history": np.concatenate([history, spare])}
        self._rows = len(arrays["query_start_loc"]) - 1
        return [self._bind_side(side, arrays) for side in self.sides]

    def _bind_side(self, side: Side, arrays: Arrays) -> StepBatch:
        given = arrays
        if isinstance(side, ChangedSide):
            given, side.row_of = self.changed(arrays, side.row_of)
            self.n_changed += not np.array_equal(side.row_of, np.arange(self._rows))
        return StepBatch(**{name: _to(side, value) for name, value in given.items()})

    def changed(self, arrays: Arrays, row_of: Array) -> Change:
        """The batch in other words; ``row_of`` is that of the forward before, which an inner one has to keep."""
        raise NotImplementedError

    def _facts(self, side: Side) -> dict[str, Array]:
        self._n_rows = dict.fromkeys(range(len(self.pools)), self._rows)
        facts = super()._facts(side)
        if isinstance(side, ChangedSide):
            facts["taint"] = side.taint()
        for i in range(len(self.pools)):
            rows = facts.pop(f"rows of pool {i}").view(abi.ROW).copy()
            rows["first_token"] = 0
            if i in self._chosen:  # the others' are of an earlier forward
                facts[f"rows of pool {i}"] = rows.view("u4")
            claims = facts[f"claims of pool {i}"].view("u8").copy()  # of writes, the token index may differ
            low = claims & _LOW
            is_write = (low != 0) & (low != abi.CLAIM_FRESH) & (low < 1 << 31)
            claims[is_write] = claims[is_write] >> np.uint64(32) << np.uint64(32) | np.uint64(1)
            facts[f"claims of pool {i}"] = claims
            facts[f"register_claims of pool {i}"] = facts[f"register_claims of pool {i}"].view("u8") >> np.uint64(32)
        return facts

    def _check_untouched(self, batches: Sequence[StepBatch], arrays: Arrays) -> None:
        """Of changed batches, the engine's arrays are not those that were given."""


def _to(side: Side, value: Any) -> Any:
    if isinstance(value, list):
        return [_to(side, v) for v in value]
    return side.to_device(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


# ---- the same batch row by row ---------------------------------------------------------------------------------------
class RowParts(NamedTuple):
    """What the arrays of a batch say of one row: tokens by array name, entries of its tables, values."""

    tokens: dict[str, list[Array]]
    tables: dict[str, list[Array]]
    values: dict[str, list[Any]]


_BY_TOKEN = ("input_ids", "slot_mapping", "expected_tokens")
_TABLES = ("block_table", "kv_indices")


def take_apart(arrays: Arrays) -> list[RowParts]:
    """The rows of a batch; what is one array for all pools becomes a list of one."""
    starts = arrays["query_start_loc"]
    per_pool = {name: value if isinstance(value, list) else [value] for name, value in arrays.items()}
    found = []
    for r in range(len(starts) - 1):
        tokens = {n: [a[starts[r] : starts[r + 1]] for a in per_pool[n]] for n in _BY_TOKEN if n in arrays}
        tables: dict[str, list[Array]] = {}
        if "block_table" in arrays:
            tables["block_table"] = [a[r] for a in per_pool["block_table"]]
        if "kv_indices" in arrays:
            pairs = zip(per_pool["kv_indptr"], per_pool["kv_indices"], strict=True)
            tables["kv_indices"] = [a[p[r] : p[r + 1]] for p, a in pairs]
        values = {n: [a[r] for a in per_pool[n]] for n in (*_BY_ROW, "kv_last_page_len") if n in arrays}
        found.append(RowParts(tokens, tables, values))
    return found


def put_together(rows: Sequence[RowParts], like: Arrays) -> Arrays:
    """A batch of these rows, with the types of another one."""
    arrays = dict(like)
    counts = [len(row.tokens["input_ids"][0]) for row in rows]
    arrays["query_start_loc"] = np.cumsum([0, *counts]).astype(np.int32)
    for name, value in like.items():
        is_list = isinstance(value, list)
        olds = value if is_list else [value]
        if name in _BY_TOKEN:
            new = [np.concatenate([row.tokens[name][i] for row in rows]).astype(a.dtype) for i, a in enumerate(olds)]
        elif name == "block_table":
            new = [np.stack([row.tables[name][i] for row in rows]).astype(a.dtype) for i, a in enumerate(olds)]
        elif name == "kv_indices":
            new = [np.concatenate([row.tables[name][i] for row in rows]).astype(np.int32) for i in range(len(olds))]
        elif name == "kv_indptr":
            lengths = [[len(row.tables["kv_indices"][i]) for row in rows] for i in range(len(olds))]
            new = [np.cumsum([0, *n]).astype(np.int32) for n in lengths]
        elif name in _BY_ROW or name == "kv_last_page_len":
            new = [np.array([row.values[name][i] for row in rows], a.dtype) for i, a in enumerate(olds)]
        else:
            continue
        arrays[name] = new if is_list else new[0]
    return arrays
