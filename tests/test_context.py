"""A context of the engine's own: every call of the guard's is made in it, and CuPy is never asked."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine import PAGE
from fake_toy import FakeToy, copy_block, prefilled, swap_blocks
from simt.fake_cuda import FakeCuda
from simt.fake_driver import CONTEXT, PRIMARY, FakeDriver, FakeLibcuda
from simt.runner import SimtLibrary

from kvcanary import BackendError, LayoutError, Reason, layouts
from kvcanary.backends import context, cuda, side_stream, whose
from kvcanary.backends.context import ContextDriver


@pytest.fixture
def driver(library: SimtLibrary, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    def no_cupy() -> Any:
        raise AssertionError("CuPy knows nothing of this context")

    driver = FakeDriver(FakeCuda(library))
    monkeypatch.setattr(cuda, "check_driver", lambda: None)
    monkeypatch.setattr(cuda, "import_cuda", no_cupy)

    def capture_info(*arguments: Any) -> int:
        assert driver.contexts[-1] == CONTEXT
        return int(driver._world.libcuda.cuStreamGetCaptureInfo_v2(*arguments))

    monkeypatch.setattr(whose, "libcuda", FakeLibcuda)
    monkeypatch.setattr(side_stream, "libcuda", lambda: SimpleNamespace(cuStreamGetCaptureInfo_v2=capture_info))
    monkeypatch.setattr(context, "import_driver", lambda: driver)
    monkeypatch.setattr(context, "compile_cubin", lambda source, arch: b"cubin" if arch == "sm_90" else b"")
    return driver


@pytest.mark.parametrize("overlap_head", [False, True])
def test_a_graph_in_the_engines_context(driver: FakeDriver, overlap_head: bool) -> None:
    config: dict[str, Any] = {"verify_data_every": 1, "stats_print_every_n_steps": 2}
    toy, graph = prefilled(driver._world, overlap_head=overlap_head, **config)
    assert isinstance(toy.manager.backend._driver, ContextDriver)
    for p in range(1, 6):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == () and toy.manager.stats().forwards == 6
    toy.k[1][1, 2, 0, 0] ^= 1
    toy.replay(graph, 6)
    toy.replay(graph, 7)
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, PAGE + 2, 1, 1)
    assert toy.manager.taint.tolist() == [Reason.DATA, 0, 0, 0]
    assert driver.contexts == [PRIMARY], "what was current is so again"


def test_a_replay_makes_no_call_at_all(driver: FakeDriver) -> None:
    toy, graph = prefilled(driver._world)
    toy.replay(graph, 1)
    toy.fill((0, 2, 1), (1, 2, 1))
    before = driver.n_calls
    with toy.manager.step(toy.stream):
        graph.launch(toy.stream)
    assert driver.n_calls - before == 3, "is the stream captured? with the context pushed"


def test_sweeps_moves_bundles_blocks_rebind_and_prove_work_there(driver: FakeDriver) -> None:
    toy, graph = prefilled(driver._world, verify_data_every=1, lifecycle=True, sweep_interval=1)
    world = driver._world
    toy.manager.allocate_blocks([1, 2, 3, 12], 1)
    toy.manager.allocate_blocks([4, 5, 6], 2)
    toy.manager.reset()
    for p in range(6):
        toy.replay(graph, p)
    slots = np.arange(PAGE, PAGE + 4, dtype=np.int32)
    resident = slots, np.arange(4, dtype=np.int32), np.concatenate([[-1], slots[:-1]]).astype(np.int32)
    toy.manager.attach_resident_set(lambda: resident)
    toy.replay(graph, 6)
    assert toy.manager.prove(toy.fill((0, 7, 1), (1, 7, 1)), toy.stream).ok
    copy_block(toy, 1, 12)
    toy.manager.copy_slots([1], [12], blocks=True, stream=toy.stream)
    bundle = toy.manager.export_slots(range(12 * PAGE, 13 * PAGE), stream=toy.stream)
    toy.manager.import_slots(bundle, range(12 * PAGE, 13 * PAGE), stream=toy.stream)
    batch = swap_blocks(toy, 1, 12, 7)
    toy.manager.rebind(0, toy.pool, stream=toy.stream)
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    world.pump()
    toy.manager.synchronize()
    assert toy.manager.violations() == () and toy.manager.lifecycle.epoch(12) == 1
    assert toy.manager.shadow_arrays()["HEAD_K"].shape[1] == 32


def test_graphs_for_child_nodes_are_captured_there(driver: FakeDriver) -> None:
    toy = FakeToy(driver._world)
    with toy.manager.graphs(toy.fill((0, 0, 1))) as graphs:
        assert [len(driver._world.graphs[g].nodes) for g in (graphs.head, graphs.tail)] == [4, 2]
    assert driver._world.graphs == {}


@pytest.mark.parametrize("overlap_head", [False, True])
def test_everything_is_given_back(driver: FakeDriver, overlap_head: bool) -> None:
    toy, graph = prefilled(driver._world, overlap_head=overlap_head)
    toy.replay(graph, 1)
    toy.manager.close()
    del toy, graph
    gc.collect()
    assert driver._memory == {} and driver.contexts == [PRIMARY]


@pytest.mark.parametrize("overlap_head", [False, True])
@pytest.mark.parametrize("answer", [None, 78], ids=["gone", "its place is another's"])
def test_a_context_that_is_gone_is_never_touched(
    driver: FakeDriver, answer: int | None, overlap_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver itself takes no question about a context that was destroyed: the process dies of it."""
    toy, graph = prefilled(driver._world, overlap_head=overlap_head)
    graphs = toy.manager.graphs(toy.fill((0, 1, 1), (1, 1, 1)))
    taint = toy.manager.taint
    toy.manager.close()
    driver.contexts[:] = [PRIMARY]
    n_calls = driver.n_calls
    gone = FakeLibcuda()
    gone.answers[7] = answer  # type: ignore[assignment]
    monkeypatch.setattr(whose, "libcuda", lambda: gone)
    graphs.close()
    del toy, graph, graphs, taint
    gc.collect()
    assert driver.n_calls == n_calls


def test_too_little_memory_is_said(driver: FakeDriver) -> None:
    driver.n_bytes_left = 1 << 8
    with pytest.raises(BackendError, match=r"not enough GPU memory: .* see CanaryManager.estimate_bytes"):
        FakeToy(driver._world)
    assert driver.contexts == [PRIMARY]


def test_a_call_that_fails_names_itself(driver: FakeDriver) -> None:
    driver.__dict__["cuCtxSynchronize"] = lambda: (700,)
    with pytest.raises(BackendError, match="cuCtxSynchronize failed in the engine's context with CUDA error 700"):
        FakeToy(driver._world)


# ---- whose memory it is ----------------------------------------------------------------------------------------------
RAW = (0x7F0000000000, (4, 4, 1, 8), None, 1)


@pytest.mark.parametrize(
    ("lib", "expected"),
    [
        (FakeLibcuda(), CONTEXT),
        (FakeLibcuda(context=PRIMARY), None),
        (FakeLibcuda(context=PRIMARY, current=CONTEXT), None),
        (FakeLibcuda(context=None, current=CONTEXT), CONTEXT),
        (FakeLibcuda(context=None, current=PRIMARY), None),
        (FakeLibcuda(context=None, current=0), None),
        (None, None),
    ],
)
def test_the_context_is_that_of_the_memory(lib: Any, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whose, "libcuda", lambda: lib)
    assert whose.foreign_context([layouts.nhd(k=[RAW])]) == expected


def test_memory_on_another_device_than_it_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [layouts.nhd(k=[RAW])]
    for lib in (FakeLibcuda(), FakeLibcuda(device=1, is_managed=True), None):
        monkeypatch.setattr(whose, "libcuda", lambda lib=lib: lib)
        whose.check_devices(pools)
    monkeypatch.setattr(whose, "libcuda", lambda: FakeLibcuda(device=1))
    with pytest.raises(
        LayoutError, match="plane 'k' of layer 0 is said to be on cuda:0, but its memory, at 0x7f0000000000"
    ):
        whose.check_devices(pools)
    whose.check_devices([layouts.nhd(k=[(*RAW, "cuda:1")])])
