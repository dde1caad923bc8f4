"""Where a stage's arrays lie and how its forwards run: on the host, or on a GPU as replayed CUDA graphs.

Both do the same things in the same order, so that a scenario is written once. On the host a launch happens at its call;
on a GPU each kind of forward is captured once and replayed, and what changes from forward to forward is copied into
arrays at fixed addresses before the replay, as engines do it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvcanary.layout import KvPool
from kvcanary.planes import Plane

Array = npt.NDArray[Any]

# One thread per byte of a token; nothing is allocated, so that it may be captured.
_WRITE_KV = r"""
extern "C" __global__ void kvc_museum_write(unsigned char* base, const long long* slots, const unsigned char* bytes,
                                            int n_tokens, long long n_slots, int page, long long page_stride,
                                            long long token_stride, long long chunk_stride, int chunk_bytes,
                                            int slot_bytes) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (long long)n_tokens * slot_bytes;
         i += (long long)gridDim.x * blockDim.x) {
        long long slot = slots[i / slot_bytes];
        int byte = (int)(i % slot_bytes);
        if (slot < 0 || slot >= n_slots) continue;
        base[slot / page * page_stride + slot % page * token_stride + byte / chunk_bytes * chunk_stride +
             byte % chunk_bytes] = bytes[i];
    }
}
"""


class Place(Protocol):
    """What a stage needs of the memory that its engine runs in."""

    stream: Any

    def put(self, values: Array) -> Any:
        """A new array there with these contents."""

    def assign(self, target: Any, values: Array) -> None:
        """Overwrite an array; forwards that run later see it."""

    def read(self, array: Any) -> Array:
        """The contents of an array now."""

    def copy(self, target: Any, source: Any) -> None:
        """Copy between two arrays of that place, as a part of a forward."""

    def write_kv(self, pool: KvPool, plane: Plane, slots: Any, data: Any) -> None:
        """Write data u8[n, bytes of a slot] into slots i64[n] of a plane (negative = none), as a part of a forward."""

    def forget_graphs(self) -> None:
        """Another guard is about to use this place."""

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Run the launches of a forward to their end; forwards of one ``key`` launch the same over the same arrays."""


class HostPlace:
    """NumPy arrays; what is launched has run when the call returns."""

    stream: Any = None

    def put(self, values: Array) -> Any:
        return np.array(values)

    def assign(self, target: Any, values: Array) -> None:
        np.copyto(target, values, casting="no")

    def read(self, array: Any) -> Array:
        found: Array = array.copy()
        return found

    def copy(self, target: Any, source: Any) -> None:
        np.copyto(target, source)

    def write_kv(self, pool: KvPool, plane: Plane, slots: Any, data: Any) -> None:
        ok = (slots >= 0) & (slots < pool.n_slots)
        view = pool.host_bytes(plane)
        view[pool.slot_index(plane, slots[ok])] = data[ok].reshape(-1, *view.shape[-2:])

    def forget_graphs(self) -> None:
        pass

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        launch()


class CudaPlace:
    """CuPy arrays; each kind of forward is one captured graph.

    Raises:
        BackendError: CuPy or the GPU is missing; the message says what to install.
    """

    def __init__(self) -> None:
        from kvcanary.sim.cuda_model import CAPTURES, import_cupy

        self._cupy = import_cupy()
        self.stream = self._cupy.cuda.Stream(non_blocking=True)
        self._capture: Any = CAPTURES["cupy"]
        self._graphs: dict[Hashable, Callable[[], None]] = {}
        self._write = self._cupy.RawKernel(_WRITE_KV, "kvc_museum_write")
        n_registers = self._write.num_regs  # asking loads it: inside a capture it would be too late
        assert n_registers

    def put(self, values: Array) -> Any:
        array = self._cupy.asarray(values)
        self._cupy.cuda.runtime.deviceSynchronize()
        return array

    def assign(self, target: Any, values: Array) -> None:
        target.set(np.ascontiguousarray(values))
        self._cupy.cuda.runtime.deviceSynchronize()

    def read(self, array: Any) -> Array:
        self._cupy.cuda.runtime.deviceSynchronize()
        found: Array = self._cupy.asnumpy(array)
        return found

    def copy(self, target: Any, source: Any) -> None:
        runtime = self._cupy.cuda.runtime
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, kind, self.stream.ptr)

    def write_kv(self, pool: KvPool, plane: Plane, slots: Any, data: Any) -> None:
        i32, i64 = np.int32, np.int64
        assert not plane.tok_split, "no scenario has interleaved tokens"
        base = np.uint64(plane.view.pointer + plane.offset)
        strides = (i64(plane.page_stride), i64(plane.token_stride), i64(plane.chunk_stride))
        sizes = (i32(plane.chunk_bytes), i32(plane.n_bytes))
        with self.stream:
            self._write(
                (8,),
                (128,),
                (base, slots, data, i32(len(slots)), i64(pool.n_slots), i32(pool.page_size), *strides, *sizes),
            )

    def forget_graphs(self) -> None:
        self._graphs.clear()

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        if key not in self._graphs:
            self._graphs[key] = self._capture(self.stream, launch)
        self._graphs[key]()
        self.stream.synchronize()


def make_place(backend: str) -> Place:
    """The place of a backend, "host" or "cuda"."""
    return CudaPlace() if backend == "cuda" else HostPlace()
