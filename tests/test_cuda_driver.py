"""The CUDA driver's own code over stand-ins for CuPy and cuda.core: order, capture, waits and copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine import N_BLOCKS, PAGE, ToyEngine
from simt.build import build, find_compiler
from simt.fake_cuda import FakeArray, FakeCuda, FakeStream
from simt.runner import SimtLibrary

from kvcanary import BackendError, BatchError, CanaryConfig, CanaryManager, CaptureError, Reason, StepBatch, layouts
from kvcanary.backends import compile as compile_module
from kvcanary.backends import cuda
from kvcanary.tags import Stage


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    return SimtLibrary(build(compile_module.kernels_dir(), tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def world(library: SimtLibrary, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    world = FakeCuda(library)
    monkeypatch.setattr(cuda, "check_driver", lambda: None)
    monkeypatch.setattr(cuda, "import_cuda", lambda: (world.cupy, world.core))
    return world


class FakeToy(ToyEngine):
    """The toy engine with its arrays on the stand-in device; a batch keeps its addresses, its contents change."""

    def __init__(self, world: FakeCuda, **config: Any) -> None:
        super().__init__(**config)
        self.world, self.stream = world, world.new_stream()
        on_device = [[FakeArray(a) for a in half] for half in (self.k, self.v)]
        self.pool = layouts.nhd(k=on_device[0], v=on_device[1], page_size=PAGE)
        self.manager = CanaryManager(self.config, [self.pool], 4, 64)
        assert self.manager.backend.name == "cuda"
        self.host: dict[str, Any] = {}
        self.device_batch: StepBatch | None = None

    def fill(self, *rows: tuple[int, int, int]) -> StepBatch:
        """Put these rows into the one set of arrays, all on the device."""
        new = self.batch(*rows)
        given = {n: getattr(new, n) for n in StepBatch.__dataclass_fields__ if isinstance(getattr(new, n), np.ndarray)}
        if self.device_batch is None:
            self.host = {n: a if n == "token_history" else a.copy() for n, a in given.items()}
            self.device_batch = StepBatch(**{n: FakeArray(a) for n, a in self.host.items()})
        for name, array in given.items():
            self.host[name][...] = array
        return self.device_batch

    def write_now(self) -> None:
        host = StepBatch(**{n: self.host[n] for n in ("query_start_loc", "input_ids", "slot_mapping")})
        self.write(host)

    def forward(self, stream: FakeStream, batch: StepBatch) -> None:
        with self.manager.forward(batch, stream):
            stream.submit(self.write_now)

    def capture(self, batch: StepBatch) -> Any:
        stream = self.world.new_stream()
        stream.begin_capture()
        self.forward(stream, batch)
        return stream.end_capture()

    def replay(self, graph: Any, p: int) -> None:
        self.fill((0, p, 1), (1, p, 1))
        with self.manager.step(self.stream):
            graph.launch(self.stream)
        self.world.pump()


def watch(submit: Any, look: Any) -> Any:
    """``submit`` that looks at the device's memory before each piece of work runs."""
    return lambda work: submit(lambda: (look(), work())[1])


def prefilled(world: FakeCuda, **config: Any) -> tuple[FakeToy, Any]:
    toy = FakeToy(world, **config)
    batch = toy.fill((0, 0, 1), (1, 0, 1))
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    world.pump()
    return toy, toy.capture(batch)


def test_eager_then_replayed_and_a_flipped_bit_is_named(world: FakeCuda) -> None:
    toy, graph = prefilled(world, verify_data_every=1)
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


def test_a_forward_is_six_launches(world: FakeCuda) -> None:
    _toy, graph = prefilled(world)
    assert len(graph.nodes) == 6 + 1  # and the model


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


def copy_block(toy: FakeToy, source: int, target: int) -> None:
    """What an engine's copy kernel does, on its stream."""

    def copy() -> None:
        for layer in (*toy.k, *toy.v):
            layer[target] = layer[source]

    toy.stream.submit(copy)


def swap_blocks(toy: FakeToy, source: int, target: int, p: int) -> StepBatch:
    """The batch of one token at position p of request 0, whose table has another block in the place of one."""
    batch = toy.fill((0, p, 1), (1, p, 1))
    table = toy.host["block_table"]
    table[table == source] = target
    slots = toy.host["slot_mapping"]
    slots[slots // PAGE == source] += (target - source) * PAGE
    return batch


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
    toy.manager.close()
    assert world.calls["synchronize"] > 0 and toy.manager.violations() == ()
    assert N_BLOCKS


def test_without_a_driver_or_cupy_the_error_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", no_library)
    with pytest.raises(BackendError, match="backend='host'"):
        cuda.check_driver()
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(BackendError, match="pip install"):
        cuda.import_cuda()
