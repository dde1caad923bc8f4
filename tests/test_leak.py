"""Steps by the thousand, with random batches, faults, failures and drains: memory, files and threads stay as they were.

LEAK_STEPS=50000 for a long run on the host; `kvcanary drill --soak --minutes 10` goes on with a whole engine.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine
from fake_toy import FakeToy, fake_world  # noqa: F401  a fixture
from simt.fake_cuda import FakeCuda

from kvcanary import KvCanaryViolation, StepBatch, abi
from kvcanary.cli import main
from kvcanary.observers import violations as observer
from kvcanary.sim import footprint, soak
from kvcanary.sim.footprint import MIB, Footprint

N_STEPS = int(os.environ.get("LEAK_STEPS", "1500"))
N_STRETCHES = 5


class Held:
    """What the process holds: Python's memory blocks, resident bytes, files, threads."""

    def __init__(self) -> None:
        gc.collect()
        self.blocks = sys.getallocatedblocks()
        self.threads = threading.active_count()
        fds, statm = Path("/proc/self/fd"), Path("/proc/self/statm")
        self.files = len(list(fds.iterdir())) if fds.exists() else 0
        self.resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def assert_flat(serve: Callable[[int], None], n_steps: int) -> None:
    """A leak grows in every stretch of steps; what else the process has (caches, ends of other tests) in one or two."""
    held = [Held()]
    for _ in range(N_STRETCHES):
        serve(n_steps // N_STRETCHES)
        held.append(Held())
    blocks = [after.blocks - before.blocks for before, after in pairwise(held)]
    resident = [after.resident - before.resident for before, after in pairwise(held)]
    assert median(blocks) < max(60, n_steps // N_STRETCHES // 20), f"Python objects grow with the steps: {blocks}"
    assert median(resident) < MIB, f"resident memory grows: {resident}"
    assert (held[-1].files, held[-1].threads) == (held[0].files, held[0].threads)


@pytest.fixture
def _short_memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the observer remembers of findings is bounded: the bounds are reached sooner. And pytest keeps no lines."""
    monkeypatch.setattr(observer, "MAX_SEEN", 64)
    monkeypatch.setattr(observer, "MAX_HISTORY", 16)
    logger = logging.getLogger("kvcanary")
    logger.addFilter(_drop)
    yield
    logger.removeFilter(_drop)


def _drop(_record: logging.LogRecord) -> bool:
    return False


class Monotone:
    """Counters that never fall."""

    def __init__(self, manager: Any) -> None:
        self.manager, self.last = manager, manager.backend.snapshot_words()

    def check(self) -> None:
        words = self.manager.backend.snapshot_words()
        goes_down = [abi.STATE_JUDGING, abi.STATE_PAUSE]
        fell = np.flatnonzero(words < self.last).tolist()
        assert set(fell) <= set(goes_down), fell
        self.last = words


class RandomToy(ToyEngine):
    """Random rows, damage, bad slot mappings, and forwards that raise."""

    def __init__(self, mode: str) -> None:
        often = {"stats_print_every_n_steps": 5, "health_check_every_n_steps": 5, "sweep_interval": 7}
        super().__init__(mode=mode, verify_data_every=3, ring_capacity=16, lifecycle=True, **often)
        self.random, self.lengths = random.Random(1), [0] * 4
        for r in range(4):
            self.manager.allocate_blocks([1 + 3 * r, 2 + 3 * r, 3 + 3 * r], r + 1)
        slots = np.arange(PAGE, 2 * PAGE, dtype=np.int32)
        self.manager.attach_resident_set(lambda: (slots, slots - PAGE, slots - 1))

    def forget(self) -> None:
        self.lengths = [0] * 4
        self.history[:] = -1

    def serve_one(self) -> None:
        rng, rows = self.random, []
        for r in range(4):
            if self.lengths[r] >= 11 or rng.random() < 0.05:
                self.lengths[r], self.history[r] = 0, -1
            n = rng.randint(1, 12 - self.lengths[r])
            rows.append((r, self.lengths[r], n))
            self.lengths[r] += n
        batch = self.batch(*rows)
        if rng.random() < 0.2:
            self.k[0].reshape(-1)[rng.randrange(self.k[0].size)] ^= 1 << rng.randrange(8)
        if rng.random() < 0.1:
            batch.slot_mapping[0] = -1
        with self.manager.step(), self.manager.forward(batch):
            if rng.random() < 0.05:
                raise RuntimeError("engine")
            self.write(batch)

    def call(self, i: int) -> None:
        """What an engine asks for between steps."""
        manager = self.manager
        if i % 50 == 0:
            manager.copy_slots([4], [8])
            manager.synchronize()
            manager.poll(), manager.stats(), manager.describe()
            manager.lifecycle.apply([("free", [1, 2, 3], 1), ("allocate", [1, 2, 3], 1)])
            self.forget()
        if i % 97 == 0:
            manager.pause()
            manager.resume()
        if i % 331 == 0:
            manager.reset()
            self.forget()

    def serve(self, n: int) -> None:
        for i in range(n):
            try:
                self.serve_one()
                self.call(i)
            except (RuntimeError, KvCanaryViolation):
                self.forget()


@pytest.mark.usefixtures("_short_memories")
@pytest.mark.parametrize("mode", ["log", "raise"])
def test_steps_on_the_host_leave_nothing_behind(mode: str) -> None:
    engine = RandomToy(mode)
    monotone = Monotone(engine.manager)
    engine.serve(600)

    def serve(n: int) -> None:
        engine.serve(n)
        monotone.check()

    assert_flat(serve, N_STEPS)
    engine.manager.synchronize()
    assert engine.manager.stats().violations_total > N_STEPS // 50


@pytest.mark.usefixtures("_short_memories")
def test_replays_on_the_stand_in_for_a_gpu_leave_nothing_behind(world: FakeCuda) -> None:
    toy = FakeToy(
        world, verify_data_every=2, stats_print_every_n_steps=3, health_check_every_n_steps=3, ring_capacity=16
    )
    toy.fill((0, 0, 1), (1, 0, 1))
    assert toy.device_batch is not None
    graph, rng, n_steps = toy.capture(toy.device_batch), random.Random(2), max(200, N_STEPS // 10)
    monotone = Monotone(toy.manager)

    def serve(n: int) -> None:
        for i in range(n):
            p = i % 11
            if p == 0:
                toy.history[:] = -1
            if rng.random() < 0.2:
                toy.k[0].reshape(-1)[rng.randrange(toy.k[0].size)] ^= 4
            toy.replay(graph, p)
            if i % 20 == 0:
                toy.manager.copy_slots([4], [40], stream=toy.stream)
                toy.manager.synchronize()
        monotone.check()

    serve(100)
    n_made = world.calls["allocate"]
    assert_flat(serve, n_steps)
    assert world.calls["allocate"] == n_made, "no memory of the device is asked for"
    assert toy.manager.stats().violations_total > 5


def test_managers_come_and_go_and_leave_nothing_behind() -> None:
    def serve(n_managers: int) -> None:
        for _ in range(n_managers):
            engine = ToyEngine()
            engine.step((0, 0, 6))
            engine.manager.close()

    serve(5)
    assert_flat(serve, 60)


def test_a_leak_is_told() -> None:
    kept: list[object] = []
    with pytest.raises(AssertionError, match="Python objects grow"):
        assert_flat(lambda n: kept.extend(object() for _ in range(n)), N_STEPS)

    def touch_new_memory(_n: int) -> None:  # mapped anew: malloc would look among what tests before have freed
        memory = mmap.mmap(-1, 40 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(memory, np.uint8).fill(1)
        kept.append(memory)

    with pytest.raises(AssertionError, match="resident memory grows"):
        assert_flat(touch_new_memory, N_STEPS)


def test_batches_that_are_gone_are_forgotten() -> None:
    engine = ToyEngine()
    for p in range(10):
        engine.step((0, p, 1))
    gc.collect()
    assert len(engine.manager._bound) == 0
    kept = [StepBatch(**vars(engine.batch((0, 10, 1))))]
    with engine.manager.forward(kept[0]):
        engine.write(kept[0])
    assert len(engine.manager._bound) == 1


# ---- kvcanary drill --soak --minutes ---------------------------------------------------------------------------------
def samples(*resident_mib: int, n_files: int = 7, n_threads: int = 1, on_device: int = 0) -> list[Footprint]:
    return [Footprint(n * MIB, n_files, n_threads, on_device) for n in resident_mib]


def test_growth_is_told_from_a_beginning_and_from_noise() -> None:
    assert footprint.growth(samples(100, 150, 200, 250, 300)) is None
    flat = footprint.growth(samples(140, 160, 150, 155, 150, 158, 160))
    assert flat is not None and footprint.is_flat(flat)
    grown = footprint.growth(samples(*range(100, 200, 10)))
    assert grown is not None and not footprint.is_flat(grown)
    for more in ({"n_files": 8}, {"n_threads": 2}, {"on_device": 64 * MIB}):
        grown = footprint.growth([*samples(*[100] * 6), *samples(*[100] * 6, **more)])
        assert grown is not None and not footprint.is_flat(grown), more
    assert "NOT FLAT: +70.0 MiB" in footprint.told(
        samples(*range(100, 200, 10)), footprint.growth(samples(*range(100, 200, 10)))
    )
    assert "too few seeds" in footprint.told(samples(100), None)


def test_a_soak_by_the_clock_tells_what_it_holds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(soak.STEPS_PER_SEED, "host", 4)
    assert main(["drill", "--soak", "--backend", "host", "--minutes", "0.05"]) == 0
    told = capsys.readouterr().out
    assert "violations=0" in told and "memory: " in told


def test_a_soak_that_leaks_does_not_pass(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soak.STEPS_PER_SEED, "host", 1)
    held = iter(samples(*range(100, 20000, 10)))
    monkeypatch.setattr(Footprint, "now", lambda **_kw: next(held))
    assert main(["drill", "--soak", "--backend", "host", "--minutes", "0.1"]) == 1
    assert "NOT FLAT" in capsys.readouterr().out
