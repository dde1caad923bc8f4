"""The toy engine of the GPU examples: its kernels as source, its arrays in CuPy, and the batch that the guard reads.

A step is `next_inputs`, HEAD, `write_kv` for each layer, TAIL and `sample`, whoever compiles and launches the kernels.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts

ROWS, LAYERS, PAGE, WIDTH, DIM, THREADS = 4, 2, 16, 8, 64, 64
MAX_LEN = PAGE * WIDTH
SOURCE = r"""
#define ROWS 4
#define PAGE 16
#define WIDTH 8
#define DIM 64
__device__ long long slot_of(const int* table, int row, int p) {
    return (long long)table[row * WIDTH + p / PAGE] * PAGE + p % PAGE;
}

extern "C" __global__ void next_inputs(const int* table, int* seq_lens, int* ids, long long* slots, int* history,
                                       const int* sampled) {
    int row = threadIdx.x;
    if (row >= ROWS) return;
    int p = seq_lens[row]++;
    ids[row] = history[row * PAGE * WIDTH + p] = sampled[row];
    slots[row] = slot_of(table, row, p);
}
extern "C" __global__ void write_kv(const int* ids, const long long* slots, float* k, float* v) {
    long long at = slots[blockIdx.x] * DIM + threadIdx.x;
    k[at] = sinf(0.1f * ids[blockIdx.x] * (1 + threadIdx.x));
    v[at] = cosf(0.1f * ids[blockIdx.x] * (1 + threadIdx.x));
}
// A row with taint emits nothing: the host recomputes it.
extern "C" __global__ void sample(const int* table, const int* seq_lens, const float* k, const float* v,
                                  const unsigned* taint, int* sampled, int* emitted) {
    int row = threadIdx.x;
    if (row >= ROWS) return;
    float sum = 0;
    for (int p = 0; p < seq_lens[row]; ++p) {
        long long at = slot_of(table, row, p) * DIM;
        sum += k[at + p % DIM] * v[at];
    }
    sampled[row] = (int)fabsf(sum * 9973) % 500;
    emitted[row] = taint[row] ? -1 : sampled[row];
}
"""


class Toy:
    """Arrays at fixed addresses; kernels are called as kernels[name](n_blocks, arguments, stream)."""

    def __init__(self, **config: Any) -> None:
        shape = (1 + ROWS * WIDTH, PAGE, 1, DIM)
        self.k, self.v = ([cupy.zeros(shape, cupy.float32) for _ in range(LAYERS)] for _ in range(2))
        self.table = 1 + cupy.arange(ROWS * WIDTH, dtype=cupy.int32).reshape(ROWS, WIDTH)
        self.seq_lens, self.ids, self.emitted = (cupy.zeros(ROWS, cupy.int32) for _ in range(3))
        self.sampled = cupy.arange(5, 5 + ROWS, dtype=cupy.int32)
        self.slots, self.history = cupy.zeros(ROWS, cupy.int64), cupy.full((ROWS, MAX_LEN), -1, cupy.int32)
        pool = layouts.nhd(k=self.k, v=self.v)
        self.manager = CanaryManager(CanaryConfig.from_env(verify_data_every=1, **config), [pool], ROWS, ROWS)
        rows = cupy.arange(ROWS, dtype=cupy.int32)
        self.batch = StepBatch(
            block_table=self.table, seq_lens=self.seq_lens, query_start_loc=cupy.arange(ROWS + 1, dtype=cupy.int32),
            input_ids=self.ids, slot_mapping=self.slots, request_slots=rows, request_ids=rows + 1,
            token_history=self.history,
        )  # fmt: skip
        cupy.cuda.runtime.deviceSynchronize()

    def launch(self, kernels: dict[str, Any], stream: Any) -> None:
        inputs = (self.table, self.seq_lens, self.ids, self.slots, self.history, self.sampled)
        kernels["next_inputs"](1, inputs, stream)
        with self.manager.forward(self.batch, stream):
            for k, v in zip(self.k, self.v, strict=True):
                kernels["write_kv"](ROWS, (self.ids, self.slots, k, v), stream)
        reads = (self.table, self.seq_lens, self.k[0], self.v[0], self.manager.taint)
        kernels["sample"](1, (*reads, self.sampled, self.emitted), stream)

    def show(self, step: Any, n_steps: int = 60) -> None:
        """Honest steps, then one after a bit of what request 2 wrote at position 5 has flipped."""
        for _ in range(n_steps):
            step()
        self.manager.synchronize()
        assert self.manager.violations() == () and int(self.emitted.min()) >= 0
        print(f"silent over {self.manager.step_number} steps")
        self.k[1].view(np.uint32).reshape(-1, DIM)[int(self.table[1, 0]) * PAGE + 5, 3] ^= 1 << 20
        step()
        self.manager.synchronize()
        (found,) = self.manager.violations()
        assert (found.request_id, found.position, found.layer) == (2, 5, 1)
        assert [token < 0 for token in self.emitted.tolist()] == [False, True, False, False], (
            "by the taint, in the graph"
        )
        print("caught:", found.summary())
