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
_MAX_BLOCKS = 4  # calls that may be under way at once before the next one waits
_MIN_BYTES = 1 << 16


class _Block:
    """Pinned host memory and device memory of one call at a time, and the event after its last launch."""

    def __init__(self, event: Any) -> None:
        self.event = event
        self.n_host = self.n_device = 0
        self.host: Any = None
        self.on_device: Any = None


class Lender:
    """A few blocks of pinned and device memory, lent in turn; they grow with the largest call, and are kept.

    A call waits only when four calls before it are still under way (for the first of them), and when it is larger than
    any before it (for the device, while memory is allocated).
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

    def _take(self, n_host: int, n_device: int) -> _Block:
        """A block that nothing reads any more, of at least these sizes."""
        idle = [b for b in self._blocks if b.event.is_done]
        fitting = [b for b in idle if b.n_host >= n_host and b.n_device >= n_device]
        if fitting:
            block = fitting[0]
        elif idle:
            block = idle[0]
        elif len(self._blocks) < _MAX_BLOCKS:
            block = _Block(self._driver._device.create_event())
            self._blocks.append(block)
        else:
            block = self._blocks[0]
            block.event.sync()
        self._blocks.remove(block)
        self._blocks.append(block)
        if block.n_host < n_host or block.n_device < n_device or block.host is None:
            self._grow(block, n_host, n_device)
        return block

    def _grow(self, block: _Block, n_host: int, n_device: int) -> None:
        n_host = max(_MIN_BYTES, n_host, 2 * block.n_host if n_host > block.n_host else block.n_host)
        n_device = max(n_host, n_device, 2 * block.n_device if n_device > block.n_device else block.n_device)
        driver = self._driver
        with driver.current():
            block.host = driver.mapped(n_host, np.uint8)[0]
            block.on_device = driver.zeros(n_device, np.uint8)
            driver.synchronize()  # zeroed on CuPy's stream, used on the engine's
        block.n_host, block.n_device = n_host, n_device


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
