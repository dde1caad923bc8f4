"""Does the guard itself still run? Its launch counters must rise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary.config import CanaryConfig
from kvcanary.deferred import DelayedDeviceHostHandler, Words
from kvcanary.errors import CanaryCounterError, CanaryStalledError
from kvcanary.log_lines import line
from kvcanary.observers.choices import PoolChoices
from kvcanary.observers.facts import StepFacts
from kvcanary.state import StateSnapshot
from kvcanary.tags import CanaryLaunchTag, Stage
from kvcanary.violations import PoolNames

logger = logging.getLogger("kvcanary")

ActiveTags: TypeAlias = Mapping[int, frozenset[CanaryLaunchTag]]


_NO_TAGS: frozenset[CanaryLaunchTag] = frozenset()
_SWEEP_TAGS = frozenset(tag for tag in CanaryLaunchTag if tag.stage == Stage.SWEEP)
_FORWARD_TAGS = frozenset(CanaryLaunchTag) - _SWEEP_TAGS


class Health(Enum):
    """What the health check last said."""

    OFF = "off"  #: health_check_every_n_steps=0
    WAITING = "waiting"  #: no snapshot was judged yet
    RUNNING = "running"  #: every launch that was expected ran
    STALLED = "stalled"  #: a launch that was expected did not run
    FALLEN = "fallen"  #: a counter fell: the guard's device memory was overwritten
    CLOSED = "closed"  #: the manager was closed: nothing is checked any more


class CounterChange(NamedTuple):
    """One counter between two snapshots, in launches."""

    pool: int
    tag: CanaryLaunchTag
    before: int
    after: int


@dataclass(frozen=True)
class CounterVerdict:
    """What two snapshots of the launch counters say, by pool and tag."""

    stalled: list[CounterChange]  #: expected to rise and did not move
    fallen: list[CounterChange]  #: lower than before, expected or not


def counter_deltas(
    previous: npt.NDArray[np.uint64], current: npt.NDArray[np.uint64], expected: ActiveTags
) -> CounterVerdict:
    """Compare two snapshots of kernel_run_counters.

    Args:
        previous: u64[pools, 12], launches; zeros before the first snapshot.
        current: the same, later.
        expected: pool index -> tags that must have risen in between.
    """
    before, now = previous.tolist(), current.tolist()  # a dozen numbers a pool: cheaper as Python's integers
    stalled = [(pool, tag) for pool, tags in expected.items() for tag in tags if now[pool][tag] == before[pool][tag]]
    fallen = [(pool, tag) for pool, runs in enumerate(now) for tag, n in enumerate(runs) if n < before[pool][tag]]

    def changes(found: Sequence[tuple[int, int]]) -> list[CounterChange]:
        return [CounterChange(p, CanaryLaunchTag(t), before[p][t], now[p][t]) for p, t in sorted(found)]

    return CounterVerdict(stalled=changes(stalled), fallen=changes(fallen))


class KernelRunCounterHealthChecker:
    """Raises, or logs, when a launch tag that should run at every forward has stopped running.

    Every ``health_check_every_n_steps`` steps from ``health_check_warmup_steps`` on it takes a snapshot and, when that
    arrives, compares it with the one that arrived before (the first with zero). Both carry the facts of their own step,
    so a late delivery confuses nothing. A stall is reported at every check while it lasts. A pool that the engine's
    forwards may leave out (`choices`) need not run by itself; when it runs, all its launches must.

    Args:
        config: whether, when and how loudly.
        active_tags: pool index -> tags that every counted step launches, and the SWEEP tags. May be replaced; empty: no
            check.
        pool_names: by pool index, all pools.
        handler: over ``state.layout.n_words`` words; this checker is its only user.
        on_report: gets the error that is about to be raised or logged; must not raise.
    """

    def __init__(
        self,
        config: CanaryConfig,
        active_tags: ActiveTags,
        pool_names: Sequence[PoolNames],
        handler: DelayedDeviceHostHandler,
        on_report: Callable[[CanaryStalledError], None] | None = None,
    ) -> None:
        self.active_tags = active_tags
        self.choices = PoolChoices()  #: told which pools forwards are bound with
        self.latest: StateSnapshot | None = None  #: the last snapshot that was delivered
        self.health = Health.WAITING if config.health_check_every_n_steps else Health.OFF
        self.n_reports = 0  #: checks that found something
        self._every = config.health_check_every_n_steps
        self._warmup = config.health_check_warmup_steps
        self._raises = config.health_raises
        self._log_format = config.log_format
        self._on_report = on_report
        self._pool_names = pool_names
        self._handler = handler
        self._baseline_steps = 0  # labels of the snapshot before, for the deltas
        self._baseline_sweeps: Mapping[int, int] = {}
        self._n_resets = 0

    def is_due(self, step: int) -> bool:
        """Whether `step` has anything to do after step number ``step``: to take a snapshot or to deliver one."""
        every = self._every
        return every > 0 and (step % every == 0 or self._handler.has_in_flight)

    def step(self, facts: StepFacts) -> None:
        """Deliver earlier snapshots, take a new one when due; never blocks, must not run inside a capture.

        Raises:
            CanaryStalledError: a snapshot that arrived shows a stall, and the health policy is to raise.
            CanaryCounterError: it shows a counter that fell; likewise.
            CaptureError: ``facts.stream`` is being captured.
        """
        if self._every == 0:
            return
        receive = partial(self._postprocess_on_host, facts=facts, n_resets=self._n_resets)
        self._handler.step(partial(self._compute_on_device, facts), receive, facts.stream)

    def reset(self, n_counted_steps: int, n_sweeps: Mapping[int, int]) -> None:
        """The device counters were set to zero on purpose, after this many steps and sweeps: start over from zero."""
        self._n_resets += 1  # snapshots from before it, still in flight, say nothing any more
        self.latest = None
        self._baseline_steps, self._baseline_sweeps = n_counted_steps, n_sweeps

    def _compute_on_device(self, facts: StepFacts) -> Any:
        """The device words, when a check is due."""
        is_due = facts.step >= self._warmup and facts.step % self._every == 0
        return facts.state.words if is_due and any(self.active_tags.values()) else None

    def _postprocess_on_host(self, words: Words, facts: StepFacts, n_resets: int = 0) -> None:
        """Judge the snapshot ``words`` (u64[n_words], taken at ``facts.step``) against the one before."""
        if n_resets != self._n_resets:
            return
        before, now = self.latest, StateSnapshot(facts.step, facts.state.layout, words.copy())
        counters = now.kernel_run_counters
        baseline = np.zeros_like(counters) if before is None else before.kernel_run_counters
        left_out = self.choices.left_out(baseline, counters)
        expected = self._expected_active_tags_for_health_check(facts, left_out)
        verdict = counter_deltas(baseline, counters, expected)
        since = f"since step {before.step}" if before else "since the start"
        n_steps = facts.n_counted_steps - self._baseline_steps
        self.latest = now
        self._baseline_steps, self._baseline_sweeps = facts.n_counted_steps, facts.n_sweeps
        if any(self.active_tags.values()) and (verdict.stalled or verdict.fallen):
            self.n_reports += 1
            self.health = Health.FALLEN if verdict.fallen else Health.STALLED
            self._report(verdict, facts.step, since, n_steps)
        elif any(expected.values()):  # else nothing was looked at, and what was known stays
            self.health = Health.RUNNING

    def _expected_active_tags_for_health_check(self, facts: StepFacts, left_out: Collection[int]) -> ActiveTags:
        """Tags that must have risen since the last snapshot: none without a counted step, SWEEP only after a sweep."""
        if facts.n_counted_steps <= self._baseline_steps:
            return {}
        swept = {pool for pool, n in facts.n_sweeps.items() if n > self._baseline_sweeps.get(pool, 0)}
        excused = [
            (_NO_TAGS if pool in swept else _SWEEP_TAGS) | (_FORWARD_TAGS if pool in left_out else _NO_TAGS)
            for pool in self.active_tags
        ]
        return {pool: tags - e for (pool, tags), e in zip(self.active_tags.items(), excused, strict=True)}

    def _report(self, verdict: CounterVerdict, step: int, since: str, n_steps: int) -> None:
        changes = verdict.fallen or verdict.stalled
        tags = sorted({change.tag for change in changes})
        text = f"[canary] health check of step {step}: "
        if verdict.fallen:
            text += (
                f"launch counters fell {since}: {self._list(verdict.fallen)}. Something wrote into the guard's device "
                "memory, so nothing in it can be trusted. Look for the stray write, then call reset() "
            )
        if verdict.stalled:
            text += (
                f"the guard did not run {since}, over {n_steps} steps that were not marked idle: no launch of "
                f"{self._list(verdict.stalled)}. If these steps had no forward, mark them: step(idle=True). If they "
                "had, it ran without the guard: call the model inside forward(), and capture a graph that is replayed "
                "again inside it "
            )
        text += "(health_check_every_n_steps=0 turns this check off)"
        error = (CanaryCounterError if verdict.fallen else CanaryStalledError)(text, tags, step)
        if self._on_report is not None:
            self._on_report(error)
        if self._raises:
            raise error
        names = [[self._pool_names[change.pool].name, change.tag.name] for change in changes]
        fields = {"step": step, "state": self.health.value, "tags": names}
        logger.error("%s", line(self._log_format, logging.ERROR, "stall", text, fields))

    def _list(self, changes: list[CounterChange]) -> str:
        return ", ".join(
            f"{tag.name} of pool '{self._pool_names[pool].name}' ({before} -> {after})"
            for pool, tag, before, after in changes
        )
