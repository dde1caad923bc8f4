"""What the host does at the end of a step, behind its forwards: sweep, renumber, count, and ask the observers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvcanary import abi
from kvcanary.agreement import RankAgreement
from kvcanary.backends import Backend
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.errors import KvCanaryError
from kvcanary.log_lines import ErrorLog
from kvcanary.observers import Observer, StepFacts, ViolationObserver
from kvcanary.phases import PhaseChecker
from kvcanary.state import StateSnapshot
from kvcanary.sweep import SweepOrchestrator

logger = logging.getLogger("kvcanary")


class HostPhase:
    """`CanaryManager`'s part for the end of a step. It never waits for the device, and only findings are raised."""

    _backend: Backend | None
    _phases: PhaseChecker
    _errors: ErrorLog
    _sweep: SweepOrchestrator
    _control: memoryview
    _step: int
    _n_counted_steps: int
    _stream: Any
    _is_idle: bool
    _is_paused: bool
    _is_out_of_numbers: bool
    _handlers: list[DelayedDeviceHostHandler]
    _violations: ViolationObserver
    _agreement: RankAgreement | None
    _observers: tuple[Any, ...]
    _more_observers: tuple[Observer, ...]

    if TYPE_CHECKING:

        def _newest_snapshot(self) -> StateSnapshot | None: ...

    def _post_ops_outside_graph(self) -> None:
        assert self._backend is not None
        counted = not (self._is_idle or self._is_paused)
        if not self._is_paused and self._sweep.is_sweeping:
            self._quietly(self._sweep_now)
        if self._control[abi.CONTROL_RENUMBER]:  # once in two thousand million forwards
            self._quietly(self._renumber)
        if self._agreement is not None:
            self._agreement.tick(is_idle=self._is_idle)
        self._step += 1
        self._n_counted_steps += counted
        step = self._step
        due: list[Observer] = [observer for observer in self._observers if observer.is_due(step)]
        # An observer with a snapshot to take looks at the stream itself.
        if all(observer in (self._violations, self._agreement) for observer in due) and self._has_odd_stream():
            due = list(self._observers)
        if self._more_observers:
            due += [observer for observer in self._more_observers if self._is_due(observer, step)]
        if due:
            self._observe(due, self._backend)

    def _renumber(self) -> None:
        """Numbers of forwards have 32 bits: move them down. Records told before have the old ones."""
        assert self._backend is not None
        if self._has_odd_stream() or self._is_out_of_numbers:  # else it is asked for again
            return
        self._is_out_of_numbers = bool(self._backend.state.control[abi.CONTROL_RENUMBER] == abi.LAST_FORWARD)
        if self._is_out_of_numbers:
            logger.error(
                "[canary] step %d: more than %d forwards since the last end_step(), so that their numbers ran out: "
                "nothing is judged any more. Make a new manager, and end a step now and then",
                self._step + 1,
                abi.LAST_FORWARD - abi.RENUMBER_AT,
            )
            return
        self._backend.renumber(self._stream)
        logger.info("[canary] step %d: the numbers of forwards were moved down", self._step + 1)

    def _sweep_now(self) -> None:
        assert self._backend is not None
        self._sweep.step(self._step + 1, self._backend, self._stream)

    def _quietly(self, work: Callable[[], object]) -> None:
        """Do something that is not worth the engine's step: whatever it raises is counted and logged."""
        try:
            work()
        except Exception:  # noqa: BLE001  whatever a driver raises
            name = getattr(work, "__name__", "?").strip("_")
            self._errors.note("[canary] the guard could not do all of its work (%s); the engine goes on", name)

    def _is_due(self, observer: Observer, step: int) -> bool:
        try:
            return observer.is_due(step)
        except Exception:  # noqa: BLE001  whatever an engine's observer raises
            self._errors.note("[canary] %s raised; the step goes on", type(observer).__name__)
            return False

    def _has_odd_stream(self) -> bool:
        """A stream that is captured, or whose context died: for the handlers to refuse, so all observers are asked."""
        try:
            return self._handlers[0].is_capturing(self._stream)
        except Exception:  # noqa: BLE001  the observers meet it again and report it, after the violations were read
            return True

    def _observe(self, due: Sequence[Observer], backend: Backend) -> None:
        errors: list[KvCanaryError] = []
        # The order is violations, health, stats; the totals in the facts are those after the first.
        facts: StepFacts | None = None
        for observer in due:
            if self._phases.is_over:  # a callback closed the manager, or this is a child that it forked
                return
            try:
                facts = facts or self._facts(backend)
                observer.step(facts)
            except Exception as error:  # noqa: BLE001  a log handler that raises is not the engine's problem
                if isinstance(error, KvCanaryError) and observer not in self._more_observers:
                    errors.append(error)  # the others still get their step; the first error is the one raised
                    continue
                self._errors.note("[canary] %s raised; the step goes on", type(observer).__name__)
            if observer is self._violations:
                facts = None  # its totals are older than what it has just read
        with suppress(Exception):
            self._note_dropped()
            for later in errors[1:]:
                logger.error("%s", later)
        if errors:
            raise errors[0]

    def _note_dropped(self) -> None:
        newest = self._newest_snapshot()
        if newest is not None:
            self._violations.note_dropped(newest.word(abi.STATE_DROPPED))

    def _facts(self, backend: Backend) -> StepFacts:
        return StepFacts(
            step=self._step,
            stream=self._stream,
            state=backend.state,
            n_counted_steps=self._n_counted_steps,
            sweep_passes=self._sweep.sweep_passes,
            n_sweeps=dict(self._sweep.n_sweeps),
            violations_total=self._violations.violations_total,
            observations_total=self._violations.observations_total,
        )
