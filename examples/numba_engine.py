"""The model's kernels in numba-cuda, captured on its stream by the driver; the guard takes its arrays and streams."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda.bindings import driver
from numba import cuda

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts

ROWS, LAYERS, PAGE, WIDTH, DIM = 4, 2, 16, 8, 64
MAX_LEN = PAGE * WIDTH


@cuda.jit
def next_inputs(table: Any, seq_lens: Any, ids: Any, slots: Any, history: Any) -> None:
    row = cuda.threadIdx.x
    if row < ROWS:
        p = seq_lens[row]
        ids[row] = (p * 7919 + row * 104729) % 50000
        history[row, p] = ids[row]
        slots[row] = table[row, p // PAGE] * PAGE + p % PAGE
        seq_lens[row] = p + 1


@cuda.jit
def write_kv(ids: Any, slots: Any, k: Any, v: Any) -> None:
    row, i = cuda.blockIdx.x, cuda.threadIdx.x
    block, offset = slots[row] // PAGE, slots[row] % PAGE
    k[block, offset, 0, i] = ids[row] * (i + 1)
    v[block, offset, 0, i] = ids[row] - i


def ok(result: tuple[Any, ...]) -> Any:
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) > 1 else None


class Engine:
    def __init__(self) -> None:
        def array(value: Any) -> Any:
            return cuda.to_device(np.ascontiguousarray(value))

        shape, rows = (1 + ROWS * WIDTH, PAGE, 1, DIM), np.arange(ROWS, dtype=np.int32)
        self.k, self.v = ([array(np.zeros(shape, np.float32)) for _ in range(LAYERS)] for _ in range(2))
        self.table = array(1 + np.arange(ROWS * WIDTH, dtype=np.int32).reshape(ROWS, WIDTH))
        self.seq_lens, self.ids, self.slots = array(0 * rows), array(0 * rows), array(0 * rows.astype(np.int64))
        self.history = array(np.full((ROWS, MAX_LEN), -1, np.int32))
        pools = [layouts.nhd(k=self.k, v=self.v)]
        self.manager = CanaryManager(CanaryConfig.from_env(verify_data_every=1), pools, ROWS, ROWS)
        self.batch = StepBatch(
            block_table=self.table, seq_lens=self.seq_lens, query_start_loc=array(np.arange(ROWS + 1, dtype=np.int32)),
            input_ids=self.ids, slot_mapping=self.slots, request_slots=array(rows), request_ids=array(rows + 1),
            token_history=self.history,
        )  # fmt: skip

    def launch(self, stream: Any) -> None:
        next_inputs[1, 32, stream](self.table, self.seq_lens, self.ids, self.slots, self.history)
        with self.manager.forward(self.batch, stream):
            for k, v in zip(self.k, self.v, strict=True):
                write_kv[ROWS, DIM, stream](self.ids, self.slots, k, v)


def main() -> None:
    engine, stream = Engine(), cuda.stream()
    with engine.manager.step(stream):
        engine.launch(stream)  # numba compiles at the first call
    handle = driver.CUstream(stream.__cuda_stream__()[1])
    ok(driver.cuStreamBeginCapture(handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    engine.launch(stream)
    graph = ok(driver.cuGraphInstantiate(ok(driver.cuStreamEndCapture(handle)), 0))

    def step() -> None:
        with engine.manager.step(stream):
            ok(driver.cuGraphLaunch(graph, handle))

    for _ in range(60):
        step()
    engine.manager.synchronize()
    assert engine.manager.violations() == ()
    print(f"silent over {engine.manager.step_number} steps")
    engine.k[1][1 + WIDTH, 5, 0, 3] = 0.5  # row 1, position 5
    step()
    engine.manager.synchronize()
    (found,) = engine.manager.violations()
    assert (found.request_id, found.position, found.layer) == (2, 5, 1)
    print("caught:", found.summary())


if __name__ == "__main__":
    main()
