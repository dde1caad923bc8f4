"""One request's cache is damaged; it is computed anew elsewhere, its blocks are never used again, and the others go on.

The guard's `taint` has the reason bits of each batch row, on the device, at a fixed address. A sampler inside the graph
reads it there (see cupy_graph.py); it lies behind TAIL, so that what TAIL found counts too. What such a row sampled is
not emitted. After the step, the host does the rest:

1. abort: the row's request ends, under its id; ids are never used again;
2. quarantine: its blocks do not go back to the allocator (with ``lifecycle``, they are just never freed);
3. recompute: its tokens become the prompt of a new request, in other blocks.

In the end every request has the text that it has without the damage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy_engine import DIM, Engine, Request


class ContainedEngine(Engine):
    """The NumPy engine, with a sampler that looks at the taint."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.quarantined: list[int] = []
        self.n_recomputed = 0

    def sample(self, sampled: Any) -> None:
        is_tainted = self.manager.taint[: len(self.rows)] != 0
        for r, token in enumerate(np.where(is_tainted, -1, sampled)):
            row = self.rows[r]
            if token >= 0:
                row.n_written = len(row.tokens)
                row.tokens.append(int(token))
            else:
                self.contain(r)

    def contain(self, r: int) -> None:
        aborted = self.rows[r]
        self.quarantined += aborted.table
        self.rows[r] = Request(next(self.new_id), aborted.tokens)
        self.n_recomputed += 1


def serve(engine: Engine, n_steps: int, damage_at: int | None = None) -> Any:
    for step in range(n_steps):
        if step == damage_at:  # what request 2 wrote at position 5, in layer 0
            slot = engine.rows[1].slots(5, 6)[0]
            for array in (engine.k[0], engine.v[0]):
                array.reshape(-1, DIM)[slot] *= -8
        engine.step()
    return engine


def main() -> None:
    healthy, unguarded = serve(Engine(mode="off"), 30), serve(Engine(mode="off"), 30, damage_at=12)
    assert unguarded.rows[1].tokens != healthy.rows[1].tokens, "the damage changes what is generated"
    engine = serve(ContainedEngine(verify_data_every=1), 12)
    assert engine.manager.violations() == ()
    print(f"silent over {engine.manager.step_number} steps")
    serve(engine, 19, damage_at=0)
    found = engine.manager.violations()
    assert {v.request_id for v in found} == {2} and engine.n_recomputed == 1
    print(f"caught: {found[0].summary()}")
    assert not set(engine.quarantined) & {block for row in engine.rows for block in (*row.table, *engine.free)}
    for row, undisturbed in zip(engine.rows, healthy.rows, strict=True):
        n = min(len(row.tokens), len(undisturbed.tokens))
        assert row.tokens[:n] == undisturbed.tokens[:n], f"request {row.id} has another text"
    print(f"contained: computed anew as request {engine.rows[1].id}, all texts as undisturbed,", end=" ")
    print(f"blocks {engine.quarantined} out of use")


if __name__ == "__main__":
    main()
