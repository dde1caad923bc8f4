"""As much of cuda.bindings.driver as `backends/context.py` calls, over the stand-in of a GPU in fake_cuda.py.

Every call but those about contexts must find the engine's context current, and has as many arguments as the real one.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from .fake_cuda import FakeCuda, FakeEvent

CONTEXT, PRIMARY = 0x5EED0, 0x1000
NOT_READY = 600


def _real() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None


class FakeDriver:
    """Calls return (status, value); ``contexts`` is this thread's stack, ``n_calls`` counts them all."""

    CUcontext = CUgraph = int
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_NUM_REGS=4)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    )

    def __init__(self, world: FakeCuda) -> None:
        self._world, self._runtime, self._driver = world, world.cupy.cuda.runtime, _real()
        self.contexts: list[int] = [PRIMARY]  # somebody else's is current
        self.n_calls = 0
        self.n_bytes_left = 1 << 40
        self._memory: dict[int, Any] = {}  # address -> what keeps it
        self._events: dict[int, FakeEvent] = {}

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        do = getattr(FakeDriver, f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            if self._driver is not None:
                inspect.signature(getattr(self._driver, name)).bind(*arguments)
            assert self.contexts[-1] == CONTEXT or name == "cuCtxPushCurrent", f"{name} in another context"
            self.n_calls += 1
            value = do(self, *arguments)
            status = NOT_READY if value is NotImplemented else 2 if value is MemoryError else 0
            return (status, *value) if isinstance(value, tuple) else (status, value)

        return call

    # ---- contexts and the device -------------------------------------------------------------------------------------
    def _cuCtxPushCurrent(self, context: int) -> None:
        self.contexts.append(context)

    def _cuCtxPopCurrent(self) -> int:
        return self.contexts.pop()

    def _cuCtxSynchronize(self) -> None:
        self._world.synchronize()

    def _cuCtxGetDevice(self) -> int:
        return 0

    def _cuDeviceGetAttribute(self, attribute: int, _device: int) -> int:
        return {16: 2, 75: 9, 76: 0}[attribute]

    # ---- memory ------------------------------------------------------------------------------------------------------
    def _cuMemAlloc(self, n_bytes: int) -> Any:
        if n_bytes > self.n_bytes_left:
            return MemoryError
        memory = np.full(n_bytes + 256, 0xA5, np.uint8)
        address = (memory.ctypes.data + 255) // 256 * 256
        self._memory[address] = memory
        return address

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self.n_bytes_left, 1 << 40

    def _cuMemFree(self, address: int) -> None:
        del self._memory[address]

    def _cuMemHostAlloc(self, n_bytes: int, flags: int) -> int:
        assert flags == 3
        return int(self._cuMemAlloc(n_bytes))

    _cuMemFreeHost = _cuMemFree

    def _cuMemHostGetDevicePointer(self, address: int, _flags: int) -> int:
        return address

    def _cuMemsetD8(self, address: int, value: int, n_bytes: int) -> None:
        ctypes.memset(address, value, n_bytes)

    def _cuMemsetD8Async(self, address: int, value: int, n_bytes: int, stream: int) -> None:
        self._runtime.memsetAsync(address, value, n_bytes, stream)

    def _cuMemcpyHtoD(self, target: int, source: int, n_bytes: int) -> None:
        self._runtime.memcpy(target, source, n_bytes, 1)

    _cuMemcpyDtoH = _cuMemcpyHtoD

    def _cuMemcpyHtoDAsync(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        self._runtime.memcpyAsync(target, source, n_bytes, 1, stream)

    _cuMemcpyDtoHAsync = _cuMemcpyDtoDAsync = _cuMemcpyHtoDAsync

    # ---- streams, events, graphs -------------------------------------------------------------------------------------
    def _cuStreamCreate(self, flags: int) -> int:
        assert flags == 1
        return self._world.new_stream().handle

    def _cuStreamDestroy(self, stream: int) -> None:
        self._world.streams[stream].close()

    def _cuStreamSynchronize(self, stream: int) -> None:
        self._world.synchronize(self._world.streams[stream])

    def _cuStreamWaitEvent(self, stream: int, event: int, _flags: int) -> None:
        self._world.streams[stream].wait(self._events[event])

    def _cuStreamIsCapturing(self, stream: int) -> int:
        return int(self._world.streams[stream].captured is not None)

    def _cuStreamBeginCapture(self, stream: int, _mode: int) -> None:
        self._world.streams[stream].begin_capture()

    def _cuStreamEndCapture(self, stream: int) -> int:
        return int(self._runtime.streamEndCapture(stream))

    def _cuGraphDestroy(self, graph: int) -> None:
        self._world.graphs.pop(graph)

    def _cuEventCreate(self, flags: int) -> int:
        assert flags == 2
        self._events[len(self._events) + 1] = FakeEvent(self._world)
        return len(self._events)

    def _cuEventDestroy(self, event: int) -> None:
        self._events[event] = None  # type: ignore[assignment]

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self._world.streams[stream].record(self._events[event])

    def _cuEventQuery(self, event: int) -> Any:
        return None if self._events[event].is_done else NotImplemented

    def _cuEventSynchronize(self, event: int) -> None:
        self._events[event].sync()

    # ---- kernels -----------------------------------------------------------------------------------------------------
    def _cuModuleLoadData(self, image: int) -> str:
        return ctypes.string_at(image, 5).decode()

    def _cuModuleUnload(self, module: str) -> None:
        assert module == "cubin"

    def _cuModuleGetFunction(self, _module: str, name: bytes) -> str:
        assert name.decode() in self._world._library.kernels
        return name.decode()

    def _cuFuncGetAttribute(self, _attribute: int, _function: str) -> int:
        return 32

    def _cuOccupancyMaxActiveBlocksPerMultiprocessor(self, _function: str, _threads: int, _shared: int) -> int:
        return 2

    def _cuLaunchKernel(self, name: str, x: int, y: int, z: int, *rest: int) -> None:
        threads, one, also_one, shared, stream, pointers, extra = rest
        assert (z, one, also_one, shared, extra) == (1, 1, 1, 0, 0)
        library, world = self._world._library, self._world
        address = ctypes.c_void_p.from_address(pointers).value
        params = np.frombuffer(ctypes.string_at(address, library.info[name].params_bytes), np.uint8)
        world.calls["launch"] += 1
        world._n_launches += 1
        seed = world._n_launches
        world.streams[stream].submit(lambda: library.launch(name, (x, y), threads, params, seed=seed))


class FakeLibcuda:
    """What `backends/whose.py` asks libcuda: contexts and devices of addresses, and the primary context."""

    def __init__(
        self, context: int | None = CONTEXT, device: int = 0, current: int = 0, is_managed: bool = False
    ) -> None:
        self.answers = {1: context, 2: 2, 7: 77, 8: int(is_managed), 9: device}
        self.current = current

    def cuPointerGetAttribute(self, out: Any, attribute: int, _pointer: Any) -> int:
        if self.answers[attribute] is None:
            return 1
        out._obj.value = self.answers[attribute]
        return 0

    def cuCtxGetCurrent(self, out: Any) -> int:
        out._obj.value = self.current
        return 0

    def cuCtxGetDevice(self, out: Any) -> int:
        out._obj.value = 0
        return 0

    def cuDeviceGet(self, out: Any, ordinal: int) -> int:
        out._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxGetState(self, _device: Any, _flags: Any, is_active: Any) -> int:
        is_active._obj.value = 1
        return 0

    def cuDevicePrimaryCtxRetain(self, out: Any, _device: Any) -> int:
        out._obj.value = PRIMARY
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, _device: Any) -> int:
        return 0
