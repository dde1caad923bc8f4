"""What the device backend asks of a device.

`cuda.py` has the real driver; a test has one that runs the same kernels on the CPU, and a bench one that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvcanary.backends import CapturedGraph
from kvcanary.deferred import Staging

Array = npt.NDArray[Any]


class Packed:
    """By-value parameters of a kernel, where a launch finds them; it copies them, also in a capture.

    Attributes:
        record: one structure, as a 0-d array; a launch reads what is in it then.
        address: of the list of pointers that ``cuLaunchKernel`` takes: one, to the record.
    """

    __slots__ = ("_pointers", "address", "record")

    def __init__(self, record: Array) -> None:
        self.record = record
        self._pointers = np.array([record.ctypes.data], np.uintp)
        self.address = int(self._pointers.ctypes.data)


class SideStream(Protocol):
    """A stream beside the engine's: it leaves that one, and is waited for later."""

    def leave(self, stream: Any) -> Any:
        """Where to launch: ordered after all that is on ``stream`` so far, within its capture if it is captured.

        ``stream`` itself where there is nothing beside it.
        """

    def let_wait(self, stream: Any) -> None:
        """Order ``stream`` after all that was launched beside it; nothing where that is captured and ``stream`` is not.

        Raises:
            CaptureError: ``stream`` is captured, and what was launched beside it is not in the same capture.
        """

    def join(self, stream: Any) -> None:
        """The same for the last time; without a `leave` before it nothing.

        Raises:
            CaptureError: they are not in the same capture.
        """

    def abandon(self) -> None:
        """Join the stream that was left, if that can be; raises nothing."""

    def close(self) -> None:
        """Give the stream back; the device has been waited for."""


class Driver(Protocol):
    """A device: memory, kernels, streams. ``stream`` is what the engine handed in (None = the default stream)."""

    n_multiprocessors: int

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """A zeroed device array (structured dtypes as u8 with the item size as last axis)."""

    def pointer(self, array: Any) -> int:
        """Device address of an array made by `zeros`."""

    def mapped(self, n: int, dtype: npt.DTypeLike) -> tuple[Array, int]:
        """Zeroed pinned host memory mapped into the device: its NumPy view and its device address."""

    def kernel(self, source: str, name: str) -> Any:
        """A loaded kernel of ``kernels/<source>.cu``."""

    def resident_blocks(self, kernel: Any) -> int:
        """Blocks of ``abi.THREADS`` threads of a kernel that a multiprocessor holds at once."""

    def launch(self, kernel: Any, grid: tuple[int, int], params: Packed, stream: Any) -> None:
        """Launch with ``abi.THREADS`` threads a block and one by-value structure."""

    def capture(self, launch: Callable[[Any], None]) -> CapturedGraph:
        """The graph of what ``launch`` puts on the stream that it is given; touches no stream of the engine's."""

    def side_stream(self) -> SideStream:
        """A stream of the driver's own."""

    def fill_zero(self, array: Any, stream: Any) -> None:
        """Zero an array, ordered on the stream."""

    def upload(self, array: Any, values: Array, stream: Any) -> None:
        """Copy host values into an array, ordered on the stream; may wait."""

    def write_table(self, array: Any, values: Array, stream: Any) -> None:
        """Copy host values into an array, ordered on the stream; waits only for buffers of its own, as `lend` does."""

    def set_word(self, array: Any, index: int, value: int, stream: Any) -> None:
        """Set one u64 word (value < 2^32), ordered on the stream, without waiting."""

    def download(self, array: Any) -> Array:
        """A host copy, after all that was launched."""

    def read_memory(self, pointer: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """A host copy of engine memory, after all that was launched."""

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        """XOR one byte of engine memory; may wait."""

    def write_memory(self, pointer: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
        """Put bytes into engine memory, after all that was launched; may wait."""

    def staging(self, n_words: int, depth: int) -> Staging:
        """Buffers for the deferred handler."""

    def upload_lists(self, lists: Sequence[Any], capacity: int, stream: Any) -> Sequence[int] | None:
        """Device addresses of i32 lists (0 for None); None if the buffers are still being read by the copies before.

        Host lists go through pinned buffers of ``capacity`` entries and are copied on the stream without waiting.
        """

    def lend(self, arrays: Sequence[Any], n_scratch: int, stream: Any) -> AbstractContextManager[tuple[list[int], int]]:
        """Device addresses of arrays (0 for None, `ArrayView`s where they lie) and of ``n_scratch`` bytes.

        They hold for what is launched on the stream until the with-block ends, and nothing is reused before that is
        done, on whichever stream. NumPy arrays are copied through pinned memory; waits only for its own buffers.
        """

    @property
    def lent_bytes(self) -> int:
        """Memory that is kept for `lend`, in bytes."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def close(self) -> None:
        """Free everything that this driver made."""
