"""The calls that attach what an engine has of its own: observers, callbacks, resident sets, other ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcanary.agreement import RankAgreement
from kvcanary.backends import Backend
from kvcanary.black_box import BlackBox
from kvcanary.checks import check_observer
from kvcanary.config import CanaryConfig
from kvcanary.errors import ConfigError
from kvcanary.observers import (
    KernelRunCounterHealthChecker,
    Observer,
    PeriodicCanaryStatsLogger,
    ViolationObserver,
)
from kvcanary.phases import PhaseChecker
from kvcanary.sweep import ResidentSet, SweepOrchestrator
from kvcanary.tags import CanaryLaunchTag
from kvcanary.turns import Turns, one_at_a_time
from kvcanary.violations import Violation

logger = logging.getLogger("kvcanary")


class AttachCalls:
    """`CanaryManager`'s part for what is attached to it, for good unless it says otherwise."""

    config: CanaryConfig
    _backend: Backend | None
    _phases: PhaseChecker
    _sweep: SweepOrchestrator
    _violations: ViolationObserver
    _health: KernelRunCounterHealthChecker
    _stats_logger: PeriodicCanaryStatsLogger
    _agreement: RankAgreement | None
    _observers: tuple[Any, ...]
    _more_observers: tuple[Observer, ...]
    _at_close: tuple[Callable[[], None], ...]
    _box: BlackBox | None
    _n_counted_steps: int
    _turns: Turns

    if TYPE_CHECKING:

        @property
        def active_tags(self) -> dict[int, frozenset[CanaryLaunchTag]]: ...

        def _pool_index(self, pool: str | int) -> int: ...

    def add_observer(self, observer: Observer) -> None:
        """Have an observer asked at the end of each step, behind the guard's own; what it raises is logged and counted.

        It runs on the thread that ends the step: it must neither wait for the device nor take long.

        Raises:
            ConfigError: it has no `is_due` or no `step`.
        """
        check_observer(observer)
        self._phases.need_open("add_observer()")
        self._more_observers += (observer,)

    def _call_at_close(self, call: Callable[[], None]) -> None:
        """Call once when the manager is closed, after the last numbers were read; what it raises is counted."""
        self._at_close += (call,)

    def on_violation(self, callback: Callable[[Violation], None]) -> None:
        """Call back for every first sighting of a violation, on the thread that ends the step (or polls)."""
        if not callable(callback):
            raise ConfigError(f"on_violation({callback!r}): give a function that takes a Violation")
        if self._backend is not None:
            self._phases.need_open("on_violation()")
            self._violations.on_violation(callback)

    @one_at_a_time
    def attach_resident_set(self, provider: ResidentSet | None, pool: str | int = 0) -> None:
        """Give the sweep the resident slots of a pool, see `SweepOrchestrator`; None detaches.

        Nothing is swept without ``sweep_interval``, as a WARNING says.

        Args:
            provider: called at each sweep: (slots, positions, predecessors[, tokens]), each i32[n], or None for
                nothing.
            pool: name or number.

        Raises:
            ConfigError: no function, or no such pool.
        """
        if provider is not None and not callable(provider):
            raise ConfigError(
                f"attach_resident_set({type(provider).__name__}): give a function without arguments, or None"
            )
        if self._backend is not None:
            self._phases.need_open("attach_resident_set()")
            if provider is not None and not self.config.sweep_interval:
                logger.warning(
                    "[canary] a resident set is attached, but sweep_interval is 0: nothing is swept; make the "
                    "CanaryConfig with sweep_interval=1000, say (steps from one sweep to the next)"
                )
            self._sweep.attach(self._pool_index(pool), provider)
            self._health.active_tags = self._stats_logger.active_tags = self.active_tags

    @one_at_a_time
    def attach_agreement(self, agreement: RankAgreement) -> None:
        """Let all ranks log or raise at the same step, see `RankAgreement`; between steps, on all ranks; for good.

        `close` closes it. Does nothing in mode "off".
        """
        if self._backend is not None:
            self._phases.need_outside_forward("attach_agreement()")
            if not isinstance(agreement, RankAgreement):
                given = type(agreement).__name__
                raise ConfigError(f"attach_agreement({given}): give a RankAgreement, made on all ranks at this point")
            on_stall = self._box.stall if self._box is not None else None
            agreement.attach(self._violations, self.config, self._n_counted_steps, on_stall)
            self._agreement = agreement
            self._observers = (self._violations, agreement, *self._observers[1:])
