"""How it ends: wait for the device and read what it still has to tell, give everything back, be told of a fork."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvcanary import abi
from kvcanary.agreement import RankAgreement
from kvcanary.backends import Backend
from kvcanary.black_box import BlackBox
from kvcanary.captured import CaptureWatch
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.observers import ViolationObserver
from kvcanary.phases import Phase, PhaseChecker
from kvcanary.state import StateSnapshot
from kvcanary.turns import Turns, one_at_a_time


class EndCalls:
    """`CanaryManager`'s part for the end of its process, its device, or of whatever was launched so far."""

    _backend: Backend | None
    _phases: PhaseChecker
    _handlers: list[DelayedDeviceHostHandler]
    _violations: ViolationObserver
    _agreement: RankAgreement | None
    _captures: CaptureWatch
    _box: BlackBox | None
    _at_close: tuple[Callable[[], None], ...]
    _open_forward: Any
    _synced: StateSnapshot | None
    _step: int
    _turns: Turns

    if TYPE_CHECKING:

        def _quietly(self, work: Callable[[], object]) -> None: ...

        def _restore_perturbed(self) -> None: ...

    @one_at_a_time
    def synchronize(self) -> None:
        """Wait for all that was launched, deliver all snapshots, read all violations, and bring `stats` up to date.

        Violations are not raised here (the next `end_step` does); a stall that a delivered snapshot shows is.
        """
        if self._backend is not None:
            self._phases.need_outside_forward("synchronize()")
            self._backend.synchronize()
            self._violations.poll()
            for handler in self._handlers:
                handler.drain()
            self._take_snapshot(self._backend)

    @one_at_a_time
    def close(self) -> None:
        """Give everything back; waits for the device. Graphs with the guard's launches must not be replayed after."""
        if self._backend is None or self._phases.is_over:
            return
        self._phases.close()
        if self._agreement is not None:
            self._agreement.close()
        self._open_forward = None
        self._quietly(self._restore_perturbed)
        self._quietly(self._violations.poll)  # first: it asks nothing of a device that may have died
        with suppress(Exception):  # of such a one, the end of this call says so
            self._finish(self._backend)
        self._captures.end()
        if self._box is not None:
            self._box.end("close")
        for call in self._at_close:  # what shows the last numbers, which were just read
            self._quietly(call)
        for handler in self._handlers:
            handler.close()
        self._backend.close()

    def after_fork(self) -> None:
        """In a forked child: every call but `close` is refused, and nothing of the parent's device state is touched."""
        self._phases.phase = Phase.FORKED
        self._turns.renew()

    def _take_snapshot(self, backend: Backend) -> None:
        words = backend.snapshot_words()
        self._synced = StateSnapshot(self._step, backend.state.layout, words)
        self._violations.note_dropped(int(words[abi.STATE_DROPPED]))

    def _finish(self, backend: Backend) -> None:
        """What the device still has to tell, for `stats` and the black box."""
        backend.synchronize()
        self._violations.poll()
        self._take_snapshot(backend)
