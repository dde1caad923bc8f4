"""A paged engine in NumPy, guarded: runs everywhere. A step brings what each request has not written yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts

LAYERS, DIM, PAGE, BLOCKS, MAX_LEN, VOCABULARY = 2, 32, 4, 64, 64, 500
PROMPTS = [[5, 7, 11], [2, 3, 5, 7, 11, 13, 17], [41, 42, 43, 44, 45]]


@dataclass
class Request:
    id: int
    tokens: list[int]
    table: list[int] = field(default_factory=list)
    n_written: int = 0

    def slots(self, first: int, last: int) -> Any:
        return np.array([self.table[p // PAGE] * PAGE + p % PAGE for p in range(first, last)], np.int64)


class Engine:
    """One request a row; greedy decoding with a real (if tiny) transformer."""

    def __init__(self, **config: Any) -> None:
        rng = np.random.default_rng(0)
        self.k, self.v = ([np.zeros((BLOCKS, PAGE, 1, DIM), np.float32) for _ in range(LAYERS)] for _ in range(2))
        self.embedding = rng.normal(size=(VOCABULARY, DIM)).astype(np.float32)
        self.weights = rng.normal(size=(LAYERS, 3, DIM, DIM), scale=DIM**-0.5).astype(np.float32)
        self.free = list(range(1, BLOCKS))  # block 0 is for padding
        self.new_id = count(1)
        self.rows = [Request(next(self.new_id), list(prompt)) for prompt in PROMPTS]
        config, pools = CanaryConfig.from_env(**config), [layouts.nhd(k=self.k, v=self.v)]
        self.manager = CanaryManager(config, pools, max_requests=8, max_new_tokens=256)

    def batch(self) -> StepBatch:
        history = np.full((8, MAX_LEN), -1, np.int32)  # by request slot: here, the row
        table, slots, ids = np.zeros((len(self.rows), MAX_LEN // PAGE), np.int32), [], []
        for r, row in enumerate(self.rows):
            while len(row.table) * PAGE < len(row.tokens):
                row.table.append(self.free.pop(0))
            table[r, : len(row.table)] = row.table
            history[r, : len(row.tokens)] = row.tokens
            slots.append(row.slots(row.n_written, len(row.tokens)))
            ids.append(row.tokens[row.n_written :])
        lengths, names = np.array([(len(row.tokens), row.id) for row in self.rows], np.int32).T.copy()
        return StepBatch(
            block_table=table, seq_lens=lengths, query_start_loc=np.cumsum([0, *map(len, ids)], dtype=np.int32),
            input_ids=np.concatenate(ids, dtype=np.int32, casting="unsafe"), slot_mapping=np.concatenate(slots),
            request_slots=np.arange(len(self.rows), dtype=np.int32), request_ids=names, token_history=history,
        )  # fmt: skip

    def model(self, batch: StepBatch) -> Any:
        """Writes K and V of the new tokens, reads each row's prefix; returns the next token of each row."""
        x = self.embedding[batch.input_ids]
        for k, v, (wq, wk, wv) in zip(self.k, self.v, self.weights, strict=True):
            k.reshape(-1, DIM)[batch.slot_mapping], v.reshape(-1, DIM)[batch.slot_mapping] = x @ wk, x @ wv
            for r, row in enumerate(self.rows):
                new, cached = slice(*batch.query_start_loc[r : r + 2]), row.slots(0, len(row.tokens))
                weights = np.exp((x[new] @ wq) @ k.reshape(-1, DIM)[cached].T / DIM**0.5)
                weights = np.tril(weights, row.n_written)  # causal
                x[new] += weights / weights.sum(1, keepdims=True) @ v.reshape(-1, DIM)[cached]
        return (x[batch.query_start_loc[1:] - 1] @ self.embedding.T).argmax(1)

    def step(self) -> None:
        batch = self.batch()
        with self.manager.step():
            with self.manager.forward(batch):  # HEAD before the model, TAIL after it
                sampled = self.model(batch)
            self.sample(sampled)

    def sample(self, sampled: Any) -> None:
        for row, token in zip(self.rows, sampled, strict=True):
            row.n_written = len(row.tokens)
            row.tokens.append(int(token))


def main() -> None:
    engine = Engine(verify_data_every=1)
    for _ in range(20):
        engine.step()
    assert engine.manager.violations() == ()
    print(f"silent over {engine.manager.step_number} steps")
    damaged = engine.rows[1].slots(5, 6)[0]  # where its position 5 lies
    engine.k[1].reshape(-1, DIM)[damaged, 3] *= 1.5
    engine.step()
    (found,) = engine.manager.violations()
    assert (found.slot, found.layer, found.request_id) == (damaged, 1, engine.rows[1].id)
    print("caught:", found.summary())


if __name__ == "__main__":
    main()
