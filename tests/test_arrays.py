"""Arrays and streams: every protocol leads to the same addresses, without a copy, a wait or a GPU library."""

from __future__ import annotations

import ctypes
import gc
import importlib
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import dlpack
from kvcanary.arrays import ArrayView, contiguous_strides, host_array, stream_pointer, view_of
from kvcanary.errors import BatchError, KvCanaryError, LayoutError

ADDRESS = 0x7F00_0000_1000


def summary(view: ArrayView) -> tuple[Any, ...]:
    return view.pointer, view.shape, view.strides, view.itemsize, view.device, view.dtype, view.readonly


# ---- stand-ins for the libraries' arrays: as much of each as is read -------------------------------------------------
class Torch:
    """A torch tensor; its ``__cuda_array_interface__`` refuses, as that of fp8 does."""

    def __init__(self, dtype: str, itemsize: int, device: str, index: int | None, pointer: int = ADDRESS) -> None:
        self.dtype, self._itemsize, self._pointer = f"torch.{dtype}", itemsize, pointer
        self.device = SimpleNamespace(type=device, index=index)
        self.shape = (2, 3)

    def data_ptr(self) -> int:
        return self._pointer

    def stride(self) -> tuple[int, ...]:
        return (8, 1)

    def element_size(self) -> int:
        return self._itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise TypeError("no typestr")


class Jax:
    """A JAX array in the layout that XLA chose."""

    shape = (2, 3, 4)
    dtype = np.dtype("<V2")  # as ml_dtypes.bfloat16 without ml_dtypes

    def __init__(self, platform: str = "gpu", order: tuple[int, ...] | None = None, n_devices: int = 1) -> None:
        self._n_devices, self._platform = n_devices, platform
        if order is not None:
            self.format = SimpleNamespace(layout=SimpleNamespace(major_to_minor=order))

    def devices(self) -> list[Any]:
        return [SimpleNamespace(platform=self._platform, id=9, local_hardware_id=1)] * self._n_devices

    def unsafe_buffer_pointer(self) -> int:
        return ADDRESS


def interface(device: Any = None, **changes: Any) -> Any:
    """An object with ``__cuda_array_interface__``; ``device`` as CuPy or warp name it."""
    described = {"shape": (2, 3), "typestr": "<i4", "data": (ADDRESS, False), "version": 3, **changes}
    return SimpleNamespace(__cuda_array_interface__=described, device=device)


class HostDlpack:
    """A DLPack exporter in host memory that speaks nothing else."""

    def __init__(self, array: Any, kind: int = 1) -> None:
        self._array, self._kind = array, kind
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._kind, 2

    def __dlpack__(self, *, stream: Any = None, **kwargs: Any) -> Any:
        self.streams.append(stream)
        return self._array.__dlpack__()


# ---- host arrays -----------------------------------------------------------------------------------------------------
def test_a_numpy_array_is_its_own_view() -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)[:, ::2]
    view = view_of(array)
    assert summary(view) == (array.ctypes.data, (2, 2, 4), (48, 32, 4), 4, "cpu", "int32", False)
    assert view.host is not None and np.shares_memory(view.host, array)
    assert view_of(view) is view
    array.flags.writeable = False
    assert view_of(array).readonly


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.data())
def test_the_byte_range_spans_what_the_array_spans(shape: list[int], data: st.DataObject) -> None:
    whole = np.zeros(shape, np.int16)
    steps = [data.draw(st.sampled_from([1, 2, -1, -2])) for _ in shape]
    array = whole[tuple(slice(None, None, step) for step in steps)]
    view = view_of(array)
    starts = [int(np.dot(index, array.strides)) for index in np.ndindex(*array.shape)]
    low, high = (min(starts), max(starts) + 2) if starts else (0, 0)
    assert view.byte_range == (view.pointer + low, view.pointer + high)
    assert view.pointer == (array.ctypes.data if starts else 0)
    assert view.is_contiguous == array.flags.c_contiguous
    assert contiguous_strides(shape, 2) == whole.strides or not whole.size


def test_a_raw_host_tuple_shows_the_same_memory() -> None:
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    view = view_of((array.ctypes.data, (3, 2), (8, 4), 2, "cpu"))
    assert view.host is not None and view.dtype == ""
    assert view.host.view(np.uint16).tolist() == array[:, ::2].tolist()
    strided = host_array(array.ctypes.data, (2,), (8,), np.uint16, owner=array, readonly=True)
    assert strided.tolist() == [0, 4] and not strided.flags.writeable


def test_a_view_keeps_its_owner_alive() -> None:
    class Owner:
        pass

    owner, array = Owner(), np.zeros(4, np.uint8)
    alive = weakref.ref(owner)
    view = host_array(array.ctypes.data, (4,), (1,), np.uint8, owner=owner)
    del owner
    gc.collect()
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", [1, 3], ids=["cpu", "pinned"])
def test_dlpack_of_host_memory(kind: int) -> None:
    array = np.arange(6, dtype=np.float32)
    exporter = HostDlpack(array, kind)
    view = view_of(exporter)
    assert (view.pointer, view.device, view.dtype) == (array.ctypes.data, "cpu", "float32")
    assert view.owner[0] is exporter and set(exporter.streams) == {None}


# ---- device arrays ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float8_e4m3fn", 1), ("int64", 8)])
def test_torch_on_a_gpu(dtype: str, itemsize: int) -> None:
    view = view_of(Torch(dtype, itemsize, "cuda", 3))
    assert summary(view) == (ADDRESS, (2, 3), (8 * itemsize, itemsize), itemsize, "cuda:3", dtype, False)
    assert view.host is None


@pytest.mark.parametrize(("dtype", "shown"), [("int32", "int32"), ("float8_e5m2", "void8")])
def test_torch_in_host_memory(dtype: str, shown: str) -> None:
    memory = np.arange(16, dtype=np.int32)
    itemsize = 4 if dtype == "int32" else 1
    view = view_of(Torch(dtype, itemsize, "cpu", None, memory.ctypes.data))
    assert view.device == "cpu" and view.host is not None and view.host.dtype.name == shown
    assert np.shares_memory(view.host, memory)


def test_jax_in_any_layout() -> None:
    assert summary(view_of(Jax())) == (ADDRESS, (2, 3, 4), (24, 8, 2), 2, "cuda:1", "void16", True)
    assert view_of(Jax(order=(1, 0, 2))).strides == (8, 16, 2)


def test_the_cuda_array_interface() -> None:
    assert summary(view_of(interface())) == (ADDRESS, (2, 3), (12, 4), 4, "cuda:0", "int32", False)
    strided = interface(strides=(32, 8), data=(ADDRESS, True), typestr="<V2", stream=7)
    assert summary(view_of(strided)) == (ADDRESS, (2, 3), (32, 8), 2, "cuda:0", "void16", True)
    empty = interface(shape=(0, 3), data=(None, False))
    assert view_of(empty).byte_range == (0, 0)


@pytest.mark.parametrize("device", [SimpleNamespace(id=2), SimpleNamespace(ordinal=2)], ids=["CuPy", "warp"])
def test_the_interface_of_another_device(device: Any) -> None:
    assert view_of(interface(device)).device == "cuda:2"


def test_the_interface_of_numba_and_of_dlpack_on_another_device() -> None:
    numba = interface()
    numba.gpu_data = SimpleNamespace(context=SimpleNamespace(device=SimpleNamespace(id=4)))
    dlpack = interface()
    dlpack.__dlpack_device__ = lambda: (2, 5)
    assert [view_of(a).device for a in (numba, dlpack)] == ["cuda:4", "cuda:5"]


def test_raw_tuples() -> None:
    assert summary(view_of((ADDRESS, (2, 3), None, 2))) == (ADDRESS, (2, 3), (6, 2), 2, "cuda:0", "", False)
    assert summary(view_of((ADDRESS, [2], [64], 1, "cuda:1"))) == (ADDRESS, (2,), (64,), 1, "cuda:1", "", False)


def test_cuda_dlpack_is_read_without_synchronising_and_without_a_library() -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)[:, ::2]
    exporter = HostDlpack(array, kind=2)
    assert summary(view_of(exporter)) == (array.ctypes.data, (3, 2), (8, 4), 2, "cuda:2", "int16", False)
    assert exporter.streams == [-1]


class Versioned(HostDlpack):
    """One that speaks the versioned protocol; ``spoil`` changes what the capsule says."""

    def __init__(self, array: Any, kind: int = 1, **spoil: int) -> None:
        super().__init__(array, kind)
        self._spoil = spoil

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        assert max_version == (1, 0)
        capsule = self._array.__dlpack__(max_version=max_version)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
        managed = dlpack._Versioned.from_address(pointer(capsule, b"dltensor_versioned"))
        for name, value in self._spoil.items():
            setattr(managed if hasattr(managed, name) else managed.tensor, name, value)
        return capsule


@pytest.mark.parametrize(
    ("code", "bits", "name"), [(4, 16, "bfloat16"), (10, 8, "float8_e4m3fn"), (2, 16, "float16"), (6, 8, "bool")]
)
def test_dlpack_names_every_element_type(code: int, bits: int, name: str) -> None:
    array = np.zeros((3, 4), f"u{bits // 8}")
    for kind, device in ((1, "cpu"), (13, "cuda:2")):
        view = view_of(Versioned(array, kind, code=code))
        assert summary(view) == (array.ctypes.data, (3, 4), array.strides, bits // 8, device, name, False)
        assert (view.host is not None) == (kind == 1)
    assert view_of(Versioned(array, flags=1)).readonly


def test_a_dlpack_capsule_is_held_as_long_as_the_view_and_no_longer() -> None:
    array = np.arange(6)
    n = sys.getrefcount(array)
    view = view_of(HostDlpack(array, kind=2))
    assert sys.getrefcount(array) > n + 1  # the exporter's and the capsule's
    del view
    gc.collect()
    assert sys.getrefcount(array) == n


def test_an_interface_that_refuses_leaves_the_word_to_the_next() -> None:
    class Buffer(HostDlpack):  # as JAX hands them to a callback on the CPU
        writeable = False

        @property
        def __cuda_array_interface__(self) -> Any:
            raise RuntimeError("no GPU context")

    array = np.arange(6)
    view = view_of(Buffer(array))
    assert (view.pointer, view.readonly) == (array.ctypes.data, True)


def test_bfloat16_of_cupy_is_named_by_its_dtype() -> None:
    class Bfloat16:  # as ml_dtypes registers it
        name, itemsize = "bfloat16", 2

    array = interface(typestr="<V2")
    array.dtype = np.dtype("<f2")  # what stands in for ml_dtypes.bfloat16
    assert view_of(array).dtype == "float16"
    array.dtype = Bfloat16()
    assert view_of(array).dtype == "void16", "only a dtype of NumPy's is believed"


def test_no_gpu_library_is_imported() -> None:
    code = "import sys, numpy as np; from kvcanary.arrays import *; view_of(np.zeros(3)); stream_pointer(3);"
    code += "print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'cupy', 'torch', 'jax')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- refusals --------------------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[Any, str]] = {
    "list": ([1, 2], "list is no array; give a NumPy"),
    "objects": (np.array([object()]), "Python objects have no bytes"),
    "short tuple": ((1, 2), "a tuple of 2; give"),
    "no shape": ((ADDRESS, 3, None, 1), "shape 3 and strides None: give tuples"),
    "float pointer": ((1.5, (3,), None, 1), "give integers as pointer"),
    "null": ((0, (3,), None, 1), "0x0..0x3 is no memory: give"),
    "before memory": ((16, (3,), (-16,), 1), "is no memory"),
    "past memory": (((1 << 64) - 2, (3,), None, 1), "is no memory"),
    "negative shape": ((ADDRESS, (-3,), None, 1), "give sizes >= 0"),
    "no item": ((ADDRESS, (3,), None, 0), "an itemsize >= 1"),
    "strides of another shape": ((ADDRESS, (3,), (1, 1), 1), "1 axes but 2 strides; give one"),
    "tpu": ((ADDRESS, (3,), None, 1, "tpu:0"), "device 'tpu:0': give 'cpu' or 'cuda:N'"),
    "meta tensor": (Torch("int32", 4, "meta", None), "give an array in cpu or cuda memory"),
    "JAX on TPU": (Jax("tpu"), "on platform 'tpu'; give an array"),
    "a copy": (Versioned(np.zeros(3), flags=2), "it exports a copy"),
    "DLPack int4": (Versioned(np.zeros(3, np.uint8), bits=4), "elements of 4 bits x 1: give the bytes"),
    "DLPack 2": (Versioned(np.zeros(3), major=2), r"DLPack 2\.0; version 1 is understood"),
    "no capsule": (SimpleNamespace(__dlpack__=lambda **_: 3, __dlpack_device__=lambda: (1, 0)), "gave a int, no"),
    "sharded": (Jax(n_devices=2), "sharded over 2 devices; give the addressable shard"),
    "masked": (interface(mask=interface()), "give the array without its mask"),
    "DLPack on ROCm": (HostDlpack(None, kind=10), "DLPack device type 10; give an array"),
    "exporter that raises": (HostDlpack(None), r"HostDlpack did not export its memory \(AttributeError: .* give"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("error", [LayoutError, BatchError])
def test_refused(case: str, error: type[KvCanaryError]) -> None:
    array, message = REFUSED[case]
    with pytest.raises(error, match=message) as found:
        view_of(array, "input_ids", error)
    assert str(found.value).startswith("input_ids: ")


# ---- streams ---------------------------------------------------------------------------------------------------------
class Handle:
    """As `cuda.bindings.driver.CUstream` of CUDA 12."""

    def __index__(self) -> int:
        return ADDRESS


STREAMS: dict[str, tuple[Any, int]] = {
    "cuda.bindings": (Handle(), ADDRESS),
    "none": (None, 0),
    "address": (ADDRESS, ADDRESS),
    "NumPy integer": (np.uint64(7), 7),
    "protocol": (SimpleNamespace(__cuda_stream__=lambda: (0, ADDRESS), handle=1), ADDRESS),
    "protocol as a tuple": (SimpleNamespace(__cuda_stream__=(0, ADDRESS)), ADDRESS),
    "CuPy": (SimpleNamespace(ptr=ADDRESS), ADDRESS),
    "torch": (SimpleNamespace(cuda_stream=ADDRESS), ADDRESS),
    "torch, default stream": (SimpleNamespace(cuda_stream=0), 0),
    "cuda.core": (SimpleNamespace(handle=np.int64(ADDRESS)), ADDRESS),
    "numba": (SimpleNamespace(handle=ctypes.c_void_p(ADDRESS)), ADDRESS),
    "numba, default stream": (SimpleNamespace(handle=ctypes.c_void_p(None)), 0),
}


@pytest.mark.parametrize("library", STREAMS)
def test_stream_pointer(library: str) -> None:
    stream, pointer = STREAMS[library]
    assert stream_pointer(stream) == pointer


@pytest.mark.parametrize("stream", [-1, True, 1.5, "7", object(), SimpleNamespace(ptr="x")])
def test_no_stream(stream: Any) -> None:
    with pytest.raises(BatchError, match=r"stream=.*: give None, an address >= 0, or a stream"):
        stream_pointer(stream, BatchError)


# ---- the libraries themselves ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "uint8"])
def test_torch_tensors_in_host_memory(dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="no torch: pip install torch")
    whole = torch.zeros((4, 6), dtype=torch.uint8).to(getattr(torch, dtype))
    tensor = whole.t()
    view, n = view_of(tensor), tensor.element_size()
    assert summary(view) == (tensor.data_ptr(), (6, 4), (n, 6 * n), n, "cpu", dtype, False)
    whole.view(torch.uint8)[0, 0] = 7
    assert view.host is not None and view.host.T.tobytes()[0] == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "float32"])
def test_jax_arrays_in_host_memory(dtype: str) -> None:
    jax = pytest.importorskip("jax", reason="no JAX: pip install jax")
    with jax.default_device(jax.devices("cpu")[0]):
        array = jax.numpy.ones((4, 6), dtype)
    view = view_of(array)
    assert summary(view)[1:] == ((4, 6), (6 * array.itemsize, array.itemsize), array.itemsize, "cpu", dtype, True)
    assert view.host is not None and view.host.tobytes() == np.asarray(array).tobytes()
    array.delete()
    with pytest.raises(KvCanaryError, match="Array has been deleted"):
        view_of(array)
    with pytest.raises(KvCanaryError, match="int4 elements share bytes"):
        view_of(jax.numpy.ones((4, 6), "int4"))


@pytest.mark.gpu
def test_cupy_arrays_and_streams() -> None:
    cupy = importlib.import_module("cupy")
    array = cupy.zeros((4, 6), cupy.int32)[:, ::2]
    view = view_of(array)
    assert summary(view) == (array.data.ptr, (4, 3), (24, 8), 4, f"cuda:{array.device.id}", "int32", False)
    stream = cupy.cuda.Stream(non_blocking=True)
    assert stream_pointer(stream) == stream.ptr and stream_pointer(cupy.cuda.Stream.null) == 0


@pytest.mark.gpu
def test_an_exporter_of_cuda_dlpack_alone() -> None:
    cupy = importlib.import_module("cupy")
    array = cupy.zeros((4, 6), cupy.int16)[:, 1:]

    class Exporter:
        def __dlpack_device__(self) -> Any:
            return array.__dlpack_device__()

        def __dlpack__(self, **kwargs: Any) -> Any:
            return array.__dlpack__(**kwargs)

    view = view_of(Exporter())
    assert summary(view)[:6] == (array.data.ptr, (4, 5), (12, 2), 2, "cuda:0", "int16")


@pytest.mark.gpu
def test_cuda_core_streams_and_graph_builders() -> None:
    core = importlib.import_module("cuda.core")
    device = core.Device()
    device.set_current()
    stream = device.create_stream()
    assert stream_pointer(stream) == int(stream.handle)
    builder = stream.create_graph_builder()
    assert stream_pointer(builder) == int(builder.stream.handle)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int32"])
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros((4, 6), device="cuda").to(getattr(torch, dtype)).t()
    view = view_of(tensor)
    n = tensor.element_size()
    assert summary(view) == (tensor.data_ptr(), (6, 4), (n, 6 * n), n, "cuda:0", dtype, False)
    stream = torch.cuda.Stream()
    assert stream_pointer(stream) == stream.cuda_stream


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int32"])
def test_jax_arrays_and_callback_buffers_on_a_gpu(dtype: str) -> None:
    jax = pytest.importorskip("jax", reason="no JAX: pip install 'jax[cuda13]'")
    buffer_callback = importlib.import_module("jax.experimental.buffer_callback").buffer_callback
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU: pip install 'jax[cuda13]'")
    array = jax.numpy.ones((4, 6), dtype)
    n, pointer = array.itemsize, array.unsafe_buffer_pointer()
    assert summary(view_of(array)) == (pointer, (4, 6), (6 * n, n), n, "cuda:0", dtype, True)
    seen = []

    def callback(context: Any, out: Any, given: Any) -> None:
        seen.extend([view_of(out), view_of(given), context.stream])

    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    result = jax.jit(buffer_callback(callback, shape, input_output_aliases={0: 0}))(array)
    assert result.block_until_ready().shape == (4, 6)
    for view in seen[:2]:
        assert (view.shape, view.strides, view.device) == ((4, 6), (6 * n, n), "cuda:0") and view.pointer
    assert stream_pointer(seen[2]) > 0


@pytest.mark.gpu
def test_numba_arrays_and_streams() -> None:
    cuda = pytest.importorskip("numba.cuda", reason="no numba-cuda: pip install numba-cuda")
    array = cuda.to_device(np.arange(12, dtype=np.int16).reshape(3, 4))
    pointer = array.device_ctypes_pointer.value
    assert summary(view_of(array)) == (pointer, (3, 4), (8, 2), 2, "cuda:0", "int16", False)
    stream = cuda.stream()
    assert stream_pointer(stream) == stream.__cuda_stream__()[1] and stream_pointer(cuda.default_stream()) in (0, 1)


@pytest.mark.gpu
def test_bfloat16_of_cupy() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="no ml_dtypes: pip install ml_dtypes")
    cupy = importlib.import_module("cupy")
    view = view_of(cupy.zeros((3, 4), ml_dtypes.bfloat16))
    assert (view.strides, view.dtype) == ((8, 2), "bfloat16")
