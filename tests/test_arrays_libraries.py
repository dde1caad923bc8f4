"""Arrays and streams of the libraries themselves, in host memory and on a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from array_stand_ins import summary

from kvcanary.arrays import stream_pointer, view_of
from kvcanary.errors import KvCanaryError


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
