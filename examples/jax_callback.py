"""Decoding in JAX, guarded from inside ``jit``: HEAD and TAIL are buffer callbacks through which the cache flows.

XLA moves the cache as it likes (donation, copies), and JAX says only inside a callback where it lies: so each callback
tells the guard with `rebind`. The caches go in and out aliased, which orders HEAD, model and TAIL and copies nothing;
the batch's arrays go to both callbacks, so that XLA keeps them until TAIL.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts

LAYERS, ROWS, BLOCKS, PAGE, WIDTH, DIM, VOCABULARY = 2, 3, 64, 4, 16, 32, 500
ON_GPU = jax.default_backend() == "gpu"
TABLE = 1 + jnp.arange(ROWS * WIDTH, dtype=jnp.int32).reshape(ROWS, WIDTH)


class Guard:
    def __init__(self, caches: list[Any]) -> None:
        config, pool = CanaryConfig.from_env(verify_data_every=1), layouts.nhd(k=caches[::2], v=caches[1::2])
        self.manager = CanaryManager(config, [pool], max_requests=ROWS, max_new_tokens=ROWS)
        self.batch: StepBatch | None = None
        shapes = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches]
        aliases = {i: i for i in range(len(caches))}
        make = partial(buffer_callback, result_shape_dtypes=shapes, has_side_effect=True, input_output_aliases=aliases)
        self.head, self.tail = make(self.on_head), make(self.on_tail)

    def on_head(self, context: Any, caches: list[Any], *inputs: Any) -> None:
        stream = self.follow(context, caches)
        self.batch = StepBatch(**inputs[-1])
        self.manager.head(self.batch, stream)

    def on_tail(self, context: Any, caches: list[Any], *_inputs: Any) -> None:
        self.manager.tail(self.batch, self.follow(context, caches))

    def follow(self, context: Any, caches: list[Any]) -> int | None:
        stream = context.stream if ON_GPU else None
        self.manager.rebind(0, caches, stream=stream)
        return stream


def model(caches: list[Any], weights: Any, embedding: Any, arrays: dict[str, Any]) -> tuple[list[Any], Any]:
    """One token a row: K and V of every layer are written, each row's prefix is read, the next token comes out."""
    x, slots = embedding[arrays["input_ids"]], arrays["slot_mapping"]
    places = (TABLE[:, :, None] * PAGE + jnp.arange(PAGE)).reshape(ROWS, -1)
    is_there = jnp.arange(PAGE * WIDTH) < arrays["seq_lens"][:, None]
    new = []
    for layer, (wq, wk, wv) in enumerate(weights):
        k, v = (c.reshape(-1, DIM).at[slots].set(x @ w) for c, w in zip(caches[2 * layer :], (wk, wv), strict=False))
        scores = jnp.einsum("rd,rpd->rp", x @ wq, k[places]) / DIM**0.5
        x = x + jnp.einsum("rp,rpd->rd", jax.nn.softmax(scores, where=is_there), v[places])
        new += [c.reshape(BLOCKS, PAGE, 1, DIM) for c in (k, v)]
    return new, (x @ embedding.T).argmax(1).astype(jnp.int32)


def main() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 2))
    weights = jax.random.normal(next(keys), (LAYERS, 3, DIM, DIM), jnp.bfloat16) / DIM**0.5
    embedding = jax.random.normal(next(keys), (VOCABULARY, DIM), jnp.bfloat16)
    caches = [jnp.zeros((BLOCKS, PAGE, 1, DIM), jnp.bfloat16) for _ in range(2 * LAYERS)]
    guard, history = Guard(caches), jnp.full((ROWS, PAGE * WIDTH), -1, jnp.int32)
    rows = jnp.arange(ROWS, dtype=jnp.int32)

    @partial(jax.jit, donate_argnums=0)
    def step(caches: list[Any], ids: Any, position: Any, history: Any) -> tuple[list[Any], Any, Any]:
        history = history.at[:, position].set(ids)
        slots = TABLE[:, position // PAGE] * PAGE + position % PAGE
        arrays = {
            "block_table": TABLE, "seq_lens": jnp.full(ROWS, position + 1, jnp.int32), "input_ids": ids,
            "query_start_loc": jnp.arange(ROWS + 1, dtype=jnp.int32), "slot_mapping": slots, "request_slots": rows,
            "request_ids": rows + 1, "token_history": history,
        }  # fmt: skip
        caches, sampled = model(guard.head(*caches, arrays), weights, embedding, arrays)
        return guard.tail(*caches, arrays), sampled, history

    ids = jnp.array([5, 7, 11], jnp.int32)
    for position in range(40):
        if position == 30:
            assert guard.manager.violations() == ()
            print(f"silent over {guard.manager.step_number} steps on {jax.default_backend()}")
            caches[2] = caches[2].at[1 + WIDTH, 2, 0, 3].multiply(-2)  # K of layer 1, row 1, position 2
        with guard.manager.step():
            caches, ids, history = step(caches, ids, np.int32(position), history)
            jax.block_until_ready(caches)
    guard.manager.synchronize()
    found = guard.manager.violations()[0]
    assert (found.request_id, found.position, found.layer) == (2, 2, 1)
    print("caught:", found.summary())


if __name__ == "__main__":
    main()
