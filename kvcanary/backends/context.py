"""The driver of the device backend in a context that is not the device's primary one, as tinygrad makes it.

Kernels, memory, events and streams belong to a context; CuPy and cuda.core work in the primary one. Here they are made
by plain driver calls (cuda.bindings), each with the engine's context pushed for just that call. What `cuda.py` and
`lending.py` build on CuPy's runtime is the same code: the few calls that they make are given here.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.arrays import host_array, stream_pointer
from kvcanary.backends.compile import INSTALL, compile_cubin
from kvcanary.backends.cuda import Array, CudaDriver, no_pinned_memory
from kvcanary.backends.driver import Packed
from kvcanary.backends.whose import buffer_id
from kvcanary.errors import BackendError

_EVENT_WITHOUT_TIME, _STREAM_NON_BLOCKING, _PORTABLE_AND_MAPPED = 2, 1, 3


class ContextOutOfMemoryError(BackendError):
    """The context has no memory left."""


def import_driver() -> Any:
    """`cuda.bindings.driver`, or a `BackendError` with the install command."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"a context of the engine's own needs cuda-bindings ({error}): {INSTALL}") from error
    return driver


class _Sentinel:
    """A byte that lives as long as its context."""

    def __init__(self, pointer: int) -> None:
        self._pointer, self._id = pointer, buffer_id(pointer)

    @property
    def is_alive(self) -> bool:
        return self._id is not None and buffer_id(self._pointer) == self._id

    def free(self, push: Any, context: Any, free: Any, pop: Any) -> None:
        if self.is_alive and int(push(context)[0]) == 0:
            free(self._pointer)
            pop()


class _Calls:
    """Driver calls in a context: ``calls.cuMemAlloc(n)`` returns what the call returns behind its status."""

    def __init__(self, driver: Any, context: int) -> None:
        self.driver, self._context = driver, driver.CUcontext(context)
        self._sentinel = _Sentinel(int(self.cuMemAlloc(1)))
        free = (driver.cuCtxPushCurrent, self._context, driver.cuMemFree, driver.cuCtxPopCurrent)
        weakref.finalize(self, self._sentinel.free, *free).atexit = False

    @property
    def is_alive(self) -> bool:
        """Whether the context is still there: the driver takes no question about one that was destroyed."""
        return self._sentinel.is_alive

    def at_end_of(self, owner: object, name: str, *arguments: Any) -> None:
        """Make a call when nobody holds ``owner`` any more, if the context is there then; else all in it is gone."""
        weakref.finalize(owner, self.last, name, *arguments).atexit = False

    def last(self, name: str, *arguments: Any) -> None:
        """A call that gives something back."""
        if self.is_alive:
            with contextlib.suppress(BackendError):
                getattr(self, name)(*arguments)

    @contextlib.contextmanager
    def pushed(self) -> Iterator[None]:
        self._check("cuCtxPushCurrent", self.driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self.driver.cuCtxPopCurrent()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.driver, name)

        def call(*arguments: Any) -> Any:
            with self.pushed():
                return self._check(name, function(*arguments))

        setattr(self, name, call)  # looked up once
        return call

    def _check(self, name: str, result: tuple[Any, ...]) -> Any:
        status = int(result[0])
        if status == 2:  # CUDA_ERROR_OUT_OF_MEMORY
            raise ContextOutOfMemoryError(f"{name}: out of memory")
        if status:
            raise BackendError(f"{name} failed in the engine's context with CUDA error {status} ({result[0]!r})")
        return None if len(result) < 2 else result[1] if len(result) == 2 else result[1:]


class DeviceArray:
    """A contiguous array of a context; slices are views, as NumPy's are."""

    def __init__(self, owner: Any, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any], calls: _Calls) -> None:
        self._owner, self._calls, self.shape, self.dtype = owner, calls, shape, dtype
        self.data = SimpleNamespace(ptr=pointer)
        self.nbytes = math.prod(shape) * dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False)}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> DeviceArray:
        row = self.nbytes // max(1, self.shape[0])
        if isinstance(index, slice):
            first, last, step = index.indices(self.shape[0])
            if step != 1:
                raise IndexError(f"a slice with step {step}: device arrays are sliced with step 1; copy it with get()")
            return self._view(self.data.ptr + first * row, (max(0, last - first), *self.shape[1:]))
        return self._view(self.data.ptr + range(self.shape[0])[index] * row, self.shape[1:])

    def reshape(self, *shape: int) -> DeviceArray:
        assert math.prod(shape) == math.prod(self.shape)
        return self._view(self.data.ptr, shape)

    def _view(self, pointer: int, shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(self._owner, pointer, shape, self.dtype, self._calls)

    def get(self) -> Array:
        """A host copy; waits for what was launched on blocking streams."""
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            self._calls.cuMemcpyDtoH(host.ctypes.data, self.data.ptr, host.nbytes)
        return host

    def tolist(self) -> Any:
        return self.get().tolist()


class _Memory:
    """An allocation, freed by the call named ``free`` when nobody holds it."""

    def __init__(self, calls: _Calls, pointer: int, free: str) -> None:
        self.pointer = pointer
        calls.at_end_of(self, free, pointer)


class _Event:
    """As much of cuda.core's events as is used."""

    def __init__(self, calls: _Calls) -> None:
        self._calls, self.handle = calls, calls.cuEventCreate(_EVENT_WITHOUT_TIME)
        calls.at_end_of(self, "cuEventDestroy", self.handle)

    @property
    def is_done(self) -> bool:
        with self._calls.pushed():
            status = int(self._calls.driver.cuEventQuery(self.handle)[0])
        if status not in (0, 600):  # CUDA_ERROR_NOT_READY
            raise BackendError(f"cuEventQuery failed in the engine's context with CUDA error {status}")
        return status == 0

    def sync(self) -> None:
        self._calls.cuEventSynchronize(self.handle)


class _Stream:
    """As much of cuda.core's streams as is used."""

    def __init__(self, calls: _Calls, handle: int) -> None:
        self._calls, self.handle = calls, handle

    def record(self, event: _Event) -> None:
        self._calls.cuEventRecord(event.handle, self.handle)

    def wait(self, event: _Event) -> None:
        self._calls.cuStreamWaitEvent(self.handle, event.handle, 0)

    def sync(self) -> None:
        self._calls.cuStreamSynchronize(self.handle)

    def close(self) -> None:
        self._calls.cuStreamDestroy(self.handle)


class _Runtime:
    """As much of CuPy's runtime as is used."""

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3  # noqa: N815  CuPy's names

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self.streamCaptureModeRelaxed = calls.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self.deviceSynchronize = calls.cuCtxSynchronize
        self.memGetInfo = calls.cuMemGetInfo
        self.streamSynchronize = calls.cuStreamSynchronize
        self.streamBeginCapture = calls.cuStreamBeginCapture
        self.streamEndCapture = lambda stream: int(calls.cuStreamEndCapture(stream))
        self.graphDestroy = lambda graph: calls.last("cuGraphDestroy", calls.driver.CUgraph(graph))
        self.streamIsCapturing = lambda stream: int(calls.cuStreamIsCapturing(stream)) != 0
        self._copies = {1: calls.cuMemcpyHtoD, 2: calls.cuMemcpyDtoH}
        self._async_copies = {1: calls.cuMemcpyHtoDAsync, 2: calls.cuMemcpyDtoHAsync, 3: calls.cuMemcpyDtoDAsync}

    def memcpy(self, target: int, source: int, n_bytes: int, kind: int) -> None:
        self._copies[kind](target, source, n_bytes)

    def memcpyAsync(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> None:  # noqa: N802
        self._async_copies[kind](target, source, n_bytes, stream)

    def memsetAsync(self, pointer: int, value: int, n_bytes: int, stream: int) -> None:  # noqa: N802
        self._calls.cuMemsetD8Async(pointer, value, n_bytes, stream)


class ContextDriver(CudaDriver):
    """`kvcanary.backends.device.Driver` in a context of the engine's own.

    Args:
        context: ``CUcontext``; it must live until the guard is closed. What is still held of the guard's memory then
            (counters, say) is freed with it.
    """

    def __init__(self, context: int) -> None:
        self._calls = calls = _Calls(import_driver(), context)
        driver = calls.driver
        self.wanted = 0
        self._runtime = _Runtime(calls)
        self._device = SimpleNamespace(
            create_event=lambda: _Event(calls),
            create_stream=lambda: _Stream(calls, int(calls.cuStreamCreate(_STREAM_NON_BLOCKING))),
        )
        legacy, streams = _Stream(calls, 0), SimpleNamespace(from_handle=lambda handle: _Stream(calls, handle))
        self._core = SimpleNamespace(Stream=streams, LEGACY_DEFAULT_STREAM=legacy)
        device = calls.cuCtxGetDevice()
        self.device_id = int(device)
        of_device, names = calls.cuDeviceGetAttribute, driver.CUdevice_attribute
        self.n_multiprocessors = int(of_device(names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device))
        major = of_device(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = of_device(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self._arch = f"sm_{int(major)}{int(minor)}"
        self._modules, self._engine_streams = {}, {}
        self._lists = self._lender = self._capture_stream = None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread, and restore what was."""
        with self._calls.pushed():
            yield

    def in_context(self, question: Callable[..., int]) -> Callable[..., int]:
        def ask(*arguments: Any) -> int:
            with self._calls.pushed():
                return question(*arguments)

        return ask

    # ---- memory ------------------------------------------------------------------------------------------------------
    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        if dtype.fields is not None:
            shape, dtype = (*shape, dtype.itemsize), np.dtype(np.uint8)
        n_bytes = max(1, math.prod(shape) * dtype.itemsize)
        try:
            pointer = int(self._calls.cuMemAlloc(n_bytes))
        except ContextOutOfMemoryError:
            raise self._no_memory(n_bytes) from None
        memory = _Memory(self._calls, pointer, "cuMemFree")
        self._calls.cuMemsetD8(pointer, 0, n_bytes)
        return DeviceArray(memory, pointer, shape, dtype, self._calls)

    def mapped(self, n: int, dtype: npt.DTypeLike) -> tuple[Array, int]:
        dtype, calls = np.dtype(dtype), self._calls
        n_bytes = n * dtype.itemsize
        try:
            address = int(calls.cuMemHostAlloc(max(1, n_bytes), _PORTABLE_AND_MAPPED))
        except BackendError as error:
            raise no_pinned_memory(n_bytes, error) from None
        memory = host_array(address, (n_bytes,), (1,), np.uint8, owner=_Memory(calls, address, "cuMemFreeHost"))
        memory[:] = 0
        return memory.view(dtype), int(calls.cuMemHostGetDevicePointer(address, 0))

    # ---- launches ----------------------------------------------------------------------------------------------------
    def kernel(self, source: str, name: str) -> Any:
        calls = self._calls
        if source not in self._modules:
            cubin = np.frombuffer(compile_cubin(f"{source}.cu", self._arch), np.uint8)
            self._modules[source] = calls.cuModuleLoadData(cubin.ctypes.data)
        function = calls.cuModuleGetFunction(self._modules[source], name.encode())
        # Asks about the function, which loads it now and not in a capture.
        n_registers = calls.cuFuncGetAttribute(calls.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
        assert int(n_registers) > 0
        return function

    def resident_blocks(self, kernel: Any) -> int:
        return int(self._calls.cuOccupancyMaxActiveBlocksPerMultiprocessor(kernel, abi.THREADS, 0))

    def launch(self, kernel: Any, grid: tuple[int, int], params: Packed, stream: Any) -> None:
        block, pointer = (abi.THREADS, 1, 1), stream_pointer(stream)
        self._calls.cuLaunchKernel(kernel, *grid, 1, *block, 0, pointer, params.address, 0)

    def give_back(self) -> None:
        """Memory is freed as soon as nothing uses it."""

    def close(self) -> None:
        for module in self._modules.values():
            self._calls.last("cuModuleUnload", module)
        super().close()
