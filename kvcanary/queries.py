"""The calls that only ask: what was found and counted, what the guard sees, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import hashing
from kvcanary.backends import Backend
from kvcanary.black_box import BlackBox
from kvcanary.checks import check_salt
from kvcanary.config import CanaryConfig
from kvcanary.construct import check_arguments, check_capacities
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.describe import describe_pools, estimate_bytes
from kvcanary.errors import BatchError
from kvcanary.history import HistoryWatch
from kvcanary.layout import KvPool
from kvcanary.lifecycle import BlockCounts, Lifecycle
from kvcanary.log_lines import ErrorLog
from kvcanary.observers import Health, KernelRunCounterHealthChecker, PeriodicCanaryStatsLogger, ViolationObserver
from kvcanary.patrol import Patrol
from kvcanary.phases import Phase, PhaseChecker
from kvcanary.pool_stats import pool_stats
from kvcanary.state import StateSnapshot
from kvcanary.stats import CanaryStats
from kvcanary.sweep import SweepOrchestrator
from kvcanary.violations import Violation


class QueryCalls:
    """`CanaryManager`'s part for what is known on the host; the device is not asked."""

    config: CanaryConfig
    pools: tuple[KvPool, ...]
    max_requests: int
    _backend: Backend | None
    _phases: PhaseChecker
    _errors: ErrorLog
    _sweep: SweepOrchestrator
    _patrols: list[Patrol]
    _lifecycle: Lifecycle | None
    _handlers: list[DelayedDeviceHostHandler]
    _violations: ViolationObserver
    _health: KernelRunCounterHealthChecker
    _stats_logger: PeriodicCanaryStatsLogger
    _box: BlackBox | None
    _synced: StateSnapshot | None
    _inputs_seen: set[str]
    _histories: HistoryWatch
    _digest_bytes: float
    _step: int
    _is_paused: bool

    def poll(self) -> tuple[Violation, ...]:
        """Read what is new in the ring now, without waiting and without raising; from any thread.

        Returns:
            The first sightings among them; what mode "raise" raises of them, the next `end_step` does.
        """
        self._phases.need_parent("poll()")
        return self._violations.poll() if self._backend is not None else ()

    def violations(self) -> tuple[Violation, ...]:
        """The newest 1,024 first sightings, oldest first; from any thread."""
        self._phases.need_parent("violations()")
        return self._violations.violations() if self._backend is not None else ()

    def stats(self) -> CanaryStats:
        """What is known on the host now, without asking the device; from any thread.

        The device's counters are those of the last snapshot: of the health check, the stats line, or `synchronize`.
        """
        if self._backend is None:
            return CanaryStats()
        self._phases.need_parent("stats()")
        newest, blocks, turns = self._newest_snapshot(), self._block_counts(), [p.n_turns for p in self._patrols]
        stats = CanaryStats.of(
            self._step,
            self._sweep.sweep_passes,
            self._violations.violations_total,
            self._violations.observations_total,
            newest,
            blocks,
            turns,
        )
        is_closed = self._phases.phase is Phase.CLOSED
        intervals = (self.config.stats_print_every_n_steps, self.config.health_check_every_n_steps)
        return replace(
            stats,
            digested_bytes=round(stats.data_slots * self._digest_bytes),
            is_on=not is_closed,
            is_paused=self._is_paused,
            health=(Health.CLOSED if is_closed else self._health.health).value,
            stalls_total=self._health.n_reports,
            observer_errors=self.n_observer_errors,
            snapshots_not_taken=sum(handler.n_not_taken for handler in self._handlers),
            snapshot_interval=min((n for n in intervals if n), default=0),
            black_box_errors=self._box.n_errors if self._box is not None else 0,
            pools=pool_stats(self.pools, newest, self._violations.counts(), dict(self._sweep.n_sweeps), turns, blocks),
        )

    def describe(self) -> str:
        """Per pool: bytes per slot, memory, expected cost, and which reasons are on, or off for lack of which input."""
        inputs, narrow = set(self._inputs_seen) or None, self._histories.narrowest
        return describe_pools(self.config, self.pools, self.max_requests, inputs, self._block_counts(), narrow)

    @property
    def memory_bytes(self) -> int:
        """Device and pinned memory that the guard holds, in bytes."""
        is_closed = self._phases.phase is Phase.CLOSED
        return 0 if self._backend is None or is_closed else self._backend.memory_bytes

    @property
    def n_observer_errors(self) -> int:
        """How often something that is not ours raised beside a step: a log handler, callback, driver, provider."""
        if self._backend is None:
            return 0
        return self._errors.n + self._violations.n_errors + self._sweep.errors.n

    @staticmethod
    def estimate_bytes(config: CanaryConfig, pools: Sequence[KvPool], max_requests: int) -> int:
        """Device and pinned memory that a manager of these would take, in bytes; nothing is allocated.

        Raises:
            ConfigError, LayoutError: a config, pools or a number that no manager can be made of.
        """
        given = check_arguments(config, pools)
        check_capacities(given, max_requests, max_new_tokens=1)
        return estimate_bytes(config, given, max_requests)

    @staticmethod
    def chain(tokens: Sequence[int] | npt.NDArray[Any], salt: int = 0) -> int:
        """The chain over a prefix of ``tokens``: what `StepBatch.prefix_chain` takes for a row with that prefix.

        Args:
            tokens: integer token ids, of which the low 32 bits count.
            salt: as in `StepBatch.salts`, 0 to 2^64 - 1.

        Raises:
            BatchError: anything else.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise BatchError(
                f"chain(): tokens are {ids.dtype}{list(ids.shape)}: give a flat sequence of integer token ids"
            )
        return hashing.prefix_chain(ids.astype(np.int64), check_salt("chain()", salt))

    def _newest_snapshot(self) -> StateSnapshot | None:
        newest = self._synced
        for observer in (self._health, self._stats_logger):
            latest = observer.latest
            if latest is not None and (newest is None or latest.step > newest.step):
                newest = latest
        return newest

    def _block_counts(self) -> tuple[BlockCounts, ...]:
        return self._lifecycle.counts() if self._lifecycle is not None else ()
