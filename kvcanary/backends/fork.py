"""HEAD on a stream of the guard's own: it leaves the engine's stream before the model, and TAIL waits for it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kvcanary.arrays import stream_pointer
from kvcanary.errors import CaptureError

if TYPE_CHECKING:
    from kvcanary.backends.cuda import CudaDriver


class CudaFork:
    """`kvcanary.backends.driver.Fork` of a GPU, by events: a capture takes the side stream in, and lets it go."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._side = driver._device.create_stream()
        self._pointer = int(self._side.handle)
        self._left, self._done = (driver._device.create_event() for _ in range(2))
        self._engine_streams: dict[int, Any] = {}
        self._from: int | None = None  # the stream that was left and has not been joined

    def leave(self, stream: Any) -> int:
        self._from = pointer = stream_pointer(stream)
        self._stream(pointer).record(self._left)
        self._side.wait(self._left)
        return self._pointer

    def wait_in(self, stream: Any) -> None:
        if self._from is not None and not self._is_only_captured(stream):
            self._order(stream_pointer(stream))

    def join(self, stream: Any) -> None:
        if self._from is None:
            return
        if self._is_only_captured(stream):
            raise CaptureError(
                "TAIL came outside the capture that HEAD of this forward is in, and with overlap_head=True it waits "
                "for it: begin and end a forward in one capture, or set overlap_head=False"
            )
        self._order(stream_pointer(stream))
        self._from = None

    def abandon(self) -> None:
        if self._from is not None:
            with contextlib.suppress(Exception):  # the device or the capture may be what failed
                self._order(self._from)
        self._from = None

    def _is_only_captured(self, stream: Any) -> bool:
        """Whether the side stream is in a capture, and ``stream`` is not."""
        is_capturing = self._driver.is_capturing
        return is_capturing(self._pointer) and not is_capturing(stream_pointer(stream))

    def _order(self, pointer: int) -> None:
        is_capturing = self._driver.is_capturing
        if is_capturing(pointer) and not is_capturing(self._pointer):  # the driver would make the capture invalid
            raise CaptureError(
                "HEAD of this forward ran outside the capture that its other calls come in, and with overlap_head=True "
                "they wait for it: begin and end a forward in one capture, or set overlap_head=False"
            )
        self._side.record(self._done)
        self._stream(pointer).wait(self._done)

    def close(self) -> None:
        self._side.close()

    def _stream(self, pointer: int) -> Any:
        if pointer not in self._engine_streams:
            self._engine_streams[pointer] = self._driver.stream_object(pointer)
        return self._engine_streams[pointer]
