"""Getting small device arrays to the host without ever waiting for the device."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary.errors import CaptureError, ConfigError, PhaseError

logger = logging.getLogger("kvcanary")

Words: TypeAlias = npt.NDArray[np.uint64]
ComputeOnDevice: TypeAlias = Callable[[], Any]
PostprocessOnHost: TypeAlias = Callable[[Words], None]


class Staging(Protocol):
    """``depth`` buffers between a device and the host, each with its event; every backend has its own.

    Only one `DelayedDeviceHostHandler` calls it, from one thread at a time. All memory, events and the side stream are
    made by the constructor; `copy` allocates nothing.
    """

    def copy(self, index: int, source: Any, stream: Any) -> None:
        """Start snapshot ``index`` of ``source``, ordered after what is on ``stream`` now; must not block.

        On a GPU: clone ``source`` into device buffer ``index`` on ``stream``, record an event there, let the side
        stream wait for it and copy the clone to pinned memory, record the buffer's second event there. Called only for
        a buffer that is not in flight, and never under capture.

        Args:
            source: u64[n] on the device.
            stream: the step's stream, as the backend names it; None is the backend's default stream.
        """

    def is_done(self, index: int) -> bool:
        """Whether the copy started last for ``index`` has arrived; must not block."""

    def wait(self, index: int) -> None:
        """Block until the copy started last for ``index`` has arrived; called by `drain` only."""

    def host(self, index: int) -> Words:
        """Host buffer ``index``: u64[n]; called once its copy has arrived, read before the next `copy` of ``index``."""

    def is_capturing(self, stream: Any) -> bool:
        """Whether ``stream`` is being captured into a graph; called at every step, must not block."""

    def close(self) -> None:
        """Give everything back; waits for copies in flight, since they write into memory that is about to go."""


class DelayedDeviceHostHandler:
    """Takes snapshots of a device array at some steps and delivers them at later ones; never blocks but in `drain`.

    A snapshot is delivered, in order, by a step after the one that staged it, to the ``postprocess_on_host`` that came
    with it. When all buffers are in flight the newest snapshot is not taken: to drop the oldest instead could starve
    delivery for ever. Not thread-safe.

    Args:
        staging: the buffers; the handler closes it.
        name: what is being copied, for messages.
        depth: buffers of ``staging``.
    """

    def __init__(self, staging: Staging, name: str, depth: int = 4) -> None:
        if depth < 1:
            raise ConfigError(f"depth={depth} of handler {name!r}: give at least 1 buffer")
        self._staging = staging
        self._name = name
        self._depth = depth
        self._in_flight: deque[tuple[int, PostprocessOnHost]] = deque()  # (buffer, receiver), oldest first
        self._n_staged = 0
        self._is_closed = False
        self.n_not_taken = 0  #: snapshots that found every buffer in flight

    @property
    def n_in_flight(self) -> int:
        """Snapshots staged and not yet delivered, at most ``depth``."""
        return len(self._in_flight)

    @property
    def has_in_flight(self) -> bool:
        """Whether a snapshot waits to be delivered."""
        return bool(self._in_flight)

    def is_capturing(self, stream: Any) -> bool:
        """Whether ``stream`` is being captured, so that `step` would refuse it."""
        return self._staging.is_capturing(stream)

    def step(
        self, compute_on_device: ComputeOnDevice, postprocess_on_host: PostprocessOnHost, stream: Any = None
    ) -> None:
        """Deliver what has arrived, then stage this step's snapshot; never blocks, must not run inside a capture.

        Args:
            compute_on_device: returns the array to take a snapshot of (u64[n] on the device), or None for no snapshot.
            postprocess_on_host: gets the snapshot at a later step, as u64[n] that is its own until it returns.
            stream: the step's stream; the snapshot is ordered after what is on it now.

        Raises:
            CaptureError: ``stream`` is being captured.
            PhaseError: the handler is closed.
            Exception: what a receiver raised, after all was delivered and staged (of several, the others are logged).
        """
        if self._is_closed:
            raise PhaseError(f"handler {self._name!r} is closed: step() came after close(); make a new manager")
        if self.is_capturing(stream):
            raise CaptureError(
                f"handler {self._name!r}: stream {stream!r} is being captured, and a snapshot inside a graph would be "
                "copied at every replay. Call end_step() outside the capture, for the stream that launches the graph"
            )
        errors: list[Exception] = []
        try:
            while self._in_flight and self._staging.is_done(self._in_flight[0][0]):
                self._deliver(errors)
            self._stage(compute_on_device, postprocess_on_host, stream)
        finally:
            self._raise(errors)

    def drain(self) -> None:
        """Wait for everything in flight and deliver it; blocks, must not run inside a capture.

        Raises:
            Exception: what a receiver raised, after all was delivered (of several, the others are logged).
        """
        errors: list[Exception] = []
        try:
            while self._in_flight:
                self._staging.wait(self._in_flight[0][0])
                self._deliver(errors)
        finally:
            self._raise(errors)

    def close(self) -> None:
        """Forget what was not delivered and give the buffers back; may be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._in_flight.clear()
            self._staging.close()

    def _deliver(self, errors: list[Exception]) -> None:
        index, receiver = self._in_flight.popleft()
        try:
            receiver(self._staging.host(index))
        except Exception as error:  # noqa: BLE001  _raise() raises it, once nothing else is lost by that
            errors.append(error)

    def _stage(self, compute_on_device: ComputeOnDevice, receiver: PostprocessOnHost, stream: Any) -> None:
        source = compute_on_device()
        if source is None:
            return
        if len(self._in_flight) == self._depth:
            self._count_not_taken()
            return
        index = self._n_staged % self._depth  # delivery is in order, so this one is free
        self._staging.copy(index, source, stream)
        self._in_flight.append((index, receiver))
        self._n_staged += 1

    def _count_not_taken(self) -> None:
        self.n_not_taken += 1
        n = self.n_not_taken
        if n & (n - 1) == 0:  # the 1st, 2nd, 4th, 8th, ... are worth a line
            logger.warning(
                "[canary] handler %r: snapshot not taken (%d so far): all %d buffers wait for the device, which is far "
                "behind the host. Nothing else is lost; take snapshots less often, or look for what holds the stream",
                self._name,
                n,
                self._depth,
            )

    def _raise(self, errors: list[Exception]) -> None:
        for error in errors[1:]:
            logger.error("[canary] handler %r: one more receiver raised in this step", self._name, exc_info=error)
        if errors:
            raise errors[0]


class HostEvent:
    """An event of the host backend: done as soon as it is recorded, unless somebody holds it back."""

    def __init__(self) -> None:
        self._gate = threading.Event()
        self._gate.set()

    @property
    def is_done(self) -> bool:
        return self._gate.is_set()

    def hold(self) -> None:
        """From now on it is not done, whatever is recorded, until `release`."""
        self._gate.clear()

    def release(self) -> None:
        """What was recorded is done, and what will be."""
        self._gate.set()

    def wait(self) -> None:
        """Block until it is done."""
        self._gate.wait()


class HostStaging:
    """`Staging` of the host backend, where device arrays are NumPy arrays and a stream runs everything at once.

    Args:
        n_words: length of the arrays, u64 words.
        depth: buffers.
    """

    def __init__(self, n_words: int, depth: int = 4) -> None:
        self.events = tuple(HostEvent() for _ in range(depth))  #: one per buffer
        self._buffers = tuple(np.zeros(n_words, np.uint64) for _ in range(depth))

    def copy(self, index: int, source: Any, stream: Any) -> None:
        assert source.shape == self._buffers[index].shape
        np.copyto(self._buffers[index], source)

    def is_done(self, index: int) -> bool:
        return self.events[index].is_done

    def wait(self, index: int) -> None:
        self.events[index].wait()

    def host(self, index: int) -> Words:
        return self._buffers[index]

    def is_capturing(self, stream: Any) -> bool:
        """The host backend has no captures."""
        return False

    def hold(self) -> None:
        """Hold every buffer's event back."""
        for event in self.events:
            event.hold()

    def release(self) -> None:
        """Release every buffer's event."""
        for event in self.events:
            event.release()

    def close(self) -> None:
        """Nothing to wait for and nothing to give back."""
