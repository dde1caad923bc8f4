"""A guard that launches nothing: what is left of a step is the Python of the guard, on any machine.

`TwinDriver` stands where `kvcanary.backends.cuda.CudaDriver` stands; streams are resolved to addresses as there, and
nothing else is done. Planes are addresses that nobody reads, so pools of any size can be made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kvcanary import CanaryConfig, CanaryManager, KvPool, Plane, StepBatch, layouts
from kvcanary.arrays import stream_pointer
from kvcanary.backends.device import DeviceBackend
from kvcanary.deferred import HostStaging
from kvcanary.tags import Half

PAGE = 16  # slots
_FAKE_BASE = 1 << 44  # of addresses that are never read


class TwinStream:
    """A stream as the CUDA libraries hand it over: an object of the stream protocol."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 64


class TwinStaging(HostStaging):
    """Buffers whose copies have arrived when they are started."""

    def copy(self, index: int, source: Any, stream: Any) -> None:
        stream_pointer(stream)
        super().copy(index, source, stream)

    def is_capturing(self, stream: Any) -> bool:
        return stream_pointer(stream) < 0


class TwinDriver:
    """`kvcanary.backends.device.Driver` over untouched host memory; launches and copies do nothing."""

    n_multiprocessors = 132

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        return np.zeros(shape, dtype)

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)

    def mapped(self, n: int, dtype: Any) -> tuple[np.ndarray[Any, Any], int]:
        array = np.zeros(n, dtype)
        return array, int(array.ctypes.data)

    def kernel(self, source: str, name: str) -> str:
        return name

    def resident_blocks(self, kernel: Any) -> int:
        return 2

    def launch(self, kernel: str, grid: tuple[int, int], params: Any, stream: Any) -> None:
        stream_pointer(stream)

    def fill_zero(self, array: Any, stream: Any) -> None: ...

    def upload(self, array: Any, values: Any, stream: Any) -> None: ...

    def set_word(self, array: Any, index: int, value: int, stream: Any) -> None:
        array[index] = value

    def download(self, array: Any) -> Any:
        return array.copy()

    def read_memory(self, pointer: int, n_bytes: int) -> Any:
        raise NotImplementedError("the planes of the twin are addresses only")

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        raise NotImplementedError("the planes of the twin are addresses only")

    def write_memory(self, pointer: int, data: Any, stream: Any) -> None:
        raise NotImplementedError("the planes of the twin are addresses only")

    def staging(self, n_words: int, depth: int) -> TwinStaging:
        return TwinStaging(n_words, depth)

    def upload_lists(self, lists: Sequence[Any], capacity: int, stream: Any) -> Sequence[int] | None:
        return [0] * len(lists)

    @contextlib.contextmanager
    def lend(self, arrays: Sequence[Any], n_scratch: int, stream: Any) -> Iterator[tuple[list[int], int]]:
        yield [0] * len(arrays), 0

    lent_bytes = 0

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


def twin_backend(
    config: CanaryConfig, pools: Sequence[KvPool], max_requests: int, max_new_tokens: int
) -> DeviceBackend:
    """The device backend over a `TwinDriver`; give it as ``backend=`` of a manager."""
    return DeviceBackend("twin", TwinDriver(), config, pools, max_requests, max_new_tokens)


# ---- pools of addresses ----------------------------------------------------------------------------------------------
def _raw_layers(n_layers: int, shape: tuple[int, ...], first: int) -> list[tuple[Any, ...]]:
    n_bytes = int(np.prod(shape))
    return [(_FAKE_BASE + (first + i) * n_bytes, shape, None, 1, "cuda:0") for i in range(n_layers)]


def llama_pool(n_slots: int, n_layers: int = 32, n_bytes: int = 2048) -> KvPool:
    """K and V of ``n_bytes`` bytes per token and layer (8 heads of 128 bf16: 2048), in pages of 16."""
    shape = (n_slots // PAGE, PAGE, 8, n_bytes // 8)
    k, v = _raw_layers(n_layers, shape, 0), _raw_layers(n_layers, shape, n_layers)
    return layouts.nhd(k=k, v=v, page_size=PAGE)


def mla_pool(n_slots: int, n_layers: int = 61, n_bytes: int = 1152) -> KvPool:
    """One latent row per token and layer: 512 + 64 bf16."""
    return layouts.token_major(latent=_raw_layers(n_layers, (n_slots // PAGE, PAGE, n_bytes), 0), page_size=PAGE)


def nvfp4_pool(n_slots: int, n_layers: int = 32, heads: int = 8, dim: int = 128) -> KvPool:
    """K and V of 4 bits an element (dim / 2 bytes a head); a scale byte per 16 elements, in arrays of their own."""
    planes, base = [], _FAKE_BASE
    for layer in range(n_layers):
        for half in Half:
            for name, per_head in (("data", dim // 2), ("scale", dim // 16)):
                n_bytes = heads * per_head
                view = (base, (n_slots, n_bytes), None, 1, "cuda:0")
                base += n_slots * n_bytes
                strides = {"page_stride": PAGE * n_bytes, "token_stride": n_bytes, "chunk_bytes": n_bytes}
                planes.append(Plane(data=view, half=half, layer=layer, name=f"{half.name.lower()}_{name}", **strides))
    return KvPool(planes=tuple(planes), page_size=PAGE)


def raw_batch(rows: int, width: int) -> StepBatch:
    """A decode batch of addresses that nobody reads: ``rows`` rows of ``width`` blocks."""

    def raw(shape: tuple[int, ...], itemsize: int) -> tuple[Any, ...]:
        return (_FAKE_BASE, shape, None, itemsize, "cuda:0")

    return StepBatch(
        block_table=raw((rows, width), 4),
        seq_lens=raw((rows,), 4),
        query_start_loc=raw((rows + 1,), 4),
        input_ids=raw((rows,), 4),
        slot_mapping=raw((rows,), 8),
        request_slots=raw((rows,), 4),
        request_ids=raw((rows,), 4),
        token_history=raw((rows, width * PAGE), 4),
    )


# ---- memory ----------------------------------------------------------------------------------------------------------
def memory() -> list[dict[str, Any]]:
    """Memory of the guard against the KV bytes of a pool of 2^20 slots, as estimated and as allocated."""
    pools: dict[str, KvPool] = {
        "8B model, K and V of 32 layers x 2048 B": llama_pool(1 << 20),
        "MLA, 61 layers x 1152 B": mla_pool(1 << 20),
        "NVFP4, 32 layers of data 512 B and scales 64 B, K and V": nvfp4_pool(1 << 20),
    }
    found = []
    for name, pool in pools.items():
        for real_data in ("all", "none"):
            config = CanaryConfig(real_data=real_data)
            estimate = CanaryManager.estimate_bytes(config, [pool], 256)
            with CanaryManager(config, [pool], 256, 8192, backend=twin_backend) as manager:
                held = manager.memory_bytes
            if not 0.99 < held / estimate < 1.01:
                raise SystemExit(f"{name}: estimate_bytes says {estimate}, memory_bytes {held}; no figure is printed")
            found.append(
                {
                    "pool": name,
                    "real_data": real_data,
                    "guard_bytes_per_slot": held / pool.n_slots,
                    "kv_bytes_per_slot": pool.bytes_per_slot,
                    "percent": 100 * held / (pool.bytes_per_slot * pool.n_slots),
                }
            )
    return found
