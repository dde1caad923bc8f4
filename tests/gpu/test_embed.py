"""Engines that bring their own context, build their own graphs, or whose buffers move."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp import EXAMPLES, build_shared

from kvcanary import CanaryConfig, CanaryManager, LayoutError, Reason, StepBatch, layouts

from .toy import CudaToy

pytestmark = pytest.mark.gpu


def ok(result: tuple[Any, ...]) -> Any:
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) > 1 else None


# ---- rebind ----------------------------------------------------------------------------------------------------------
def test_a_captured_graph_follows_moved_arrays() -> None:
    toy = CudaToy(verify_data_every=1)
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)

    def replay(n: int) -> None:
        for _ in range(n):
            with toy.manager.step(stream):
                graph.launch(stream)
        stream.synchronize()

    replay(20)
    for _ in range(3):
        # The guard's view moves; the toy's graph goes on writing into the old arrays, so these are kept and copied.
        new_k, new_v = [a.copy() for a in toy.k], [a.copy() for a in toy.v]
        toy.cupy.cuda.runtime.deviceSynchronize()
        arrays = [a for pair in zip(new_k, new_v, strict=True) for a in pair]
        toy.manager.rebind(0, arrays, stream=stream)
        toy.flip(0, toy.page + 1)  # in the old arrays: nobody looks
        with toy.manager.step(stream):
            pass
    assert toy.manager.violations() == ()
    toy.manager.rebind(0, [a for pair in zip(toy.k, toy.v, strict=True) for a in pair], stream=stream)
    toy.flip(0, toy.page + 1)  # the fourth flip: as written again
    replay(20)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    toy.flip(1, toy.page + 5)
    replay(1)
    toy.manager.synchronize()
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.request_id) == (Reason.DATA, toy.page + 5, 1, 1)


# ---- graphs ----------------------------------------------------------------------------------------------------------
def test_the_cpp_example_guards_a_graph_with_child_nodes(tmp_path: Path) -> None:
    from cuda.bindings import driver

    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    example = ctypes.CDLL(str(build_shared("child_nodes", [EXAMPLES / "cpp" / "child_nodes.cpp"], into=tmp_path)))
    toy = CudaToy(verify_data_every=1)
    stream = toy.cupy.cuda.Stream(non_blocking=True)
    model = captured_model(toy)
    guarded = ctypes.c_void_p()
    with toy.manager.graphs(toy.batch) as graphs:
        arguments = (ctypes.c_void_p(graphs.head), ctypes.c_void_p(model), ctypes.c_void_p(graphs.tail))
        assert example.kvc_guard_graph(*arguments, ctypes.byref(guarded)) == 0
    handle = driver.CUgraphExec(guarded.value)

    def replay(n: int) -> None:
        for p in range(n):
            advance(toy, stream)
            with toy.manager.step(stream):
                ok(driver.cuGraphLaunch(handle, driver.CUstream(stream.ptr)))
            assert p >= 0
        stream.synchronize()

    replay(40)
    toy.manager.synchronize()
    assert toy.manager.violations() == ()
    toy.flip(1, toy.page + 5)
    replay(1)
    toy.manager.synchronize()
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.position, v.request_id) == (Reason.DATA, toy.page + 5, 1, 5, 1)


def advance(toy: CudaToy, stream: Any) -> None:
    i32, width = np.int32, toy.table.shape[1]
    head = (i32(toy.rows), i32(toy.page), i32(width), i32(toy.max_len))
    with stream:
        toy._advance((1,), (256,), (*head, toy.table, toy.seq_lens, toy.ids, toy.slots, toy.history))


def captured_model(toy: CudaToy) -> int:
    """The writes of the toy's step alone, as a CUgraph that is left to its fate."""
    runtime, stream = toy.cupy.cuda.runtime, toy.cupy.cuda.Stream(non_blocking=True)
    runtime.streamBeginCapture(stream.ptr, runtime.streamCaptureModeRelaxed)
    with stream:
        for salt, layer in enumerate((*toy.k, *toy.v)):
            args = (np.int32(toy.rows), np.int32(toy.n_bytes), toy.ids, toy.slots, layer, np.int32(salt))
            toy._write((toy.rows,), (128,), args)
    return int(runtime.streamEndCapture(stream.ptr))


# ---- a context of the engine's own -----------------------------------------------------------------------------------
class ForeignEngine:
    """An engine of driver calls alone, in a context made by cuCtxCreate; it writes its KV with copies."""

    PAGE, WIDTH, ROWS, DIM = 16, 4, 2, 64

    def __init__(self, overlap_head: bool = False) -> None:
        from cuda.bindings import driver

        self.driver = driver
        ok(driver.cuInit(0))
        self.context = ok(driver.cuCtxCreate(None, 0, ok(driver.cuDeviceGet(0))))  # current from here on
        self.rng = np.random.default_rng(0)
        n_blocks, rows = 1 + self.ROWS * self.WIDTH, np.arange(self.ROWS, dtype=np.int32)
        shape = (n_blocks, self.PAGE, 1, self.DIM)
        self.k, self.v = (self.put(np.zeros(shape, np.uint8)) for _ in range(2))
        table = 1 + np.arange(self.ROWS * self.WIDTH, dtype=np.int32).reshape(self.ROWS, self.WIDTH)
        self.host = {
            "block_table": table,
            "seq_lens": 0 * rows,
            "query_start_loc": np.arange(self.ROWS + 1, dtype=np.int32),
            "input_ids": 0 * rows,
            "slot_mapping": np.zeros(self.ROWS, np.int64),
            "request_slots": rows,
            "request_ids": rows + 1,
        }
        self.arrays = {name: self.put(a) for name, a in self.host.items()}
        self.batch = StepBatch(**self.arrays)
        pool = layouts.nhd(k=[self.k], v=[self.v])
        config = CanaryConfig(verify_data_every=1, overlap_head=overlap_head)
        self.manager = CanaryManager(config, [pool], self.ROWS, self.ROWS)

    def put(self, array: Any) -> tuple[Any, ...]:
        pointer = int(ok(self.driver.cuMemAlloc(array.nbytes)))
        ok(self.driver.cuMemcpyHtoD(pointer, array.ctypes.data, array.nbytes))
        return pointer, array.shape, None, array.itemsize, "cuda:0"

    def step(self, p: int, stream: Any = None) -> None:
        self.fill(p, stream)
        with self.manager.step(stream), self.manager.forward(self.batch, stream):
            self.write(stream)

    def fill(self, p: int, stream: Any) -> None:
        ok(self.driver.cuStreamSynchronize(stream or 0))  # the copies below are not ordered on it
        self.host["seq_lens"][:] = p + 1
        self.host["input_ids"][:] = self.rng.integers(0, 500, self.ROWS)
        self.host["slot_mapping"][:] = self.host["block_table"][:, p // self.PAGE] * self.PAGE + p % self.PAGE
        for name in ("seq_lens", "input_ids", "slot_mapping"):
            array = self.host[name]
            ok(self.driver.cuMemcpyHtoD(self.arrays[name][0], array.ctypes.data, array.nbytes))

    def write(self, stream: Any) -> None:
        for pointer in (self.k[0], self.v[0]):
            for slot in self.host["slot_mapping"]:
                row = self.rng.integers(0, 256, self.DIM, dtype=np.uint8)
                target = pointer + int(slot) * self.DIM
                ok(self.driver.cuMemcpyHtoDAsync(target, row.ctypes.data, self.DIM, stream or 0))
                ok(self.driver.cuStreamSynchronize(stream or 0))

    def flip(self, slot: int) -> None:
        byte = np.zeros(1, np.uint8)
        ok(self.driver.cuCtxSynchronize())
        ok(self.driver.cuMemcpyDtoH(byte.ctypes.data, self.k[0] + slot * self.DIM, 1))
        byte ^= 8
        ok(self.driver.cuMemcpyHtoD(self.k[0] + slot * self.DIM, byte.ctypes.data, 1))


@pytest.fixture(params=[False, True], ids=["before the model", "beside it"])
def foreign(request: pytest.FixtureRequest) -> Iterator[ForeignEngine]:
    engine = ForeignEngine(overlap_head=request.param)
    yield engine
    engine.manager.close()
    ok(engine.driver.cuCtxDestroy(engine.context))


@pytest.mark.parametrize("has_stream", [False, True], ids=["NULL stream", "own stream"])
def test_a_context_of_cuctxcreate(foreign: ForeignEngine, has_stream: bool) -> None:
    from kvcanary.backends.context import ContextDriver

    assert isinstance(foreign.manager.backend._driver, ContextDriver)
    stream = int(ok(foreign.driver.cuStreamCreate(1))) if has_stream else None
    for p in range(30):
        foreign.step(p, stream)
    foreign.manager.synchronize()
    assert foreign.manager.violations() == ()
    assert foreign.manager.prove(foreign.batch, stream).ok
    foreign.flip(foreign.PAGE + 7)
    foreign.step(30, stream)
    foreign.manager.synchronize()
    (v,) = foreign.manager.violations()
    assert (v.reasons, v.slot, v.request_id) == (Reason.DATA, foreign.PAGE + 7, 1)
    assert foreign.manager.taint.tolist() == [Reason.DATA, 0]
    assert int(ok(foreign.driver.cuCtxGetCurrent())) == int(foreign.context)


def test_a_forward_is_captured_there_from_a_thread_without_a_context(foreign: ForeignEngine) -> None:
    driver, manager, stream = foreign.driver, foreign.manager, int(ok(foreign.driver.cuStreamCreate(1)))
    foreign.step(0, stream)
    ok(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    context = ok(driver.cuCtxPopCurrent())
    try:
        with manager.forward(foreign.batch, stream):
            pass  # what is written into the new slots before HEAD does as well
    finally:
        ok(driver.cuCtxPushCurrent(context))
    graph = ok(driver.cuGraphInstantiate(ok(driver.cuStreamEndCapture(stream)), 0))
    for p in range(1, 31):
        foreign.fill(p, stream)
        foreign.write(stream)
        if p == 30:
            manager.synchronize()
            assert manager.violations() == ()
            foreign.flip(foreign.PAGE + 7)
        with manager.step(stream):
            ok(driver.cuGraphLaunch(graph, stream))
    manager.synchronize()
    (v,) = manager.violations()
    assert (v.reasons, v.slot, v.request_id) == (Reason.DATA, foreign.PAGE + 7, 1)


def test_the_guard_is_captured_in_such_a_context(foreign: ForeignEngine) -> None:
    driver, manager = foreign.driver, foreign.manager
    foreign.step(0)
    with manager.graphs(foreign.batch) as graphs:
        kinds = [int(ok_pair(driver.cuGraphGetNodes(driver.CUgraph(g), 0))) for g in (graphs.head, graphs.tail)]
    assert kinds == [4, 2]


def ok_pair(result: tuple[Any, ...]) -> int:
    assert int(result[0]) == 0, result[0]
    return int(result[2])


# ---- memory that is elsewhere ----------------------------------------------------------------------------------------
def test_a_raw_pointer_on_another_device_is_named() -> None:
    import cupy

    k = cupy.zeros((4, 16, 1, 8), cupy.float16)
    raw = (k.data.ptr, k.shape, None, 2, f"cuda:{cupy.cuda.runtime.getDevice() + 1}")
    with pytest.raises(LayoutError, match="its memory, at 0x"):
        CanaryManager(CanaryConfig(), [layouts.nhd(k=[raw])], 2, 8)


def test_arrays_of_the_primary_context_get_the_usual_driver() -> None:
    from kvcanary.backends.cuda import CudaDriver

    assert type(CudaToy().manager.backend._driver) is CudaDriver


def test_the_taint_of_a_guard_that_is_off_lies_beside_the_kv() -> None:
    import cupy

    toy = CudaToy(mode="off")
    taint = toy.manager.taint
    assert isinstance(taint, cupy.ndarray) and taint.dtype == cupy.uint32 and not taint.any()
    assert toy.manager.taint is taint
