"""The health checker against an oracle that is a dictionary, over whatever happens in any order."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcanary.errors import CanaryCounterError, CanaryStalledError
from kvcanary.tags import Stage

from .health_rig import ALL, IN_GRAPH, Rig, T


class Taken(NamedTuple):
    """A snapshot as the oracle remembers it."""

    step: int
    counts: dict[tuple[int, T], int]
    news: set[str]


class CounterDeltaMachine(RuleBasedStateMachine):
    """Launches, idle steps, sweeps, late and dropped snapshots, resets and stray writes; the oracle is a dictionary."""

    @initialize(every=st.integers(1, 4), warmup=st.integers(0, 6), n_pools=st.integers(1, 2), depth=st.integers(1, 3))
    def start(self, every: int, warmup: int, n_pools: int, depth: int) -> None:
        self.active = dict.fromkeys(range(n_pools), ALL)
        self.every, self.warmup, self.depth = every, warmup, depth
        config = {"health_check_every_n_steps": every, "health_check_warmup_steps": warmup}
        self.rig = Rig(self.active, n_pools, depth, **config)
        self.counts = dict.fromkeys(itertools.product(range(n_pools), T), 0)
        self.is_held = False
        self.n_dropped = 0
        self.waiting: list[Taken | None] = []  # in flight; None = taken before a reset, says nothing
        self.start_over()

    def start_over(self) -> None:
        self.base_counts = dict.fromkeys(self.counts, 0)
        self.news: set[str] = set()  # what happened since the snapshot that was taken last

    @rule(
        counts=st.booleans(),
        lost=st.frozensets(st.sampled_from(sorted(ALL)), max_size=2),
        sweeps=st.booleans(),
        swept=st.frozensets(st.integers(0, 1)),
    )
    def step(self, counts: bool, lost: frozenset[T], sweeps: bool, swept: frozenset[int]) -> None:
        launched = (IN_GRAPH if counts else frozenset()) | (frozenset({T.SWEEP_K_FULL}) if sweeps else frozenset())
        for pool in self.active:
            for tag in launched - lost:
                self.counts[pool, tag] += 1
                if pool > 0:  # Rig.step launches for pool 0
                    self.rig.launch(frozenset({tag}), pool)
        counted = {pool for pool in self.active if sweeps and pool in swept}  # others had nothing to check
        self.news |= ({"forward"} if counts else set()) | {f"sweep {pool}" for pool in counted}
        for pool in counted:
            self.rig.n_sweeps[pool] += 1
        expected = self.deliver()
        seen: CanaryStalledError | None = None
        try:
            self.rig.step(launched - lost, counts)
        except CanaryStalledError as error:
            seen = error
        shown = (type(seen), seen.tags, seen.step) if seen else None
        assert shown == (expected[0] if expected else None)
        self.stage()

    def deliver(self) -> list[tuple[type, tuple[T, ...], int]]:
        """What the snapshots that arrive now must bring."""
        found: list[tuple[type, tuple[T, ...], int]] = []
        while self.waiting and not self.is_held:
            taken = self.waiting.pop(0)
            if taken is None:
                continue
            step, counts, news = taken
            stalled, fallen = set(), set()
            for (pool, tag), n in counts.items():
                must_rise = "forward" in news and tag in self.active.get(pool, ())
                if tag.stage == Stage.SWEEP:
                    must_rise = must_rise and f"sweep {pool}" in news
                if n < self.base_counts[pool, tag]:
                    fallen.add(tag)
                elif n == self.base_counts[pool, tag] and must_rise:
                    stalled.add(tag)
            self.base_counts = counts
            if any(self.active.values()) and (fallen or stalled):
                kind = CanaryCounterError if fallen else CanaryStalledError
                found.append((kind, tuple(sorted(fallen or stalled)), step))
        return found

    def stage(self) -> None:
        number = self.rig.n_steps
        if number < self.warmup or number % self.every or not any(self.active.values()):
            return
        if len(self.waiting) == self.depth:
            self.n_dropped += 1
            return  # the news wait for the snapshot after it
        self.waiting.append(Taken(number, dict(self.counts), self.news))
        self.news = set()

    @rule()
    def hold(self) -> None:
        self.rig.staging.hold()
        self.is_held = True

    @rule()
    def release(self) -> None:
        self.rig.staging.release()
        self.is_held = False

    @rule(tag=st.sampled_from(T), value=st.integers(0, 3))
    def stray_write(self, tag: T, value: int) -> None:
        self.rig.state.kernel_run_counters[0, tag] = value
        self.counts[0, tag] = value

    @rule()
    def reset(self) -> None:
        self.rig.state.words[:] = 0
        self.rig.checker.reset(self.rig.n_counted, dict(self.rig.n_sweeps))
        self.counts = dict.fromkeys(self.counts, 0)
        self.waiting = [None] * len(self.waiting)
        self.start_over()

    @rule(is_on=st.booleans())
    def change_active_tags(self, is_on: bool) -> None:
        self.active = dict.fromkeys(self.active, ALL if is_on else frozenset())
        self.rig.checker.active_tags = self.active

    @invariant()
    def nothing_grows(self) -> None:
        assert self.rig.handler.n_in_flight == len(self.waiting) <= self.depth
        assert self.rig.handler.n_not_taken == self.n_dropped


TestCounterDeltaMachine = CounterDeltaMachine.TestCase
TestCounterDeltaMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
