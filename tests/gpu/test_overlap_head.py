"""HEAD beside the model on a GPU: it overlaps, every owner's capture takes it in, and it changes nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from agree import BesideTheModel
from agree_faults import SEEN_BEFORE_THE_MODEL

from kvcanary import CaptureError, Reason, abi

from .cupti import driver_calls, find_cupti
from .test_agree import CupySide, run_faulty, run_honest
from .test_capture import OWNERS, replay
from .test_never_waits import ALLOCATES, WAITS
from .toy import CudaToy

pytestmark = pytest.mark.gpu


def beside(**given: Any) -> CudaToy:
    return CudaToy(**{"overlap_head": True, "verify_data_every": 1, **given})


def names_a_flip(toy: CudaToy, step: Callable[[], None], stream: Any) -> None:
    """The next step names a flipped bit of row 0, position 5, and nothing else was reported before."""
    assert toy.manager.violations() == ()
    toy.flip(1, toy.page + 5)
    replay(toy, step, stream, 1)
    replay(toy, lambda: None, stream, 1)
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.position, v.request_id) == (Reason.DATA, toy.page + 5, 1, 5, 1)
    assert toy.manager.taint.tolist() == [Reason.DATA, 0, 0, 0]


def goes_on(toy: CudaToy) -> None:
    """Forwards on another stream are as ever, eager and captured."""
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: toy.launch_step(stream), stream, 10)
    graph = toy.capture()
    replay(toy, lambda: graph.launch(stream), stream, 10)
    names_a_flip(toy, lambda: graph.launch(stream), stream)


@pytest.mark.parametrize("capture", OWNERS)
def test_replays_are_silent_and_then_find_the_flipped_bit_beside_the_model(capture: Callable[..., Any]) -> None:
    toy = beside()
    launch, stream = capture(toy), toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: launch(stream), stream, 40)
    assert toy.seq_lens.tolist() == [40] * 4
    names_a_flip(toy, lambda: launch(stream), stream)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_eager_forwards_are_silent_and_then_find_the_flipped_bit(is_legacy: bool) -> None:
    toy = beside()
    stream = toy.cupy.cuda.Stream.null if is_legacy else toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: toy.launch_step(stream), stream, 40)
    names_a_flip(toy, lambda: toy.launch_step(stream), stream)


def test_eager_and_replayed_forwards_mix_without_waiting_for_each_other() -> None:
    toy = beside()
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    for i in range(200):
        with toy.manager.step(stream):
            graph.launch(stream) if i % 3 else toy.launch_step(stream)
    stream.synchronize()
    assert toy.seq_lens.tolist() == [200] * 4
    names_a_flip(toy, lambda: graph.launch(stream), stream)


def test_head_is_done_while_the_model_still_runs() -> None:
    toy = beside()
    stream, third = (toy.cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    replay(toy, lambda: toy.launch_step(stream), stream, 5)
    pinned = toy.cupy.cuda.alloc_pinned_memory(16)
    is_released, seen = np.frombuffer(pinned, np.int32, 1), np.frombuffer(pinned, np.uint64, 2)[1:]
    seen[0], is_released[0] = 0, 0
    runtime, words = toy.cupy.cuda.runtime, toy.manager.state.words

    def compared() -> int:
        at = words.data.ptr + 8 * abi.STATE_DATA_SLOTS
        runtime.memcpyAsync(seen.ctypes.data, at, 8, runtime.memcpyDeviceToHost, third.ptr)
        third.synchronize()
        return int(seen[0])

    before = compared()
    try:
        with toy.manager.step(stream), toy.manager.forward(toy.batch, stream):
            toy.spin(stream, pinned.ptr)
            for _ in range(100_000):
                if compared() == before + 4 * 4 * 4:  # rows, planes, positions of the prefix
                    break
            assert not stream.done, "the model is still held"
            assert compared() == before + 64
    finally:
        is_released[0] = 1
        stream.synchronize()
    assert toy.manager.violations() == ()


def test_a_forward_that_raises_leaves_the_capture_whole() -> None:
    toy = beside()
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    with pytest.raises(LookupError), toy.manager.forward(toy.batch, stream):
        raise LookupError
    stream.end_capture()
    graph = toy.capture()
    replay(toy, lambda: graph.launch(stream), stream, 20)
    names_a_flip(toy, lambda: graph.launch(stream), stream)


def test_inner_forwards_and_a_layer_in_one_capture() -> None:
    toy = beside()
    toy.batch = replace(toy.batch, pending=toy.cupy.zeros(4, np.uint8))
    capture, forward = toy.cupy.cuda.Stream(non_blocking=True), toy.manager.forward
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    capture.begin_capture()
    for i in range(3):
        toy.manager.forward = lambda batch, s, i=i: forward(batch, s, index=i)
        toy.launch_step(capture, verifies_layers=True)
    graph = capture.end_capture()
    toy.manager.forward = forward
    replay(toy, lambda: graph.launch(stream), stream, 5)
    words = toy.manager.backend.snapshot_words()
    assert (words[abi.STATE_FORWARD], words[abi.STATE_STEP]) == (15, 5)
    assert toy.manager.violations() == ()


@pytest.mark.parametrize("is_captured", [False, True])
def test_another_forward_while_a_capture_is_open(is_captured: bool) -> None:
    toy = beside()
    first, other, stream = (toy.cupy.cuda.Stream(non_blocking=True) for _ in range(3))
    first.begin_capture(toy.cupy.cuda.runtime.streamCaptureModeRelaxed)
    toy.launch_step(first)
    if is_captured:
        other.begin_capture(toy.cupy.cuda.runtime.streamCaptureModeRelaxed)
    toy.launch_step(other)
    graphs = [s.end_capture() for s in ((other, first) if is_captured else (first,))]
    other.synchronize()
    for i in range(20):
        replay(toy, lambda i=i: graphs[i % len(graphs)].launch(stream), stream, 1)
    names_a_flip(toy, lambda: graphs[0].launch(stream), stream)


@pytest.mark.parametrize("calls", ["eager, captured", "captured, eager", "captured, in another"])
def test_a_forward_over_two_captures_is_refused_and_both_end_well(calls: str) -> None:
    toy = beside()
    first, second = (toy.cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    captured = {"eager, captured": (second,), "captured, eager": (first,)}.get(calls, (first, second))
    for stream in captured:
        stream.begin_capture(toy.cupy.cuda.runtime.streamCaptureModeRelaxed)
    toy.manager.head(toy.batch, first)
    with pytest.raises(CaptureError, match="not in the same capture"):
        toy.manager.tail(toy.batch, second)
    for stream in captured:
        stream.end_capture()
    goes_on(toy)


def test_a_head_that_is_captured_alone_costs_the_engine_that_capture_only() -> None:
    toy = beside()
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    toy.manager.head(toy.batch, stream)
    with pytest.raises(toy.cupy.cuda.runtime.CUDARuntimeError, match="Unjoined"):
        stream.end_capture()
    toy.manager.abandon_step()
    goes_on(toy)
    for _ in range(2):  # the same stream, in other captures
        stream.begin_capture()
        toy.launch_step(stream)
        graph = stream.end_capture()
    toy.flip(1, toy.page + 5)  # as it was
    n = len(toy.manager.violations())
    replay(toy, lambda: graph.launch(stream), stream, 10)
    assert len(toy.manager.violations()) == n


def test_while_a_capture_is_invalid_others_go_on() -> None:
    toy = beside()
    runtime, stream = toy.cupy.cuda.runtime, toy.cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture(runtime.streamCaptureModeRelaxed)
    with pytest.raises(runtime.CUDARuntimeError), toy.manager.forward(toy.batch, stream):
        runtime.streamSynchronize(stream.ptr)  # not allowed while it is captured
    try:
        goes_on(toy)
    finally:  # or every test after it would find a capture open
        with contextlib.suppress(runtime.CUDARuntimeError):
            stream.end_capture()


def test_eager_steps_neither_allocate_nor_wait() -> None:
    if find_cupti() is None:
        pytest.skip("no libcupti: pip install nvidia-cuda-cupti")
    toy, n = beside(verify_data_every=127), 300
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, lambda: toy.launch_step(stream), stream, 20)
    with driver_calls() as calls:
        for _ in range(n):
            with toy.manager.step(stream):
                toy.launch_step(stream)
    stream.synchronize()
    print(dict(calls))
    assert calls["cuEventRecord"] == calls["cuStreamWaitEvent"] == 2 * n
    assert not {name: k for name, k in calls.items() if name.startswith((*ALLOCATES, *WAITS))}
    assert toy.manager.violations() == () and toy.seq_lens.tolist() == [n + 20] * 4


class BesideSide(BesideTheModel, CupySide):
    """A guard on the GPU whose HEAD may run beside the model."""


@pytest.mark.parametrize("seed", range(300, 340))
def test_honest_engines_agree_and_are_silent_beside_the_model(seed: int) -> None:
    run_honest(seed, BesideSide())


@pytest.mark.parametrize("seed", range(400, 440))
def test_faults_are_reported_alike_beside_the_model(seed: int) -> None:
    run_faulty(seed, BesideSide(), SEEN_BEFORE_THE_MODEL)
