"""Where HEAD runs: on the engine's stream, or beside the model on one of the guard's own that TAIL waits for.

A stream of the guard's own is taken into the engine's capture by an event, and leaves it only when that capture ends.
So what is captured has to be asked here, before the driver makes the engine's capture invalid.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kvcanary.arrays import stream_pointer
from kvcanary.errors import CaptureError

if TYPE_CHECKING:
    from kvcanary.backends.cuda import CudaDriver


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
        self._engine_streams: dict[int, Any] = {}
        self._last = 0  # the stream that was left last
        self._is_out = False

    def leave(self, stream: Any) -> Any:
        pointer = stream_pointer(stream)
        if self._driver.is_capturing(self._pointer) and pointer != self._last:
            return stream  # still in a capture, perhaps another one: this forward has none of its own
        self._last, self._is_out = pointer, True
        self._stream(pointer).record(self._left)
        self._side.wait(self._left)
        return self._pointer

    def let_wait(self, stream: Any) -> None:
        if self._is_out and not self._is_only_captured(stream):
            self._order(stream_pointer(stream))

    def join(self, stream: Any) -> None:
        if not self._is_out:
            return
        if self._is_only_captured(stream):
            raise CaptureError(
                "TAIL came outside the capture that HEAD of this forward is in, and with overlap_head=True it waits "
                "for it: begin and end a forward in one capture, or set overlap_head=False"
            )
        self._order(stream_pointer(stream))
        self._is_out = False

    def abandon(self) -> None:
        if self._is_out:
            with contextlib.suppress(Exception):  # the device or the capture may be what failed
                self._order(self._last)
        self._is_out = False

    def close(self) -> None:
        self._side.close()

    def _is_only_captured(self, stream: Any) -> bool:
        """Whether the side stream is in a capture, and ``stream`` is not."""
        is_capturing = self._driver.is_capturing
        return is_capturing(self._pointer) and not is_capturing(stream_pointer(stream))

    def _order(self, pointer: int) -> None:
        is_capturing = self._driver.is_capturing
        if is_capturing(pointer) and not is_capturing(self._pointer):
            raise CaptureError(
                "HEAD of this forward is not in the capture that its other calls come in, and with overlap_head=True "
                "they wait for it: begin and end a forward in one capture, or set overlap_head=False"
            )
        self._side.record(self._done)
        self._stream(pointer).wait(self._done)

    def _stream(self, pointer: int) -> Any:
        if pointer not in self._engine_streams:
            self._engine_streams[pointer] = self._driver.stream_object(pointer)
        return self._engine_streams[pointer]
