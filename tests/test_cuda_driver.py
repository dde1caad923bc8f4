"""The CUDA driver's own code over stand-ins for CuPy and cuda.core: order, capture, waits and copies."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from engine import PAGE
from fake_toy import FakeToy, fake_world, prefilled  # noqa: F401  a fixture
from simt.fake_cuda import FakeArray, FakeCuda

from kvcanary import BackendError, Reason
from kvcanary.backends import cuda
from kvcanary.tags import Stage


def watch(submit: Any, look: Any) -> Any:
    """``submit`` that looks at the device's memory before each piece of work runs."""
    return lambda work: submit(lambda: (look(), work())[1])


@pytest.mark.parametrize("overlap_head", [False, True])
def test_eager_then_replayed_and_a_flipped_bit_is_named(world: FakeCuda, overlap_head: bool) -> None:
    toy, graph = prefilled(world, verify_data_every=1, overlap_head=overlap_head)
    for p in range(1, 6):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    toy.k[1][1, 2, 0, 0] ^= 1
    toy.replay(graph, 6)
    toy.replay(graph, 7)  # nothing was waited for: the next step reads the ring
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, PAGE + 2, 1, 1)
    assert toy.manager.taint.tolist() == [Reason.DATA, 0, 0, 0]


@pytest.mark.parametrize("overlap_head", [False, True])
def test_a_forward_is_six_launches(world: FakeCuda, overlap_head: bool) -> None:
    _toy, graph = prefilled(world, overlap_head=overlap_head)
    assert len(graph.nodes) == 6 + 1  # and the model; another stream is edges, and no nodes


def test_steady_steps_allocate_nothing_wait_for_nothing_and_copy_only_snapshots(world: FakeCuda) -> None:
    toy, graph = prefilled(
        world, stats_print_every_n_steps=2, health_check_every_n_steps=2, health_check_warmup_steps=0
    )
    toy.replay(graph, 1)
    before = world.calls.copy()
    for p in range(2, 10):
        toy.replay(graph, p)
    assert dict(world.calls - before) == {"graph launch": 8, "copy": 2 * 2 * 4}


def test_nothing_waits_while_the_stream_is_held(world: FakeCuda) -> None:
    toy, graph = prefilled(
        world, stats_print_every_n_steps=1, health_check_every_n_steps=1, health_check_warmup_steps=0
    )
    toy.manager.synchronize()
    toy.stream.is_held = True
    before = world.calls["synchronize"]
    for p in range(1, 9):
        toy.replay(graph, p)
    assert world.calls["synchronize"] == before
    assert [h.n_in_flight for h in toy.manager._handlers] == [4, 4]
    assert [h.n_not_taken for h in toy.manager._handlers] == [4, 4]
    toy.stream.is_held = False
    world.pump()
    toy.replay(graph, 9)
    assert toy.manager.stats().snapshot_step == 5  # the oldest four were kept, in order


def test_a_snapshot_shows_the_step_it_was_taken_at_and_no_later_one(world: FakeCuda) -> None:
    toy, graph = prefilled(world, stats_print_every_n_steps=1)
    for p in range(1, 6):
        toy.replay(graph, p)
    stats = toy.manager.stats()
    assert (stats.snapshot_step, stats.forwards) == (5, 5)


def test_pause_resume_and_reset_are_ordered_on_the_stream(world: FakeCuda) -> None:
    toy, graph = prefilled(world, verify_data_every=1)
    toy.replay(graph, 1)
    toy.manager.pause()
    toy.k[0][1, 0, 0, 0] ^= 1
    toy.replay(graph, 2)
    toy.manager.resume()
    assert toy.manager.violations() == ()
    toy.k[0][1, 0, 0, 0] ^= 1
    toy.manager.reset()
    toy.history[:] = -1
    toy.replay(graph, 0)
    toy.replay(graph, 1)
    toy.replay(graph, 2)
    assert toy.manager.violations() == ()


def test_sweeps_take_host_and_device_lists_and_reuse_their_buffers(world: FakeCuda) -> None:
    toy, graph = prefilled(world, sweep_interval=1)
    for p in range(1, 4):
        toy.replay(graph, p)
    toy.v[1][1, 3, 0, 0] ^= 1
    slots = np.arange(PAGE, PAGE + 4, dtype=np.int32)
    host = slots, np.arange(4, dtype=np.int32), np.concatenate([[-1], slots[:-1]]).astype(np.int32)
    answers = [host, tuple(FakeArray(a) for a in host), host]
    toy.manager.attach_resident_set(answers.pop)
    toy.replay(graph, 4)
    before = world.calls["allocate"]
    toy.replay(graph, 5)
    toy.stream.is_held = True
    toy.replay(graph, 6)
    toy.manager.attach_resident_set(lambda: host)
    with toy.manager.step(toy.stream):
        pass  # the lists are still being copied: tried again later
    assert toy.manager.stats().sweep_passes == 3
    toy.stream.is_held = False
    world.pump()
    toy.replay(graph, 7)
    assert toy.manager.stats().sweep_passes == 4 and world.calls["allocate"] == before
    toy.manager.synchronize()
    found = [(v.slot, v.tag.stage) for v in toy.manager.violations()]
    assert found == [(PAGE + 3, Stage.SWEEP), (PAGE + 3, Stage.HEAD)], "the sweep, then the request that reads it"


def test_prove_names_every_plane(world: FakeCuda) -> None:
    toy, graph = prefilled(world, n_layers=3)
    for p in range(1, 5):
        toy.replay(graph, p)
    before = [a.copy() for a in (*toy.k, *toy.v)]
    assert toy.device_batch is not None
    proof = toy.manager.prove(toy.device_batch, toy.stream)
    assert proof.ok and len(proof.planes) == 6, str(proof)
    assert all(np.array_equal(a, b) for a, b in zip(before, (*toy.k, *toy.v), strict=True))


def test_the_drill_damages_what_a_graph_then_reads_and_puts_the_table_back(world: FakeCuda) -> None:
    text = "table_swap:p=1,warmup=8;next_token_swap:p=1,warmup=9;flip_after_forward:p=1,warmup=10"
    toy, graph = prefilled(world, verify_data_every=1, ring_capacity=64, perturb=text, perturb_armed=True)
    for p in range(1, 8):
        toy.replay(graph, p)
    table: list[Any] = []
    toy.stream.submit = watch(toy.stream.submit, lambda: table.append(toy.host["block_table"].copy()))  # type: ignore[method-assign]
    toy.replay(graph, 8)
    del toy.stream.submit
    swap = toy.manager.perturbations[0]
    true = toy.host["block_table"].copy()
    one, two = swap.places
    assert (true[one.row, one.element], true[two.row, two.element]) == (one.before, two.before)
    assert (table[0][one.row, one.element], table[0][two.row, two.element]) == (two.before, one.before)
    toy.replay(graph, 9)
    seen = {(v.row, v.position // PAGE) for v in toy.manager.violations()}
    assert {(p.row, p.element) for p in swap.places} <= seen and {v.step for v in toy.manager.violations()} == {9}
    toy.replay(graph, 10)
    toy.replay(graph, 11)
    toy.manager.synchronize()
    _swap, tokens, flip = toy.manager.perturbations
    later = [v for v in toy.manager.violations() if v.step > 9]
    wrong = {(v.slot, v.step) for v in later if v.reasons & Reason.TOKEN}
    assert wrong == {(p.slot, tokens.step + 1) for p in tokens.places}
    assert [(v.slot, v.plane, v.step) for v in later if v.reasons == Reason.DATA] == [
        (flip.places[0].slot, flip.plane, flip.step + 1)
    ]


def test_streams_come_as_objects_integers_and_none(world: FakeCuda) -> None:
    toy = FakeToy(world)
    for p, stream in enumerate((toy.stream, toy.stream.handle, None)):
        batch = toy.fill((0, p, 1))
        with toy.manager.step(stream), toy.manager.forward(batch, stream):
            world.pump()
            toy.write_now()
        world.pump()
    toy.manager.synchronize()
    assert toy.manager.violations() == ()


def test_closing_gives_back_and_waits(world: FakeCuda) -> None:
    toy, graph = prefilled(world)
    toy.replay(graph, 1)
    stamps = weakref.ref(toy.manager.backend.shadow_arrays(0)["HEAD_K"])
    assert stamps() is not None
    n_waits = world.calls["synchronize"]
    toy.manager.close()
    gc.collect()
    assert world.calls["synchronize"] > n_waits, "a replay may still be under way"
    assert stamps() is None
    assert toy.manager.violations() == ()


def test_without_a_driver_or_cupy_the_error_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", no_library)
    with pytest.raises(BackendError, match="backend='host'"):
        cuda.check_driver()
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(BackendError, match="pip install"):
        cuda.import_cuda()
