"""Captures cut short, streams and managers that go away, too little memory: the CUDA driver over a stand-in."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine
from fake_toy import FakeToy, fake_world, prefilled  # noqa: F401  a fixture
from simt.fake_cuda import FakeArray, FakeCuda

from kvcanary import BackendError, CanaryManager, PhaseError, Reason, captured, layouts
from kvcanary.backends import cuda


@pytest.fixture(autouse=True)
def _no_orphans() -> None:
    gc.collect()  # of other tests
    captured._orphans.clear()


def damage(toy: FakeToy, slot: int = PAGE + 2) -> None:
    toy.k[1][slot // PAGE, slot % PAGE, 0, 0] ^= 1


def serves(toy: FakeToy, graph: Any, first: int) -> None:
    """The guard is silent over some steps, and then tells of damage."""
    for p in range(first, first + 3):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    damage(toy)
    toy.replay(graph, first + 3)
    toy.manager.synchronize()
    assert {(v.reasons, v.slot) for v in toy.manager.violations()} == {(Reason.DATA, PAGE + 2)}


# ---- captures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["before HEAD", "model", "behind TAIL"])
def test_a_capture_cut_short_leaves_nothing_behind(world: FakeCuda, place: str) -> None:
    toy, graph = prefilled(world, verify_data_every=1)
    assert toy.device_batch is not None
    batch, stream, before = toy.device_batch, world.new_stream(), toy.manager.backend.snapshot_words().copy()

    def capture() -> None:
        stream.begin_capture()
        try:
            if place == "before HEAD":
                raise RuntimeError("capture")
            with toy.manager.forward(batch, stream):
                if place == "model":
                    raise RuntimeError("capture")
            raise RuntimeError("capture")
        finally:
            stream.end_capture()  # what the engine's capture does with its graph: it is dropped

    for _ in range(3):
        with pytest.raises(RuntimeError, match="capture"):
            capture()
    assert np.array_equal(toy.manager.backend.snapshot_words(), before), "nothing was launched"
    serves(toy, toy.capture(batch), 1)
    assert graph is not None


def test_a_capture_cut_short_by_plain_calls_is_abandoned(world: FakeCuda) -> None:
    toy, _graph = prefilled(world, verify_data_every=1)
    batch, stream = toy.device_batch, world.new_stream()
    assert batch is not None
    stream.begin_capture()
    toy.manager.head(batch, stream)
    stream.end_capture()
    with pytest.raises(PhaseError, match=r"expected: tail\(\)"):
        toy.manager.begin_step(toy.stream)
    toy.manager.abandon_forward()
    serves(toy, toy.capture(batch), 1)


def test_a_graph_that_holds_half_a_forward_is_neither_an_alarm_nor_silence(
    world: FakeCuda,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """HEAD without TAIL: its slots are counted, not judged, and the health check says what is missing."""
    every = {"health_check_every_n_steps": 2, "health_check_warmup_steps": 1}
    toy, whole = prefilled(world, verify_data_every=1, **every)
    batch, stream = toy.device_batch, world.new_stream()
    assert batch is not None
    stream.begin_capture()
    toy.manager.head(batch, stream)
    stream.submit(toy.write_now)
    toy.manager.abandon_forward()
    half = stream.end_capture()
    for p in range(1, 6):
        toy.replay(half, p)
    for p in range(6, 9):
        toy.replay(whole, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    assert toy.manager.stats().unjudged_slots > 0
    assert "no launch of TAIL_K_FULL" in caplog.text


# ---- streams ---------------------------------------------------------------------------------------------------------
def destroy(toy: FakeToy) -> None:
    """What cudaStreamDestroy leaves: whoever uses the handle gets an error."""
    del toy.world.streams[toy.stream.handle]


def test_a_stream_that_is_destroyed_between_steps_is_not_used_any_more(world: FakeCuda) -> None:
    toy, graph = prefilled(world, verify_data_every=1, stats_print_every_n_steps=1, lifecycle=False)
    toy.replay(graph, 1)
    world.pump()
    destroy(toy)
    with pytest.raises(BackendError, match=r"pause\(\): stream .* cannot be used .*within step\(\) on one that lives"):
        toy.manager.pause()
    toy.manager.poll(), toy.manager.stats(), toy.manager.synchronize()
    toy.stream = world.new_stream()
    serves(toy, graph, 2)
    destroy(toy)
    toy.manager.close()


def test_a_stream_that_is_destroyed_within_a_step_costs_a_snapshot(
    world: FakeCuda,
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy, graph = prefilled(world, verify_data_every=1, stats_print_every_n_steps=1, sweep_interval=1)
    slots = np.arange(PAGE, PAGE + 1, dtype=np.int32)
    toy.manager.attach_resident_set(lambda: (slots, slots - PAGE, slots - PAGE - 1))
    toy.replay(graph, 1)
    damage(toy, PAGE)
    toy.fill((0, 2, 1), (1, 2, 1))
    with toy.manager.step(toy.stream):
        graph.launch(toy.stream)
        world.pump()
        handle = toy.stream.handle
        destroy(toy)
    assert {v.slot for v in toy.manager.violations()} == {PAGE}, "what was found is told"
    assert toy.manager.step_number == 3 and toy.manager.n_observer_errors > 0
    assert "the engine goes on" in caplog.text or "the step goes on" in caplog.text
    toy.stream = world.new_stream()
    assert toy.stream.handle != handle or toy.stream
    toy.replay(graph, 3)
    toy.manager.synchronize()
    assert toy.manager.stats().snapshot_step == 4


# ---- the manager goes, its graphs stay -------------------------------------------------------------------------------
def test_a_manager_collected_while_a_graph_lives_leaves_its_memory_to_it(
    world: FakeCuda,
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy, graph = prefilled(world)
    stamps = weakref.ref(toy.manager.backend._arrays[0]["head0"])  # type: ignore[attr-defined]
    manager = weakref.ref(toy.manager)
    del toy.manager
    gc.collect()
    assert manager() is None and stamps() is not None and len(captured.orphans()) == 1
    assert "collected without close()" in caplog.text
    for p in range(1, 4):
        toy.fill((0, p, 1), (1, p, 1))
        graph.launch(toy.stream)
        world.pump()
    assert stamps().np.view(np.uint32)[PAGE + 3 :].any(), "the graph has written where it always did"


def test_a_manager_whose_forwards_were_never_captured_is_freed(world: FakeCuda) -> None:
    toy = FakeToy(world)
    batch = toy.fill((0, 0, 1), (1, 0, 1))
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    world.pump()
    stamps = weakref.ref(toy.manager.backend._arrays[0]["head0"])  # type: ignore[attr-defined]
    del toy.manager
    gc.collect()
    assert stamps() is None and captured.orphans() == ()


def test_a_manager_that_is_closed_is_freed_although_it_was_captured(world: FakeCuda) -> None:
    toy, _graph = prefilled(world)
    stamps = weakref.ref(toy.manager.backend._arrays[0]["head0"])  # type: ignore[attr-defined]
    toy.manager.close()
    del toy.manager, _graph
    gc.collect()
    assert stamps() is None and captured.orphans() == ()


# ---- memory ----------------------------------------------------------------------------------------------------------
class SmallCuda(FakeCuda):
    """A device with so many bytes, and as many pinned ones."""

    def __init__(self, lib: Any, n_bytes: int, n_pinned: int) -> None:
        super().__init__(lib)
        self.total, self.n_pinned = n_bytes, n_pinned
        self.alive: weakref.WeakSet[FakeArray] = weakref.WeakSet()
        self.cupy.cuda.runtime.memGetInfo = lambda: (self.total - self.used, self.total)
        pool = type("Pool", (), {"free_all_blocks": lambda _self: self.calls.update(["free_all_blocks"])})
        self.cupy.get_default_memory_pool = pool

    @property
    def used(self) -> int:
        return sum(a.nbytes for a in self.alive)

    def _zeros(self, shape: Any, dtype: Any) -> FakeArray:
        if self.used + int(np.prod(shape)) * np.dtype(dtype).itemsize > self.total:
            raise MemoryError("Out of memory allocating ... bytes")
        array = super()._zeros(shape, dtype)
        self.alive.add(array)
        return array

    def _pinned(self, n_bytes: int) -> Any:
        if n_bytes > self.n_pinned:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
        return super()._pinned(n_bytes)


@pytest.fixture
def small(library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(n_bytes: int, n_pinned: int = 1 << 30) -> SmallCuda:
        small = SmallCuda(library, n_bytes, n_pinned)
        monkeypatch.setattr(cuda, "check_driver", lambda: None)
        monkeypatch.setattr(cuda, "import_cuda", lambda: (small.cupy, small.core))
        return small

    return make


def construct(toy: ToyEngine, **config: Any) -> CanaryManager:
    k, v = ([FakeArray(a) for a in half] for half in (toy.k, toy.v))
    return CanaryManager(toy.config, [layouts.nhd(k=k, v=v, page_size=PAGE)], 4, 64)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.95, 0.999])
def test_memory_that_does_not_suffice_is_named_and_given_back(small: Any, fraction: float) -> None:
    toy = ToyEngine()
    enough = small(1 << 30)
    manager = construct(toy)
    needed = enough.used
    manager.close()
    world = small(int(needed * fraction))
    with pytest.raises(BackendError) as caught:
        construct(toy)
    text = str(caught.value)
    pool = layouts.nhd(k=[FakeArray(a) for a in toy.k], v=[FakeArray(a) for a in toy.v], page_size=PAGE)
    estimate = CanaryManager.estimate_bytes(toy.config, [pool], 4)
    assert f"of {world.total} are free on cuda:0" in text and f"takes {estimate}," in text
    assert "bytes more are wanted" in text and "leave it as much" in text
    gc.collect()
    assert world.used < 1024, "the error is still held, and its frames hold a counter or two at most"
    assert world.calls["free_all_blocks"] == 1 or fraction > 0.9
    del caught
    gc.collect()
    assert world.used == 0
    world.total = 1 << 30
    construct(toy).close()  # and then there is room


def test_pinned_memory_that_does_not_suffice_is_named(small: Any) -> None:
    world = small(1 << 30, n_pinned=100)
    with pytest.raises(BackendError, match=r"no pinned host memory of \d+ bytes .*ulimit -l") as caught:
        construct(ToyEngine())
    gc.collect()
    assert world.used == 0 and caught.value.__context__ is None


def test_a_log_of_such_a_failure_holds_nothing(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An engine that logs the error with its traceback and goes on unguarded has its memory back."""
    world = small(1 << 12)
    toy = ToyEngine()
    try:
        construct(toy)
    except BackendError:
        logging.getLogger("engine").exception("no guard")
    gc.collect()
    assert world.used == 0 and "no guard" in caplog.text
