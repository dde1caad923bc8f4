"""HEAD beside the model (`overlap_head`): it leaves the engine's stream, TAIL waits for it, a capture takes it in."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine
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


def test_replays_are_silent_and_then_name_a_flipped_bit(world: FakeCuda) -> None:
    toy, graph = beside(world)
    assert len(graph.nodes) == len(HEAD + TAIL) + 1, "the fork is edges, and no nodes"
    for p in range(1, 6):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    toy.k[1][1, 2, 0, 0] ^= 1
    toy.replay(graph, 6)
    toy.replay(graph, 7)
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, PAGE + 2, 1, 1)


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
    for p in range(1, 4):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()


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


def test_a_forward_over_two_captures_is_refused(world: FakeCuda) -> None:
    toy, graph = beside(world)
    batch, stream = toy.fill((0, 1, 1), (1, 1, 1)), world.new_stream()
    toy.manager.head(batch, toy.stream)
    stream.begin_capture()
    with pytest.raises(CaptureError, match=r"HEAD of this forward ran outside the capture .* overlap_head=False"):
        toy.manager.tail(batch, stream)
    stream.end_capture()  # it is still valid
    stream.begin_capture()
    toy.manager.head(batch, stream)
    with pytest.raises(CaptureError, match=r"TAIL came outside the capture .* overlap_head=False"):
        toy.manager.tail(batch, toy.stream)
    stream.end_capture()  # it was joined none the less
    for p in range(1, 4):  # all is as before
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
    for p in range(1, 4):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()


def test_graphs_of_the_guard_are_of_one_stream(world: FakeCuda) -> None:
    toy, _graph = beside(world)
    graphs = toy.manager.graphs(toy.fill((0, 1, 1), (1, 1, 1)))
    assert [len(world.graphs[handle].nodes) for handle in (graphs.head, graphs.tail)] == [len(HEAD), len(TAIL)]


def test_the_host_backend_takes_the_setting_and_does_as_ever() -> None:
    toy = ToyEngine(overlap_head=True, verify_data_every=1)
    toy.step((0, 0, 6), (1, 0, 3))
    toy.k[1][1, 2, 0, 0] ^= 1
    toy.step((0, 6, 1), (1, 3, 1))
    (v,) = toy.manager.violations()
    assert v.reasons == Reason.DATA
    assert "HEAD beside the model on a GPU" in toy.manager.describe()
