"""A guard that stopped running is found, whatever is late, idle, paused or reset."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
from base import make_facts
from hypothesis import given
from hypothesis import strategies as st

from kvcanary.errors import CanaryCounterError, CanaryStalledError
from kvcanary.observers import Health, counter_deltas
from kvcanary.state import CounterLayout
from kvcanary.tags import N_TAGS

from .health_rig import ALL, IN_GRAPH, Rig, T


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
        rig = Rig({0: IN_GRAPH})
        rig.run(20, IN_GRAPH)
        assert rig.checker.latest is not None and rig.checker.latest.step == 18  # it did look

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
        assert rig.checker.latest is not None and not rig.checker.latest.words.any()  # it has seen that they fell

    def test_one_buffer_is_enough(self) -> None:
        rig = Rig({0: IN_GRAPH}, depth=1)
        rig.run(9, IN_GRAPH)
        assert rig.checker.latest is not None and rig.checker.latest.step == 8

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
