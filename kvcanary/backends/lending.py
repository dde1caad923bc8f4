"""Memory of a GPU lent to host-driven calls: lists and images go through it without the host waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcanary.arrays import ArrayView, stream_pointer

if TYPE_CHECKING:
    from kvcanary.backends.cuda import CudaDriver

_ALIGNMENT = 256  # of what is lent: stamps are read 32 bytes at a time
_N_BLOCKS = 4  # calls that may be under way at once before the next one waits
_MIN_BYTES = 1 << 16


class _Block:
    """Pinned host memory and device memory of one call at a time, and the event after its last launch."""

    def __init__(self, event: Any) -> None:
        self.event = event
        self.n_host = self.n_device = 0
        self.host: Any = None
        self.on_device: Any = None

    def fits(self, n_host: int, n_device: int) -> bool:
        return self.host is not None and self.n_host >= n_host and self.n_device >= n_device


class Lender:
    """Four blocks of pinned and device memory, lent in turn; they grow with the largest call, and are kept.

    A call waits only when four calls before it are still under way (for the first of them), and when it is larger than
    those before it (for the device, while memory is allocated).
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._blocks: list[_Block] = []  # the one lent last comes last

    @contextlib.contextmanager
    def lend(self, arrays: Sequence[Any], n_scratch: int, stream: Any) -> Iterator[tuple[list[int], int]]:
        """Addresses of ``arrays`` on the device, and of scratch, see `kvcanary.backends.device.Driver.lend`."""
        offsets, n_host = [], 0
        for array in arrays:
            offsets.append(n_host)
            n_host += _padded(array.nbytes) if isinstance(array, np.ndarray) else 0
        block = self._take(n_host, n_host + n_scratch)
        pointer, runtime = stream_pointer(stream), self._driver._runtime
        base = int(block.on_device.data.ptr)
        addresses = []
        for array, offset in zip(arrays, offsets, strict=True):
            if isinstance(array, np.ndarray):
                block.host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                addresses.append(base + offset)
            else:
                assert array is None or isinstance(array, ArrayView)
                addresses.append(0 if array is None else array.pointer)
        try:
            if n_host:
                runtime.memcpyAsync(base, block.host.ctypes.data, n_host, runtime.memcpyHostToDevice, pointer)
            yield addresses, base + n_host
        finally:
            self._driver.stream_object(pointer).record(block.event)

    def put(self, target: int, values: np.ndarray[Any, Any], stream: Any) -> None:
        """Copy host values to a device address, ordered on the stream."""
        block, n = self._take(values.nbytes, 0), values.nbytes
        pointer, runtime = stream_pointer(stream), self._driver._runtime
        block.host[:n] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        try:
            runtime.memcpyAsync(target, block.host.ctypes.data, n, runtime.memcpyHostToDevice, pointer)
        finally:
            self._driver.stream_object(pointer).record(block.event)

    def _take(self, n_host: int, n_device: int) -> _Block:
        """A block that nothing reads any more, of at least these sizes."""
        if not self._blocks:
            self._blocks = [_Block(self._driver._device.create_event()) for _ in range(_N_BLOCKS)]
        idle = [b for b in self._blocks if b.event.is_done]
        if not idle:
            self._blocks[0].event.sync()
            idle = [self._blocks[0]]
        if not any(b.fits(n_host, n_device) for b in idle):
            self._grow(idle, n_host, n_device)
        block = next(b for b in idle if b.fits(n_host, n_device))
        self._blocks.remove(block)
        self._blocks.append(block)
        return block

    def _grow(self, blocks: Sequence[_Block], n_host: int, n_device: int) -> None:
        """All that are idle at once, as the device is waited for."""
        driver = self._driver
        n_host = max(_MIN_BYTES, n_host, *(2 * b.n_host for b in blocks if n_host > b.n_host))
        n_device = max(n_host, n_device, *(2 * b.n_device for b in blocks if n_device > b.n_device))
        with driver.current():
            for block in blocks:
                block.host = driver.mapped(n_host, np.uint8)[0]
                block.on_device = driver.zeros(n_device, np.uint8)
                block.n_host, block.n_device = n_host, n_device
            driver.synchronize()  # zeroed on CuPy's stream, used on the engine's

    @property
    def n_bytes(self) -> int:
        """Pinned and device memory of all blocks."""
        return sum(b.n_host + b.n_device for b in self._blocks)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
