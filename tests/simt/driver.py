"""A `Driver` that runs the real kernels on the CPU: device memory is host memory, a launch is done when it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kvcanary import abi
from kvcanary.arrays import ArrayView, host_array
from kvcanary.backends.device import DeviceBackend
from kvcanary.backends.driver import Packed
from kvcanary.config import CanaryConfig
from kvcanary.deferred import HostStaging, Staging
from kvcanary.errors import CaptureError
from kvcanary.layout import KvPool

from .exact import exact_array, exact_copy
from .runner import SimtLibrary


class SimtDriver:
    """See `kvcanary.backends.device.Driver`; every launch runs its blocks in an order of its own seed.

    Whatever the kernels see is an allocation of its own and of exactly its size: `simt.exact`.
    """

    def __init__(self, library: SimtLibrary, seed: int = 0, n_multiprocessors: int = 1) -> None:
        self.n_multiprocessors = n_multiprocessors
        self.lent_bytes = 0
        self.launches: list[tuple[str, tuple[int, int]]] = []
        self._library = library
        self._seed = seed

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        return exact_array(shape, dtype)

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)

    def mapped(self, n: int, dtype: Any) -> tuple[np.ndarray[Any, Any], int]:
        array = exact_array(n, dtype)
        return array, int(array.ctypes.data)

    def kernel(self, source: str, name: str) -> str:
        assert name in self._library.kernels, f"{name} is not in {source}.cu"
        return name

    def resident_blocks(self, kernel: str) -> int:
        return 2

    def launch(self, kernel: str, grid: tuple[int, int], params: Any, stream: Any) -> None:
        if isinstance(stream, LateStream):
            stream.queue.append((kernel, grid, Packed(params.record.copy())))
            return
        self._seed += 1
        self.launches.append((kernel, grid))
        self._library.launch(kernel, grid, abi.THREADS, params.record, seed=self._seed)

    def capture(self, launch: Any) -> Any:
        raise CaptureError("what runs at the call cannot be captured: tests of graphs take simt.fake_cuda")

    def side_stream(self) -> LateStream:
        return LateStream(self)

    def fill_zero(self, array: Any, stream: Any) -> None:
        array[...] = np.zeros((), array.dtype)

    def upload(self, array: Any, values: Any, stream: Any) -> None:
        array[...] = values

    def write_table(self, array: Any, values: Any, stream: Any) -> None:
        array[...] = values

    def set_word(self, array: Any, index: int, value: int, stream: Any) -> None:
        array[index] = value

    def download(self, array: Any) -> Any:
        return array.copy()

    def read_memory(self, pointer: int, n_bytes: int) -> Any:
        return host_array(pointer, (n_bytes,), (1,), np.uint8).copy()

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        host_array(address, (1,), (1,), np.uint8)[0] ^= mask

    def write_memory(self, pointer: int, data: Any, stream: Any) -> None:
        host_array(pointer, data.shape, (1,), np.uint8)[:] = data

    def staging(self, n_words: int, depth: int) -> Staging:
        return HostStaging(n_words, depth)

    def upload_lists(self, lists: Sequence[Any], capacity: int, stream: Any) -> Sequence[int] | None:
        self._lists = [None if a is None else exact_copy(np.asarray(a, np.int32)) for a in lists]
        return [0 if a is None else int(a.ctypes.data) for a in self._lists]

    @contextlib.contextmanager
    def lend(self, arrays: Sequence[Any], n_scratch: int, stream: Any) -> Iterator[tuple[list[int], int]]:
        held = [exact_copy(a) if isinstance(a, np.ndarray) else a for a in arrays]
        scratch = exact_array(n_scratch, np.uint8, fill=0xA5)  # whoever reads it before writing it finds no zeros
        addresses = [a.pointer if isinstance(a, ArrayView) else 0 if a is None else int(a.ctypes.data) for a in held]
        yield addresses, int(scratch.ctypes.data)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class LateStream:
    """A side stream whose launches run as late as they may: when the engine's stream waits for them."""

    def __init__(self, driver: SimtDriver) -> None:
        self._driver = driver
        self.queue: list[tuple[str, tuple[int, int], Packed]] = []

    def leave(self, stream: Any) -> LateStream:
        assert not self.queue, "joined before"
        return self

    def let_wait(self, stream: Any) -> None:
        queue, self.queue = self.queue, []
        for launch in queue:
            self._driver.launch(*launch, stream)

    def join(self, stream: Any) -> None:
        self.let_wait(stream)

    def abandon(self) -> None:
        self.let_wait(None)

    def close(self) -> None:
        assert not self.queue, "joined before"


def simt_backend(
    config: CanaryConfig,
    pools: Sequence[KvPool],
    max_requests: int,
    max_new_tokens: int,
    *,
    library: SimtLibrary,
    seed: int = 0,
    n_multiprocessors: int = 1,
) -> DeviceBackend:
    """The device backend over the CPU build of the kernels."""
    driver = SimtDriver(library, seed, n_multiprocessors)
    return DeviceBackend("simt", driver, config, pools, max_requests, max_new_tokens)
