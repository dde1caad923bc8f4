"""Arrays and streams: every protocol leads to the same addresses, without a copy, a wait or a GPU library."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from array_stand_ins import ADDRESS, HostDlpack, Jax, Torch, Versioned, interface, summary
from hypothesis import given
from hypothesis import strategies as st

from kvcanary.arrays import contiguous_strides, host_array, stream_pointer, view_of
from kvcanary.errors import BatchError, KvCanaryError, LayoutError


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
