"""Batches: what is accepted reaches the kernels' record, what is not is a BatchError that says what to give."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from strategies import (
    MAX_LEN,
    MAX_NEW_TOKENS,
    MAX_REQUESTS,
    batch_arrays,
    host_pool,
    mutated_batch_arrays,
)

from kvcanary import abi
from kvcanary.batch import BoundBatch, StepBatch
from kvcanary.errors import BatchError
from kvcanary.layout import KvPool, Plane
from kvcanary.tags import PoolKind

POINTERS = ("seq_lens", "query_start_loc", "input_ids", "slot_mapping", "request_slots", "request_ids", "salts")
NEXT_STEP = r"\b(give|raise|slice)\b"
POINTERS += ("prefix_chain", "token_history", "expected_tokens", "pending", "verify_all", "kv_indptr")


def bind(pools: list[KvPool] | None = None, device_kind: str = "cpu", **arrays: Any) -> list[BoundBatch]:
    return StepBatch(**arrays).validate(pools or [host_pool()], MAX_REQUESTS, MAX_NEW_TOKENS, device_kind)


def plain(**changes: Any) -> dict[str, Any]:
    """Two rows, three tokens, a dense table of blocks."""
    return {
        "block_table": np.zeros((2, 5), np.int32),
        "seq_lens": np.ones(2, np.int32),
        "query_start_loc": np.zeros(3, np.int32),
        "input_ids": np.zeros(3, np.int32),
        "slot_mapping": np.zeros(3, np.int64),
        **changes,
    }


def address(array: Any) -> int:
    return int(array.ctypes.data)


# ---- what is accepted ------------------------------------------------------------------------------------------------
@given(batch_arrays())
def test_a_valid_batch_is_packed_where_it_lies(arrays: dict[str, Any]) -> None:
    (bound,) = bind(**arrays)
    record = bound.record
    assert record.dtype == abi.BATCH
    assert (record["rows"], record["n_tokens"]) == (bound.rows, bound.n_tokens) == (
        len(arrays["query_start_loc"]) - 1,
        len(arrays["input_ids"]),
    )  # fmt: skip
    for name in POINTERS:
        array = arrays.get(name)
        assert record[name] == (address(array) if array is not None and array.size else 0), name
        assert array is None or np.shares_memory(bound.host(name), array) or not array.size
    assert record["wide_ids"] == (arrays["input_ids"].itemsize == 8)
    assert record["wide_slots"] == (arrays["slot_mapping"].itemsize == 8)
    assert record["history_length"] == (MAX_LEN if "token_history" in arrays else 0)


def why_refused(arrays: dict[str, Any]) -> str | None:
    """The message of the BatchError; None if the batch is accepted."""
    try:
        bind(**arrays)
    except BatchError as error:
        return str(error)
    return None


@given(mutated_batch_arrays())
def test_anything_else_is_refused_with_a_next_step(arrays: dict[str, Any]) -> None:
    message = why_refused(arrays)
    assert message is None or re.search(NEXT_STEP, message), message


def test_a_dense_table_may_have_its_rows_apart() -> None:
    table = np.zeros((2, 8), np.int32)[:, :5]
    (bound,) = bind(**plain(block_table=table))
    record = bound.record
    assert (record["table_kind"], record["table_width"], record["table_stride"]) == (abi.TABLE_DENSE, 5, 8)
    assert (record["block_table"], record["table_page"]) == (address(table), 4)


def test_a_table_of_slots_has_one_position_per_entry() -> None:
    (bound,) = bind(**plain(table_entries="slots"))
    assert (bound.record["table_page"], bound.record["table_width"]) == (1, 5)


def test_a_single_row_has_no_row_stride_of_its_own() -> None:
    one = plain(block_table=np.zeros((4, 5), np.int32)[::4], seq_lens=np.ones(1, np.int32))
    (bound,) = bind(**{**one, "query_start_loc": np.zeros(2, np.int32)})
    assert bound.record["table_stride"] == 5


def test_a_csr_table_goes_without_lengths_if_it_brings_the_last_pages() -> None:
    csr = plain(block_table=None, kv_indptr=np.zeros(3, np.int32), kv_indices=np.zeros(7, np.int32))
    last = np.ones(2, np.int32)
    record = bind(**{**csr, "seq_lens": None, "kv_last_page_len": last})[0].record
    assert (record["table_kind"], record["table_width"]) == (abi.TABLE_CSR, 7)
    assert (record["block_table"], record["kv_indptr"]) == (address(csr["kv_indices"]), address(csr["kv_indptr"]))
    assert (record["kv_last_page_len"], record["seq_lens"]) == (address(last), 0)
    both = bind(**{**csr, "kv_last_page_len": last})[0].record
    assert (both["kv_last_page_len"], both["seq_lens"]) == (0, address(csr["seq_lens"])), "the lengths are given"


def test_a_static_cache_needs_no_table() -> None:
    record = bind(**plain(block_table=None))[0].record
    assert (record["table_kind"], record["table_width"], record["table_page"]) == (abi.TABLE_STATIC, 1, 4)
    with pytest.raises(BatchError, match="1 blocks: give block_table"):
        bind([host_pool(n_blocks=1)], **plain(block_table=None))


def test_each_pool_has_its_table_and_its_slots() -> None:
    pools = [host_pool(), host_pool(page_size=8, name="swa", kind=PoolKind.SWA, window=6)]
    tables = [np.zeros((2, 5), np.int32), np.zeros((2, 3), np.int32)]
    slots = (np.zeros(3, np.int32), np.zeros(3, np.int64))
    full, swa = bind(pools, **plain(block_table=tables, slot_mapping=slots))
    assert [b.pool_index for b in (full, swa)] == [0, 1]
    assert [b.record["table_width"] for b in (full, swa)] == [5, 3]
    assert [b.record["table_page"] for b in (full, swa)] == [4, 8]
    assert [b.record["wide_slots"] for b in (full, swa)] == [0, 1]
    shared = bind(pools, **plain())
    assert shared[0].record["block_table"] == shared[1].record["block_table"], "one array serves all pools"


def test_signed_and_boolean_arrays_are_read_as_the_unsigned_they_mean() -> None:
    given_arrays = plain(
        request_slots=np.zeros(2, np.int32),
        request_ids=np.full(2, -1, np.int32),
        salts=np.full(2, -1, np.int64),
        pending=np.ones(2, np.bool_),
    )
    (bound,) = bind(**given_arrays)
    for name, value in (("request_ids", 2**32 - 1), ("salts", 2**64 - 1), ("pending", 1)):
        host = bound.host(name)
        assert host is not None and host.tolist() == [value] * 2


def test_a_raw_host_array_is_read_as_what_it_must_be() -> None:
    ids = np.arange(3, dtype=np.int32)
    (bound,) = bind(**plain(input_ids=(address(ids), (3,), None, 4, "cpu")))
    host = bound.host("input_ids")
    assert host is not None and host.dtype == np.int32 and host.tolist() == [0, 1, 2]
    assert bound.host("salts") is None


# ---- what is refused -------------------------------------------------------------------------------------------------
I32 = np.int32
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float table": ({"block_table": np.zeros((2, 5), np.float32)}, "block_table is float32: give int32"),
    "wide lengths": ({"seq_lens": np.ones(2, np.int64)}, "seq_lens is int64: give int32"),
    "narrow ids": ({"input_ids": np.zeros(3, np.int16)}, "input_ids is int16: give int32 or int64"),
    "narrow chain": ({"prefix_chain": np.zeros(2, np.uint32)}, "prefix_chain is uint32: give uint64 or int64"),
    "flat table": ({"block_table": np.zeros(10, I32)}, r"block_table has shape \(10,\): give 2 axes of int32"),
    "table by request slot": (
        {"block_table": np.zeros((9, 5), I32)},
        "9 rows, seq_lens 2: give the rows of this batch",
    ),
    "column-major table": ({"block_table": np.zeros((5, 2), I32).T}, "give a contiguous last axis"),
    "rows upon each other": ({"block_table": np.broadcast_to(np.zeros(5, I32), (2, 5))}, "rows apart and aligned"),
    "strided lengths": ({"seq_lens": np.ones(4, I32)[::2]}, "seq_lens .* give a contiguous array"),
    "strided history": (
        {"request_slots": np.zeros(2, I32), "token_history": np.zeros((6, 80), I32)[:, :40]},
        "token_history .* give a contiguous array",
    ),
    "short history": (
        {"request_slots": np.zeros(2, I32), "token_history": np.zeros((5, 40), I32)},
        "token_history has 5 rows: give one per request slot, 6",
    ),
    "a history of nothing": (
        {"request_slots": np.zeros(2, I32), "token_history": np.zeros((6, 0), I32)},
        r"token_history has shape \(6, 0\), no room for a token: give i32\[max_requests, tokens of",
    ),
    "starts without an end": (
        {"query_start_loc": np.zeros(2, I32)},
        r"query_start_loc has 2 entries, 2 rows .* need 3",
    ),
    "unsliced slots": ({"slot_mapping": np.zeros(24, I32)}, "slot_mapping has 24 entries, 3 input_ids need 3: slice"),
    "unsliced ids of requests": ({"request_slots": np.zeros(6, I32)}, "request_slots has 6 entries, 2 rows"),
    "ids of two widths": (
        {"expected_tokens": np.zeros(3, np.int64)},
        "8 bytes an entry, input_ids 4: give both the same",
    ),
    "too many rows": (
        {"seq_lens": np.ones(7, I32)},
        "7 rows, the manager has room for 6: raise max_requests",
    ),
    "too many tokens": (
        {"input_ids": np.zeros(25, I32), "slot_mapping": np.zeros(25, I32)},
        "25 tokens, the manager has room for 24: raise max_new_tokens",
    ),
    "no slots": ({"slot_mapping": None}, "slot_mapping: not given; give them"),
    "no slots of one pool": ({"slot_mapping": [None]}, "slot_mapping is None for one of the pools"),
    "no lengths": ({"seq_lens": None}, "seq_lens: not given; give"),
    "ids without slots": ({"request_ids": np.zeros(2, np.uint32)}, "request_ids is given without request_slots"),
    "history without slots": (
        {"token_history": np.zeros((6, 40), I32)},
        "token_history is given without request_slots",
    ),
    "half a CSR table": ({"kv_indptr": np.zeros(3, I32)}, "a CSR table has both"),
    "last pages of no table": ({"kv_last_page_len": np.ones(2, I32)}, "give those too, it belongs to a CSR table"),
    "two tables": (
        {"kv_indptr": np.zeros(3, I32), "kv_indices": np.zeros(3, I32)},
        "block_table and kv_indptr are both given",
    ),
    "slots without a table": ({"block_table": None, "table_entries": "slots"}, "table_entries='slots' without a table"),
    "unknown entries": ({"table_entries": "pages"}, "table_entries='pages': give 'blocks' or 'slots'"),
    "tables of other pools": (
        {"block_table": [np.zeros((2, 5), I32)] * 2},
        "sequence of 2 arrays: give 1, one per pool",
    ),
    "a list of numbers": ({"seq_lens": [1, 1]}, "seq_lens: list is no array; give a NumPy"),
    "big-endian ids": ({"input_ids": np.zeros(3, ">i4")}, "input_ids is >i4: give int32 or int64"),
    "on the GPU": ({"input_ids": (4096, (3,), None, 4)}, "input_ids is on cuda:0, the guard runs on cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(BatchError, match=message):
        bind(**plain(**changes))


def gpu_pool(device: str = "cuda:0") -> KvPool:
    """A pool at an address that nobody reads."""
    plane = Plane(data=(1 << 20, (4096,), None, 1, device), page_stride=256, token_stride=64, chunk_bytes=64)
    return KvPool(planes=(plane,), page_size=4)


def test_a_host_array_cannot_guard_a_gpu() -> None:
    with pytest.raises(BatchError, match=r"seq_lens is in host memory, the guard runs on cuda:0: give the array"):
        bind([gpu_pool()], "cuda", **plain())


def test_an_array_of_another_gpu_is_refused() -> None:
    on_gpu = {name: (4096, a.shape, None, a.itemsize) for name, a in plain().items()}
    (bound,) = bind([gpu_pool()], "cuda", **on_gpu)
    assert bound.record["seq_lens"] == 4096 and bound.host("seq_lens") is None
    with pytest.raises(BatchError, match=r"is on cuda:0, the guard runs on cuda:1: .* names its device as fifth"):
        bind([gpu_pool("cuda:1")], "cuda", **on_gpu)


def test_a_pool_of_stamps_alone_takes_the_device_of_the_guard() -> None:
    stamps = KvPool(planes=(), n_blocks=8, page_size=4)
    assert bind([stamps], **plain())[0].rows == 2
    with pytest.raises(BatchError, match="in host memory, the guard runs on cuda"):
        bind([stamps], "cuda", **plain())
