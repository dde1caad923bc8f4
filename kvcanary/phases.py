"""The order of calls: which phase the manager is in, and what may come next."""

from __future__ import annotations

import threading
from enum import Enum

from kvcanary.errors import PhaseError


class Phase(Enum):
    """Where the manager stands; the value says what may come next."""

    OUTSIDE = "begin_step() before the next replay or forward, or head() to capture or warm up"
    STEP = "head() for an eager forward, or end_step(), or abandon_step() if it was interrupted"
    FORWARD = "tail() with the same batch, on the same stream, or abandon_forward() if it was interrupted"
    FORWARD_IN_STEP = (
        "tail() with the same batch, on the same stream, then end_step(), or abandon_step() if it was interrupted"
    )
    CLOSED = "nothing: the manager is closed; make a new one"
    FORKED = "nothing: this process was forked from the one whose manager it is; make a manager of its own"


_OUTSIDE, _STEP, _FORWARD, _FORWARD_IN_STEP = Phase.OUTSIDE, Phase.STEP, Phase.FORWARD, Phase.FORWARD_IN_STEP
_CLOSED, _FORKED = Phase.CLOSED, Phase.FORKED


class PhaseChecker:
    """Refuses calls in the wrong order and says what came and what was expected."""

    def __init__(self) -> None:
        self.phase = Phase.OUTSIDE
        self._thread = 0  # that came into the phase

    def begin_step(self) -> None:
        if self.phase is not _OUTSIDE:
            self._refuse("begin_step()")
        self.phase, self._thread = _STEP, threading.get_ident()

    def end_step(self) -> None:
        if self.phase is not _STEP:
            self._refuse("end_step()")
        self.phase = _OUTSIDE

    def head(self) -> None:
        if self.phase is _STEP:
            self.phase = _FORWARD_IN_STEP
        elif self.phase is _OUTSIDE:
            self.phase = _FORWARD
        else:
            self._refuse("head()")
        self._thread = threading.get_ident()

    def tail(self) -> None:
        if self.phase is _FORWARD_IN_STEP:
            self.phase = _STEP
        elif self.phase is _FORWARD:
            self.phase = _OUTSIDE
        else:
            self._refuse("tail()")

    def abandon_forward(self) -> None:
        """The model raised between HEAD and TAIL."""
        self.phase = {Phase.FORWARD: Phase.OUTSIDE, Phase.FORWARD_IN_STEP: Phase.STEP}.get(self.phase, self.phase)

    def abandon_step(self) -> None:
        """The engine raised inside a step."""
        if not self.is_over:
            self.phase = Phase.OUTSIDE

    @property
    def is_over(self) -> bool:
        """Closed, or in a forked child."""
        return self.phase is _CLOSED or self.phase is _FORKED

    def need_open(self, call: str) -> None:
        """Neither closed nor in a forked child."""
        if self.phase is _CLOSED or self.phase is _FORKED:
            self._refuse(call)

    def need_parent(self, call: str) -> None:
        """Not in a forked child."""
        if self.phase is Phase.FORKED:
            self._refuse(call)

    def need_outside_forward(self, call: str) -> None:
        """Not between HEAD and TAIL, not closed, not in a forked child."""
        if self.phase is not _STEP and self.phase is not _OUTSIDE:
            self._refuse(call)

    def close(self) -> None:
        self.phase = Phase.CLOSED

    def _refuse(self, call: str) -> None:
        raise PhaseError(f"{call} came in phase {self.phase.name}; expected: {self.phase.value}{self._whose()}")

    def _whose(self) -> str:
        """A word of the thread that came into the phase, if the call is another one's."""
        if self.phase is _OUTSIDE or self.is_over or self._thread == threading.get_ident():
            return ""
        other = next((t.name for t in threading.enumerate() if t.ident == self._thread), "that ended")
        return (
            f". It is thread {other!r} that began this phase, and the call came in thread "
            f"{threading.current_thread().name!r}: use a manager from one thread at a time, and let no other begin "
            "before it has ended its step"
        )
