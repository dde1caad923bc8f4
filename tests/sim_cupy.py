"""The sim's kernels on the CPU: as much of CuPy as its models use, and where they run in a test."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from simt.build import build, find_compiler
from simt.runner import SimtLibrary
from test_sim_model import N_BLOCKS, PAGE, SMALL

from kvcanary.sim import cuda_model
from kvcanary.sim.cuda_model import CudaModel
from kvcanary.sim.model import ModelConfig, NumpyModel

SOURCE = cuda_model.KERNELS_DIR / "sim.cu"
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}  # logits have unit scale; another order of the sums
Work = tuple[str, Callable[[], object]]


class SimtStream:
    """Does what was submitted when somebody waits, and not before: who forgets to wait sees old contents."""

    def __init__(self, cupy: SimtCupy) -> None:
        self._cupy = cupy
        cupy.streams.append(self)
        self.ptr = len(cupy.streams)
        self.n_waits = 0
        self.done: list[str] = []  # what was executed, by name
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None

    def submit(self, name: str, work: Callable[[], object] = lambda: None) -> None:
        assert self._captured is None or not name.startswith("copy"), "a copy would be repeated at every replay"
        (self._queue if self._captured is None else self._captured).append((name, work))

    def run(self) -> None:
        while self._queue:
            name, work = self._queue.pop(0)
            work()
            self.done.append(name)

    def synchronize(self) -> None:
        assert self._captured is None, "waits inside a capture"
        self.n_waits += 1
        self.run()

    def begin_capture(self) -> None:
        self._captured = []

    def end_capture(self) -> SimtGraph:
        assert self._captured is not None
        graph, self._captured = SimtGraph(self._captured), None
        return graph

    def __enter__(self) -> None:
        self._cupy.entered.append(self)

    def __exit__(self, *exc: object) -> None:
        self._cupy.entered.pop()


class SimtGraph:
    def __init__(self, nodes: list[Work]) -> None:
        self._nodes = nodes

    def launch(self, stream: SimtStream) -> None:
        stream.submit("graph")
        for name, work in self._nodes:
            stream.submit(name, work)


class SimtEvent:
    def __init__(self, disable_timing: bool) -> None:
        self._stream: SimtStream | None = None

    def record(self, stream: SimtStream) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.run()


class SimtCupy:
    """As much of CuPy as the model uses; device memory is host memory."""

    zeros, asarray, asnumpy = staticmethod(np.zeros), staticmethod(np.array), staticmethod(np.array)
    memcpyHostToDevice, memcpyDeviceToHost = 1, 2  # noqa: N815
    Event = SimtEvent

    def __init__(self, library: SimtLibrary) -> None:
        self.library = library
        self.cuda = self.runtime = self
        self.streams: list[SimtStream] = []
        self.entered: list[SimtStream] = []

    def alloc_pinned_memory(self, n_bytes: int) -> bytearray:
        return bytearray(n_bytes)

    def memcpyAsync(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> None:  # noqa: N802
        name = {1: "copy to device", 2: "copy to host"}[kind]
        self.streams[stream - 1].submit(name, lambda: ctypes.memmove(target, source, n_bytes))

    def Stream(self, non_blocking: bool) -> SimtStream:  # noqa: N802
        assert non_blocking, "a capture and the default stream would get into each other's way"
        return SimtStream(self)

    def RawModule(self, code: str, options: tuple[str, ...]) -> SimtCupy:  # noqa: N802
        assert code == SOURCE.read_text()
        return self

    def get_function(self, name: str) -> SimtKernel:
        assert name in self.library.kernels
        return SimtKernel(self, name)


class SimtKernel:
    num_regs = 32

    def __init__(self, cupy: SimtCupy, name: str) -> None:
        self._cupy, self._name, self._n_launches = cupy, name, 0

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[np.void]) -> None:
        stream = self._cupy.entered[-1]  # fails on the default stream
        stream.submit(self._name, lambda: self._launch(grid[0], block[0], *args))

    def _launch(self, grid: int, block: int, params: np.void) -> None:
        self._n_launches += 1
        self._cupy.library.launch(self._name, grid, block, params, seed=self._n_launches)


@pytest.fixture(name="library", scope="session")
def sim_library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    # One place: each module that imports the fixture has one of its own.
    return SimtLibrary(build(cuda_model.KERNELS_DIR, tmp_path_factory.getbasetemp() / "sim-kernels"))


@pytest.fixture
def simt(library: SimtLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """CudaModel runs on the CPU build."""
    monkeypatch.setattr(cuda_model, "import_cupy", lambda: SimtCupy(library))


@pytest.fixture(name="device", params=["simt", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> str:
    """Where CudaModel runs in this test."""
    if request.param == "simt":
        request.getfixturevalue("simt")
    return str(request.param)


def both(config: ModelConfig = SMALL, n_blocks: int = N_BLOCKS, page: int = PAGE) -> tuple[NumpyModel, CudaModel]:
    return NumpyModel(config, n_blocks, page), CudaModel(config, n_blocks, page)


def host(array: Any) -> np.ndarray[Any, Any]:
    return array if isinstance(array, np.ndarray) else array.get()


def check_caches(model: CudaModel, expected: NumpyModel) -> None:
    for mine, theirs in zip(model.k_cache + model.v_cache, expected.k_cache + expected.v_cache, strict=True):
        np.testing.assert_allclose(host(mine), theirs, **CLOSE)
