"""Where HEAD runs: on the engine's stream, or beside the model on one of the guard's own that TAIL waits for.

A stream of the guard's own is taken into the engine's capture by an event, and leaves it only when that capture ends.
So what is captured has to be asked here, before the driver makes the engine's capture invalid.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any

from kvcanary.arrays import LEGACY_STREAMS, stream_pointer
from kvcanary.backends.whose import libcuda
from kvcanary.errors import CaptureError

if TYPE_CHECKING:
    from kvcanary.backends.cuda import CudaDriver

_NONE, _ACTIVE = 0, 1  # CU_STREAM_CAPTURE_STATUS_*


class SameStream:
    """`kvcanary.backends.driver.SideStream` that is none: HEAD runs on the engine's stream."""

    def leave(self, stream: Any) -> Any:
        return stream

    def let_wait(self, stream: Any) -> None: ...

    def join(self, stream: Any) -> None: ...

    def abandon(self) -> None: ...

    def close(self) -> None: ...


class CudaSideStream:
    """`kvcanary.backends.driver.SideStream` of a GPU, by events."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._side = driver._device.create_stream()
        self._pointer = int(self._side.handle)
        self._left, self._done = (driver._device.create_event() for _ in range(2))
        self._query = driver.in_context(libcuda().cuStreamGetCaptureInfo_v2)
        self._last = 0  # the stream that was left last
        self._is_out = False

    def leave(self, stream: Any) -> Any:
        pointer, capture = stream_pointer(stream), self._capture_of(self._pointer)
        if capture and capture != self._capture_of(pointer):
            return stream  # still in a capture that this forward is not in: HEAD stays on the engine's stream
        self._last, self._is_out = pointer, True
        self._driver.stream_object(pointer).record(self._left)
        self._side.wait(self._left)
        return self._pointer

    def let_wait(self, stream: Any) -> None:
        pointer = stream_pointer(stream)
        if self._is_out and not (self._capture_of(self._pointer) and not self._capture_of(pointer)):
            self._order(pointer)

    def join(self, stream: Any) -> None:
        if self._is_out:
            self._order(stream_pointer(stream))
            self._is_out = False

    def abandon(self) -> None:
        if self._is_out:
            with contextlib.suppress(Exception):  # the device or the capture may be what failed
                self._order(self._last)
        self._is_out = False

    def close(self) -> None:
        self._side.close()

    def _order(self, pointer: int) -> None:
        if self._capture_of(pointer) != self._capture_of(self._pointer):  # the driver would make both invalid
            raise CaptureError(
                "HEAD of this forward and a call that waits for it (overlap_head=True) are not in the same capture: "
                "begin and end a forward in one capture or outside of any, or set overlap_head=False"
            )
        self._side.record(self._done)
        self._driver.stream_object(pointer).wait(self._done)

    def _capture_of(self, pointer: int) -> int:
        """The driver's number of the capture that a stream is in; 0 = none, -1 = one that has become invalid."""
        if pointer in LEGACY_STREAMS:
            return 0
        status, number = ctypes.c_int(), ctypes.c_ulonglong()
        arguments = (ctypes.byref(status), ctypes.byref(number), None, None, None)
        if self._query(ctypes.c_void_p(pointer), *arguments):
            return 0  # the next call on that stream says what is wrong with it
        return {_NONE: 0, _ACTIVE: number.value}.get(status.value, -1)
