"""One forward's arrays: what the engine hands in, checked once and turned into what the kernels read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.arrays import ArrayView, view_of
from kvcanary.errors import BatchError
from kvcanary.keywords import refuse_unknown_keywords
from kvcanary.layout import KvPool

_MAX_I32 = (1 << 31) - 1


class _Kind(NamedTuple):
    """Element types that an input may have, and its axes; of two types of one width the guard reads it as the first."""

    accepted: tuple[str, ...]
    axes: int = 1


_I32 = _Kind(("int32",))
_I32_OR_I64 = _Kind(("int32", "int64"))
_TABLE = _Kind(("int32",), axes=2)
_U64 = _Kind(("uint64", "int64"))
_U32 = _Kind(("uint32", "int32"))
_U8 = _Kind(("uint8", "bool"))
_KINDS: dict[str, _Kind] = {
    "block_table": _TABLE,
    "kv_indptr": _I32,
    "kv_indices": _I32,
    "kv_last_page_len": _I32,
    "seq_lens": _I32,
    "query_start_loc": _I32,
    "input_ids": _I32_OR_I64,
    "slot_mapping": _I32_OR_I64,
    "request_slots": _I32,
    "request_ids": _U32,
    "salts": _U64,
    "prefix_chain": _U64,
    "token_history": _TABLE,
    "expected_tokens": _I32_OR_I64,
    "pending": _U8,
    "verify_all": _U8,
}
_PER_POOL = ("block_table", "kv_indptr", "kv_indices", "kv_last_page_len", "slot_mapping")
_PER_ROW = ("seq_lens", "request_slots", "request_ids", "salts", "prefix_chain", "pending", "verify_all")
_REQUIRED = ("query_start_loc", "input_ids", "slot_mapping")
_PER_TOKEN = ("input_ids", "slot_mapping", "expected_tokens")


@dataclass(frozen=True, eq=False, kw_only=True)
class StepBatch:
    """The arrays of one forward, where the engine keeps them: nothing is copied, a captured graph reads them anew.

    rows <= max_requests; a row without new tokens is padding. Any array that `kvcanary.arrays.view_of` takes. Their
    contents may change from forward to forward; other arrays are another `StepBatch`. Between HEAD and TAIL they stay
    as they are, for TAIL reads them again: all but ``input_ids`` and ``seq_lens``, and these too with ``overlap_head``.

    Attributes:
        block_table: i32[rows, max_blocks] by batch row, of blocks or (``table_entries="slots"``) of slots, or a
            sequence of such arrays, one per pool of the forward (all, or those that its ``pools=`` names); None for CSR
            tables and for static caches, where row r has block r.
        seq_lens: i32[rows], tokens after this forward; None only with ``kv_last_page_len``.
        query_start_loc: i32[rows + 1], where each row's new tokens begin in the token arrays; the last is
            the end of the last row's.
        input_ids: i32 or i64[tokens], the new tokens, row after row; what lies behind the last row is padding.
        slot_mapping: i32 or i64[tokens], the slot each token is written to, negative = none; or one per pool.
        request_slots: i32[rows], small stable integer of the request, in [0, max_requests); negative = none.
        request_ids: u32 or i32[rows] of 32 bits that are never reused, nor kept for another text (a beam that goes on
            from another one); 0 and -1 (`kvcanary.PREFIX_CACHE`, which has no rows) = unknown: of such a row nothing
            is remembered.
        salts: u64[rows], what the KV of a row depends on beside its tokens, as one number: adapter, tenant, ...; rows
            may share KV only under equal salts. A request keeps its own as long as it lives. None = 0 for all.
        prefix_chain: u64[rows], `CanaryManager.chain` of the prefix; read on a request's first forward.
        token_history: i32[max_requests, max_len] by request slot; negative = not judged, nor is what lies
            behind max_len.
        expected_tokens: [tokens], of the element type of ``input_ids``: what the scheduler meant them to be; negative =
            not judged.
        pending: u8[rows], 1 = KV of this row is still being loaded.
        verify_all: u8[rows], 1 = digest the whole prefix; set it for a row whose KV came from elsewhere since its last
            forward (a preempted request that resumes with a hit near its old length looks like one that went on).
        kv_indptr: i32[rows + 1], where each row's entries begin in ``kv_indices`` (CSR tables).
        kv_indices: i32[entries].
        kv_last_page_len: i32[rows], tokens in a row's last page.
        table_entries: what the entries of the table number.
    """

    block_table: Any = None
    seq_lens: Any = None
    query_start_loc: Any
    input_ids: Any
    slot_mapping: Any
    request_slots: Any = None
    request_ids: Any = None
    salts: Any = None
    prefix_chain: Any = None
    token_history: Any = None
    expected_tokens: Any = None
    pending: Any = None
    verify_all: Any = None
    kv_indptr: Any = None
    kv_indices: Any = None
    kv_last_page_len: Any = None
    table_entries: Literal["blocks", "slots"] = "blocks"

    def validate(
        self, pools: Sequence[KvPool], max_requests: int, max_new_tokens: int, device_kind: str
    ) -> list[BoundBatch]:
        """Check the arrays against each other and the capacities; reads no element and may run inside a capture.

        Args:
            device_kind: where the guard runs, "cpu" or "cuda".

        Returns:
            One per pool, in the order of ``pools``.

        Raises:
            BatchError: arrays that do not fit together, or do not fit into the manager.
        """
        _check_choices(self)
        shared = {
            name: _resolve(name, getattr(self, name))
            for name in _KINDS
            if name not in _PER_POOL and getattr(self, name) is not None
        }
        per_pool = {name: _split(name, getattr(self, name), len(pools)) for name in _PER_POOL}
        bound = []
        for i, pool in enumerate(pools):
            views = dict(shared)
            for name, values in per_pool.items():
                if values[i] is not None:
                    views[name] = _resolve(name, values[i])
            for name, view in views.items():
                _check_device(name, view, pool, device_kind)
            rows, n_tokens = _check_shapes(views, max_requests, max_new_tokens)
            _check_table(views, pool, rows, self.table_entries)
            bound.append(BoundBatch(i, rows, n_tokens, views, _record(views, pool, rows, n_tokens, self.table_entries)))
        return bound


refuse_unknown_keywords(StepBatch, BatchError)


@dataclass(frozen=True, eq=False)
class BoundBatch:
    """A checked batch for one pool.

    Attributes:
        record: BATCH, 0-d; the fields that depend on the configuration (``check_write_position`` and those behind it)
            are the manager's to fill.
        views: the arrays that were given, by name.
    """

    pool_index: int
    rows: int
    n_tokens: int
    views: Mapping[str, ArrayView]
    record: npt.NDArray[Any]

    def host(self, name: str) -> npt.NDArray[Any] | None:
        """The array in host memory as the guard reads it (bool as u8, ids and chains unsigned); None if not given."""
        view = self.views.get(name)
        return None if view is None else view.host


# ---- one array -------------------------------------------------------------------------------------------------------
def _resolve(name: str, value: object) -> ArrayView:
    view = view_of(value, name, BatchError)
    kind = _KINDS[name]
    widths = {np.dtype(d).itemsize: d for d in reversed(kind.accepted)}
    wanted = " or ".join(kind.accepted)
    if len(view.shape) != kind.axes:
        raise BatchError(f"{name} has shape {view.shape}: give {kind.axes} axes of {wanted}")
    if view.dtype not in ("", *kind.accepted) or view.itemsize not in widths:
        given = view.dtype or f"{view.itemsize} bytes wide"
        raise BatchError(f"{name} is {given}: give {wanted}")
    if view.size and view.pointer % view.itemsize:
        raise BatchError(
            f"{name} begins at {view.pointer:#x}, off its {view.itemsize}-byte alignment: give an aligned array"
        )
    is_table = name == "block_table"
    if not (_rows_are_contiguous(view) if is_table else view.is_contiguous):
        what = "a contiguous last axis, rows apart and aligned" if is_table else "a contiguous array"
        raise BatchError(f"{name} has shape {view.shape} with strides {view.strides} (bytes): give {what}")
    if view.host is None:
        return view
    return replace(view, host=view.host.view(widths[view.itemsize]))


def _rows_are_contiguous(view: ArrayView) -> bool:
    (rows, width), (row_stride, stride) = view.shape, view.strides
    if not view.size:
        return True
    if width > 1 and stride != view.itemsize:
        return False
    return rows == 1 or (row_stride >= width * view.itemsize and row_stride % view.itemsize == 0)


def _split(name: str, value: Any, n_pools: int) -> Sequence[Any]:
    """The value of each pool; a tuple that begins with an integer is one raw array."""
    is_sequence = isinstance(value, (list, tuple)) and not (value and isinstance(value[0], (int, np.integer)))
    if not is_sequence:
        return [value] * n_pools
    if len(value) != n_pools:
        raise BatchError(
            f"{name} is a sequence of {len(value)} arrays: give {n_pools}, one per pool of this forward, or one for all"
        )
    if name in _REQUIRED and any(v is None for v in value):
        raise BatchError(f"{name} is None for one of the pools: give an array for each, every forward has it")
    return list(value)


def _check_device(name: str, view: ArrayView, pool: KvPool, device_kind: str) -> None:
    wanted = pool.device or device_kind
    where = view.device if pool.device else view.device.split(":")[0]
    if where == wanted:
        return
    if view.is_host:
        raise BatchError(
            f"{name} is in host memory, the guard runs on {wanted}: give the array that the engine's kernels read"
        )
    raise BatchError(
        f"{name} is on {view.device}, the guard runs on {wanted}: give the arrays that lie beside the KV cache "
        "(a raw tuple names its device as fifth element)"
    )


# ---- the arrays together ---------------------------------------------------------------------------------------------
def _check_choices(batch: StepBatch) -> None:
    if not isinstance(batch.table_entries, str) or batch.table_entries not in ("blocks", "slots"):
        raise BatchError(f"table_entries={batch.table_entries!r}: give 'blocks' or 'slots'")
    missing = [name for name in _REQUIRED if getattr(batch, name) is None]
    if missing:
        raise BatchError(f"{', '.join(missing)}: not given; give them, every forward has them")
    if (batch.kv_indptr is None) != (batch.kv_indices is None):
        raise BatchError("kv_indptr and kv_indices: one is not given; give both, a CSR table has both")
    if batch.kv_indptr is None and batch.kv_last_page_len is not None:
        raise BatchError(
            "kv_last_page_len is given without kv_indptr and kv_indices: give those too, it belongs to a CSR table"
        )
    if batch.block_table is not None and batch.kv_indptr is not None:
        raise BatchError("block_table and kv_indptr are both given: give the table that the attention kernels read")
    if batch.seq_lens is None and batch.kv_last_page_len is None:
        raise BatchError("seq_lens: not given; give i32[rows], or kv_last_page_len with a CSR table")
    for name in ("request_ids", "token_history"):
        if getattr(batch, name) is not None and batch.request_slots is None:
            raise BatchError(f"{name} is given without request_slots, by which it is looked up: give i32[rows]")


def _check_shapes(views: Mapping[str, ArrayView], max_requests: int, max_new_tokens: int) -> tuple[int, int]:
    by_row = "seq_lens" if "seq_lens" in views else "kv_last_page_len"
    if by_row not in views:
        raise BatchError("seq_lens: not given, and kv_last_page_len is None for some pool; give i32[rows]")
    rows, n_tokens = views[by_row].shape[0], views["input_ids"].shape[0]
    if rows > max_requests:
        raise BatchError(f"{rows} rows, the manager has room for {max_requests}: raise max_requests")
    if n_tokens > max_new_tokens:
        raise BatchError(f"{n_tokens} tokens, the manager has room for {max_new_tokens}: raise max_new_tokens")
    wanted = dict.fromkeys((*_PER_ROW, "kv_last_page_len"), rows)
    wanted.update(dict.fromkeys(_PER_TOKEN, n_tokens))
    wanted.update(query_start_loc=rows + 1, kv_indptr=rows + 1)
    for name, n in wanted.items():
        if name in views and views[name].shape[0] != n:
            of = f"{n_tokens} input_ids" if name in _PER_TOKEN else f"{rows} rows ({by_row})"
            raise BatchError(f"{name} has {views[name].shape[0]} entries, {of} need {n}: slice it to the batch")
    expected, ids, history = views.get("expected_tokens"), views["input_ids"], views.get("token_history")
    if expected is not None and expected.itemsize != ids.itemsize:
        raise BatchError(
            f"expected_tokens has {expected.itemsize} bytes an entry, input_ids {ids.itemsize}: give both the same type"
        )
    if history is not None and not history.shape[1]:
        raise BatchError(
            f"token_history has shape {history.shape}, no room for a token: give i32[max_requests, tokens of the "
            "longest request], or None"
        )
    if history is not None and history.shape[0] < max_requests:
        raise BatchError(f"token_history has {history.shape[0]} rows: give one per request slot, {max_requests}")
    return rows, n_tokens


def _check_table(views: Mapping[str, ArrayView], pool: KvPool, rows: int, entries: str) -> None:
    table = views.get("block_table")
    if table is not None and table.shape[0] != rows:
        raise BatchError(
            f"block_table has {table.shape[0]} rows, seq_lens {rows}: give the rows of this batch, in its order"
        )
    widest = max((n for name in ("block_table", "kv_indices") if name in views for n in views[name].shape), default=0)
    if widest > _MAX_I32:
        raise BatchError(f"the table has {widest} entries: slice it to at most {_MAX_I32}")
    if ("kv_indptr" in views) != ("kv_indices" in views):
        raise BatchError(f"pool {pool.name!r} has one of kv_indptr and kv_indices: give it both")
    if table is not None or "kv_indptr" in views:
        return
    if entries == "slots":
        raise BatchError("table_entries='slots' without a table: give block_table, or kv_indptr and kv_indices")
    if pool.reserved_blocks:
        raise BatchError(
            f"no table, where row r has block r, but pool {pool.name!r} reserves blocks {pool.reserved_blocks}: "
            "rows there would not be guarded; make the pool of a static cache with reserved_blocks=()"
        )
    if rows > pool.n_blocks:
        raise BatchError(
            f"{rows} rows without a table, where row r has block r, and pool {pool.name!r} has {pool.n_blocks} blocks: "
            "give block_table, or a pool with a block per row"
        )


def _record(views: Mapping[str, ArrayView], pool: KvPool, rows: int, n_tokens: int, entries: str) -> npt.NDArray[Any]:
    record = abi.zeros_of(abi.BATCH)
    for name, view in views.items():
        if name != "kv_indices" and not (name == "kv_last_page_len" and "seq_lens" in views):
            record[name] = view.pointer
    record["rows"], record["n_tokens"] = rows, n_tokens
    record["table_page"] = 1 if entries == "slots" else pool.page_size
    named = pool.n_slots if pool.lut_view is None else min(pool.lut_view.shape[0], _MAX_I32)
    record["table_limit"] = -(-named // int(record["table_page"]))
    record["table_shift"] = abi.log2_or_negative(int(record["table_page"]))
    table, indices = views.get("block_table"), views.get("kv_indices")
    if table is not None:
        width = table.shape[1]
        record["table_kind"], record["table_width"] = abi.TABLE_DENSE, width
        record["table_stride"] = table.strides[0] // table.itemsize if rows > 1 and width else width
    elif indices is not None:
        record["table_kind"], record["table_width"] = abi.TABLE_CSR, indices.shape[0]
        record["block_table"] = indices.pointer
    else:
        record["table_kind"], record["table_width"] = abi.TABLE_STATIC, 1
    record["wide_ids"] = views["input_ids"].itemsize == 8
    record["wide_slots"] = views["slot_mapping"].itemsize == 8
    if "token_history" in views:
        record["history_length"] = views["token_history"].shape[1]
    return record
