"""What the semantics in NumPy work on: the guard's arrays of one pool, and the engine's arrays of one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.batch import BoundBatch
from kvcanary.config import CanaryConfig
from kvcanary.layout import KvPool
from kvcanary.tags import Stage

Array: TypeAlias = npt.NDArray[Any]


@dataclass
class PoolArrays:
    """The guard's arrays of one pool, and what it knows of the pool.

    Attributes:
        head, tail: STAMP[n_slots] per half.
        claims: u64[n_slots]: forward << 32 | token index + 1 of the last winner.
        digests: u64[n_digests, n_slots]; 0 = none.
        registers: REGISTER[max_requests].
        register_claims: u64[max_requests].
        state: one POOL_STATE.
        slot_lut: i64[n] or None.
        blocks: BLOCK_STATE[n_blocks] or None: block ownership is not judged.
        scrub_blocks: blocks of a turn of the patrol; 0 = none.
    """

    index: int
    kind: int
    n_slots: int
    page_size: int
    window: int
    token_offset: int
    reserved: Array
    slot_lut: Array | None
    head: list[Array]
    tail: list[Array]
    claims: Array
    digests: Array
    registers: Array
    register_claims: Array
    state: Array
    max_requests: int
    blocks: Array | None = None
    scrub_blocks: int = 0
    ring_length: int = 0
    ring_bubble: int = 0
    sink: int = 0

    def tag(self, stage: Stage, half: int = 0) -> int:
        return stage * 4 + self.kind * 2 + half

    def block_states(self, slots: Array) -> Array:
        """The words of the slots' blocks: BLOCK_STATE[n]; of any block where a slot is negative."""
        assert self.blocks is not None
        states: Array = self.blocks[np.maximum(slots, 0) // self.page_size]
        return states


@dataclass
class BatchArrays:
    """The engine's arrays of one batch for one pool, as NumPy arrays; None = not given."""

    rows: int
    n_tokens: int
    table_kind: int
    table_page: int
    table_width: int
    block_table: Array | None
    kv_indptr: Array | None
    kv_last_page_len: Array | None
    seq_lens: Array | None
    query_start_loc: Array
    input_ids: Array
    slot_mapping: Array
    request_slots: Array | None
    request_ids: Array | None
    salts: Array | None
    prefix_chain: Array | None
    token_history: Array | None
    expected_tokens: Array | None
    pending: Array | None
    verify_all: Array | None
    check_write_position: bool
    adopt: bool
    verify_data_every: int
    full_verify_min_tokens: int
    is_first_forward: bool

    def request_id(self, row: int) -> int:
        """Whose row it is, 0 = unknown."""
        request_id = 0 if self.request_ids is None else int(self.request_ids[row])
        return 0 if request_id == abi.PREFIX_CACHE else request_id


# ---- made of what the manager has ------------------------------------------------------------------------------------
def pool_arrays(index: int, pool: KvPool, config: CanaryConfig, max_requests: int, scrub_blocks: int) -> PoolArrays:
    """New ones: nothing was ever written, claimed or allocated."""
    n, halves = pool.n_slots, len(pool.halves)
    lut = pool.lut_view
    return PoolArrays(
        index=index,
        kind=int(pool.kind),
        n_slots=n,
        page_size=pool.page_size,
        window=pool.window or 0,
        token_offset=pool.token_offset,
        ring_length=pool.ring_length,
        ring_bubble=pool.ring_bubble,
        sink=pool.sink,
        reserved=np.array(pool.reserved_blocks, np.int64),
        slot_lut=None if lut is None else lut.host,
        head=[np.zeros(n, abi.STAMP) for _ in range(halves)],
        tail=[np.zeros(n, abi.STAMP) for _ in range(halves)],
        claims=np.zeros(n, np.uint64),
        digests=np.zeros((len(pool.digest_units(config.real_data)), n), np.uint64),
        registers=np.zeros(max_requests, abi.REGISTER),
        register_claims=np.zeros(max_requests, np.uint64),
        state=abi.zeros_of(abi.POOL_STATE),
        max_requests=max_requests,
        blocks=np.zeros(pool.n_blocks, abi.BLOCK_STATE) if config.lifecycle else None,
        scrub_blocks=scrub_blocks,
    )


def batch_arrays(bound: BoundBatch, config: CanaryConfig, is_first_forward: bool) -> BatchArrays:
    """The host's views of a bound batch."""
    record, table = bound.record, bound.host("block_table")
    query_start_loc, input_ids, slot_mapping = (bound.host(n) for n in ("query_start_loc", "input_ids", "slot_mapping"))
    assert query_start_loc is not None and input_ids is not None and slot_mapping is not None
    names = ["kv_indptr", "kv_last_page_len", "seq_lens", "request_slots", "request_ids", "salts", "prefix_chain"]
    names += ["token_history", "expected_tokens", "pending", "verify_all"]
    return BatchArrays(
        rows=bound.rows,
        n_tokens=bound.n_tokens,
        table_kind=int(record["table_kind"]),
        table_page=int(record["table_page"]),
        table_width=int(record["table_width"]),
        block_table=bound.host("kv_indices") if table is None else table,
        query_start_loc=query_start_loc,
        input_ids=input_ids,
        slot_mapping=slot_mapping,
        check_write_position=config.check_write_position,
        adopt=config.on_unwritten == "adopt",
        verify_data_every=config.verify_data_every,
        full_verify_min_tokens=config.full_verify_min_tokens,
        is_first_forward=is_first_forward,
        **{name: bound.host(name) for name in names},
    )
