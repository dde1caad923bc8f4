"""What the semantics in NumPy work on: the guard's arrays of one pool, and the engine's arrays of one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

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
