"""Numbers by pool, and observers of the engine's own."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from base import make_state
from engine import ToyEngine

from kvcanary import (
    CanaryConfig,
    CanaryManager,
    ConfigError,
    KvCanaryViolation,
    KvPool,
    Plane,
    PoolKind,
    Reason,
    Stage,
    layouts,
)
from kvcanary.observers import StepFacts
from kvcanary.pool_stats import digest_bytes, leading_reason, pool_stats
from kvcanary.state import StateSnapshot
from kvcanary.tags import CanaryLaunchTag, Half
from kvcanary.violations import READINGS


def two_pools() -> list[KvPool]:
    full = layouts.nhd(k=[np.zeros((4, 2, 1, 8), np.uint8)], v=[np.zeros((4, 2, 1, 8), np.uint8)], page_size=2)
    latent = Plane(data=np.zeros((3, 2, 40), np.uint8), page_stride=80, token_stride=40, chunk_bytes=40)
    swa = KvPool(planes=(latent,), page_size=2, name="swa", kind=PoolKind.SWA, window=4)
    return [full, swa]


def test_counters_go_to_their_pool_and_tag() -> None:
    pools, state = two_pools(), make_state(2)
    state.words[:] = np.arange(len(state.words)) + 1000
    snapshot = StateSnapshot(5, state.layout, state.words.copy())
    counts = {(0, Reason.DATA): 2, (0, Reason.CHAIN | Reason.TOKEN): 3, (1, Reason.CHAIN): 4, (7, Reason.DATA): 9}
    full, swa = pool_stats(pools, snapshot, counts, {1: 6}, [10, 20], [(5, 2, 1), (0, 0, 3)])
    assert set(full.launches) == {CanaryLaunchTag.of(s, h, PoolKind.FULL) for s in Stage for h in Half}
    assert set(swa.launches) == {CanaryLaunchTag.of(s, Half.K, PoolKind.SWA) for s in Stage}
    tag = CanaryLaunchTag.TAIL_K_SWA
    assert swa.launches[tag] == state.kernel_run_counters[1, tag]
    assert swa.entries[tag] == state.slot_run_counters[1, tag]
    assert swa.data_launches[Stage.SWEEP] == state.data_run_counters[1, Stage.SWEEP]
    assert (full.scrub_turns, swa.scrub_turns) == tuple(state.scrub_run_counters.tolist())
    assert (full.scrub_turns_per_pass, swa.scrub_turns_per_pass, full.sweeps, swa.sweeps) == (10, 20, 0, 6)
    assert (full.sole_blocks, full.shared_blocks, full.free_blocks) == (3, 2, 1)
    assert {r: n for r, n in full.violations.items() if n} == {Reason.DATA: 2, Reason.TOKEN: 3}
    assert {r: n for r, n in full.reasons.items() if n} == {Reason.DATA: 2, Reason.CHAIN: 3, Reason.TOKEN: 3}
    assert {r: n for r, n in swa.violations.items() if n} == {Reason.CHAIN: 4}


def test_without_a_snapshot_the_device_has_done_nothing() -> None:
    full, _ = pool_stats(two_pools(), None, {}, {})
    assert not any((*full.launches.values(), *full.entries.values(), *full.data_launches.values()))


@pytest.mark.parametrize("reason", list(Reason))
def test_the_leading_reason_is_the_first_that_is_told(reason: Reason) -> None:
    order = list(READINGS)
    for other in Reason:
        first = reason if order.index(reason) < order.index(other) else other
        assert leading_reason(reason | other) == first


def test_the_mean_size_of_a_digest_is_over_slots_and_digests() -> None:
    full, swa = two_pools()
    assert digest_bytes([full], "all") == 8 and digest_bytes([swa], "all") == 40
    # 8 slots x 2 digests of 8 bytes, 6 slots x 1 of 40
    assert digest_bytes([full, swa], "all") == (8 * 16 + 6 * 40) / (8 * 2 + 6)
    assert digest_bytes([swa], "partial") == 16 and digest_bytes([full, swa], "none") == 0


class Recorder:
    """An observer that is due at even steps."""

    def __init__(self, fails: str = "") -> None:
        self.steps: list[tuple[int, int]] = []
        self.fails = fails

    def is_due(self, step: int) -> bool:
        if self.fails == "is_due":
            raise ValueError("boom")
        return step % 2 == 0

    def step(self, facts: StepFacts) -> None:
        self.steps.append((facts.step, facts.violations_total))
        if self.fails == "step":
            raise ValueError("boom")


class TestObservers:
    def test_it_is_asked_behind_our_own_when_it_is_due(self) -> None:
        engine, observer = ToyEngine(verify_data_every=1), Recorder()
        engine.manager.add_observer(observer)
        engine.step((0, 0, 6))
        engine.k[0][1, 1, 0, 0] ^= 1
        for p in (6, 7, 8):
            engine.step((0, p, 1))
        assert observer.steps == [(2, 1), (4, 1)]

    def test_it_is_asked_also_when_a_violation_is_raised(self) -> None:
        engine, observer = ToyEngine(verify_data_every=1, mode="raise"), Recorder()
        engine.manager.add_observer(observer)
        engine.step((0, 0, 6))
        engine.k[0][1, 1, 0, 0] ^= 1
        with pytest.raises(KvCanaryViolation):
            engine.step((0, 6, 1))
        assert observer.steps == [(2, 1)]

    @pytest.mark.parametrize("observer", [5, None, print, Recorder, SimpleNamespace(step=print, is_due=True)], ids=str)
    def test_what_cannot_be_asked_is_refused(self, observer: Any) -> None:
        engine = ToyEngine()
        with pytest.raises(ConfigError, match=r"add_observer\(.*\): give an object with is_due\(step\)"):
            engine.manager.add_observer(observer)
        engine.step((0, 0, 1))
        assert engine.manager.stats().observer_errors == 0

    @pytest.mark.parametrize("fails", ["is_due", "step"])
    def test_one_that_raises_is_counted_and_the_step_goes_on(
        self, fails: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = ToyEngine()
        engine.manager.add_observer(Recorder(fails))
        engine.manager.add_observer(good := Recorder())
        for p in range(4):
            engine.step((0, p, 1))
        assert [step for step, _ in good.steps] == [2, 4] and engine.manager.step_number == 4
        assert engine.manager.stats().observer_errors == (4 if fails == "is_due" else 2)
        assert all("Recorder raised" in r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR)

    def test_stats_tell_the_state_of_the_guard(self) -> None:
        engine = ToyEngine(stats_print_every_n_steps=3, health_check_every_n_steps=0)
        manager = engine.manager
        engine.step((0, 0, 2))
        manager.pause()
        stats = manager.stats()
        assert (stats.is_on, stats.is_paused, stats.health, stats.snapshot_interval) == (True, True, "off", 3)
        assert (stats.lag_steps, stats.black_box_errors, stats.pools[0].name) == (1, 0, "full")
        manager.close()
        assert not manager.stats().is_on
        off: Any = CanaryManager(CanaryConfig(mode="off"), [engine.pool], 2, 8).stats()
        assert not off.is_on and off.pools == ()
