"""HEAD beside the model (`overlap_head`): it leaves the engine's stream, TAIL waits for it, a capture takes it in."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from engine import ToyEngine
from fake_toy import FakeToy, fake_world, prefilled  # noqa: F401  a fixture
from simt.fake_cuda import FakeArray, FakeCuda, FakeStream

from kvcanary import CaptureError, Reason, abi

HEAD = ("kvc_begin", "kvc_stamps_write", "kvc_stamps_verify", "kvc_digests_verify")
TAIL = ("kvc_stamps_tail", "kvc_digests_write")


def record_launches(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, FakeStream]]:
    """The launches from here on: name and stream, in the order of the calls."""
    launches: list[tuple[str, FakeStream]] = []
    original = world.launch

    def launch(name: str, grid: Any, block: int, params: Any, stream: FakeStream) -> None:
        launches.append((name, stream))
        original(name, grid, block, params, stream)

    monkeypatch.setattr(world, "launch", launch)
    return launches


def beside(world: FakeCuda, **config: Any) -> tuple[FakeToy, Any]:
    return prefilled(world, overlap_head=True, verify_data_every=1, **config)


def forwards(toy: FakeToy) -> int:
    """Forwards that the device has begun by now."""
    return int(toy.manager.backend.state.words.np[abi.STATE_FORWARD])


def move(toy: FakeToy) -> list[np.ndarray[Any, Any]]:
    """Rebind the pool to arrays with the same bytes; returns the old ones."""
    old = [*toy.k, *toy.v]
    toy.k, toy.v = [a.copy() for a in toy.k], [a.copy() for a in toy.v]
    moved = [FakeArray(a) for pair in zip(toy.k, toy.v, strict=True) for a in pair]
    toy.manager.rebind(0, moved, stream=toy.stream)
    return old


def goes_on(toy: FakeToy, graph: Any) -> None:
    """Replays are silent, as ever."""
    for p in range(1, 4):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()


def test_head_runs_on_a_stream_of_its_own_and_tail_on_the_engines(
    world: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, _graph = beside(world)
    launches = record_launches(world, monkeypatch)
    batch = toy.fill((0, 1, 1), (1, 1, 1))
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    assert tuple(name for name, _stream in launches) == HEAD + TAIL
    sides = {stream.handle for name, stream in launches if name in HEAD}
    assert len(sides) == 1 and toy.stream.handle not in sides
    assert {stream.handle for name, stream in launches if name in TAIL} == {toy.stream.handle}


def test_head_waits_for_what_was_before_it_and_tail_for_head(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, _graph = beside(world)
    launches = record_launches(world, monkeypatch)
    batch, before = toy.fill((0, 1, 1), (1, 1, 1)), forwards(toy)
    is_there = False
    toy.stream.submit(lambda: is_there)
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    world.pump()
    assert forwards(toy) == before, "HEAD did not wait for the stream that it left"
    side = next(stream for name, stream in launches if name in HEAD)
    side.is_held, is_there = True, True
    world.pump()
    assert forwards(toy) == before and len(toy.stream.queue) > len(TAIL), "the model has run, and TAIL waits"
    side.is_held = False
    world.pump()
    assert forwards(toy) == before + 1 and not toy.stream.queue
    toy.manager.synchronize()
    assert toy.manager.violations() == ()


def test_steady_steps_allocate_nothing_and_wait_for_nothing(world: FakeCuda) -> None:
    toy, _graph = beside(world)
    before = world.calls.copy()
    for p in range(1, 9):
        batch = toy.fill((0, p, 1), (1, p, 1))
        with toy.manager.step(toy.stream):
            toy.forward(toy.stream, batch)
        world.pump()
    assert dict(world.calls - before) == {"launch": 8 * len(HEAD + TAIL)}


def test_a_forward_that_raises_in_a_capture_leaves_the_capture_whole(world: FakeCuda) -> None:
    toy, graph = beside(world)
    stream = world.new_stream()
    stream.begin_capture()
    with pytest.raises(LookupError), toy.manager.forward(toy.fill((0, 1, 1), (1, 1, 1)), stream):
        raise LookupError
    stream.end_capture()  # the side stream has come back
    goes_on(toy, graph)


def test_what_follows_a_forward_that_raised_waits_for_head(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, _graph = beside(world)
    launches = record_launches(world, monkeypatch)
    batch = toy.fill((0, 1, 1), (1, 1, 1))

    def model() -> None:
        launches[0][1].is_held = True
        raise LookupError

    with pytest.raises(LookupError), toy.manager.step(toy.stream), toy.manager.forward(batch, toy.stream):
        model()
    done: list[int] = []
    toy.stream.submit(lambda: done.append(1))
    world.pump()
    assert not done
    launches[0][1].is_held = False
    world.pump()
    assert done


@pytest.mark.parametrize("calls", ["eager, captured", "captured, eager", "captured, in another"])
def test_a_forward_over_two_captures_is_refused_and_both_end_well(world: FakeCuda, calls: str) -> None:
    toy, graph = beside(world)
    batch, first, second = toy.fill((0, 1, 1), (1, 1, 1)), world.new_stream(), world.new_stream()
    captured = {"eager, captured": (second,), "captured, eager": (first,)}.get(calls, (first, second))
    for stream in captured:
        stream.begin_capture()
    toy.manager.head(batch, first)
    with pytest.raises(CaptureError, match=r"not in the same capture: .* overlap_head=False"):
        toy.manager.tail(batch, second)
    for stream in captured:
        stream.end_capture()
    goes_on(toy, graph)


def test_a_head_that_is_captured_alone_costs_the_engine_that_capture_only(world: FakeCuda) -> None:
    toy, _graph = beside(world)
    batch, stream = toy.fill((0, 1, 1), (1, 1, 1)), world.new_stream()
    stream.begin_capture()
    toy.manager.head(batch, stream)
    with pytest.raises(RuntimeError, match="Unjoined"):
        stream.end_capture()
    toy.manager.abandon_step()
    stream.begin_capture()  # the same stream, in another capture
    toy.forward(stream, batch)
    graph = stream.end_capture()
    goes_on(toy, graph)


def test_while_a_capture_is_invalid_others_go_on(world: FakeCuda) -> None:
    toy, graph = beside(world)
    batch, stream = toy.fill((0, 1, 1), (1, 1, 1)), world.new_stream()
    stream.begin_capture()
    toy.manager.head(batch, stream)
    stream.is_invalid = True  # what waits in it, say
    toy.manager.abandon_forward()
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    world.pump()
    with pytest.raises(RuntimeError, match="Invalidated"):
        stream.end_capture()
    for p in range(2, 5):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()


def test_a_layer_and_a_rebind_wait_for_head(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, _graph = beside(world)
    launches = record_launches(world, monkeypatch)
    pending = FakeArray(np.zeros(2, np.uint8))
    batch = dataclasses.replace(toy.fill((0, 1, 1), (1, 1, 1)), pending=pending)
    old = [move(toy)]  # has allocated what it needs
    for call in ("layer", "rebind"):
        with toy.manager.step(toy.stream), toy.manager.forward(batch, toy.stream):
            side = launches[0][1]
            side.is_held = True
            world.pump()
            assert not toy.stream.queue
            if call == "layer":
                toy.manager.verify_layer(batch, 0, toy.stream)
            else:
                old.append(move(toy))
            world.pump()
            assert toy.stream.queue, f"{call} did not wait"
            side.is_held = False
            toy.stream.submit(toy.write_now)
        world.pump()
    toy.manager.synchronize()
    assert toy.manager.violations() == () and len(old) == 2


def test_a_rebind_while_a_forward_is_captured_waits_for_nothing(world: FakeCuda) -> None:
    toy, _graph = beside(world)
    batch, stream = toy.fill((0, 1, 1), (1, 1, 1)), world.new_stream()
    stream.begin_capture()
    with toy.manager.forward(batch, stream):
        move(toy)
        stream.submit(toy.write_now)
    graph = stream.end_capture()
    goes_on(toy, graph)


def test_a_layer_in_the_capture_and_inner_forwards_of_one_capture(world: FakeCuda) -> None:
    toy, _graph = beside(world)
    pending, stream = FakeArray(np.zeros(2, np.uint8)), world.new_stream()
    batch = dataclasses.replace(toy.fill((0, 1, 1), (1, 1, 1)), pending=pending)
    before = forwards(toy)
    stream.begin_capture()
    for index in range(3):
        with toy.manager.forward(batch, stream, index=index):
            toy.manager.verify_layer(batch, 1, stream)
            stream.submit(toy.write_now)
    graph = stream.end_capture()
    for p in range(1, 4):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == () and forwards(toy) == before + 9


def test_inner_forwards_of_one_capture_are_all_beside_the_model(
    world: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, _graph = beside(world)
    launches, stream = record_launches(world, monkeypatch), world.new_stream()
    batch = toy.fill((0, 1, 1), (1, 1, 1))
    stream.begin_capture()
    for index in range(2):
        with toy.manager.forward(batch, stream, index=index):
            stream.submit(toy.write_now)
    stream.end_capture()
    assert stream not in {used for name, used in launches if name in HEAD}


@pytest.mark.parametrize("is_captured", [False, True])
def test_another_forward_while_a_capture_is_open_stays_on_its_own_stream(
    world: FakeCuda, monkeypatch: pytest.MonkeyPatch, is_captured: bool
) -> None:
    toy, _graph = beside(world)
    launches = record_launches(world, monkeypatch)
    batch, first, other = toy.fill((0, 1, 1), (1, 1, 1)), world.new_stream(), world.new_stream()
    first.begin_capture()
    toy.forward(first, batch)
    if is_captured:  # the body of a conditional node, say
        other.begin_capture()
    del launches[:]
    toy.forward(other, batch)
    assert {stream.handle for _name, stream in launches} == {other.handle}
    graphs = [stream.end_capture() for stream in ((other, first) if is_captured else (first,))]
    assert [len(graph.nodes) for graph in graphs] == [7] * len(graphs)
    goes_on(toy, graphs[0])


def test_a_head_that_fails_half_way_leaves_the_capture_whole(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, graph = beside(world)
    batch, stream, launch = toy.fill((0, 1, 1), (1, 1, 1)), world.new_stream(), world.launch

    def failing(name: str, *rest: Any) -> None:
        if name == HEAD[2]:
            raise OSError("no more launches")
        launch(name, *rest)

    stream.begin_capture()
    monkeypatch.setattr(world, "launch", failing)
    with pytest.raises(OSError, match="no more"):
        toy.manager.head(batch, stream)
    monkeypatch.setattr(world, "launch", launch)
    stream.end_capture()
    goes_on(toy, graph)


def test_an_error_of_the_model_is_not_masked_where_the_stream_cannot_come_back(world: FakeCuda) -> None:
    toy, graph = beside(world)
    batch = toy.fill((0, 1, 1), (1, 1, 1))

    def model() -> None:
        toy.stream.begin_capture()
        raise LookupError

    with pytest.raises(LookupError), toy.manager.step(toy.stream), toy.manager.forward(batch, toy.stream):
        model()
    toy.stream.end_capture()
    goes_on(toy, graph)


def test_a_stream_that_was_joined_is_not_joined_again(world: FakeCuda) -> None:
    toy, graph = beside(world)
    toy.replay(graph, 1)
    side = toy.manager.backend._side
    assert not side._is_out
    n_queued = sum(len(stream.queue) for stream in world.streams.values())
    side.join(toy.stream)
    side.abandon()
    side.let_wait(toy.stream)
    assert sum(len(stream.queue) for stream in world.streams.values()) == n_queued


def test_a_forked_child_touches_no_stream(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, _graph = beside(world)
    batch = toy.fill((0, 1, 1), (1, 1, 1))
    toy.manager.head(batch, toy.stream)
    toy.manager.after_fork()  # what a fork calls in the child

    def touched(*_: object) -> None:
        raise AssertionError("of the parent's device")

    monkeypatch.setattr(FakeStream, "record", touched)
    monkeypatch.setattr(FakeStream, "wait", touched)
    monkeypatch.setattr(toy.manager.backend._side, "_query", touched)
    monkeypatch.setattr(toy.manager.backend, "abandon", touched)
    toy.manager.abandon_forward()
    toy.manager.abandon_step()


def test_graphs_of_the_guard_are_of_one_stream(world: FakeCuda) -> None:
    toy, _graph = beside(world)
    graphs = toy.manager.graphs(toy.fill((0, 1, 1), (1, 1, 1)))
    assert [len(world.graphs[handle].nodes) for handle in (graphs.head, graphs.tail)] == [len(HEAD), len(TAIL)]


def test_describe_says_so(world: FakeCuda) -> None:
    toy, _graph = beside(world)
    assert "HEAD beside the model" in toy.manager.describe()


def test_the_host_backend_takes_the_setting_and_does_as_ever() -> None:
    toy = ToyEngine(overlap_head=True, verify_data_every=1)
    toy.step((0, 0, 6), (1, 0, 3))
    toy.k[1][1, 2, 0, 0] ^= 1
    toy.step((0, 6, 1), (1, 3, 1))
    (v,) = toy.manager.violations()
    assert v.reasons == Reason.DATA
    assert "HEAD beside the model" not in toy.manager.describe()
