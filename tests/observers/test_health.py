"""A guard that stopped running is found, whatever is late, idle, paused or reset."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from base import POOL_NAMES, full_config, make_facts, make_state
from engine import N_BLOCKS, PAGE, ToyEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcanary import CanaryManager, layouts
from kvcanary.deferred import DelayedDeviceHostHandler, HostStaging
from kvcanary.errors import CanaryCounterError, CanaryStalledError
from kvcanary.observers import Health, KernelRunCounterHealthChecker, counter_deltas
from kvcanary.state import CounterLayout
from kvcanary.tags import N_TAGS, CanaryLaunchTag, Stage

T = CanaryLaunchTag
ALL = frozenset({T.HEAD_K_FULL, T.HEAD_V_FULL, T.TAIL_K_FULL, T.TAIL_V_FULL, T.SWEEP_K_FULL})
IN_GRAPH = frozenset(tag for tag in ALL if tag.stage != Stage.SWEEP)


class Rig:
    """A checker over a device state whose launches are made by hand."""

    def __init__(self, active: Mapping[int, frozenset[T]], n_pools: int = 1, depth: int = 4, **config: Any) -> None:
        self.state = make_state(n_pools)
        self.staging = HostStaging(self.state.layout.n_words, depth)
        self.handler = DelayedDeviceHostHandler(self.staging, "health", depth)
        values = {"health_check_every_n_steps": 2, "health_check_warmup_steps": 0, "health_policy": "raise", **config}
        self.checker = KernelRunCounterHealthChecker(full_config(**values), active, POOL_NAMES[:n_pools], self.handler)
        self.n_steps = self.n_counted = 0
        self.n_sweeps = dict.fromkeys(range(n_pools), 0)

    def launch(self, tags: frozenset[T], pool: int = 0) -> None:
        for tag in tags:
            self.state.kernel_run_counters[pool, tag] += np.uint64(1)

    def step(self, tags: frozenset[T] = frozenset(), counts: bool = True) -> None:
        """One outer step of pool 0; ``counts`` = it had a forward and was not paused."""
        self.launch(tags)
        self.n_steps += 1
        self.n_counted += counts
        facts = {"n_counted_steps": self.n_counted, "n_sweeps": dict(self.n_sweeps)}
        self.checker.step(make_facts(self.state, self.n_steps, **facts))

    def run(self, n_steps: int, tags: frozenset[T] = frozenset()) -> None:
        for _ in range(n_steps):
            self.step(tags)


class TestHealth:
    """What `checker.health` says."""

    def test_it_waits_for_its_first_snapshot_and_then_says_what_the_last_check_found(self) -> None:
        rig = Rig({0: IN_GRAPH}, health_policy="log")
        assert rig.checker.health is Health.WAITING
        rig.run(3, IN_GRAPH)
        assert rig.checker.health is Health.RUNNING
        rig.run(4)
        assert rig.checker.health is Health.STALLED and rig.checker.n_reports == 1
        rig.run(2, IN_GRAPH)
        assert rig.checker.health is Health.RUNNING
        rig.state.kernel_run_counters[0, T.TAIL_V_FULL] = 0
        rig.run(2, IN_GRAPH - {T.TAIL_V_FULL})
        assert rig.checker.health is Health.FALLEN and rig.checker.n_reports == 2

    def test_idle_steps_tell_nothing_new(self) -> None:
        rig = Rig({0: IN_GRAPH}, health_policy="log")
        rig.run(2)
        rig.step()
        assert rig.checker.health is Health.STALLED
        for _ in range(6):
            rig.step(counts=False)
        assert rig.checker.health is Health.STALLED

    def test_it_is_off_where_nothing_is_checked(self) -> None:
        rig = Rig({0: IN_GRAPH}, health_check_every_n_steps=0)
        rig.run(5, IN_GRAPH)
        assert rig.checker.health is Health.OFF

    def test_the_error_goes_to_the_receiver_first_and_is_raised_all_the_same(self) -> None:
        told: list[CanaryStalledError] = []
        rig = Rig({0: IN_GRAPH})
        rig.checker._on_report = told.append
        rig.run(2)
        with pytest.raises(CanaryStalledError) as caught:
            rig.step()
        assert told == [caught.value]


class TwoPools:
    """An engine with a draft pool that its forwards may leave out."""

    def __init__(self, **config: Any) -> None:
        self.engine = ToyEngine()
        self.draft = [np.zeros((N_BLOCKS, PAGE, 2, 8), np.uint8)]
        pools = [self.engine.pool, layouts.nhd(k=self.draft, page_size=PAGE, name="draft")]
        values = {"health_check_every_n_steps": 4, "health_check_warmup_steps": 0, "health_policy": "raise", **config}
        self.manager = CanaryManager(full_config(**values), pools, 4, 64)
        self.n = 0

    def step(self, *forwards: list[str] | None) -> None:
        """One step with a forward for each list of pools, the first of which has index 0."""
        batch = self.engine.batch((0, self.n % 8, 1))
        with self.manager.step():
            for index, pools in enumerate(forwards):
                with self.manager.forward(batch, index=index, pools=pools):
                    self.engine.write(batch)
        self.n += 1

    def run(self, n_steps: int, *forwards: list[str] | None) -> None:
        for _ in range(n_steps):
            self.step(*forwards)


class TestPoolsThatForwardsLeaveOut:
    """A draft pool that rests is no stall; a guard that stopped is one."""

    @pytest.mark.parametrize("both", [None, ["full", "draft"]])
    def test_a_pool_that_rests_is_no_stall(self, both: list[str] | None) -> None:
        rig = TwoPools()
        rig.run(6, both)
        rig.run(12, ["full"])
        rig.run(6, both)
        assert rig.manager.stats().health == "running" and rig.manager.stats().stalls_total == 0

    def test_one_that_is_never_taken_is_none(self) -> None:
        rig = TwoPools()
        rig.run(12, ["full"])
        assert rig.manager.stats().health == "running"

    def test_pools_that_take_turns_may_rest_both(self) -> None:
        rig = TwoPools()
        for pool in ("full", "draft", "full"):
            rig.run(12, [pool])
        assert rig.manager.stats().health == "running"

    def test_a_later_forward_of_a_step_may_rest(self) -> None:
        rig = TwoPools()
        rig.run(6, ["full"], ["draft"])
        rig.run(12, ["full"])
        assert rig.manager.stats().health == "running"

    @pytest.mark.parametrize("sets", [([None], [["full"]]), ([["full"]], [["draft"]]), ([["full"], ["draft"]],)])
    def test_the_stop_of_all_pools_is_a_stall(self, sets: Any) -> None:
        rig = TwoPools()
        for forwards in sets:
            rig.run(6, *forwards)
        with pytest.raises(CanaryStalledError, match=r"did not run .*HEAD_K_FULL of pool 'full'.* of pool 'draft'"):
            rig.run(12)

    def test_a_pool_that_every_first_forward_takes_must_run(self) -> None:
        rig = TwoPools()
        rig.run(6, None)
        rig.run(6, ["full"])
        rig.manager._bind(rig.engine.batch((0, 0, 1)), False, ["draft"])
        checker, state = rig.manager._health, rig.manager.state
        before = state.kernel_run_counters.copy()
        now = before.copy()
        now[1] += np.uint64(1)  # what runs has the draft pool alone
        assert checker.choices.left_out(before, now) == ()
        now[0, T.HEAD_K_FULL] += np.uint64(1)
        now[1] = before[1]
        assert checker.choices.left_out(before, now) == {1}

    def test_where_no_choice_was_ever_made_all_pools_must_run(self) -> None:
        rig = Rig({0: frozenset({T.HEAD_K_FULL}), 1: frozenset({T.HEAD_K_SWA})}, n_pools=2)
        rig.checker.choices.note([0, 1], is_first=True)
        with pytest.raises(CanaryStalledError) as caught:
            rig.run(3, frozenset({T.HEAD_K_FULL}))
        assert caught.value.tags == (T.HEAD_K_SWA,)

    def test_a_pool_that_may_rest_runs_whole_or_not_at_all(self) -> None:
        rig = Rig({0: frozenset({T.HEAD_K_FULL}), 1: frozenset({T.HEAD_K_SWA, T.TAIL_K_SWA})}, n_pools=2)
        rig.checker.choices.note([0], is_first=True)
        rig.checker.choices.note([0, 1], is_first=True)
        rig.run(4, frozenset({T.HEAD_K_FULL}))
        rig.launch(frozenset({T.HEAD_K_SWA}), 1)  # a graph that lost its TAIL
        with pytest.raises(CanaryStalledError, match=r"TAIL_K_SWA of pool 'swa' \(0 -> 0\)") as caught:
            rig.run(3, frozenset({T.HEAD_K_FULL}))
        assert caught.value.tags == (T.TAIL_K_SWA,)

    def test_a_sweep_of_a_pool_that_rests_is_expected_all_the_same(self) -> None:
        rig = Rig({0: IN_GRAPH, 1: ALL}, n_pools=2)
        for pools in ([0], [0, 1]):
            rig.checker.choices.note(pools, is_first=True)
        rig.n_sweeps[1] = 1
        with pytest.raises(CanaryStalledError) as caught:
            rig.run(3, IN_GRAPH)
        assert caught.value.tags == (T.SWEEP_K_FULL,)


class TestKernelRunCounterDeltaCheck:
    def test_first_check_raises_when_counter_never_incremented(self) -> None:
        rig = Rig({0: IN_GRAPH})
        rig.run(2, IN_GRAPH - {T.TAIL_V_FULL})  # snapshot at step 2
        with pytest.raises(CanaryStalledError) as caught:
            rig.step(IN_GRAPH)  # delivered at step 3
        assert not isinstance(caught.value, CanaryCounterError)
        assert (caught.value.tags, caught.value.step) == ((T.TAIL_V_FULL,), 2)
        for text in (
            "step 2",
            "TAIL_V_FULL of pool 'full' (0 -> 0)",
            "since the start",
            "health_check_every_n_steps=0",
        ):
            assert text in str(caught.value)

    def test_running_guard_is_left_alone(self) -> None:
        Rig({0: IN_GRAPH}).run(20, IN_GRAPH)

    def test_later_check_compares_with_the_snapshot_before(self) -> None:
        rig = Rig({0: IN_GRAPH})
        rig.run(4, IN_GRAPH)
        rig.run(2)
        with pytest.raises(
            CanaryStalledError, match=r"step 6.* since step 4, over 2 steps .*HEAD_K_FULL .*\(4 -> 4\)"
        ) as caught:
            rig.step()
        assert (caught.value.tags, caught.value.step) == (tuple(sorted(IN_GRAPH)), 6)

    def test_stall_is_reported_at_every_check_while_it_lasts_and_then_no_more(self) -> None:
        rig = Rig({0: IN_GRAPH})
        steps: list[int] = []
        for number in range(1, 13):
            try:
                rig.step(IN_GRAPH if number > 6 else frozenset())
            except CanaryStalledError as error:
                steps.append(error.step)
        assert steps == [2, 4, 6]

    def test_warmup_and_period(self) -> None:
        rig = Rig({0: IN_GRAPH}, health_check_every_n_steps=3, health_check_warmup_steps=7)
        rig.run(9)  # 3 and 6 are in the warm-up, 9 is the first check
        with pytest.raises(CanaryStalledError) as caught:
            rig.step()
        assert caught.value.step == 9

    def test_check_at_the_last_step_of_the_warmup(self) -> None:
        rig = Rig({0: IN_GRAPH}, health_check_every_n_steps=3, health_check_warmup_steps=6)
        rig.run(6)
        with pytest.raises(CanaryStalledError) as caught:
            rig.step()
        assert caught.value.step == 6

    @pytest.mark.parametrize("active", [{}, {0: frozenset()}])
    def test_empty_active_tags_means_no_check(self, active: dict[int, frozenset[T]]) -> None:
        rig = Rig(active)
        rig.run(10)
        assert rig.handler.n_in_flight == 0
        rig.checker.active_tags = {0: IN_GRAPH}
        rig.run(2)
        with pytest.raises(CanaryStalledError):
            rig.step()

    def test_tags_that_are_taken_away_excuse_a_snapshot_in_flight(self) -> None:
        rig = Rig({0: IN_GRAPH})
        rig.run(4, IN_GRAPH)
        rig.step()
        rig.state.words[:] = 0
        rig.step()  # takes a snapshot of counters that fell
        rig.checker.active_tags = {}
        rig.step()

    def test_one_buffer_is_enough(self) -> None:
        rig = Rig({0: IN_GRAPH}, depth=1)
        rig.run(9, IN_GRAPH)

    def test_zero_turns_it_off(self) -> None:
        rig = Rig({0: IN_GRAPH}, health_check_every_n_steps=0)
        rig.run(10)
        assert rig.handler.n_in_flight == 0

    def test_steps_without_a_forward_do_not_count(self) -> None:
        rig = Rig({0: IN_GRAPH})
        rig.run(2, IN_GRAPH)
        for _ in range(6):
            rig.step(counts=False)
        rig.step(counts=True)
        rig.step(counts=False)
        with pytest.raises(CanaryStalledError, match="over 1 steps") as caught:
            rig.step(counts=False)
        assert caught.value.step == 10

    def test_fallen_counter_is_its_own_error(self) -> None:
        rig = Rig({0: IN_GRAPH})
        rig.run(4, IN_GRAPH)
        rig.state.kernel_run_counters[0, T.HEAD_K_FULL] = 1
        rig.step(IN_GRAPH - {T.TAIL_K_FULL})
        rig.step(IN_GRAPH - {T.TAIL_K_FULL})
        with pytest.raises(CanaryCounterError, match=r"HEAD_K_FULL .*\(4 -> 3\).*no launch of TAIL_K_FULL") as caught:
            rig.step(IN_GRAPH)
        assert (caught.value.tags, caught.value.step) == ((T.HEAD_K_FULL,), 6)

    def test_sweep_tags_are_expected_only_after_a_sweep(self) -> None:
        rig = Rig({0: ALL})
        rig.run(3, IN_GRAPH)  # off
        rig.run(3, IN_GRAPH)  # on, but there was nothing to check
        rig.n_sweeps[0] = 1
        rig.step(IN_GRAPH | {T.SWEEP_K_FULL})
        rig.run(2, IN_GRAPH)
        rig.n_sweeps[0] = 2  # said to be launched, and was not
        rig.run(1, IN_GRAPH)
        with pytest.raises(CanaryStalledError) as caught:
            rig.run(1, IN_GRAPH)
        assert (caught.value.tags, caught.value.step) == ((T.SWEEP_K_FULL,), 10)

    def test_pools_are_told_apart(self) -> None:
        rig = Rig({0: frozenset({T.HEAD_K_FULL}), 1: frozenset({T.HEAD_K_SWA})}, n_pools=2)
        rig.run(2, frozenset({T.HEAD_K_FULL, T.HEAD_K_SWA}))  # both of pool 0
        with pytest.raises(CanaryStalledError, match="HEAD_K_SWA of pool 'swa'"):
            rig.step()

    def test_delta_is_between_snapshots_however_late_they_arrive(self) -> None:
        rig = Rig({0: IN_GRAPH})
        rig.staging.hold()
        rig.run(2, IN_GRAPH)
        rig.run(2)  # stalled between the snapshots of 2 and 4
        rig.run(1, IN_GRAPH)
        rig.staging.release()
        with pytest.raises(CanaryStalledError) as caught:
            rig.step(IN_GRAPH)
        assert caught.value.step == 4
        rig.run(4, IN_GRAPH)  # the snapshot of step 6 was staged although step 6 raised

    def test_reset_starts_over_and_ignores_what_is_in_flight(self) -> None:
        rig = Rig({0: IN_GRAPH})
        rig.run(5, IN_GRAPH)
        rig.staging.hold()
        rig.run(1, IN_GRAPH)  # snapshot of 6, in flight over the reset
        rig.state.words[:] = 0
        rig.checker.reset(rig.n_counted, dict(rig.n_sweeps))
        rig.staging.release()
        rig.run(4, IN_GRAPH)
        rig.state.words[:] = 0
        rig.checker.reset(rig.n_counted, dict(rig.n_sweeps))
        rig.run(2)
        with pytest.raises(CanaryStalledError, match="since the start, over 2 steps"):
            rig.step()

    def test_log_policy_logs(self, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig({0: IN_GRAPH}, health_policy="log", mode="raise")
        rig.run(5)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.name for record in errors] == ["kvcanary"] * 2
        assert "health check of step 2" in errors[0].getMessage()
        assert "health check of step 4" in errors[1].getMessage()

    @pytest.mark.parametrize("mode", ["log", "raise"])
    def test_as_mode_follows_the_mode(self, mode: str, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig({0: IN_GRAPH}, health_policy="as-mode", mode=mode)
        rig.run(2)
        if mode == "raise":
            with pytest.raises(CanaryStalledError):
                rig.step()
        else:
            rig.step()
            assert "health check of step 2" in caplog.text

    @given(st.data())
    def test_pure_function_says_what_a_plain_loop_says(self, data: st.DataObject) -> None:
        counts = st.lists(st.lists(st.integers(0, 3), min_size=N_TAGS, max_size=N_TAGS), min_size=2, max_size=2)
        before, after = data.draw(counts), data.draw(counts)
        expected = data.draw(st.dictionaries(st.integers(0, 1), st.frozensets(st.sampled_from(T))))
        verdict = counter_deltas(np.array(before, np.uint64), np.array(after, np.uint64), expected)
        stalled, fallen = [], []
        for pool in range(2):
            for tag in T:
                b, a = before[pool][tag], after[pool][tag]
                if a < b:
                    fallen.append((pool, tag, b, a))
                elif a == b and tag in expected.get(pool, ()):
                    stalled.append((pool, tag, b, a))
        assert (verdict.stalled, verdict.fallen) == (stalled, fallen)


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


def test_bytes_and_time_of_one_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    for n_pools, n_bytes in ((1, 416), (2, 640)):
        rig = Rig(dict.fromkeys(range(n_pools), frozenset({T.HEAD_K_FULL})), n_pools, health_check_every_n_steps=1)
        assert rig.state.words.nbytes == CounterLayout(n_pools).n_words * 8 == n_bytes == 8 * (24 + 28 * n_pools)
        for pool in range(n_pools):
            rig.launch(frozenset({T.HEAD_K_FULL}), pool)
        facts = [make_facts(rig.state, step, n_counted_steps=0) for step in range(1, 2001)]
        start = time.perf_counter()
        for fact in facts:
            rig.checker.step(fact)
        microseconds = (time.perf_counter() - start) / len(facts) * 1e6
        with capsys.disabled():
            print(
                f"\n{n_pools} pools: a snapshot is {n_bytes} bytes; staged, delivered, judged in {microseconds:.1f} us"
            )
        assert rig.checker.latest is not None
        assert rig.checker.latest.step == 1999
