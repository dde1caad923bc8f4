"""A toy engine on the GPU whose decode step advances itself: a captured step is replayed without any copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts

_SOURCE = r"""
extern "C" __global__ void toy_advance(int rows, int page, int width, int max_len, const int* table,
                                       int* seq_lens, int* ids, long long* slots, int* history) {
    int r = threadIdx.x;
    if (r >= rows) return;
    int p = seq_lens[r];
    int token = (p * 7919 + r * 104729 + 13) % 50000;
    ids[r] = token;
    history[(long long)r * max_len + p] = token;
    slots[r] = (long long)table[r * width + p / page] * page + p % page;
    seq_lens[r] = p + 1;
}
extern "C" __global__ void toy_write(int n_tokens, int n_bytes, const int* ids, const long long* slots,
                                     unsigned char* layer, int salt) {
    long long slot = slots[blockIdx.x];
    if (blockIdx.x >= n_tokens || slot < 0) return;
    for (int i = threadIdx.x; i < n_bytes; i += blockDim.x) {
        unsigned int x = ids[blockIdx.x] * 2654435761u + (unsigned)slot * 40503u + i * 97u + salt;
        layer[slot * n_bytes + i] = (unsigned char)(x >> 11);
    }
}
extern "C" __global__ void toy_spin(volatile int* is_released) {
    while (!*is_released) {}
}
"""


class CudaToy:
    """``rows`` requests with contiguous blocks; `launch_step` = advance, HEAD, model, TAIL on a stream."""

    def __init__(
        self, rows: int = 4, n_layers: int = 2, n_bytes: int = 256, max_len: int = 1200, page: int = 16, **config: Any
    ) -> None:
        import cupy

        self.cupy, self.rows, self.page, self.n_bytes, self.max_len = cupy, rows, page, n_bytes, max_len
        width = -(-max_len // page)
        n_blocks = 1 + rows * width
        rng = cupy.random.default_rng(0)
        shape = (n_blocks, page, 2, n_bytes // 2)
        self.k = [rng.integers(0, 256, shape, dtype=cupy.uint8) for _ in range(n_layers)]
        self.v = [rng.integers(0, 256, shape, dtype=cupy.uint8) for _ in range(n_layers)]
        self.table = 1 + cupy.arange(rows * width, dtype=cupy.int32).reshape(rows, width)
        self.seq_lens = cupy.zeros(rows, cupy.int32)
        self.ids = cupy.zeros(rows, cupy.int32)
        self.slots = cupy.full(rows, -1, cupy.int64)
        self.history = cupy.full((rows, max_len), -1, cupy.int32)
        module = cupy.RawModule(code=_SOURCE)
        self._advance, self._write, self._spin = (
            module.get_function(n) for n in ("toy_advance", "toy_write", "toy_spin")
        )
        assert self._advance.num_regs and self._write.num_regs and self._spin.num_regs  # loaded before any capture
        self.manager = CanaryManager(
            CanaryConfig(**{"stats_print_every_n_steps": 0, "health_check_every_n_steps": 0, **config}),
            [layouts.nhd(k=self.k, v=self.v, page_size=page)],
            max_requests=rows,
            max_new_tokens=max(rows, 8),
        )
        self._constant = {
            "query_start_loc": cupy.arange(rows + 1, dtype=cupy.int32),
            "request_slots": cupy.arange(rows, dtype=cupy.int32),
            "request_ids": cupy.arange(1, rows + 1, dtype=cupy.uint32),
        }
        self.batch = self.batch_of(rows)
        cupy.cuda.runtime.deviceSynchronize()

    def batch_of(self, rows: int) -> StepBatch:
        """The batch of the first ``rows`` rows: a smaller bucket over the same buffers."""
        return StepBatch(
            block_table=self.table[:rows],
            seq_lens=self.seq_lens[:rows],
            query_start_loc=self._constant["query_start_loc"][: rows + 1],
            input_ids=self.ids[:rows],
            slot_mapping=self.slots[:rows],
            request_slots=self._constant["request_slots"][:rows],
            request_ids=self._constant["request_ids"][:rows],
            token_history=self.history,
        )

    def launch_step(
        self, stream: Any, batch: StepBatch | None = None, guarded_on: Any = None, *, verifies_layers: bool = False
    ) -> None:
        """One decode step; ``stream`` is a CuPy stream, ``guarded_on`` what the guard is given (default: the same)."""
        batch = batch or self.batch
        rows = len(batch.seq_lens)
        guarded_on = stream if guarded_on is None else guarded_on
        i32, width = np.int32, self.table.shape[1]
        with stream:
            self._advance(
                (1,),
                (256,),
                (i32(rows), i32(self.page), i32(width), i32(self.max_len), self.table, self.seq_lens, self.ids,
                 self.slots, self.history),
            )  # fmt: skip
        with self.manager.forward(batch, guarded_on), stream:
            for layer in range(len(self.k) if verifies_layers else 0):
                self.manager.verify_layer(batch, layer, guarded_on)
            for salt, layer in enumerate((*self.k, *self.v)):
                args = (i32(rows), i32(self.n_bytes), self.ids, self.slots, layer, i32(salt))
                self._write((rows,), (128,), args)

    def capture(self, batch: StepBatch | None = None) -> Any:
        """The step as a CuPy graph, captured on a stream of its own."""
        stream = self.cupy.cuda.Stream(non_blocking=True)
        stream.begin_capture()
        try:
            self.launch_step(stream, batch)
        finally:
            graph = stream.end_capture()
        return graph

    def spin(self, stream: Any, is_released: Any) -> None:
        """Hold a stream until the mapped word is set."""
        with stream:
            self._spin((1,), (1,), (is_released,))

    def flip(self, layer: int, slot: int, byte: int = 3) -> None:
        """Flip a bit of a slot's K bytes; waits, but not for the device: that fails while any capture is open."""
        self.k[layer].reshape(-1, self.n_bytes)[slot, byte] ^= 4
        self.cupy.cuda.get_current_stream().synchronize()
