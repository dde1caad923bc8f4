"""The persistent batch buffers that one step of the engine fills and a model reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class StepArrays:
    """One bucket of batch buffers: the arrays keep their addresses, a step changes only contents and the two counts.

    `n_rows` and `n_tokens` count what is real; whatever lies behind them is padding. `token_history` is the
    engine's own, shared by all buckets, and indexed by request slot, not by row.
    """

    block_table: NDArray[np.int32]  # [rows, max_blocks], blocks, 0 = padding
    seq_lens: NDArray[np.int32]  # [rows], tokens, after this forward
    query_start_loc: NDArray[np.int32]  # [rows + 1], tokens
    input_ids: NDArray[np.int32]  # [tokens]
    slot_mapping: NDArray[np.int64]  # [tokens], slots, negative = writes nothing
    request_slots: NDArray[np.int32]  # [rows]
    request_ids: NDArray[np.uint32]  # [rows], 0 = padding
    token_history: NDArray[np.int32]  # [max_requests, max_len], -1 = unknown
    salts: NDArray[np.uint64]  # [rows]
    pending: NDArray[np.uint8]  # [rows], 1 = some of its KV comes layer by layer
    depths: NDArray[np.int32]  # [tokens], what is added to a token's place in its row for its position: 0, but in trees
    n_rows: int = 0
    n_tokens: int = 0

    @classmethod
    def allocate(cls, rows: int, tokens: int, max_blocks: int, token_history: NDArray[np.int32]) -> StepArrays:
        """Buffers for `rows` rows and `tokens` new tokens around the shared `token_history`."""
        return cls(
            block_table=np.zeros((rows, max_blocks), np.int32),
            seq_lens=np.zeros(rows, np.int32),
            query_start_loc=np.zeros(rows + 1, np.int32),
            input_ids=np.zeros(tokens, np.int32),
            slot_mapping=np.full(tokens, -1, np.int64),
            request_slots=np.zeros(rows, np.int32),
            request_ids=np.zeros(rows, np.uint32),
            token_history=token_history,
            salts=np.zeros(rows, np.uint64),
            pending=np.zeros(rows, np.uint8),
            depths=np.zeros(tokens, np.int32),
        )

    @property
    def max_rows(self) -> int:
        """Capacity in rows, padding included."""
        return len(self.seq_lens)

    @property
    def max_tokens(self) -> int:
        """Capacity in new tokens, padding included."""
        return len(self.input_ids)

    def clear(self, pad_slot: int) -> None:
        """Turn the whole bucket into padding that writes to `pad_slot` (-1: nowhere)."""
        self.block_table.fill(0)
        self.seq_lens.fill(0)
        self.query_start_loc.fill(0)
        self.input_ids.fill(0)
        self.slot_mapping.fill(pad_slot)
        self.request_slots.fill(0)
        self.request_ids.fill(0)
        self.salts.fill(0)
        self.pending.fill(0)
        self.depths.fill(0)
        self.n_rows = self.n_tokens = 0

    def pad_rows(self, *, one_token_each: bool) -> None:
        """Close the bucket behind the real rows: a decode graph gives each padded row one token, other steps none."""
        n_padded = self.max_rows - self.n_rows
        per_row = 1 if one_token_each else 0
        self.seq_lens[self.n_rows :] = per_row
        self.query_start_loc[self.n_rows + 1 :] = self.n_tokens + per_row * np.arange(1, n_padded + 1)
