"""1,000 replayed steps neither allocate nor wait nor copy; nothing waits for a device that is behind."""

from __future__ import annotations

import logging
import time

import pytest

from kvcanary import Reason

from .cupti import driver_calls, find_cupti
from .toy import CudaToy

pytestmark = pytest.mark.gpu

ALLOCATES = ("cuMemAlloc", "cuMemHostAlloc", "cuMemCreate", "cuMemFree", "cuMemPool", "cuMemHostRegister")
WAITS = ("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize")


def test_a_thousand_replayed_steps_only_launch(caplog: pytest.LogCaptureFixture) -> None:
    if find_cupti() is None:
        pytest.skip("no libcupti: pip install nvidia-cuda-cupti")
    every = 50
    toy = CudaToy(
        stats_print_every_n_steps=every, health_check_every_n_steps=every, health_check_warmup_steps=0, max_len=1200
    )
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    for _ in range(100):  # past every first use
        with toy.manager.step(stream):
            graph.launch(stream)
        stream.synchronize()
    with caplog.at_level(logging.INFO, "kvcanary"), driver_calls() as calls:
        for _ in range(1000):
            with toy.manager.step(stream):
                graph.launch(stream)
    stream.synchronize()
    toy.manager.synchronize()
    print(dict(calls))
    assert calls["cuGraphLaunch"] == 1000
    assert not {name: n for name, n in calls.items() if name.startswith(ALLOCATES)}
    assert not {name: n for name, n in calls.items() if name.startswith(WAITS)}
    n_snapshots = 2 * (1000 // every) - sum(h.n_not_taken for h in toy.manager._handlers)
    copies = sum(n for name, n in calls.items() if name.startswith("cuMemcpy"))
    assert copies == 2 * n_snapshots  # a clone and a copy to the host each
    assert not {name for name in calls if name.startswith("cuMemcpy") and "Async" not in name}
    assert toy.manager.violations() == ()
    assert toy.seq_lens.tolist() == [1100] * 4


def test_nothing_waits_while_a_kernel_holds_the_stream() -> None:
    toy = CudaToy(stats_print_every_n_steps=1, health_check_every_n_steps=1, health_check_warmup_steps=0)
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    for _ in range(5):
        with toy.manager.step(stream):
            graph.launch(stream)
    stream.synchronize()
    is_released = toy.cupy.cuda.alloc_pinned_memory(4)
    import numpy as np

    word = np.frombuffer(is_released, np.int32, 1)
    word[0] = 0
    toy.spin(stream, is_released.ptr)
    longest = 0.0
    try:
        for _ in range(100):
            start = time.perf_counter()
            with toy.manager.step(stream):
                graph.launch(stream)
            longest = max(longest, time.perf_counter() - start)
        assert not stream.done  # the kernel really held it all the while
        in_flight = [h.n_in_flight for h in toy.manager._handlers]
        assert in_flight == [4, 4] and all(h.n_not_taken > 0 for h in toy.manager._handlers)
    finally:
        word[0] = 1
        stream.synchronize()
    print(f"longest step {longest * 1e6:.0f} us with the stream held")
    assert longest < 0.05
    with toy.manager.step(stream):
        graph.launch(stream)
    stream.synchronize()
    toy.manager.synchronize()
    assert toy.manager.stats().snapshot_step >= 9
    assert toy.manager.violations() == ()


def test_a_violation_reaches_the_host_within_two_steps_of_its_forward() -> None:
    toy = CudaToy(verify_data_every=1)
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    for _ in range(20):
        with toy.manager.step(stream):
            graph.launch(stream)
    stream.synchronize()
    toy.flip(0, toy.page + 3)
    with toy.manager.step(stream):
        graph.launch(stream)
    stream.synchronize()  # the faulty forward has completed on the device
    n_steps = 0
    while not toy.manager.violations() and n_steps < 10:
        with toy.manager.step(stream):
            pass
        n_steps += 1
    assert n_steps <= 2
    assert toy.manager.violations()[0].reasons == Reason.DATA
