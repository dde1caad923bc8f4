"""graphs(): HEAD and TAIL as graphs for engines that build theirs node by node, and the C++ example that does."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cpp import EXAMPLES, build_shared
from engine import PAGE, ToyEngine
from fake_toy import FakeToy, fake_world  # noqa: F401  a fixture
from simt.fake_cuda import FakeCuda, FakeStream

from kvcanary import CaptureError, PhaseError, Reason, StepBatch, abi


@pytest.fixture(scope="session")
def child_nodes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The C++ example, linked to a stand-in of the driver."""
    sources = [EXAMPLES / "cpp" / "child_nodes.cpp", Path(__file__).parent / "simt" / "fake_driver.cpp"]
    return ctypes.CDLL(str(build_shared("child_nodes", sources, into=tmp_path_factory.mktemp("cpp"))))


def guard_graph(example: Any, head: int, model: int, tail: int) -> list[int]:
    """The children that `kvc_guard_graph` makes one graph of, in the order in which they run."""
    guarded, handles = ctypes.c_void_p(), (ctypes.c_uint64 * 8)()
    arguments = (ctypes.c_void_p(head), ctypes.c_void_p(model), ctypes.c_void_p(tail), ctypes.byref(guarded))
    assert example.kvc_guard_graph(*arguments) == 0
    return list(handles[: example.fake_children(guarded, handles)])


def launch(world: FakeCuda, children: Sequence[Any], stream: FakeStream) -> None:
    for child in children:
        child.launch(stream)
    world.pump()


def captured_model(toy: FakeToy) -> Any:
    stream = toy.world.new_stream()
    stream.begin_capture()
    stream.submit(toy.write_now)
    return stream.end_capture()


def test_an_engine_in_cpp_adds_them_as_child_nodes(world: FakeCuda, child_nodes: Any) -> None:
    toy = FakeToy(world, verify_data_every=1)
    batch, model = toy.fill((0, 0, 1), (1, 0, 1)), captured_model(toy)
    graphs = toy.manager.graphs(batch)
    assert graphs is not None
    order = guard_graph(child_nodes, graphs.head, 77, graphs.tail)
    assert order == [graphs.head, 77, graphs.tail]
    children = [world.graphs.get(handle, model) for handle in order]  # a child node is a copy
    graphs.close()
    assert world.graphs == {} and (graphs.head, graphs.tail) == (0, 0)
    for p in range(6):
        toy.fill((0, p, 1), (1, p, 1))
        with toy.manager.step(toy.stream):
            launch(world, children, toy.stream)
    assert toy.manager.violations() == ()
    toy.k[1][1, 2, 0, 0] ^= 1
    toy.fill((0, 6, 1), (1, 6, 1))
    with toy.manager.step(toy.stream):
        launch(world, children, toy.stream)
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, PAGE + 2, 1, 1)


def test_the_engines_streams_are_not_touched_and_nothing_runs(world: FakeCuda) -> None:
    toy = FakeToy(world)
    batch = toy.fill((0, 0, 1))
    before = world.calls.copy()
    with toy.manager.step(toy.stream), toy.manager.graphs(batch, index=1, pools=["full"]) as graphs:
        assert len(world.graphs[graphs.head].nodes) == 4 and len(world.graphs[graphs.tail].nodes) == 2
        assert not toy.stream.queue
    assert dict(world.calls - before) == {"launch": 6}
    assert toy.manager.backend.snapshot_words()[abi.STATE_FORWARD] == 0


def test_handles_that_nobody_holds_are_destroyed(world: FakeCuda) -> None:
    toy = FakeToy(world)
    graphs = toy.manager.graphs(toy.fill((0, 0, 1)))
    assert len(world.graphs) == 2
    del graphs
    gc.collect()
    assert world.graphs == {}


def test_a_capture_that_fails_is_ended(world: FakeCuda) -> None:
    toy = FakeToy(world)
    batch = toy.fill((0, 0, 1))
    toy.manager.graphs(batch).close()
    driver = toy.manager.backend._driver
    with pytest.raises(ZeroDivisionError):
        driver.capture(lambda stream: 1 / 0)
    assert world.graphs == {} and world.streams[int(driver._capture_stream.handle)].captured is None
    toy.manager.graphs(batch).close()


def test_where_there_are_none() -> None:
    toy, off = ToyEngine(), ToyEngine(mode="off")
    batch: StepBatch = toy.batch((0, 0, 3))
    assert off.manager.graphs(batch) is None
    with pytest.raises(CaptureError, match="host backend runs NumPy"):
        toy.manager.graphs(batch)
    with toy.manager.forward(batch), pytest.raises(PhaseError, match=r"graphs\(\) came in phase FORWARD"):
        toy.manager.graphs(batch)
