"""rebind(): the pool's arrays move between steps, and everything of the guard follows them."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from engine import N_BLOCKS, PAGE, ToyEngine
from fake_toy import FakeToy, fake_world, prefilled  # noqa: F401  a fixture
from simt.driver import simt_backend
from simt.fake_cuda import FakeArray, FakeCuda

from kvcanary import CanaryManager, CaptureError, LayoutError, PhaseError, Reason, layouts
from kvcanary.rebind import arrays_of, rebound_pool


@pytest.fixture(params=["host", "kernels"])
def engine(request: pytest.FixtureRequest) -> Any:
    """A maker of toy engines on the reference, and on the real kernels built for the CPU."""
    if request.param == "host":
        return ToyEngine
    simt = request.getfixturevalue("library")
    return functools.partial(ToyEngine, backend=functools.partial(simt_backend, library=simt))


def move(engine: ToyEngine) -> list[Any]:
    """New arrays with the same bytes for every layer; returns the old ones."""
    old = [a for pair in zip(engine.k, engine.v, strict=True) for a in pair]
    engine.k, engine.v = [a.copy() for a in engine.k], [a.copy() for a in engine.v]
    engine.manager.rebind("full", [a for pair in zip(engine.k, engine.v, strict=True) for a in pair])
    return old


def test_digests_hold_a_flip_in_the_new_arrays_is_named_and_one_in_the_old_is_not(engine: Any) -> None:
    toy = engine(verify_data_every=1)
    toy.step((0, 0, 6), (1, 0, 3))
    for p in range(6, 10):
        old = move(toy)
        for array in old:
            array[...] = 0xEE  # whatever becomes of them
        toy.step((0, p, 1), (1, p - 3, 1))
    assert toy.manager.violations() == ()
    toy.k[1][1, 2, 0, 0] ^= 1
    old[1][1, 1, 0, 0] ^= 1
    toy.step((0, 10, 1), (1, 7, 1))
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, PAGE + 2, 1, 1)


def test_a_write_between_head_and_tail_may_go_to_new_arrays(engine: Any) -> None:
    toy = engine(verify_data_every=1)
    toy.step((0, 0, 6))
    for p in range(6, 9):
        batch = toy.batch((0, p, 1))
        with toy.manager.step(), toy.manager.forward(batch):
            for array in move(toy):
                array[...] = 0
            toy.write(batch)
    assert toy.manager.violations() == ()


def test_the_patrol_prove_moves_and_the_drill_follow(engine: Any) -> None:
    text = "flip_after_forward:p=1,warmup=3,max=1"
    toy = engine(verify_data_every=1, lifecycle=True, scrub_bytes_per_step=1 << 20, perturb=text, perturb_armed=True)
    toy.manager.allocate_blocks([1, 2, 3], 1)
    toy.manager.allocate_blocks([4, 5, 6, 12], 2)
    toy.step((0, 0, 6), (1, 0, 3))
    for array in move(toy):
        array[...] = 0
    batch = toy.step((0, 6, 1))
    assert toy.manager.prove(batch).ok
    for array in (*toy.k, *toy.v):
        array[12] = array[4]
    toy.manager.copy_slots([4], [12], blocks=True)
    bundle = toy.manager.export_slots(range(12 * PAGE, 12 * PAGE + 3))
    toy.step((0, 7, 1))
    assert toy.manager.violations() == () and bundle.states.tolist() == [2, 2, 2]
    toy.k[0][4, 1, 0, 0] ^= 1  # nobody reads it: the patrol's
    toy.step((0, 8, 1))
    assert [(v.slot, v.detail.name) for v in toy.manager.violations() if v.slot == 4 * PAGE + 1] == [(17, "SCRUB")]
    (flip,) = toy.manager.perturbations
    address = flip.places[0].address
    assert any(a.ctypes.data <= address < a.ctypes.data + a.nbytes for a in (*toy.k, *toy.v))
    toy.step((0, 9, 1))
    assert any(v.slot == flip.places[0].slot and v.reasons == Reason.DATA for v in toy.manager.violations())


def test_reserved_blocks_are_looked_at_where_they_are_now(engine: Any) -> None:
    toy = engine(check_reserved_every=1)
    toy.k, toy.v = ([np.zeros((N_BLOCKS, PAGE, 2, 8), np.float16) for _ in range(2)] for _ in range(2))
    pool = layouts.nhd(k=toy.k, v=toy.v, page_size=PAGE)
    toy.manager = CanaryManager(toy.config, [pool], 4, 64, toy.backend)
    toy.write = lambda batch: None
    toy.step((0, 0, 3))
    for array in move(toy):
        array[0] = np.nan
    toy.step((0, 3, 1))
    assert toy.manager.violations() == ()
    toy.v[1][0, 2, 1, 1] = np.nan
    toy.step((0, 4, 1))
    (v,) = toy.manager.violations()
    assert (v.reasons, v.layer) == (Reason.NONFINITE_RESERVED, 1)


def test_addresses_and_arrays_take_turns(engine: Any) -> None:
    toy = engine(check_reserved_every=1, verify_data_every=1)
    shape = (N_BLOCKS, PAGE, 2, 8)
    toy.k, toy.v = ([np.zeros(shape, np.float16) for _ in range(2)] for _ in range(2))
    typed = [a for pair in zip(toy.k, toy.v, strict=True) for a in pair]
    copies = [a.copy() for a in typed]
    raw = [(a.ctypes.data, shape, None, 2, "cpu") for a in copies]
    for first, then in ((typed, raw), (raw, typed)):
        pool = layouts.nhd(k=first[::2], v=first[1::2], page_size=PAGE)
        toy.manager = CanaryManager(toy.config, [pool], 4, 64, toy.backend)
        toy.write = lambda batch: None
        toy.history[:] = -1
        toy.step((0, 0, 3))
        toy.manager.rebind(0, then)
        toy.step((0, 3, 1))
        assert toy.manager.violations() == ()
        copies[2][0, 1, 0, 0] = typed[2][0, 1, 0, 0] = np.nan
        toy.step((0, 4, 1))
        assert len(toy.manager.violations()) == (first is typed), "as the first arrays told"
        copies[2][0, 1, 0, 0] = typed[2][0, 1, 0, 0] = 0


def test_the_old_arrays_are_let_go(engine: Any) -> None:
    toy = engine()
    toy.step((0, 0, 3))
    toy.pool = None
    old = weakref.ref(toy.k[0])
    move(toy)
    gc.collect()
    assert old() is None


def test_a_look_up_table_stays_where_it_is() -> None:
    toy, lut = ToyEngine(), np.arange(64)
    pool = layouts.nhd(k=toy.k, v=toy.v, page_size=PAGE, slot_lut=lut)
    planes = [a.copy() for pair in zip(toy.k, toy.v, strict=True) for a in pair]
    moved = rebound_pool(rebound_pool(pool, planes), [*toy.k, *toy.v])
    assert moved.lut_view is pool.lut_view and moved.planes[1].view.pointer == toy.k[1].ctypes.data


def test_a_pool_over_the_new_arrays_does_as_well(engine: Any) -> None:
    toy = engine(verify_data_every=1)
    toy.step((0, 0, 6))
    old = toy.k
    toy.k, toy.v = [a.copy() for a in toy.k], [a.copy() for a in toy.v]
    toy.manager.rebind(0, layouts.nhd(k=toy.k, v=toy.v, page_size=PAGE))
    old[0][...] = 0
    toy.step((0, 6, 1))
    assert toy.manager.violations() == ()


REFUSED: dict[str, tuple[Any, str]] = {
    "too few": (lambda t: t.k, r"lies in 4 arrays, given was 2 arrays: give a list of as many"),
    "one array": (lambda t: t.k[0], "given was ndarray"),
    "another shape": (lambda t: [np.zeros((N_BLOCKS, PAGE, 2, 9), np.uint8)] * 4, r"had shape \(16, 4, 2, 8\)"),
    "other strides": (lambda t: [np.asfortranarray(a) for a in (*t.k, *t.v)], "had strides"),
    "another type": (lambda t: [a.view(np.int8) for a in (*t.k, *t.v)], "had dtype 'uint8', the new one has 'int8'"),
    "another device": (lambda t: [FakeArray(a) for a in (*t.k, *t.v)], "had device 'cpu'"),
    "one array twice": (lambda t: [t.k[0].copy()] * 4, "share bytes"),
    "another pool": (lambda t: layouts.nhd(k=t.k, page_size=PAGE), "has 4 planes"),
    "another layout": (
        lambda t: layouts.nhd(k=t.k, v=t.v, page_size=PAGE, layers=[0, 7]),
        "has layer=1, the pool given 7",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_geometry_is_refused_and_nothing_is_changed(what: str) -> None:
    toy = ToyEngine(verify_data_every=1)
    toy.step((0, 0, 6))
    arrays, message = REFUSED[what]
    with pytest.raises(LayoutError, match=message):
        toy.manager.rebind(0, arrays(toy))
    toy.step((0, 6, 1))
    assert toy.manager.violations() == ()


def test_a_closed_manager_refuses_and_a_switched_off_one_does_nothing() -> None:
    off, toy = ToyEngine(mode="off"), ToyEngine()
    off.manager.rebind(0, [])
    toy.manager.close()
    with pytest.raises(PhaseError):
        toy.manager.rebind(0, [])


def test_arrays_come_once_each_in_the_order_of_the_planes() -> None:
    fused = np.zeros((2, N_BLOCKS, PAGE, 1, 8), np.uint8)
    pool = layouts.nhd(k=[fused[0]], v=[fused[1]], page_size=PAGE)
    assert [v.pointer for v in arrays_of(pool)] == [fused[0].ctypes.data, fused[1].ctypes.data]


# ---- a captured graph ------------------------------------------------------------------------------------------------
def test_a_captured_graph_follows_without_waiting(world: FakeCuda) -> None:
    toy, graph = prefilled(world, verify_data_every=1)
    for p in range(1, 4):
        toy.replay(graph, p)
    _moved(toy)  # the first brings its buffers
    world.pump()
    before = world.calls.copy()
    toy.stream.is_held = True
    toy.fill((0, 4, 1), (1, 4, 1))
    with toy.manager.step(toy.stream):
        old = _moved(toy)
        graph.launch(toy.stream)
    assert dict(world.calls - before) == {"copy": 1, "graph launch": 1}
    for array in old:
        array[...] = 0
    toy.stream.is_held = False
    world.pump()
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    toy.k[1][1, 2, 0, 0] ^= 1
    toy.replay(graph, 5)
    toy.manager.synchronize()
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, PAGE + 2, 1, 1)


def _moved(toy: FakeToy) -> list[Any]:
    old = [*toy.k, *toy.v]
    toy.k, toy.v = [a.copy() for a in toy.k], [a.copy() for a in toy.v]
    new = [FakeArray(a) for pair in zip(toy.k, toy.v, strict=True) for a in pair]
    toy.manager.rebind(0, new, stream=toy.stream)
    return old


def test_arrays_that_have_not_moved_cost_nothing(world: FakeCuda) -> None:
    toy, _graph = prefilled(world)
    before = world.calls.copy()
    toy.manager.rebind(0, toy.pool, stream=toy.stream)
    toy.manager.rebind(0, [plane.data for plane in toy.pool.planes], stream=toy.stream)
    assert world.calls == before


def test_a_capturing_stream_is_refused(world: FakeCuda) -> None:
    toy, _graph = prefilled(world)
    toy.stream.begin_capture()
    with pytest.raises(CaptureError, match=r"rebind\(\)"):
        _moved(toy)
