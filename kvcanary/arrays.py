"""Arrays and streams of any library, resolved to addresses; nothing is copied, synchronised or imported for it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import dlpack
from kvcanary.errors import KvCanaryError

_DEVICE = re.compile(r"cpu|cuda:\d+")
_DLPACK_HOST, _DLPACK_CUDA = (1, 3), (2, 13)  # DLDeviceType: CPU and pinned host memory; CUDA and managed memory
_PACKED = ("int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")  # XLA's, on a device
_MAX_ADDRESS = 1 << 64


class _Unusable(Exception):
    """An array that cannot be resolved; the text says why and what to give instead."""


@dataclass(frozen=True, eq=False)
class ArrayView:
    """Where one array lies.

    Attributes:
        pointer: address of the first element; 0 only if the array is empty.
        shape: elements per axis.
        strides: bytes from one element to the next, per axis.
        itemsize: bytes of one element.
        device: "cpu" or "cuda:N".
        dtype: name of the element type ("int32", "bfloat16"); "" if the array does not tell it.
        readonly: whether the exporter forbids writing.
        owner: what keeps the memory alive.
        host: NumPy view of the same memory; None unless it is host memory.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: str = "cuda:0"
    dtype: str = ""
    readonly: bool = False
    owner: object = None
    host: npt.NDArray[Any] | None = None

    def __repr__(self) -> str:
        elements = f"{self.dtype or f'{self.itemsize} bytes'}{list(self.shape)}"
        return f"<ArrayView {elements}, strides {list(self.strides)}, at {self.pointer:#x} on {self.device}>"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_host(self) -> bool:
        return self.device == "cpu"

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        wanted = contiguous_strides(self.shape, self.itemsize)
        steps = zip(self.shape, self.strides, wanted, strict=True)
        return not self.size or all(n == 1 or stride == step for n, stride, step in steps)

    @property
    def byte_range(self) -> tuple[int, int]:
        """Addresses of the first byte and of the byte after the last."""
        if not self.size:
            return self.pointer, self.pointer
        reach = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        return (
            self.pointer + sum(r for r in reach if r < 0),
            self.pointer + sum(r for r in reach if r > 0) + self.itemsize,
        )


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a C-ordered array."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def view_of(obj: object, name: str = "array", error: type[KvCanaryError] = KvCanaryError) -> ArrayView:
    """Resolve an array to its address; never copies and never synchronises.

    Args:
        obj: a NumPy array, a torch tensor or JAX array of any element type, an object with DLPack or
            ``__cuda_array_interface__`` (CuPy, numba, warp), or ``(pointer, shape, strides, itemsize[, device])`` with
            strides in bytes (None = contiguous) and device "cpu" or "cuda:N" (default "cuda:0").
        name: what the message calls the array.
        error: the class to raise.
    """
    try:
        view = _resolve(obj)
        _check(view)
    except _Unusable as reason:
        raise error(f"{name}: {reason}") from None
    except Exception as reason:  # an exporter's own refusal can be any exception
        raise error(
            f"{name}: {type(obj).__name__} did not export its memory ({type(reason).__name__}: {reason}); "
            "give (pointer, shape, strides, itemsize, device) instead"
        ) from reason
    return view


def host_array(
    pointer: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: npt.DTypeLike,
    *,
    owner: object = None,
    readonly: bool = False,
) -> npt.NDArray[Any]:
    """NumPy view of host memory at an address, strides in bytes; the view keeps ``owner`` alive."""
    if not math.prod(shape):
        return np.empty(shape, dtype)
    interface = {
        "version": 3,
        "shape": tuple(shape),
        "strides": tuple(strides),
        "typestr": np.dtype(dtype).str,
        "data": (pointer, readonly),
    }
    return np.asarray(_Memory(owner, interface))


class _Memory:
    """Host memory as NumPy takes it; a NumPy view keeps this object alive, and this object the owner."""

    def __init__(self, owner: object, interface: dict[str, Any]) -> None:
        self.owner = owner
        self.__array_interface__ = interface


def _check(view: ArrayView) -> None:
    if len(view.shape) != len(view.strides):
        raise _Unusable(f"{len(view.shape)} axes but {len(view.strides)} strides; give one stride (bytes) per axis")
    if any(n < 0 for n in view.shape) or view.itemsize < 1:
        raise _Unusable(f"shape {view.shape}, itemsize {view.itemsize}: give sizes >= 0 and an itemsize >= 1")
    low, high = view.byte_range
    if (view.size and low <= 0) or not 0 <= view.pointer <= _MAX_ADDRESS or high > _MAX_ADDRESS:
        raise _Unusable(f"{low:#x}..{high:#x} is no memory: give the first element's address, not {view.pointer:#x}")
    if not _DEVICE.fullmatch(view.device):
        raise _Unusable(f"device {view.device!r}: give 'cpu' or 'cuda:N'")


def _resolve(obj: Any) -> ArrayView:
    if isinstance(obj, ArrayView):
        return obj
    if isinstance(obj, np.ndarray):
        return _from_numpy(obj, obj)
    if isinstance(obj, tuple):
        return _from_raw(obj)
    refused: Exception | None = None
    for attributes, reader in _READERS:
        try:
            if not all(getattr(obj, a, None) is not None for a in attributes):
                continue
        except Exception as error:  # noqa: BLE001  an interface that refuses this array; another one may not
            refused = error
            continue
        return reader(obj)
    if refused is not None:
        raise refused
    raise _Unusable(
        f"{type(obj).__name__} is no array; give a NumPy, CuPy, torch or JAX array, an object with "
        "__cuda_array_interface__ or __dlpack__, or (pointer, shape, strides, itemsize, device)"
    )


def _from_numpy(array: npt.NDArray[Any], owner: object) -> ArrayView:
    dtype = array.dtype
    if dtype.hasobject:
        raise _Unusable(f"dtype {dtype}: Python objects have no bytes to guard; give a numeric array")
    return ArrayView(
        pointer=int(array.__array_interface__["data"][0]) if array.size else 0,
        shape=array.shape,
        strides=array.strides,
        itemsize=dtype.itemsize,
        device="cpu",
        dtype=_dtype_name(dtype),
        readonly=not array.flags.writeable,
        owner=owner,
        host=np.asarray(array),
    )


def _from_raw(raw: tuple[Any, ...]) -> ArrayView:
    if len(raw) not in (4, 5):
        raise _Unusable(f"a tuple of {len(raw)}; give (pointer, shape, strides or None, itemsize[, device])")
    pointer, shape, strides, itemsize, device = raw if len(raw) == 5 else (*raw, "cuda:0")
    if not isinstance(shape, Sequence) or not (strides is None or isinstance(strides, Sequence)):
        raise _Unusable(f"shape {shape!r} and strides {strides!r}: give tuples of integers; strides may be None")
    if not all(_is_int(i) for i in (pointer, itemsize, *shape, *(strides or ()))):
        raise _Unusable(f"{raw!r}: give integers as pointer, shape, strides and itemsize")
    shape = tuple(map(int, shape))
    view = ArrayView(
        pointer=int(pointer),
        shape=shape,
        strides=contiguous_strides(shape, int(itemsize)) if strides is None else tuple(map(int, strides)),
        itemsize=int(itemsize),
        device=str(device),
    )
    return _with_host(view, f"V{view.itemsize}")


def _from_torch(tensor: Any) -> ArrayView:
    device, itemsize = tensor.device, int(tensor.element_size())
    if device.type not in ("cpu", "cuda"):
        raise _Unusable(f"on device {device}; give an array in cpu or cuda memory")
    dtype = str(tensor.dtype).rpartition(".")[2]
    view = ArrayView(
        pointer=int(tensor.data_ptr()),
        shape=tuple(tensor.shape),
        strides=tuple(s * itemsize for s in tensor.stride()),
        itemsize=itemsize,
        device="cpu" if device.type == "cpu" else f"cuda:{device.index or 0}",
        dtype=dtype,
        owner=tensor,
    )
    return _with_host(view, _host_dtype(view))


def _from_jax(array: Any) -> ArrayView:
    devices = tuple(array.devices())
    if len(devices) != 1:
        raise _Unusable(f"sharded over {len(devices)} devices; give the addressable shard of this process's device")
    is_host = devices[0].platform == "cpu"
    if not is_host and devices[0].platform not in ("gpu", "cuda"):
        raise _Unusable(f"on platform {devices[0].platform!r}; give an array in cpu or cuda memory")
    ordinal = getattr(devices[0], "local_hardware_id", None)
    dtype = np.dtype(array.dtype)
    if dtype.name in _PACKED:
        raise _Unusable(f"{dtype.name} elements share bytes; give the bytes, as uint8 (jax.lax.bitcast_convert_type)")
    view = ArrayView(
        pointer=int(array.unsafe_buffer_pointer()),
        shape=tuple(array.shape),
        strides=_jax_strides(array, dtype.itemsize),
        itemsize=dtype.itemsize,
        device="cpu" if is_host else f"cuda:{devices[0].id if ordinal is None else ordinal}",
        dtype=_dtype_name(dtype),
        readonly=True,
        owner=array,
    )
    return _with_host(view, _host_dtype(view))


def _jax_strides(array: Any, itemsize: int) -> tuple[int, ...]:
    """XLA may choose another order of the axes; the array's layout tells it, outermost axis first."""
    layout = getattr(getattr(array, "format", None), "layout", None)
    order = tuple(getattr(layout, "major_to_minor", None) or range(len(array.shape)))
    strides = [0] * len(order)
    for axis, stride in zip(order, contiguous_strides([array.shape[a] for a in order], itemsize), strict=True):
        strides[axis] = stride
    return tuple(strides)


def _from_cuda_array_interface(obj: Any) -> ArrayView:
    exported = obj.__cuda_array_interface__
    if exported.get("mask") is not None:
        raise _Unusable("a masked array; give the array without its mask")
    dtype = np.dtype(exported["typestr"])
    own = getattr(obj, "dtype", None) if dtype.kind == "V" else None  # the protocol has no bfloat16 and no float8
    if isinstance(own, np.dtype) and own.itemsize == dtype.itemsize:
        dtype = own
    shape, strides = tuple(exported["shape"]), exported.get("strides")
    pointer, readonly = exported["data"]
    return ArrayView(
        pointer=int(pointer or 0),
        shape=shape,
        strides=contiguous_strides(shape, dtype.itemsize) if strides is None else tuple(strides),
        itemsize=dtype.itemsize,
        device=f"cuda:{_cuda_ordinal(obj)}",
        dtype=_dtype_name(dtype),
        readonly=bool(readonly),
        owner=obj,
    )


def _cuda_ordinal(obj: Any) -> int:
    """The protocol does not name the device: CuPy, warp and numba each have their own word for it."""
    for path in (("device", "id"), ("device", "ordinal"), ("gpu_data", "context", "device", "id")):
        value: Any = obj
        for attribute in path:
            value = getattr(value, attribute, None)
        if _is_int(value):
            return int(value)
    export = getattr(obj, "__dlpack_device__", None)
    return int(export()[1]) if export is not None else 0


def _from_dlpack(obj: Any) -> ArrayView:
    kind, ordinal = (int(i) for i in obj.__dlpack_device__())
    if kind not in (*_DLPACK_HOST, *_DLPACK_CUDA):
        raise _Unusable(f"DLPack device type {kind}; give an array in cpu or cuda memory")
    found = dlpack.describe(obj, is_host=kind in _DLPACK_HOST)
    strides = contiguous_strides(found.shape, 1) if found.strides is None else found.strides
    view = ArrayView(
        pointer=found.pointer if math.prod(found.shape) else 0,
        shape=found.shape,
        strides=tuple(s * found.itemsize for s in strides),
        itemsize=found.itemsize,
        device="cpu" if kind in _DLPACK_HOST else f"cuda:{ordinal}",
        dtype=found.dtype,
        readonly=found.readonly or getattr(obj, "writeable", True) is False,
        owner=(obj, found.capsule),
    )
    return _with_host(view, _host_dtype(view))


_READERS: tuple[tuple[tuple[str, ...], Callable[[Any], ArrayView]], ...] = (
    (("data_ptr", "stride", "element_size"), _from_torch),  # before the interface below, which has no bf16 and no fp8
    (("unsafe_buffer_pointer",), _from_jax),
    (("__cuda_array_interface__",), _from_cuda_array_interface),
    (("__dlpack__", "__dlpack_device__"), _from_dlpack),
)


def _host_dtype(view: ArrayView) -> str:
    """What NumPy calls the elements: their bytes where it has no such type of its own (ml_dtypes registers more)."""
    is_own = view.dtype in np.sctypeDict and np.dtype(view.dtype).isbuiltin == 1
    return view.dtype if is_own else f"V{view.itemsize}"


def _with_host(view: ArrayView, dtype: npt.DTypeLike) -> ArrayView:
    if not view.is_host:
        return view
    _check(view)
    host = host_array(view.pointer, view.shape, view.strides, dtype, owner=view.owner, readonly=view.readonly)
    return replace(view, host=host)


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else dtype.str


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


LEGACY_STREAMS = (0, 1)  # cudaStreamLegacy by either of its names; it can never be captured


def stream_pointer(stream: Any, error: type[KvCanaryError] = KvCanaryError) -> int:
    """The ``CUstream`` address of a stream; None and 0 are the legacy default stream. May run inside a capture.

    Args:
        stream: None, an integer, an object with ``__cuda_stream__`` (cuda.core streams and graph builders, CuPy, warp,
            numba, torch), or one with ``ptr``, ``cuda_stream`` or ``handle``, or that is an integer by ``__index__``
            (the handles of cuda.bindings, older ones too).
    """
    pointer: Any = stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        pointer = (protocol() if callable(protocol) else protocol)[1]
        if type(pointer) is int and pointer >= 0:  # nearly always, and many times in a step
            return pointer
    elif stream is not None and not _is_int(stream):
        found = (getattr(stream, name, None) for name in ("ptr", "cuda_stream", "handle"))
        is_handle = hasattr(stream, "__index__") and not isinstance(stream, bool)
        pointer = next((p for p in found if p is not None), operator.index(stream) if is_handle else "")
    pointer = getattr(pointer, "value", pointer)  # numba's handle is a ctypes pointer
    try:
        address = int(pointer or 0) if pointer != "" else -1
    except (TypeError, ValueError):
        address = -1
    if address < 0:
        raise error(
            f"stream={stream!r}: give None, an address >= 0, or a stream of torch, CuPy, cuda.core, numba or warp"
        )
    return address
