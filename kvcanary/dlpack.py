"""What a DLPack capsule says, read through ctypes: of any element type, without a copy, a wait or a library.

NumPy reads neither bfloat16 nor the float8 types, and no device memory; here only the description is read. The capsule
is not consumed: it keeps the memory alive, and gives it back when nobody holds it any more.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

NO_SYNC = -1  # the stream that asks a CUDA exporter for no synchronisation
_NAMES = (b"dltensor_versioned", b"dltensor")
_READ_ONLY, _IS_COPIED = 1, 2
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}  # DLDataTypeCode
_FLOAT8 = {
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
}


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned, as far as the tensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class Described(NamedTuple):
    """An exported tensor; ``strides`` count elements, None = contiguous; ``capsule`` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    itemsize: int
    dtype: str
    readonly: bool
    capsule: Any


def describe(obj: Any, is_host: bool) -> Described:
    """What an object with ``__dlpack__`` exports.

    Raises:
        ValueError: a copy, elements that share bytes, or a capsule of another kind; or whatever the exporter raises.
    """
    arguments = {} if is_host else {"stream": NO_SYNC}
    try:
        capsule = obj.__dlpack__(**arguments, max_version=(1, 0))
    except TypeError:  # older than the versioned protocol
        capsule = obj.__dlpack__(**arguments)
    tensor, flags = _read(capsule)
    if flags & _IS_COPIED:
        raise ValueError("it exports a copy")
    if tensor.bits % 8 or tensor.lanes != 1:
        raise ValueError(f"elements of {tensor.bits} bits x {tensor.lanes}: give the bytes, as uint8")
    n = range(tensor.ndim)
    kind = _KINDS.get(tensor.code)
    name = _FLOAT8.get(tensor.code, "") if kind is None else kind if kind == "bool" else f"{kind}{tensor.bits}"
    return Described(
        pointer=(tensor.data or 0) + tensor.byte_offset,
        shape=tuple(tensor.shape[i] for i in n),
        strides=tuple(tensor.strides[i] for i in n) if tensor.strides else None,
        itemsize=tensor.bits // 8,
        dtype=name,
        readonly=bool(flags & _READ_ONLY),
        capsule=capsule,
    )


def _read(capsule: Any) -> tuple[_Tensor, int]:
    api = ctypes.pythonapi
    is_valid = api.PyCapsule_IsValid
    is_valid.argtypes, is_valid.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
    pointer = api.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    name = next((n for n in _NAMES if is_valid(capsule, n)), None)
    if name is None:
        raise ValueError(f"__dlpack__ gave a {type(capsule).__name__}, no unused DLPack capsule")
    address = pointer(capsule, name)
    if name == b"dltensor":  # DLManagedTensor begins with the tensor
        return _Tensor.from_address(address), 0
    managed = _Versioned.from_address(address)
    if managed.major != 1:
        raise ValueError(f"DLPack {managed.major}.{managed.minor}; version 1 is understood")
    return managed.tensor, managed.flags
