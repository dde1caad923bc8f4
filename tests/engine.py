"""A toy engine for the manager's tests: one pool in host memory, whole prompts, then one token a step."""

from __future__ import annotations

from typing import Any

import numpy as np
from base import full_config

from kvcanary import CanaryConfig, CanaryManager, KvPool, StepBatch, layouts

N_BLOCKS, PAGE, MAX_LEN = 16, 4, 64


class ToyEngine:
    """Rows with contiguous blocks; ``write`` puts fresh random bytes where the slot mapping says."""

    def __init__(
        self, n_layers: int = 2, seed: int = 0, max_requests: int = 4, backend: Any = "auto", **config: Any
    ) -> None:
        self.rng = np.random.default_rng(seed)
        shape = (N_BLOCKS, PAGE, 2, 8)
        self.k = [self.rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(n_layers)]
        self.v = [self.rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(n_layers)]
        self.history = np.full((max_requests, MAX_LEN), -1, np.int32)
        self.pool: KvPool = layouts.nhd(k=self.k, v=self.v, page_size=PAGE)
        self.config: CanaryConfig = full_config(**config)
        self.backend = backend
        self.manager = CanaryManager(self.config, [self.pool], max_requests, 64, backend)

    def batch(self, *rows: tuple[int, int, int], **overrides: Any) -> StepBatch:
        """A batch of (request slot, prefix, new tokens); request slot r has blocks 1 + 3 r ... and request id r + 1."""
        tables, ids, slots, lengths = [], [], [], []
        for r, prefix, n in rows:
            table = 1 + 3 * r + np.arange(3)
            positions = np.arange(prefix, prefix + n)
            fresh = self.history[r, positions] < 0
            self.history[r, positions[fresh]] = self.rng.integers(0, 1000, int(fresh.sum()))
            tables.append(table)
            ids.append(self.history[r, positions])
            slots.append(table[positions // PAGE] * PAGE + positions % PAGE)
            lengths.append(n)
        values: dict[str, Any] = {
            "block_table": np.array(tables, np.int32),
            "seq_lens": np.array([p + n for _, p, n in rows], np.int32),
            "query_start_loc": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            "input_ids": np.concatenate(ids).astype(np.int32),
            "slot_mapping": np.concatenate(slots).astype(np.int64),
            "request_slots": np.array([r for r, _, _ in rows], np.int32),
            "request_ids": np.array([r + 1 for r, _, _ in rows], np.uint32),
            "token_history": self.history,
        }
        return StepBatch(**{**values, **overrides})

    def write(self, batch: StepBatch) -> None:
        """What a model does: K and V of every layer at the slots of the batch."""
        slots = batch.slot_mapping[batch.slot_mapping >= 0]
        for layer in (*self.k, *self.v):
            shape = (len(slots), *layer.shape[2:])
            layer.reshape(-1, *layer.shape[2:])[slots] = self.rng.integers(0, 256, shape, dtype=np.uint8)

    def step(self, *rows: tuple[int, int, int], **overrides: Any) -> StepBatch:
        """One guarded step."""
        batch = self.batch(*rows, **overrides)
        with self.manager.step(), self.manager.forward(batch):
            self.write(batch)
        return batch


def flip(engine: ToyEngine, layer: int, slot: int) -> None:
    engine.k[layer][slot // PAGE, slot % PAGE, 0, 0] ^= 1
