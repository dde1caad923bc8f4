"""Hypothesis strategies, and the little around them, that several test files share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvcanary import layouts
from kvcanary.layout import KvPool, Plane, plane_address


class Form(NamedTuple):
    """The affine form of one plane: counts and strides (bytes) of blocks, tokens and chunks."""

    n_blocks: int
    page_size: int
    n_chunks: int
    chunk_bytes: int
    page_stride: int
    token_stride: int
    chunk_stride: int
    tok_split: int = 0
    tok_hi_stride: int = 0

    @property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """(stride, count) of blocks, runs of tokens, tokens and chunks."""
        run = self.tok_split or self.page_size
        counts = self.n_blocks, self.page_size // run, run, self.n_chunks
        strides = self.page_stride, self.tok_hi_stride, self.token_stride, self.chunk_stride
        return tuple(zip(strides, counts, strict=True))

    @property
    def span(self) -> int:
        """Bytes from the first to behind the last."""
        return self.chunk_bytes + sum((n - 1) * stride for stride, n in self.axes)

    @property
    def starts(self) -> list[int]:
        """Offset of every chunk of every slot, by the definition."""
        n_blocks, page_size, n_chunks = self[:3]
        run = self.tok_split or page_size
        tokens = [t // run * self.tok_hi_stride + t % run * self.token_stride for t in range(page_size)]
        return [
            b * self.page_stride + token + c * self.chunk_stride
            for b in range(n_blocks)
            for token in tokens
            for c in range(n_chunks)
        ]

    def plane(self, data: Any, offset: int = 0) -> Plane:
        return Plane(
            data=data,
            offset=offset,
            page_stride=self.page_stride,
            token_stride=self.token_stride,
            chunk_stride=self.chunk_stride,
            n_chunks=self.n_chunks,
            chunk_bytes=self.chunk_bytes,
            tok_split=self.tok_split,
            tok_hi_stride=self.tok_hi_stride,
        )

    def pool(self, data: Any, offset: int = 0) -> KvPool:
        return KvPool(
            planes=(self.plane(data, offset),), page_size=self.page_size, n_blocks=self.n_blocks, reserved_blocks=()
        )


def digested_offsets(pool: KvPool, flat: NDArray[np.uint8], slot: int, real_data: str = "all") -> NDArray[np.int64]:
    """Offset in ``flat`` of every digested byte of a slot, in digest order, by the plane records."""
    found = [
        plane_address(record, slot, pool.page_size, byte) - flat.ctypes.data
        for record in pool.plane_records(real_data)
        for byte in range(record["n_chunks"] * record["chunk_bytes"])
    ]
    return np.array(found)


_COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
_CHUNK_BYTES = st.sampled_from([1, 2, 3, 4, 6, 8, 16, 20, 32])


@st.composite
def nested_forms(draw: st.DrawFn) -> Form:
    """A form whose axes nest in any order (page inside token too), with or without padding between their steps."""
    (n_blocks, run, n_chunks), chunk_bytes = draw(_COUNTS), draw(_CHUNK_BYTES)
    n_runs = draw(st.sampled_from([0, 0, 1, 2, 3]))  # 0: the tokens are not split
    counts = n_blocks, run, n_chunks, max(1, n_runs)
    strides, extent = [0, 0, 0, 0], chunk_bytes
    for axis in draw(st.permutations(range(4))):
        strides[axis] = extent + draw(st.sampled_from([0, 0, 0, 1, 4, 16]))
        extent = strides[axis] * counts[axis]
    split = (run, strides[3]) if n_runs else (0, 0)
    return Form(n_blocks, run * max(1, n_runs), n_chunks, chunk_bytes, *strides[:3], *split)


@st.composite
def any_forms(draw: st.DrawFn) -> Form:
    """A form of small arbitrary strides: most overlap somewhere."""
    strides = [draw(st.integers(0, 24)) for _ in range(4)]
    n_blocks, run, n_chunks = draw(_COUNTS)
    n_runs = draw(st.sampled_from([0, 0, 1, 2, 3]))
    split = (run, strides[3]) if n_runs else (0, 0)
    return Form(n_blocks, run * max(1, n_runs), n_chunks, draw(st.integers(1, 6)), *strides[:3], *split)


MAX_REQUESTS, MAX_NEW_TOKENS, MAX_LEN = 6, 24, 40


def host_pool(n_blocks: int = 8, page_size: int = 4, **fields: Any) -> KvPool:
    """A small pool in host memory, one layer of K and V."""
    k, v = np.zeros((2, n_blocks, page_size, 2, 4), np.float16)
    return layouts.nhd(k=[k], v=[v], **{"reserved_blocks": (), **fields})


@st.composite
def batch_arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Keywords of a valid StepBatch for `host_pool`: any table kind, any subset of the optional arrays."""
    rows, n_tokens = draw(st.integers(0, MAX_REQUESTS)), draw(st.integers(0, MAX_NEW_TOKENS))
    ids, slots = (draw(st.sampled_from([np.int32, np.int64])) for _ in range(2))
    arrays: dict[str, Any] = {
        "seq_lens": np.ones(rows, np.int32),
        "query_start_loc": np.zeros(rows + 1, np.int32),
        "input_ids": np.zeros(n_tokens, ids),
        "slot_mapping": np.zeros(n_tokens, slots),
    }
    table = draw(st.sampled_from(["blocks", "slots", "csr", "static"]))
    if table in ("blocks", "slots"):
        width, padding = draw(st.integers(1, 5)), draw(st.integers(0, 3))
        arrays["block_table"] = np.zeros((rows, width + padding), np.int32)[:, :width]
        arrays["table_entries"] = table
    elif table == "csr":
        arrays["kv_indptr"] = np.zeros(rows + 1, np.int32)
        arrays["kv_indices"] = np.zeros(draw(st.integers(0, 9)), np.int32)
        if draw(st.booleans()):
            arrays["kv_last_page_len"] = np.ones(rows, np.int32)
            arrays["seq_lens"] = draw(st.sampled_from([None, arrays["seq_lens"]]))
    optional = {
        "request_slots": np.zeros(rows, np.int32),
        "request_ids": np.zeros(rows, draw(st.sampled_from([np.uint32, np.int32]))),
        "salts": np.zeros(rows, draw(st.sampled_from([np.uint64, np.int64]))),
        "prefix_chain": np.zeros(rows, np.uint64),
        "token_history": np.zeros((MAX_REQUESTS + draw(st.integers(0, 2)), MAX_LEN), np.int32),
        "expected_tokens": np.zeros(n_tokens, ids),
        "pending": np.zeros(rows, draw(st.sampled_from([np.uint8, np.bool_]))),
        "verify_all": np.zeros(rows, np.uint8),
    }
    wanted = draw(st.sets(st.sampled_from(sorted(optional))))
    if wanted & {"request_ids", "token_history"}:
        wanted |= {"request_slots"}
    return {**arrays, **{name: optional[name] for name in sorted(wanted)}}


def _unaligned(array: Any) -> Any:
    raw = np.zeros(array.nbytes + array.itemsize, np.uint8)
    return raw[1 : 1 + array.nbytes].view(array.dtype).reshape(array.shape)


def _on_device(device: str) -> Any:
    return lambda a: (max(a.ctypes.data, 64), a.shape, None, a.itemsize, device)


_ANY_ARRAY = st.sampled_from(
    [
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int16),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.uint32),
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: a.astype(object),
        lambda a: a.reshape(-1),
        lambda a: a[None],
        lambda a: a[:-1],
        lambda a: a[::-1],
        lambda a: np.concatenate([a, a]),
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: np.broadcast_to(a[:1], a.shape),
        _unaligned,
        _on_device("cuda:0"),
        _on_device("cuda:1"),
        _on_device("cpu"),
        _on_device("tpu:0"),
        lambda a: (0, a.shape, None, a.itemsize, "cpu"),
        lambda a: (64, (-1,), None, a.itemsize, "cpu"),
        lambda a: (64, a.shape, (4,) * 5, a.itemsize, "cpu"),
        lambda a: (64, a.shape, None, 0, "cpu"),
        lambda a: ("64", a.shape, None, "x"),
        lambda a: (math.inf, None, None, None, None),
        lambda a: (1 << 70, a.shape, None, a.itemsize, "cpu"),
        lambda a: (64, (1 << 62, 1 << 62), None, a.itemsize, "cpu"),
        lambda a: a.tolist(),
        lambda a: [a],
        lambda a: (a, a),
        lambda a: [None],
        lambda a: a.dtype.type(0),
        lambda a: "array",
        lambda a: None,
        lambda a: object(),
    ]
)


@st.composite
def mutated_batch_arrays(draw: st.DrawFn) -> dict[str, Any]:
    """A valid batch of which one to three arrays were exchanged for something that may be anything."""
    arrays = draw(batch_arrays())
    given = sorted(name for name, value in arrays.items() if isinstance(value, np.ndarray))
    for name in draw(st.lists(st.sampled_from(given), min_size=1, max_size=3, unique=True)):
        arrays[name] = draw(_ANY_ARRAY)(arrays[name])
    return arrays
