"""As much of CuPy and cuda.core as `backends/cuda.py` uses, over host memory and the CPU build of the kernels.

A stream is a queue that runs only when somebody waits for it or the test pumps it: a device that is behind, held or
captured is a matter of not pumping. What CuPy and cuda.core really do is for the GPU tests; this shows that our side of
it is right.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from .exact import exact_array
from .runner import SimtLibrary

_FIRST_FUNCTION = 1 << 20  # handles of functions; no addresses
Work = Callable[[], bool]  # False: not yet, try again later


class FakeArray:
    """A device array: host memory that says it is on cuda:0."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.np = array
        self.data = SimpleNamespace(ptr=array.ctypes.data)
        self.shape, self.nbytes, self.dtype = array.shape, array.nbytes, array.dtype
        self.device = SimpleNamespace(id=0)
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3}

    def __len__(self) -> int:
        return len(self.np)

    def __getitem__(self, index: Any) -> FakeArray:
        return FakeArray(self.np[index])

    def reshape(self, *shape: int) -> FakeArray:
        return FakeArray(self.np.reshape(*shape))

    def get(self) -> np.ndarray[Any, Any]:
        return self.np.copy()

    def tolist(self) -> Any:
        return self.np.tolist()


class FakeStream:
    """A queue of work under a handle; `captured` collects instead while a capture is open."""

    def __init__(self, world: FakeCuda, handle: int) -> None:
        self.world, self.handle, self.ptr = world, handle, handle
        self.queue: deque[Work] = deque()
        self.captured: list[Work] | None = None
        self.origin: FakeStream | None = None  # of the capture that this stream was taken into by an event
        self.is_joined = True
        self.is_invalid = False
        self.capture_number = 0
        self.is_held = False

    def submit(self, work: Callable[[], object]) -> None:
        def run() -> bool:
            return work() is not False

        (self.queue if self.captured is None else self.captured).append(run)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    # cuda.core
    def record(self, event: FakeEvent) -> None:
        event.is_done, event.captured_on = False, self if self.captured is not None else None
        if event.captured_on is None:
            self.submit(lambda: setattr(event, "is_done", True))

    def wait(self, event: FakeEvent) -> None:
        source, mine = event.captured_on, self.origin or self
        if source is None:
            if self.captured is not None:
                mine.is_invalid = True
                raise RuntimeError("cudaErrorStreamCaptureIsolation")
            self.submit(lambda: event.is_done)
            return
        origin = source.origin or source
        if self.captured is None:  # taken into the capture, until that ends
            self.captured, self.origin = [], origin
        elif mine is not origin:
            mine.is_invalid = origin.is_invalid = True
            raise RuntimeError("cudaErrorStreamCaptureMerge")
        if self is not origin:
            self.is_joined = False
        elif source is not origin:  # back from it: what a side stream has done comes as late as it may
            self.captured += source.captured or []
            source.captured, source.is_joined = [], True

    def sync(self) -> None:
        self.world.synchronize(self)

    def close(self) -> None:
        assert not self.queue

    # CuPy
    synchronize = sync

    def begin_capture(self) -> None:
        assert self.captured is None
        self.captured, self.is_invalid = [], False
        self.world.n_captures += 1
        self.capture_number = self.world.n_captures

    def end_capture(self) -> FakeGraph:
        assert self.captured is not None
        sides = [s for s in self.world.streams.values() if s.origin is self]
        is_whole = all(s.is_joined and not s.captured for s in sides)
        for side in sides:
            side.captured = side.origin = None
        graph, self.captured = FakeGraph(self.captured), None
        if self.is_invalid:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")
        if not is_whole:
            raise RuntimeError("cudaErrorStreamCaptureUnjoined")
        return graph


class FakeGraph:
    def __init__(self, nodes: list[Work]) -> None:
        self.nodes = nodes

    def launch(self, stream: FakeStream) -> None:
        stream.world.calls["graph launch"] += 1
        for node in self.nodes:
            stream.submit(node)


class FakeEvent:
    def __init__(self, world: FakeCuda) -> None:
        self._world = world
        self.is_done = True
        self.captured_on: FakeStream | None = None

    def sync(self) -> None:
        self._world.calls["synchronize"] += 1
        self._world.pump()
        assert self.is_done, "waits for what nobody will finish"


class FakeCuda:
    """The `cupy` and `core` modules of a world with one device; ``calls`` counts what an engine would feel."""

    def __init__(self, library: SimtLibrary) -> None:
        self._library = library
        self.calls: Counter[str] = Counter()
        self.streams: dict[int, FakeStream] = {0: FakeStream(self, 0)}
        self.graphs: dict[int, FakeGraph] = {}  # by handle, until they are destroyed
        self._n_launches = self._n_graphs = self.n_captures = 0
        self.libcuda = SimpleNamespace(cuStreamGetCaptureInfo_v2=self._capture_info)
        self.keep: list[Any] = []
        runtime = SimpleNamespace(
            getDevice=lambda: 0,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3,
            memcpyAsync=self._memcpy_async,
            memcpy=self._memcpy,
            memsetAsync=self._memset_async,
            streamSynchronize=lambda handle: self.synchronize(self.streams[handle]),
            deviceSynchronize=self.synchronize,
            streamCaptureModeRelaxed=2,
            streamBeginCapture=lambda handle, _mode: self.streams[handle].begin_capture(),
            streamEndCapture=self._end_capture,
            graphDestroy=self.graphs.pop,
            streamIsCapturing=lambda handle: self.streams[handle].captured is not None,
        )
        device = SimpleNamespace(attributes={"MultiProcessorCount": 2})
        self.cupy = SimpleNamespace(
            zeros=self._zeros,
            RawModule=lambda code, options, backend: SimpleNamespace(get_function=self._kernel),
            cuda=SimpleNamespace(
                runtime=runtime,
                Device=lambda _id=0: _Context(device),
                memory=SimpleNamespace(OutOfMemoryError=MemoryError),
                driver=SimpleNamespace(
                    occupancyMaxActiveBlocksPerMultiprocessor=lambda _kernel, _threads, _shared: 2,
                    launchKernel=self._launch_kernel,
                ),
            ),
        )
        self.core = SimpleNamespace(
            Device=lambda _id: SimpleNamespace(
                set_current=lambda: None, create_stream=self.new_stream, create_event=lambda: FakeEvent(self)
            ),
            Stream=SimpleNamespace(from_handle=lambda handle: self.streams[handle]),
            LEGACY_DEFAULT_STREAM=self.streams[0],
            LegacyPinnedMemoryResource=lambda: SimpleNamespace(allocate=self._pinned),
        )

    def _capture_info(self, handle: Any, status: Any, number: Any, *rest: Any) -> int:
        assert rest == (None, None, None)
        stream = self.streams[handle.value]
        origin = stream.origin or stream
        status._obj.value = 0 if stream.captured is None else 2 if origin.is_invalid else 1
        number._obj.value = origin.capture_number
        return 0

    def _end_capture(self, handle: int) -> int:
        graph = self.streams[handle].end_capture()
        self._n_graphs += 1
        self.graphs[1000 + self._n_graphs] = graph
        return 1000 + self._n_graphs

    def new_stream(self) -> FakeStream:
        handle = 16 * len(self.streams)
        self.streams[handle] = FakeStream(self, handle)
        return self.streams[handle]

    def pump(self) -> None:
        """Run all queues as far as they go."""
        progress = True
        while progress:
            progress = False
            for stream in list(self.streams.values()):
                while stream.queue and not stream.is_held and stream.queue[0]():
                    stream.queue.popleft()
                    progress = True

    def synchronize(self, stream: FakeStream | None = None) -> None:
        self.calls["synchronize"] += 1
        self.pump()
        waiting = [s for s in self.streams.values() if s.queue and (stream is None or s is stream)]
        assert not waiting, "waits for a stream that is held"

    # ---- memory ------------------------------------------------------------------------------------------------------
    def _zeros(self, shape: Any, dtype: Any) -> FakeArray:
        self.calls["allocate"] += 1
        return FakeArray(exact_array(shape, dtype))

    def _pinned(self, n_bytes: int) -> SimpleNamespace:
        self.calls["allocate"] += 1
        memory = exact_array(n_bytes, np.uint8, fill=0xA5)
        return SimpleNamespace(handle=int(memory.ctypes.data), memory=memory)

    def _memcpy_async(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        self.calls["copy"] += 1
        self.streams[stream].submit(lambda: ctypes.memmove(target, source, n_bytes))

    def _memcpy(self, target: int, source: int, n_bytes: int, kind: int) -> None:
        self.calls["blocking copy"] += 1
        ctypes.memmove(target, source, n_bytes)

    def _memset_async(self, pointer: int, value: int, n_bytes: int, stream: int) -> None:
        self.streams[stream].submit(lambda: ctypes.memset(pointer, value, n_bytes))

    # ---- kernels -----------------------------------------------------------------------------------------------------
    def _kernel(self, name: str) -> Any:
        address = _FIRST_FUNCTION + self._library.kernels.index(name)
        return SimpleNamespace(num_regs=32, kernel=SimpleNamespace(ptr=address))

    def _launch_kernel(self, function: int, x: int, y: int, z: int, *rest: int) -> None:
        threads, one, also_one, shared, stream, pointers, extra = rest
        assert (z, one, also_one, shared, extra) == (1, 1, 1, 0, 0)
        name = self._library.kernels[function - _FIRST_FUNCTION]
        address = ctypes.c_void_p.from_address(pointers).value
        params = np.frombuffer(ctypes.string_at(address, self._library.info[name].params_bytes), np.uint8)
        self.launch(name, (x, y), threads, params, self.streams[stream])

    def launch(self, name: str, grid: tuple[int, int], block: int, params: np.ndarray, stream: FakeStream) -> None:
        """``params`` are the launch's own."""
        self.calls["launch"] += 1

        def run() -> None:
            self._n_launches += 1
            self._library.launch(name, grid, block, params, seed=self._n_launches)

        stream.submit(run)


class _Context(SimpleNamespace):
    """A CuPy device: attributes, and a context manager."""

    def __init__(self, device: SimpleNamespace) -> None:
        super().__init__(attributes=device.attributes)

    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...
