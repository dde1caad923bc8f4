"""What is promised of counters, numbers and the ring holds where they are full, wrapped, or very large."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from agree import Side, Sides
from agree_script import A, Row, batch_of, pool_spec
from agree_twins import Twins
from engine import ToyEngine

from kvcanary import CanaryConfig, CanaryManager, CanaryStats, Reason, StepBatch, abi, layouts
from kvcanary.observers import counter_deltas
from kvcanary.state import CounterLayout, StateSnapshot
from kvcanary.tags import CanaryLaunchTag
from kvcanary.violation_ring import RingReader

CAPACITY = 3


def astray(n: int) -> dict[str, Any]:
    """A batch whose n tokens are written outside the pool, one record each at HEAD."""
    arrays = batch_of([Row(1, A, 0, n, [1, 2, 3, 4, 5, 6])])
    return {**arrays, "slot_mapping": np.full(n, 1 << 40, np.int64)}


class Lane:
    """One guard of one pool over a ring of `CAPACITY`, and a reader of it."""

    def __init__(self, side: Side) -> None:
        self.twins = Twins(
            [pool_spec()], [side], 8, is_acknowledging=False, ring_capacity=CAPACITY, verify_data_every=1
        )
        self.state = side.manager.state
        self.manager = side.manager
        self.reader = RingReader(self.state.violation_log, self.state.control, CAPACITY)

    def word(self, word: int) -> int:
        return int(self.manager.backend.snapshot_words()[word])

    def set_word(self, word: int, value: int) -> None:
        self.state.words[word] = value

    def report(self, n: int) -> None:
        """n records, by one forward's HEAD."""
        batch = StepBatch(**astray(n))
        self.manager.head(batch)
        self.manager.abandon_forward()


@pytest.fixture(params=["host", "simt"])
def lane(request: pytest.FixtureRequest, sides: Sides) -> Lane:
    found = sides()
    if request.param == "simt" and len(found) < 2:
        pytest.skip("no C++ compiler: install g++ or clang++")
    return Lane(found[request.param == "simt"])


# ---- the ring --------------------------------------------------------------------------------------------------------
def test_a_full_ring_keeps_what_came_first_and_counts_the_rest(lane: Lane) -> None:
    lane.report(1)
    first = lane.state.violation_log[0].copy()
    assert first["commit"] == 1
    lane.report(CAPACITY + 4)
    words = [lane.word(w) for w in (abi.STATE_CLAIMED, abi.STATE_DROPPED, abi.STATE_OBSERVATIONS)]
    assert words == [CAPACITY, 5, CAPACITY + 5]
    assert lane.state.violation_log["commit"].tolist() == [1, 2, 3, 0]
    assert lane.state.violation_log[0] == first
    assert lane.reader.read()["commit"].tolist() == [1, 2, 3]
    lane.report(1)  # there is room again: in the place of record 0 it is not
    assert lane.reader.read()["commit"].tolist() == [4]
    assert lane.state.violation_log[0] == first


def test_many_laps_lose_and_mix_up_nothing(lane: Lane) -> None:
    rng, seen, n_reported = np.random.default_rng(0), [], 0
    for _ in range(150):
        n = int(rng.integers(1, 6))
        lane.report(n)
        n_reported += n
        if rng.random() < 0.8:
            seen += lane.reader.read(int(rng.integers(1, CAPACITY + 1)))["commit"].tolist()
    while lane.reader.has_new:
        seen += lane.reader.read()["commit"].tolist()
    assert len(seen) > 50 * CAPACITY
    assert seen == list(range(1, lane.word(abi.STATE_CLAIMED) + 1))
    assert lane.word(abi.STATE_OBSERVATIONS) == n_reported == len(seen) + lane.word(abi.STATE_DROPPED)


@pytest.mark.parametrize("claimed", [(1 << 32) - 2, (1 << 53) - 2, (1 << 63) - 2])
def test_records_whose_number_is_very_large(lane: Lane, claimed: int) -> None:
    lane.report(1)
    lane.set_word(abi.STATE_CLAIMED, claimed)
    lane.state.control[abi.CONTROL_READ] = claimed
    reader = RingReader(lane.state.violation_log, lane.state.control, CAPACITY)
    for n in (2, CAPACITY + 1, 3):
        before = reader.n_read
        lane.report(n)
        records = reader.read()
        assert records["commit"].tolist() == list(range(before + 1, before + 1 + min(n, CAPACITY)))
    assert lane.word(abi.STATE_CLAIMED) == reader.n_read == claimed + 8
    assert lane.word(abi.STATE_DROPPED) == 1
    assert int(lane.state.control[abi.CONTROL_ALARM]) == claimed + 8


# ---- counters --------------------------------------------------------------------------------------------------------
def test_counters_near_2_to_the_63_are_exact(lane: Lane) -> None:
    start = (1 << 63) - 3
    layout = lane.state.layout
    for counters in (layout.kernel_runs, layout.slot_runs, layout.data_runs):
        counters(lane.state.words)[...] = start
    for word in (abi.STATE_OBSERVATIONS, abi.STATE_DROPPED, abi.STATE_DATA_SLOTS, abi.STATE_UNJUDGED_SLOTS):
        lane.set_word(word, start)
    rng = np.random.default_rng(0)
    for n in range(1, 8):
        batch = batch_of([Row(1, A, n - 1, n, [1, 2])])
        slots = batch["slot_mapping"]
        lane.twins.write_kv(0, slots, rng)
        lane.twins.publish()
        with lane.manager.step(), lane.manager.forward(StepBatch(**batch)):
            pass
    lane.manager.synchronize()
    words = lane.manager.backend.snapshot_words()
    assert int(layout.kernel_runs(words)[0][CanaryLaunchTag(0)]) == start + 14
    stats = lane.manager.stats()
    assert stats.protected_tokens == sum(int(n) for n in layout.slot_runs(words).flat) > 1 << 66
    assert stats.dropped == start and stats.data_slots > start
    assert stats.observations_total == start, "what was dropped counts"


def test_snapshots_and_deltas_of_large_counters_are_exact() -> None:
    layout = CounterLayout(2)
    words = np.zeros(layout.n_words, np.uint64)
    runs = layout.kernel_runs(words)
    runs[...] = (1 << 63) + 1
    snapshot = StateSnapshot(3, layout, words)
    layout.slot_runs(words)[...] = (1 << 64) - 1
    assert snapshot.protected_tokens == 24 * ((1 << 64) - 1)
    assert CanaryStats.of(3, 0, 0, 0, snapshot).protected_tokens == snapshot.protected_tokens
    later = runs + np.uint64(1)
    tag = CanaryLaunchTag(0)
    verdict = counter_deltas(runs, later, {0: frozenset([tag])})
    assert not verdict.stalled and not verdict.fallen
    later[0, 0] -= np.uint64(1)
    assert [(c.before, c.after) for c in counter_deltas(runs, later, {0: frozenset([tag])}).stalled] == [
        ((1 << 63) + 1, (1 << 63) + 1)
    ]
    later[0, 0] -= np.uint64(1)
    assert [c.after for c in counter_deltas(runs, later, {}).fallen] == [1 << 63]


@pytest.mark.parametrize("step", [(1 << 32) - 2, (1 << 63) - 2])
def test_the_step_counter_goes_on(lane: Lane, step: int) -> None:
    for word in (abi.STATE_STEP, abi.STATE_STEP_DONE):
        lane.set_word(word, step)
    for n in range(1, 5):
        with lane.manager.step(), lane.manager.forward(StepBatch(**batch_of([Row(1, A, n - 1, n, [1])]))):
            pass
    lane.report(1)
    assert lane.word(abi.STATE_STEP) == step + 5
    (record,) = lane.reader.read()
    assert int(record["step"]) == (step + 5) % (1 << 32), "a record keeps the lower half"


# ---- a million -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["host", "simt"])
def test_a_million_violations_in_one_step(sides: Sides, backend: str) -> None:
    n, found = 1_000_000, sides()
    if backend == "simt" and len(found) < 2:
        pytest.skip("no C++ compiler: install g++ or clang++")
    pool = layouts.nhd(k=[np.zeros((4, 16, 1, 4), np.uint8)], page_size=16)
    config = CanaryConfig(real_data="none", stats_print_every_n_steps=0, health_check_every_n_steps=0)
    manager = CanaryManager(config, [pool], 1, n, backend=found[backend == "simt"].backend)
    batch = StepBatch(
        block_table=np.ones((1, 1), np.int32),
        seq_lens=np.array([n], np.int32),
        query_start_loc=np.array([0, n], np.int32),
        input_ids=np.zeros(n, np.int32),
        slot_mapping=np.full(n, 1 << 40, np.int64),
    )
    with manager.step():
        manager.head(batch)
        manager.abandon_forward()
        start = time.perf_counter()
    assert time.perf_counter() - start < 2, "the step reads some and leaves the rest in the ring"
    assert len(manager.violations()) > 0 and manager.stats().violations_total <= 1024
    manager.synchronize()
    stats, words = manager.stats(), manager.backend.snapshot_words()
    assert stats.observations_total == int(words[abi.STATE_OBSERVATIONS]) == n + 1  # the row is longer than its table
    assert stats.dropped == n + 1 - config.ring_capacity
    assert {v.reasons for v in manager.violations()} == {Reason.OUT_OF_RANGE}


def test_a_fault_in_every_slot_of_a_step_leaves_the_guard_as_it_was() -> None:
    engine = ToyEngine(verify_data_every=1, ring_capacity=4, stats_print_every_n_steps=0, health_check_every_n_steps=0)
    engine.step((0, 0, 8), (1, 0, 8))
    for layer in (*engine.k, *engine.v):
        layer[...] ^= 255
    engine.step((0, 8, 1), (1, 8, 1))
    for layer in (*engine.k, *engine.v):
        layer[...] ^= 255  # all is well again but for what was written in between
    engine.manager.synchronize()
    stats = engine.manager.stats()
    assert (stats.observations_total, stats.dropped) == (16 * 4, 16 * 4 - 4), "of each slot two layers of K and V"
    assert len(engine.manager.violations()) == 4
