"""What `tests/test_abuse*.py` show over stand-ins, on a GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref

import numpy as np
import pytest

from kvcanary import BackendError, CanaryConfig, CanaryManager, PhaseError, Reason, captured, layouts

from .toy import CudaToy

pytestmark = pytest.mark.gpu


def serve(toy: CudaToy, graph: object, n: int) -> None:
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    for _ in range(n):
        with toy.manager.step(stream):
            graph.launch(stream)  # type: ignore[attr-defined]
    stream.synchronize()
    toy.manager.synchronize()


@pytest.mark.parametrize("overlap_head", [False, True])
def test_a_capture_that_the_model_invalidates_leaves_the_guard_usable(overlap_head: bool) -> None:
    toy = CudaToy(verify_data_every=1, overlap_head=overlap_head)
    runtime = toy.cupy.cuda.runtime
    before = toy.manager.backend.snapshot_words().copy()
    for _ in range(3):
        stream = toy.cupy.cuda.Stream(non_blocking=True)
        stream.begin_capture()
        with pytest.raises(runtime.CUDARuntimeError), toy.manager.forward(toy.batch, stream):
            runtime.streamSynchronize(stream.ptr)  # not allowed while it is captured
        with contextlib.suppress(runtime.CUDARuntimeError):  # the capture is invalid
            stream.end_capture()
    assert np.array_equal(toy.manager.backend.snapshot_words(), before)
    serve(toy, toy.capture(), 20)
    assert toy.manager.violations() == ()
    toy.flip(0, toy.page + 3)
    serve(toy, toy.capture(), 1)
    assert {v.reasons for v in toy.manager.violations()} == {Reason.DATA}


def test_a_stream_per_step_that_is_destroyed_behind_it() -> None:
    toy = CudaToy(verify_data_every=1, stats_print_every_n_steps=1, health_check_every_n_steps=1)
    graph = toy.capture()
    for _ in range(30):
        stream = toy.cupy.cuda.Stream(non_blocking=True)
        with toy.manager.step(stream.ptr):  # a number: the guard cannot keep the stream
            graph.launch(stream)
        stream.synchronize()
        del stream
        gc.collect()
    toy.manager.synchronize()
    assert toy.manager.violations() == () and toy.manager.stats().snapshot_step >= 29
    toy.manager.close()


def test_a_graph_that_outlives_its_manager_writes_into_nothing_of_others() -> None:
    toy = CudaToy()
    graph, cupy = toy.capture(), toy.cupy
    manager = weakref.ref(toy.manager)
    stream = cupy.cuda.Stream(non_blocking=True)
    graph.launch(stream)
    stream.synchronize()
    n_bytes = toy.manager.memory_bytes
    del toy.manager
    gc.collect()
    assert manager() is None and captured.orphans()
    try:
        # Whatever was freed would be given out again here.
        others = [cupy.full(max(n_bytes // 8, 1 << 20), 0x5A, cupy.uint8) for _ in range(16)]
        for _ in range(200):
            graph.launch(stream)
        stream.synchronize()
        assert all(bool((a == 0x5A).all()) for a in others)
    finally:
        captured._orphans.clear()


def test_a_forked_child_is_refused_and_touches_no_device() -> None:
    toy = CudaToy()
    graph = toy.capture()
    serve(toy, graph, 3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            with toy.manager.step():
                pass
        except PhaseError as error:
            text = str(error)
        toy.manager.close()
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _pid, status = os.waitpid(child, 0)
    assert status == 0 and "forked" in text, (status, text)
    serve(toy, graph, 3)
    assert toy.manager.violations() == ()


def test_memory_that_does_not_suffice_is_named_and_given_back() -> None:
    import cupy

    runtime, pool = cupy.cuda.runtime, cupy.get_default_memory_pool()
    n_blocks, page = 1 << 19, 16  # 8 M slots: the guard takes more than 1 GB
    k = cupy.zeros((n_blocks, page, 1, 4), cupy.uint8)
    guarded = layouts.nhd(k=[k], v=None, page_size=page)
    estimate = CanaryManager.estimate_bytes(CanaryConfig(), [guarded], 8)
    pool.free_all_blocks()
    hog = runtime.malloc(runtime.memGetInfo()[0] - estimate // 2)
    try:
        free = runtime.memGetInfo()[0]
        with pytest.raises(BackendError, match=rf"bytes more are wanted, \d+ of \d+ are free .* takes {estimate},"):
            CanaryManager(CanaryConfig(), [guarded], 8, 64)
        gc.collect()
        assert free - runtime.memGetInfo()[0] < 64 << 20, "kernels are loaded, nothing else is held"
    finally:
        runtime.free(hog)
    CanaryManager(CanaryConfig(), [guarded], 8, 64).close()
