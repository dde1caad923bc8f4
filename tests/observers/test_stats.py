"""The stats line: exact, on time, about its own step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from base import full_config, make_facts, make_state

from kvcanary.deferred import DelayedDeviceHostHandler, HostStaging
from kvcanary.observers import PeriodicCanaryStatsLogger
from kvcanary.tags import CanaryLaunchTag

T = CanaryLaunchTag


class Rig:
    def __init__(self, every: int = 10, n_pools: int = 2) -> None:
        self.state = make_state(n_pools)
        self.staging = HostStaging(self.state.layout.n_words)
        handler = DelayedDeviceHostHandler(self.staging, "stats")
        active = {0: frozenset({T.HEAD_K_FULL, T.TAIL_K_FULL}), 1: frozenset({T.HEAD_K_SWA, T.HEAD_K_FULL})}
        self.logger = PeriodicCanaryStatsLogger(full_config(stats_print_every_n_steps=every), active, handler)

    def step(self, step: int, **facts: Any) -> None:
        self.logger.step(make_facts(self.state, step, **facts))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "kvcanary")
    return caplog


def test_line_is_exact(lines: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.state.slot_run_counters[0, T.HEAD_K_FULL] = 40
    rig.state.slot_run_counters[1, T.HEAD_K_SWA] = 2
    rig.state.kernel_run_counters[1, T.HEAD_K_FULL] = 7
    rig.state.kernel_run_counters[0, T.HEAD_K_FULL] = 7  # the same tag in two pools is one
    rig.state.kernel_run_counters[0, T.SWEEP_V_SWA] = 1  # not active
    rig.step(10, sweep_passes=3, violations_total=5, observations_total=50)
    rig.step(11)
    (record,) = lines.records
    assert record.msg == "[canary] step=%d protected_tokens=%d sweep_passes=%d violations=%d launch_tags_active=%d/%d"
    assert (
        record.getMessage() == "[canary] step=10 protected_tokens=42 sweep_passes=3 violations=5 launch_tags_active=1/3"
    )
    assert (record.name, record.levelno) == ("kvcanary", logging.INFO)


def test_every_n_steps_and_never_at_step_0(lines: pytest.LogCaptureFixture) -> None:
    rig = Rig(every=3)
    for step in range(11):
        rig.step(step)
    assert [record.getMessage().split()[1] for record in lines.records] == ["step=3", "step=6", "step=9"]


def test_zero_turns_it_off(lines: pytest.LogCaptureFixture) -> None:
    rig = Rig(every=0)
    for step in range(11):
        rig.step(step)
    assert lines.records == []


def test_late_line_has_the_numbers_of_its_own_step(lines: pytest.LogCaptureFixture) -> None:
    rig = Rig(every=2)
    rig.staging.hold()
    for step in range(1, 6):
        rig.state.slot_run_counters[0, T.HEAD_K_FULL] += np.uint64(100)
        rig.step(step, sweep_passes=step, violations_total=10 * step)
    assert lines.records == []
    rig.staging.release()
    rig.step(7)
    assert [record.getMessage() for record in lines.records] == [
        "[canary] step=2 protected_tokens=200 sweep_passes=2 violations=20 launch_tags_active=0/3",
        "[canary] step=4 protected_tokens=400 sweep_passes=4 violations=40 launch_tags_active=0/3",
    ]
    assert rig.logger.latest is not None
    assert (rig.logger.latest.step, rig.logger.latest.protected_tokens) == (4, 400)


def test_latest_snapshot_is_a_copy(lines: pytest.LogCaptureFixture) -> None:
    rig = Rig(every=1)
    kept = []
    for step in range(1, 8):
        rig.state.slot_run_counters[0, T.HEAD_K_FULL] = step
        rig.step(step)
        kept.append(rig.logger.latest)
    assert [snapshot.protected_tokens for snapshot in kept if snapshot] == [1, 2, 3, 4, 5, 6]


def test_no_active_tags(lines: pytest.LogCaptureFixture) -> None:
    rig = Rig(every=1)
    rig.logger.active_tags = {}
    rig.step(1)
    rig.step(2)
    assert lines.records[0].getMessage().endswith("launch_tags_active=0/0")
