"""The driver of the device backend on a GPU: CuPy for kernels and memory, cuda.core for streams, events, pinned memory.

The only module that talks to a GPU. Importing it needs neither CuPy nor a driver; making the backend does.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.arrays import LEGACY_STREAMS, host_array, stream_pointer, view_of
from kvcanary.backends.compile import INSTALL, kernels_dir, source_hash
from kvcanary.backends.device import DeviceBackend
from kvcanary.backends.driver import Packed
from kvcanary.backends.lending import Lender
from kvcanary.backends.side_stream import CudaSideStream
from kvcanary.backends.whose import check_devices, foreign_context
from kvcanary.config import CanaryConfig
from kvcanary.deferred import Staging, Words
from kvcanary.describe import estimate_bytes
from kvcanary.errors import BackendError, BatchError
from kvcanary.layout import KvPool

Array = npt.NDArray[Any]


def make_cuda_backend(
    config: CanaryConfig, pools: Sequence[KvPool], max_requests: int, max_new_tokens: int
) -> DeviceBackend:
    """The device backend on the GPU where the pools' planes lie (or the current one).

    Raises:
        BackendError: no driver, no CuPy or cuda.core, kernels that do not compile, or not enough memory.
    """
    check_driver()
    check_devices(pools)
    driver = make_driver(pools)
    driver.wanted = estimate_bytes(config, pools, max_requests)
    try:
        with driver.current():
            return DeviceBackend("cuda", driver, config, pools, max_requests, max_new_tokens)
    except BackendError as error:
        text = str(error)  # the error itself holds frames, and they hold what was allocated before it
    driver.close()
    driver.give_back()
    raise BackendError(text)


def make_driver(pools: Sequence[KvPool]) -> CudaDriver:
    """The driver in the context that the pools lie in: mostly the primary one of their device."""
    context = foreign_context(pools)
    if context is None:
        return CudaDriver(next((int(p.device.split(":")[1]) for p in pools if p.device), None))
    from kvcanary.backends.context import ContextDriver

    return ContextDriver(context)


def check_driver() -> None:
    """Raise `BackendError` unless the NVIDIA driver is there and sees a GPU; never hangs, imports nothing."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError("no NVIDIA driver (libcuda.so.1): install it, or use backend='host'") from error
    count = ctypes.c_int()
    status = libcuda.cuInit(0) or libcuda.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise BackendError(f"the NVIDIA driver sees no GPU (status {status}): check nvidia-smi, or use backend='host'")


def import_cuda() -> tuple[Any, Any]:
    """CuPy and cuda.core, or a `BackendError` with the install command."""
    try:
        import cupy
        from cuda import core
    except ImportError as error:
        raise BackendError(f"backend='cuda' needs CuPy and cuda.core ({error}): {INSTALL}") from error
    return cupy, core


def no_pinned_memory(n_bytes: int, error: Exception) -> BackendError:
    """What is said where page-locked memory does not suffice."""
    return BackendError(
        f"no pinned host memory of {n_bytes} bytes ({error}): see `ulimit -l` and what else is pinned, or "
        "lower ring_capacity"
    )


class CudaGraph:
    """`kvcanary.backends.CapturedGraph`: a handle and whoever destroys it."""

    def __init__(self, handle: int, destroy: Callable[[int], Any]) -> None:
        self.handle = handle
        self._finalizer = weakref.finalize(self, destroy, handle)
        self._finalizer.atexit = False  # the driver may be gone by then

    def close(self) -> None:
        self._finalizer()
        self.handle = 0


class CudaDriver:
    """`kvcanary.backends.device.Driver` on one GPU, in its primary context."""

    def __init__(self, device: int | None) -> None:
        check_driver()
        self._cupy, self._core = import_cuda()
        self._runtime = self._cupy.cuda.runtime
        self.device_id = int(self._runtime.getDevice()) if device is None else device
        self._device = self._core.Device(self.device_id)
        with self.current():
            self.n_multiprocessors = int(self._cupy.cuda.Device().attributes["MultiProcessorCount"])
        self.wanted = 0  #: bytes that all of the guard takes, for messages
        self._out_of_memory = self._cupy.cuda.memory.OutOfMemoryError
        self._modules: dict[str, Any] = {}
        self._launch = self._cupy.cuda.driver.launchKernel
        self._lists: _ListUploader | None = None
        self._lender: Lender | None = None
        self._capture_stream: Any = None
        self._engine_streams: dict[int, Any] = {}

    @contextlib.contextmanager
    def current(self) -> Any:
        """Make the device current in this thread for CuPy and cuda.core, and restore what was."""
        with self._cupy.cuda.Device(self.device_id):
            self._device.set_current()
            yield

    # ---- memory ------------------------------------------------------------------------------------------------------
    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        shape, of = (shape, dtype) if dtype.fields is None else ((*shape, dtype.itemsize), np.dtype(np.uint8))
        try:
            return self._cupy.zeros(shape, of)
        except self._out_of_memory:
            pass
        raise self._no_memory(math.prod(shape) * of.itemsize)

    def _no_memory(self, n_bytes: int) -> BackendError:
        free, total = self._runtime.memGetInfo()
        return BackendError(
            f"not enough GPU memory: {n_bytes} bytes more are wanted, {free} of {total} are free on "
            f"cuda:{self.device_id}. The whole guard takes {self.wanted}, see CanaryManager.estimate_bytes: "
            "leave it as much (a smaller KV cache), or guard fewer pools, or with real_data='none'"
        )

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def mapped(self, n: int, dtype: npt.DTypeLike) -> tuple[Array, int]:
        dtype = np.dtype(dtype)
        n_bytes = max(1, n * dtype.itemsize)
        try:
            buffer = self._core.LegacyPinnedMemoryResource().allocate(n_bytes)
        except Exception as error:  # noqa: BLE001  cuda.core's errors have no public base class
            raise no_pinned_memory(n_bytes, error) from None
        address = int(buffer.handle)  # the device sees pinned memory at its host address
        # The view keeps the buffer alive: a host thread may still poll the ring when the driver is closed.
        memory = host_array(address, (n * dtype.itemsize,), (1,), np.uint8, owner=buffer)
        memory[:] = 0
        return memory.view(dtype), address

    def fill_zero(self, array: Any, stream: Any) -> None:
        self._runtime.memsetAsync(array.data.ptr, 0, array.nbytes, stream_pointer(stream))

    def upload(self, array: Any, values: Array, stream: Any) -> None:
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        pointer = stream_pointer(stream)
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(array.data.ptr, flat.ctypes.data, flat.nbytes, kind, pointer)
        self._runtime.streamSynchronize(pointer)

    def write_table(self, array: Any, values: Array, stream: Any) -> None:
        self._lending().put(array.data.ptr, values, stream)

    def set_word(self, array: Any, index: int, value: int, stream: Any) -> None:
        # The words are 0 or 1: their lowest byte, which comes first, is all there is to set.
        assert value in (0, 1)
        self._runtime.memsetAsync(array.data.ptr + 8 * index, value, 1, stream_pointer(stream))

    def download(self, array: Any) -> Array:
        self.synchronize()
        host: Array = array.get()
        return host

    def read_memory(self, pointer: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        self.synchronize()
        out = np.empty(n_bytes, np.uint8)
        if n_bytes:
            self._runtime.memcpy(out.ctypes.data, pointer, n_bytes, self._runtime.memcpyDeviceToHost)
        return out

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        byte = self.read_memory(address, 1) ^ np.uint8(mask)
        self._runtime.memcpy(address, byte.ctypes.data, 1, self._runtime.memcpyHostToDevice)
        self.synchronize()

    def write_memory(self, pointer: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
        self.synchronize()
        self._runtime.memcpy(pointer, data.ctypes.data, data.nbytes, self._runtime.memcpyHostToDevice)
        self.synchronize()  # the engine's streams do not wait for the one that the copy ran on

    # ---- launches ----------------------------------------------------------------------------------------------------
    def kernel(self, source: str, name: str) -> Any:
        """Its ``CUfunction``; CuPy keeps the module loaded."""
        if source not in self._modules:
            directory = kernels_dir()
            code = (directory / f"{source}.cu").read_text()
            # CuPy's disk cache does not look into included headers: their hash is part of the options.
            options = ("-std=c++17", f"-I{directory}", f"-DKVC_SOURCES_{source_hash()[:16]}")
            self._modules[source] = self._cupy.RawModule(code=code, options=options, backend="nvrtc")
        try:
            kernel = self._modules[source].get_function(name)
            n_registers = kernel.num_regs  # asks the driver about the function, which loads it now and not in a capture
            function = int(kernel.kernel.ptr)
        except Exception as error:  # CuPy's compile errors share no public base class
            raise BackendError(f"kernel {name} of {source}.cu cannot be compiled or loaded: {error}") from error
        assert n_registers > 0
        return function

    def resident_blocks(self, kernel: Any) -> int:
        return int(self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel, abi.THREADS, 0))

    def launch(self, kernel: Any, grid: tuple[int, int], params: Packed, stream: Any) -> None:
        # What a RawKernel does at last: before that it packs its arguments anew, which takes longer than the launch.
        self._launch(kernel, *grid, 1, abi.THREADS, 1, 1, 0, stream_pointer(stream), params.address, 0)

    def capture(self, launch: Callable[[Any], None]) -> CudaGraph:
        runtime = self._runtime
        with self.current():
            if self._capture_stream is None:
                self._capture_stream = self._device.create_stream()
            pointer = int(self._capture_stream.handle)
            # Relaxed: what other threads of the engine allocate meanwhile is their business.
            runtime.streamBeginCapture(pointer, runtime.streamCaptureModeRelaxed)
            try:
                launch(pointer)
            except BaseException:
                with contextlib.suppress(Exception):  # a capture that failed may have no graph
                    runtime.graphDestroy(runtime.streamEndCapture(pointer))
                raise
            return CudaGraph(int(runtime.streamEndCapture(pointer)), runtime.graphDestroy)

    def side_stream(self) -> CudaSideStream:
        with self.current():
            return CudaSideStream(self)

    def in_context(self, question: Callable[..., int]) -> Callable[..., int]:
        """A function of libcuda's, to be called where kernels are launched: with the context current that they need."""
        return question

    def staging(self, n_words: int, depth: int) -> Staging:
        with self.current():
            return CudaStaging(self, n_words, depth)

    def upload_lists(self, lists: Sequence[Any], capacity: int, stream: Any) -> Sequence[int] | None:
        if self._lists is None:
            self._lists = _ListUploader(self, len(lists))
        return self._lists.upload(lists, capacity, stream)

    def lend(
        self, arrays: Sequence[Any], n_scratch: int, stream: Any
    ) -> contextlib.AbstractContextManager[tuple[list[int], int]]:
        return self._lending().lend(arrays, n_scratch, stream)

    def _lending(self) -> Lender:
        if self._lender is None:
            self._lender = Lender(self)
        return self._lender

    @property
    def lent_bytes(self) -> int:
        return 0 if self._lender is None else self._lender.n_bytes

    def stream_object(self, pointer: int) -> Any:
        """A stream of the engine's as cuda.core takes it, to record events on."""
        if pointer not in self._engine_streams:
            core = self._core
            stream = core.LEGACY_DEFAULT_STREAM if pointer in LEGACY_STREAMS else core.Stream.from_handle(pointer)
            self._engine_streams[pointer] = stream
        return self._engine_streams[pointer]

    def synchronize(self) -> None:
        with self.current():
            self._runtime.deviceSynchronize()

    def give_back(self) -> None:
        """Give memory that nothing uses any more back to the device: CuPy would keep it for itself."""
        with self.current():
            self._cupy.get_default_memory_pool().free_all_blocks()

    def close(self) -> None:
        self._modules.clear()
        self._lists = self._lender = self._capture_stream = None


class CudaStaging:
    """`kvcanary.deferred.Staging`: a clone on the step's stream, a copy to pinned memory on a side stream."""

    def __init__(self, driver: CudaDriver, n_words: int, depth: int) -> None:
        self._driver = driver
        self._runtime = driver._runtime
        self._n_bytes = 8 * n_words
        self._on_device = driver.zeros((depth, n_words), np.uint64)
        host, _address = driver.mapped(depth * n_words, np.uint64)
        self._host = host.reshape(depth, n_words)
        self._clone_at = [self._on_device.data.ptr + i * self._n_bytes for i in range(depth)]
        self._host_at = [int(row.ctypes.data) for row in self._host]
        self._side = driver._device.create_stream()
        self._side_pointer = int(self._side.handle)
        self._cloned = [driver._device.create_event() for _ in range(depth)]
        self._arrived = [driver._device.create_event() for _ in range(depth)]

    def copy(self, index: int, source: Any, stream: Any) -> None:
        pointer = stream_pointer(stream)
        runtime, n_bytes, clone = self._runtime, self._n_bytes, self._clone_at[index]
        runtime.memcpyAsync(clone, source.data.ptr, n_bytes, runtime.memcpyDeviceToDevice, pointer)
        self._driver.stream_object(pointer).record(self._cloned[index])
        self._side.wait(self._cloned[index])
        runtime.memcpyAsync(self._host_at[index], clone, n_bytes, runtime.memcpyDeviceToHost, self._side_pointer)
        self._side.record(self._arrived[index])

    def is_done(self, index: int) -> bool:
        return bool(self._arrived[index].is_done)

    def wait(self, index: int) -> None:
        self._arrived[index].sync()

    def host(self, index: int) -> Words:
        words: Words = self._host[index]
        return words

    def is_capturing(self, stream: Any) -> bool:
        pointer = stream_pointer(stream)
        return pointer not in LEGACY_STREAMS and bool(self._runtime.streamIsCapturing(pointer))

    def close(self) -> None:
        self._side.sync()
        self._side.close()


class _ListUploader:
    """Pinned and device buffers for the sweep's lists; grows when a longer list comes, otherwise allocates nothing."""

    def __init__(self, driver: CudaDriver, n_lists: int) -> None:
        self._driver, self._n_lists, self._capacity = driver, n_lists, 0
        self._copied = driver._device.create_event()
        self._is_used = False

    def upload(self, lists: Sequence[Any], capacity: int, stream: Any) -> Sequence[int] | None:
        if self._is_used and not self._copied.is_done:
            return None
        driver, pointer = self._driver, stream_pointer(stream)
        if capacity > self._capacity:
            with driver.current():
                self._host = driver.mapped(self._n_lists * capacity, np.int32)[0].reshape(self._n_lists, capacity)
                self._on_device = driver.zeros((self._n_lists, capacity), np.int32)
                driver.synchronize()  # zeroed on CuPy's stream, written on the step's
            self._capacity = capacity
        addresses = []
        for i, values in enumerate(lists):
            if values is None:
                addresses.append(0)
                continue
            view = view_of(values, "resident slots", BatchError)
            if not view.is_host:
                addresses.append(view.pointer)
                continue
            n = view.shape[0]
            self._host[i, :n] = view.host
            target = self._on_device.data.ptr + 4 * i * self._capacity
            kind = driver._runtime.memcpyHostToDevice
            driver._runtime.memcpyAsync(target, self._host[i].ctypes.data, 4 * n, kind, pointer)
            addresses.append(target)
        driver.stream_object(pointer).record(self._copied)
        self._is_used = True
        return addresses
