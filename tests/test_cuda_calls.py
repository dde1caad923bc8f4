"""Moves and calls about blocks on a stand-in for a GPU: ordered on the stream, and nothing waits for them."""

from __future__ import annotations

import numpy as np
import pytest
from engine import N_BLOCKS, PAGE
from fake_toy import FakeToy, copy_block, fake_world, prefilled, swap_blocks  # noqa: F401  a fixture
from simt.fake_cuda import FakeArray, FakeCuda

from kvcanary import BatchError, CanaryConfig, CanaryManager, CaptureError, Reason, layouts


def test_moves_are_ordered_on_the_stream_and_wait_for_nothing(world: FakeCuda) -> None:
    toy, graph = prefilled(world, verify_data_every=127)
    for p in range(1, 6):
        toy.replay(graph, p)
    with toy.manager.step(toy.stream):
        toy.manager.copy_slots([1], [10], blocks=True)  # its memory is allocated
    world.pump()
    toy.stream.is_held = True
    before = world.calls.copy()
    with toy.manager.step(toy.stream):
        copy_block(toy, 1, 11)
        toy.manager.copy_slots([1], [11], blocks=True)
        copy_block(toy, 11, 12)
        lists = [FakeArray(np.arange(PAGE * b, PAGE * (b + 1)).astype(np.int64)) for b in (11, 12)]
        toy.manager.copy_slots(*lists)
        toy.stream.submit(lambda: toy.k[1][12, 2, 0].__ixor__(1))
    # Lists that lie on the device are not copied.
    assert dict(world.calls - before) == {"copy": 1, "launch": 4}
    toy.stream.is_held = False
    batch = swap_blocks(toy, 1, 12, 6)
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    world.pump()
    toy.manager.synchronize()
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, 12 * PAGE + 2, 1, 1)


def test_a_fifth_move_waits_for_the_first_and_none_is_lost(world: FakeCuda) -> None:
    toy, graph = prefilled(world)
    for p in range(1, 4):
        toy.replay(graph, p)
    n_bytes = toy.manager.memory_bytes
    n_waits = []
    with toy.manager.step(toy.stream):
        for target in range(8, 16):
            before = world.calls["synchronize"]
            toy.manager.copy_slots([PAGE], [PAGE * target])
            n_waits.append(world.calls["synchronize"] - before)
    assert n_waits == [1, 0, 0, 0, 1, 0, 0, 0], "for memory; then for the first, when four are under way"
    assert toy.manager.memory_bytes - n_bytes >= 4 << 17
    toy.manager.synchronize()
    stamps = toy.manager.backend.read_stamps(0, np.arange(8, 16) * PAGE)
    assert all((head["step"] == 4).all() and (head["position"] == 0).all() for head, _tail in stamps)


def test_moves_on_two_streams_do_not_share_memory_that_is_in_use(world: FakeCuda) -> None:
    toy, graph = prefilled(world)
    for p in range(1, 4):
        toy.replay(graph, p)
    other = world.new_stream()
    with toy.manager.step(toy.stream):
        toy.manager.copy_slots([PAGE], [PAGE * 9])  # allocates
    world.pump()
    toy.stream.is_held = True
    with toy.manager.step(toy.stream):
        toy.manager.copy_slots([PAGE], [PAGE * 10])
        toy.manager.copy_slots([PAGE + 1], [PAGE * 11], stream=other)
        world.pump()
    toy.stream.is_held = False
    toy.manager.synchronize()
    ((head, _), _) = toy.manager.backend.read_stamps(0, np.array([10, 11]) * PAGE)
    assert head["position"].tolist() == [0, 1]


def test_bundles_go_through_the_device(world: FakeCuda) -> None:
    toy, graph = prefilled(world, verify_data_every=1)
    for p in range(1, 6):
        toy.replay(graph, p)
    bundle = toy.manager.export_slots(range(PAGE, 2 * PAGE), stream=toy.stream)
    assert bundle.states.tolist() == [2] * PAGE and bundle.stamps["position"][0].tolist() == list(range(PAGE))
    copy_block(toy, 1, 12)
    toy.manager.import_slots(bundle, range(12 * PAGE, 13 * PAGE), stream=toy.stream)
    batch = swap_blocks(toy, 1, 12, 6)
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    shadow = toy.manager.shadow_arrays()
    assert shadow["HEAD_V"].data.ptr == toy.manager.backend._arrays[0]["head1"].data.ptr
    assert shadow["DIGEST_1"].shape == (N_BLOCKS * PAGE,)


def test_lists_of_the_device_of_other_types_are_refused(world: FakeCuda) -> None:
    toy, _graph = prefilled(world)
    narrow, wide = (FakeArray(np.array([PAGE], dtype)) for dtype in (np.int32, np.int64))
    with pytest.raises(BatchError, match="some lists on the device are int32 and some int64"):
        toy.manager.copy_slots(narrow, wide)
    with pytest.raises(BatchError, match="src is int16"):
        toy.manager.copy_slots(FakeArray(np.array([4], np.int16)), narrow)
    elsewhere = FakeArray(np.array([4], np.int32))
    elsewhere.device.id = 1
    with pytest.raises(BatchError, match="src is on cuda:1, the pool on cuda:0"):
        toy.manager.copy_slots(elsewhere, narrow)


def test_host_driven_calls_on_a_capturing_stream_are_refused(world: FakeCuda) -> None:
    toy, _graph = prefilled(world)
    other = world.new_stream()
    other.begin_capture()
    with pytest.raises(CaptureError, match=r"copy_slots\(\) came with a stream that is being captured"):
        toy.manager.copy_slots([4], [8], stream=other)
    toy.manager.begin_step(toy.stream)
    toy.stream.begin_capture()
    for call in (toy.manager.pause, toy.manager.reset, lambda: toy.manager.copy_slots([4], [8]), toy.manager.end_step):
        with pytest.raises(CaptureError):
            call()


def test_calls_about_blocks_are_ordered_on_the_stream_and_wait_for_nothing(world: FakeCuda) -> None:
    toy, graph = prefilled(world, lifecycle=True, verify_data_every=1)
    toy.manager.allocate_blocks([1, 2, 3], 1)
    toy.manager.allocate_blocks([4, 5, 6], 2)
    toy.manager.reset()
    toy.replay(graph, 0)
    toy.replay(graph, 1)
    toy.stream.is_held = True
    before = world.calls.copy()
    toy.fill((0, 2, 1), (1, 2, 1))
    with toy.manager.step(toy.stream):
        graph.launch(toy.stream)  # may still read what is freed behind it
        toy.manager.free_blocks(np.arange(1, 4), 1)
        toy.manager.lifecycle.apply([("allocate", 3, 7), ("share", [4], 7)])
    assert dict(world.calls - before) == {"graph launch": 1, "launch": 3}
    assert toy.manager.lifecycle.owners(4) == (2, 7), "the ledger knows already"
    toy.stream.is_held = False
    world.pump()
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    assert [toy.manager.lifecycle.epoch(b) for b in (1, 3, 4, 7)] == [1, 2, 1, 0]
    toy.replay(graph, 3)
    toy.manager.synchronize()
    found = {(v.slot, v.request_id): v.reasons for v in toy.manager.violations()}
    assert found == {(PAGE + p, 1): Reason.STALE_EPOCH for p in range(3)}


def test_a_thousand_blocks_are_one_launch_and_nothing_else(world: FakeCuda) -> None:
    k = FakeArray(np.zeros((2100, PAGE, 1, 8), np.uint8))
    pools = [layouts.nhd(k=[k], page_size=PAGE)]
    without, manager = (CanaryManager(CanaryConfig(lifecycle=on), pools, 4, 64) for on in (False, True))
    assert manager.memory_bytes - without.memory_bytes == 16 * 2100
    before = world.calls.copy()
    for n in (1000, 1001, 2098):
        ids = np.arange(1, n + 1, dtype=np.int32)
        manager.allocate_blocks(ids, 7)
        manager.free_blocks(ids, 7)
    assert dict(world.calls - before) == {"launch": 2 * (1 + 2 + 3)}


def test_calls_about_blocks_on_a_capturing_stream_are_refused(world: FakeCuda) -> None:
    toy = FakeToy(world, lifecycle=True)
    toy.manager.begin_step(toy.stream)
    toy.manager.allocate_blocks([1], 1)
    toy.stream.begin_capture()
    calls = (toy.manager.allocate_blocks, toy.manager.share_blocks, toy.manager.free_blocks)
    for call in calls:
        with pytest.raises(CaptureError, match=call.__name__):
            call([1, 2], 1)
    with pytest.raises(CaptureError, match=r"lifecycle.apply\(\)"):
        toy.manager.lifecycle.apply([("free", [1], 1)])
    batch = toy.fill((0, 0, 1))
    with toy.manager.forward(batch, toy.stream), pytest.raises(CaptureError):
        toy.manager.free_blocks([1], 1)
    assert (toy.manager.lifecycle.owners(1), toy.manager.lifecycle.owners(2)) == ((1,), ())
    toy.manager.free_blocks([1], 1, stream=world.new_stream())
    assert toy.manager.lifecycle.owners(1) == ()
