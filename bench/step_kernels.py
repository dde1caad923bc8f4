"""A decode step with the memory traffic of an 8-billion-parameter model, and nothing else: what bench_step.py guards.

Per layer three kernels: the weights are read once, K and V of the new tokens are written, and all K and V of every row
are read through the block table. Arithmetic is left out: a decode step waits for memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcanary import KvPool, StepBatch, layouts

ROWS = 64  # requests
PREFIX = 4096  # positions of each before the step
LAYERS = 32
PAGE = 16  # slots
TOKEN_BYTES = 2048  # K of one token and layer (8 heads of 128 bf16); V the same
WEIGHT_BYTES = 500_000_000  # of one layer
MAX_NEW = 5  # new tokens of a row: one, and four drafts
WIDTH = -(-(PREFIX + MAX_NEW) // PAGE)  # blocks of a row
BLOCKS_PER_MULTIPROCESSOR = 4  # of 256 threads with up to 64 registers

SOURCE = r"""
// A persistent grid of 256-thread blocks; every load is 16 bytes a lane, coalesced, eight in flight, past L1.
typedef unsigned int u32;
typedef unsigned long long u64;
#define THREADS 256
#define UNROLL 8
#define LOADS 128       // 16-byte loads of a token's K: TOKEN_BYTES / 16
#define NEVER 0x9E3779B9u  // a checksum that is not expected: the store that keeps the loads alive

static __device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}
static __device__ __forceinline__ u32 fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }
static __device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}
static __device__ __forceinline__ uint4 noise(u64 seed) {
    const u64 a = mix(seed * 2 + 1), b = mix(a + seed);
    return make_uint4((u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32));
}

extern "C" __global__ void __launch_bounds__(THREADS) step_fill(uint4* out, long long n, u64 seed) {
    const long long stride = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n; i += stride) out[i] = noise(seed + i);
}

// A block takes tiles of 32 KB.
extern "C" __global__ void __launch_bounds__(THREADS, 4) step_read(const uint4* in, long long n, u32* sink) {
    const long long tile = THREADS * UNROLL;
    u32 sum = 0;
    for (long long base = blockIdx.x * tile; base < n; base += gridDim.x * tile) {
        const long long at = base + threadIdx.x;
        if (base + tile <= n) {
            uint4 v[UNROLL];
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) v[j] = load_once(in + at + j * THREADS);
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) sum ^= fold(v[j]);
        } else {
            for (long long i = at; i < n; i += THREADS) sum ^= fold(load_once(in + i));
        }
    }
    if (sum == NEVER) *sink = sum;
}

// A block per new token; the bytes depend on token, slot and layer only.
extern "C" __global__ void __launch_bounds__(LOADS) step_write(uint4* k, uint4* v, const int* ids,
                                                              const long long* slots, int layer) {
    const long long slot = slots[blockIdx.x];
    if (slot < 0) return;
    const u64 seed = mix((u64)ids[blockIdx.x] << 32 | (u64)slot) + mix(layer) + threadIdx.x;
    k[slot * LOADS + threadIdx.x] = noise(seed);
    v[slot * LOADS + threadIdx.x] = noise(~seed);
}

static __device__ __forceinline__ long long slot_of(long long unit, int rows, int width, int page, const int* table,
                                                    const int* lengths) {
    const int per_row = width * page, row = (int)(unit / per_row), position = (int)(unit % per_row);
    if (row >= rows || position >= lengths[row]) return -1;
    return (long long)table[row * width + position / page] * page + position % page;
}

// A warp per token: K and V of it, eight loads a lane; where the next token lies is looked up meanwhile.
extern "C" __global__ void __launch_bounds__(THREADS, 4) step_attend(const uint4* k, const uint4* v, const int* table,
                                                                    const int* lengths, int rows, int width, int page,
                                                                    u32* sink) {
    const long long n_units = (long long)rows * width * page, n_warps = (long long)gridDim.x * (THREADS / 32);
    long long unit = ((long long)blockIdx.x * THREADS + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    u32 sum = 0;
    long long next = unit < n_units ? slot_of(unit, rows, width, page, table, lengths) : -1;
    for (; unit < n_units; unit += n_warps) {
        const long long slot = next;
        uint4 a[UNROLL];
        if (slot >= 0) {
#pragma unroll
            for (int j = 0; j < 4; ++j) a[j] = load_once(k + slot * LOADS + 32 * j + lane);
#pragma unroll
            for (int j = 0; j < 4; ++j) a[4 + j] = load_once(v + slot * LOADS + 32 * j + lane);
        }
        next = unit + n_warps < n_units ? slot_of(unit + n_warps, rows, width, page, table, lengths) : -1;
        if (slot >= 0) {
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) sum ^= fold(a[j]);
        }
    }
    if (sum == NEVER) *sink = sum;
}
"""
_NAMES = ("step_fill", "step_read", "step_write", "step_attend")


def needed_bytes(n_layers: int) -> int:
    """Weights and KV of ``n_layers`` layers, with 2 % and 256 MiB for the guard and the rest."""
    slots = (1 + ROWS * WIDTH) * PAGE
    return int(1.02 * n_layers * (WEIGHT_BYTES + slots * 2 * TOKEN_BYTES)) + (256 << 20)


class DecodeModel:
    """The arrays and kernels; rows have shuffled blocks, and decode the same positions again at every step.

    Args:
        n_layers: layers of weights and KV.
        stream: a CuPy stream; everything runs on it.
    """

    def __init__(self, n_layers: int, stream: Any) -> None:
        import cupy

        self.cupy, self.n_layers, self.stream = cupy, n_layers, stream
        module = cupy.RawModule(code=SOURCE, options=("-std=c++17",), backend="nvrtc")
        self._kernels = {name: module.get_function(name) for name in _NAMES}
        assert all(kernel.num_regs for kernel in self._kernels.values())  # loaded before any capture
        self._grid = (BLOCKS_PER_MULTIPROCESSOR * int(cupy.cuda.Device().attributes["MultiProcessorCount"]),)
        self._sink = cupy.zeros(1, np.uint32)
        shape = (1 + ROWS * WIDTH, PAGE, 8, TOKEN_BYTES // 8)
        self.weights = cupy.empty(n_layers * WEIGHT_BYTES, np.uint8)
        self.k = [cupy.empty(shape, np.uint8) for _ in range(n_layers)]
        self.v = [cupy.empty(shape, np.uint8) for _ in range(n_layers)]
        self._make_batches(np.random.default_rng(0))
        cupy.cuda.runtime.deviceSynchronize()
        for seed, array in enumerate((self.weights, *self.k, *self.v)):
            self._launch("step_fill", (array, np.int64(array.nbytes // 16), np.uint64(seed << 40)))
        stream.synchronize()
        self.pool: KvPool = layouts.nhd(k=self.k, v=self.v, page_size=PAGE)

    def _make_batches(self, rng: np.random.Generator) -> None:
        on_device = self.cupy.asarray
        blocks = 1 + rng.permutation(ROWS * WIDTH).astype(np.int32).reshape(ROWS, WIDTH)
        positions = np.arange(WIDTH * PAGE)
        self.slots = blocks[:, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE  # i64[rows, positions]
        tokens = rng.integers(0, 128_000, self.slots.shape, dtype=np.int32)
        self.table, self.history = on_device(blocks), on_device(tokens)
        self.verify_all = self.cupy.zeros(ROWS, np.uint8)
        request_slots = on_device(np.arange(ROWS, dtype=np.int32))
        request_ids = on_device(np.arange(1, ROWS + 1, dtype=np.uint32))

        def batch(first: int, n_new: int) -> StepBatch:
            new = slice(first, first + n_new)
            return StepBatch(
                block_table=self.table,
                seq_lens=on_device(np.full(ROWS, first + n_new, np.int32)),
                query_start_loc=on_device(np.arange(ROWS + 1, dtype=np.int32) * n_new),
                input_ids=on_device(tokens[:, new].ravel()),
                slot_mapping=on_device(self.slots[:, new].ravel()),
                request_slots=request_slots,
                request_ids=request_ids,
                token_history=self.history,
                verify_all=self.verify_all,
            )

        self.prefill = batch(0, PREFIX)  #: all prefixes in one forward
        self.decode = {n: batch(PREFIX, n) for n in (1, MAX_NEW)}  #: by new tokens a row

    def _launch(self, name: str, args: tuple[Any, ...], grid: tuple[int] | None = None, threads: int = 256) -> None:
        with self.stream:
            self._kernels[name](grid or self._grid, (threads,), args)

    def read_weights(self, layers: slice) -> None:
        """Read the weights of some layers once, in one launch."""
        part = self.weights.reshape(self.n_layers, WEIGHT_BYTES)[layers]
        self._launch("step_read", (part, np.int64(part.nbytes // 16), self._sink))

    def launch(self, n_new: int) -> None:
        """One decode step with ``n_new`` tokens a row: three launches a layer; may run inside a capture."""
        batch = self.decode[n_new]
        sizes = (np.int32(ROWS), np.int32(WIDTH), np.int32(PAGE))
        for layer, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            self.read_weights(slice(layer, layer + 1))
            write = (k, v, batch.input_ids, batch.slot_mapping, np.int32(layer))
            self._launch("step_write", write, (ROWS * n_new,), TOKEN_BYTES // 16)
            self._launch("step_attend", (k, v, self.table, batch.seq_lens, *sizes, self._sink))

    def step_bytes(self, n_new: int) -> int:
        """What a step reads and writes, in bytes."""
        kv = ROWS * (PREFIX + 2 * n_new) * self.pool.bytes_per_slot
        return self.weights.nbytes + kv

    def plane(self, digest: int) -> Any:
        """u8[slots, TOKEN_BYTES]: the array behind a digest: K of layer 0, V of layer 0, K of layer 1, ..."""
        return (self.v if digest % 2 else self.k)[digest // 2].reshape(-1, TOKEN_BYTES)
