"""The guard inside captured graphs: every owner of a capture, several graphs, changed contents, other streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvcanary import CaptureError, Reason, StepBatch, abi
from kvcanary.tags import Stage

from .toy import CudaToy

pytestmark = pytest.mark.gpu


def replay(toy: CudaToy, launch: Callable[[], None], stream: Any, n: int) -> None:
    for _ in range(n):
        with toy.manager.step(stream):
            launch()
    stream.synchronize()


def capture_with_cupy(toy: CudaToy) -> Callable[[Any], None]:
    launch: Callable[[Any], None] = toy.capture().launch
    return launch


def capture_with_graph_builder(toy: CudaToy) -> Callable[[Any], None]:
    from cuda.core import Device

    device = Device()
    builder = device.create_stream().create_graph_builder()
    builder.begin_building()
    toy.launch_step(toy.cupy.cuda.Stream.from_external(builder), guarded_on=builder)
    builder.end_building()
    graph = builder.complete()
    toy.keep = builder

    def launch(stream: Any) -> None:
        graph.launch(device.create_stream(stream))

    return launch


def capture_with_the_driver(toy: CudaToy) -> Callable[[Any], None]:
    """An owner who knows nothing of CuPy or cuda.core: raw driver calls, the guard is given an integer."""
    from cuda.bindings import driver

    def ok(result: tuple[Any, ...]) -> Any:
        assert int(result[0]) == 0, result[0]
        return result[1] if len(result) > 1 else None

    stream = toy.cupy.cuda.Stream(non_blocking=True)
    raw = driver.CUstream(stream.ptr)
    ok(driver.cuStreamBeginCapture(raw, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    toy.launch_step(stream, guarded_on=int(stream.ptr))
    graph = ok(driver.cuStreamEndCapture(raw))
    executable = ok(driver.cuGraphInstantiate(graph, 0))
    return lambda stream: ok(driver.cuGraphLaunch(executable, driver.CUstream(stream.ptr)))


OWNERS = [capture_with_cupy, capture_with_graph_builder, capture_with_the_driver]


@pytest.mark.parametrize("capture", OWNERS)
def test_replays_are_silent_and_then_find_the_flipped_bit(capture: Callable[..., Any]) -> None:
    toy = CudaToy(verify_data_every=1)
    launch = capture(toy)
    stream = toy.cupy.cuda.Stream(non_blocking=True)  # not the one it was captured on
    replay(toy, lambda: launch(stream), stream, 40)
    assert toy.manager.violations() == ()
    assert toy.seq_lens.tolist() == [40] * 4
    toy.flip(1, toy.page + 5)  # row 0, position 5
    replay(toy, lambda: launch(stream), stream, 1)
    replay(toy, lambda: None, stream, 1)
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.position, v.request_id) == (Reason.DATA, toy.page + 5, 1, 5, 1)
    assert toy.manager.taint.tolist() == [Reason.DATA, 0, 0, 0]


def test_a_replay_checks_the_contents_that_the_table_has_now() -> None:
    toy = CudaToy()
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: graph.launch(stream), stream, 40)
    toy.table[1] = toy.table[2]  # the whole row is another request's
    toy.cupy.cuda.runtime.deviceSynchronize()
    replay(toy, lambda: graph.launch(stream), stream, 1)
    replay(toy, lambda: None, stream, 1)
    found = toy.manager.violations()
    assert found and {v.request_id for v in found} == {2}
    assert {r for v in found for r in v.reasons.names()} >= {"TOKEN", "CHAIN"}


def test_graphs_of_several_buckets_work_side_by_side() -> None:
    toy = CudaToy(rows=8, verify_data_every=1)
    graphs = {n: toy.capture(toy.batch_of(n)) for n in (1, 2, 4, 8)}
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    for n in (8, 1, 4, 2, 8, 4, 4, 1, 8):
        replay(toy, lambda n=n: graphs[n].launch(stream), stream, 3)
    assert toy.manager.violations() == ()
    assert toy.seq_lens.tolist() == [27, 21, 18, 18, 9, 9, 9, 9]


def test_pause_reaches_captured_graphs_without_recapture() -> None:
    toy = CudaToy(verify_data_every=1)
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: graph.launch(stream), stream, 5)
    toy.manager.pause()
    toy.flip(0, toy.page)
    replay(toy, lambda: graph.launch(stream), stream, 5)
    assert toy.manager.violations() == ()
    toy.manager.resume()
    replay(toy, lambda: graph.launch(stream), stream, 1)
    replay(toy, lambda: None, stream, 1)
    assert [v.slot for v in toy.manager.violations()] == [toy.page]


def test_eager_and_replayed_forwards_mix() -> None:
    toy = CudaToy(verify_data_every=1)
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    for i in range(12):
        replay(toy, (lambda: graph.launch(stream)) if i % 2 else (lambda: toy.launch_step(stream)), stream, 1)
    assert toy.manager.violations() == ()


def test_a_step_adds_at_most_six_launches() -> None:
    toy = CudaToy()
    launches: list[Any] = []
    driver = toy.manager.backend._driver
    original = driver.launch
    driver.launch = lambda *args: (launches.append(args[0]), original(*args))
    toy.launch_step(toy.cupy.cuda.Stream(non_blocking=True))
    assert len(launches) == 6


def test_end_step_on_a_capturing_stream_is_refused() -> None:
    toy = CudaToy(stats_print_every_n_steps=1)
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    try:
        toy.manager.begin_step(stream)
        with pytest.raises(CaptureError):
            toy.manager.end_step()
    finally:
        stream.end_capture()


def test_several_inner_forwards_in_one_graph() -> None:
    toy = CudaToy(verify_data_every=1)
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    capture = toy.cupy.cuda.Stream(non_blocking=True)
    capture.begin_capture()
    manager, forward = toy.manager, toy.manager.forward
    for i in range(3):
        manager.forward = lambda batch, s, i=i: forward(batch, s, index=i)
        toy.launch_step(capture)
    graph = capture.end_capture()
    manager.forward = forward
    replay(toy, lambda: graph.launch(stream), stream, 5)
    words = manager.backend.snapshot_words()
    assert (words[abi.STATE_FORWARD], words[abi.STATE_STEP]) == (15, 5)
    assert manager.violations() == ()


def test_prove_names_every_plane_of_every_layer() -> None:
    toy = CudaToy(n_layers=8)
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: toy.launch_step(stream), stream, 20)
    before = [a.get() for a in (*toy.k, *toy.v)]
    proof = toy.manager.prove(toy.batch, stream)
    assert proof.ok and len(proof.planes) == 16, str(proof)
    assert all(np.array_equal(a, b.get()) for a, b in zip(before, (*toy.k, *toy.v), strict=True))
    replay(toy, lambda: toy.launch_step(stream), stream, 1)
    assert toy.manager.violations() == ()


def test_a_sweep_takes_host_and_device_lists() -> None:
    toy = CudaToy(sweep_interval=1)
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: toy.launch_step(stream), stream, 20)
    slots = np.arange(toy.page, toy.page + 12, dtype=np.int32)
    lists = slots, np.arange(12, dtype=np.int32), np.concatenate([[-1], slots[:-1]]).astype(np.int32)
    toy.flip(1, toy.page + 7)
    for answer in (lists, tuple(toy.cupy.asarray(a) for a in lists)):
        toy.manager.attach_resident_set(lambda answer=answer: answer)
        replay(toy, lambda: None, stream, 2)
    (v,) = toy.manager.violations()
    assert (v.slot, v.layer, v.tag.stage) == (toy.page + 7, 1, Stage.SWEEP)


def test_a_host_array_in_the_batch_is_refused() -> None:
    toy = CudaToy()
    arrays = {name: getattr(toy.batch, name) for name in StepBatch.__dataclass_fields__}
    arrays["seq_lens"] = np.zeros(toy.rows, np.int32)
    with pytest.raises(Exception, match="host memory"):
        toy.manager.head(StepBatch(**arrays))
