"""The maximum over the ranks on GPUs, on a stream of our own: by NCCL, or by a function of the engine.

Not on the engine's stream and never in its graph: a collective in a captured graph binds the lifetime of the
communicator to that of the graph, and a rank that does not come would stop the engine instead of being reported.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from kvcanary.backends.compile import INSTALL
from kvcanary.backends.cuda import CudaDriver
from kvcanary.errors import BackendError, ConfigError
from kvcanary.reducers import LEFT_BEHIND, AllreduceMax, Words, check_ranks
from kvcanary.verdict import N_WORDS

INSTALL_NCCL = 'pip install "kvcanary[nccl]" (NCCL for CUDA 13 and nccl4py)'
_ID_BYTES = 128  # ncclUniqueId


class DeviceReducer:
    """Words go up, through ``enqueue``, and down again on one stream; an event after them says when it is done.

    Everything is allocated here. ``enqueue(device_words, stream)`` puts the maximum over all ranks of i64[N_WORDS]
    (CuPy, in place) on a stream of cuda.core's, which waits for no other.
    """

    name = "callable"

    def __init__(self, device: int | None, rank: int, n_ranks: int) -> None:
        check_ranks(rank, n_ranks)
        self.rank, self.n_ranks = rank, n_ranks
        self._driver = CudaDriver(device)
        with self._driver.current():
            self._runtime = self._driver._runtime
            self._stream = self._driver._device.create_stream()
            self._on_device = self._driver.zeros(N_WORDS, np.int64)
            self._sent = self._driver.mapped(N_WORDS, np.int64)[0]
            self._words: Words = self._driver.mapped(N_WORDS, np.int64)[0]
            self._done = self._driver._device.create_event()
            self._driver.synchronize()  # zeroed on CuPy's stream

    def enqueue(self, words: Any, stream: Any) -> None:
        raise NotImplementedError

    def start(self, words: Words) -> None:
        np.copyto(self._sent, words)
        with self._driver.current():
            runtime, pointer, n_bytes = self._runtime, int(self._stream.handle), 8 * N_WORDS
            up, down = runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost
            runtime.memcpyAsync(self._on_device.data.ptr, self._sent.ctypes.data, n_bytes, up, pointer)
            self.enqueue(self._on_device, self._stream)
            runtime.memcpyAsync(self._words.ctypes.data, self._on_device.data.ptr, n_bytes, down, pointer)
            self._stream.record(self._done)

    def is_done(self) -> bool:
        return bool(self._done.is_done)

    def result(self) -> Words:
        return self._words

    def abort(self) -> None:
        """What the engine's function has enqueued is the engine's to take back; it may still write here."""
        LEFT_BEHIND.append(self)

    def close(self) -> None:
        self._stream.close()
        self._driver.close()


class DeviceCallReducer(DeviceReducer):
    """A function of the engine over words in GPU memory, which enqueues its maximum on the stream that it is given."""

    def __init__(self, allreduce_max: AllreduceMax, device: int, rank: int, n_ranks: int) -> None:
        self._call = allreduce_max
        super().__init__(device, rank, n_ranks)

    def enqueue(self, words: Any, stream: Any) -> None:
        if self._call(words, stream) is not None:
            raise ConfigError(
                "allreduce_max returned something for words on a device: let it enqueue the maximum on the stream that "
                "it is given and return None, or leave device= out to get words in host memory"
            )


class Nccl4pyReducer(DeviceReducer):
    """``ncclAllReduce`` through ``nccl4py``, on a communicator of our own with one thread block per kernel."""

    name = "nccl4py"

    def __init__(self, unique_id: bytes, device: int | None, rank: int, n_ranks: int) -> None:
        nccl = self._nccl = _import_nccl4py()
        super().__init__(device, rank, n_ranks)
        with self._driver.current():
            config = nccl.NCCLConfig(min_ctas=1, max_ctas=1)
            self._comm = nccl.Communicator.init(n_ranks, rank, nccl.UniqueId.from_bytes(_checked(unique_id)), config)

    def enqueue(self, words: Any, stream: Any) -> None:
        self._comm.allreduce(words, words, self._nccl.MAX, stream=int(stream.handle))

    def abort(self) -> None:
        self._comm.abort()  # its kernel would turn on the GPU for ever

    def close(self) -> None:
        if self._comm.is_valid:
            self._comm.destroy()
        super().close()


class CupyNcclReducer(DeviceReducer):
    """``ncclAllReduce`` through ``cupy.cuda.nccl``, on a communicator of our own."""

    name = "cupy"

    def __init__(self, unique_id: bytes, device: int | None, rank: int, n_ranks: int) -> None:
        nccl = self._nccl = _import_cupy_nccl()
        super().__init__(device, rank, n_ranks)
        with self._driver.current():
            self._comm: Any = _with_id(lambda of: nccl.NcclCommunicator(n_ranks, of, rank), unique_id)

    def enqueue(self, words: Any, stream: Any) -> None:
        nccl, pointer = self._nccl, words.data.ptr
        self._comm.allReduce(pointer, pointer, N_WORDS, nccl.NCCL_INT64, nccl.NCCL_MAX, int(stream.handle))

    def abort(self) -> None:
        if self._comm is not None:
            self._comm.abort()
            self._comm = None

    def close(self) -> None:
        if self._comm is not None:
            self._comm.destroy()
            self._comm = None
        super().close()


REDUCERS: dict[str, type[Nccl4pyReducer] | type[CupyNcclReducer]] = {
    "nccl4py": Nccl4pyReducer,
    "cupy": CupyNcclReducer,
}


def new_unique_id(backend: str) -> bytes:
    """What one rank makes and all ranks need to find each other: 128 bytes of NCCL.

    Raises:
        BackendError: NCCL, or its Python module, is not there.
    """
    if backend == "nccl4py":
        return bytes(_import_nccl4py().get_unique_id())
    return bytes(value & 0xFF for value in _import_cupy_nccl().get_unique_id())


def available(backend: str) -> bool:
    """Whether the module of a backend can be imported here."""
    try:
        (_import_nccl4py if backend == "nccl4py" else _import_cupy_nccl)()
    except BackendError:
        return False
    return True


def _import_nccl4py() -> Any:
    try:
        import nccl.core
    except ImportError as error:
        raise BackendError(f"backend='nccl4py' needs nccl4py ({error}): {INSTALL_NCCL}") from error
    if nccl.core.get_version().libnccl is None:
        raise BackendError(f"backend='nccl4py': nccl4py finds no NCCL library: {INSTALL_NCCL}")
    return nccl.core


def _import_cupy_nccl() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # CuPy's own words about a missing library; ours come below
            from cupy.cuda import nccl
    except ImportError as error:
        raise BackendError(f"backend='cupy' needs CuPy ({error}): {INSTALL}") from error
    if not nccl.available:
        raise BackendError(f"backend='cupy': CuPy finds no NCCL library: {INSTALL_NCCL}")
    return nccl


def _checked(unique_id: bytes) -> bytes:
    if len(unique_id) != _ID_BYTES:
        raise ConfigError(
            f"unique_id of {len(unique_id)} bytes: give the {_ID_BYTES} of RankAgreement.new_unique_id() on one rank"
        )
    return unique_id


def _with_id(make: Callable[[Any], Any], unique_id: bytes) -> Any:
    """CuPy 14 takes the id as bytes, CuPy 13 as a tuple of C chars, which are signed on x86 and unsigned on Arm.

    What is not taken is refused at once.
    """
    data = np.frombuffer(_checked(unique_id), np.int8)
    with contextlib.suppress(TypeError):
        return make(data.tobytes())
    try:
        return make(tuple(data.tolist()))
    except OverflowError:
        return make(tuple(data.view(np.uint8).tolist()))
