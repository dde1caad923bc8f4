"""Memory that ends where its array ends, so that the address sanitizer sees an access one byte beyond it.

NumPy rounds nothing up, but it does not align to 32 bytes, which stamps need; rounding up by hand would leave room
behind the array that no sanitizer watches.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary.arrays import host_array

ALIGNMENT = 64  # more than any structure of the guard's asks for

_libc = ctypes.CDLL(None)  # with a sanitizer preloaded, its own allocator
_libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class _Block:
    """One allocation, given back when nothing refers to it any more."""

    def __init__(self, n_bytes: int) -> None:
        address = ctypes.c_void_p()
        if _libc.posix_memalign(ctypes.byref(address), ALIGNMENT, n_bytes) or not address.value:
            raise MemoryError(f"no {n_bytes} bytes")
        self.address = address.value
        weakref.finalize(self, _libc.free, self.address)


def exact_array(shape: int | tuple[int, ...], dtype: npt.DTypeLike, fill: int = 0) -> npt.NDArray[Any]:
    """An array in an allocation of its own, of exactly its size.

    Args:
        fill: value of each byte.
    """
    shape, wanted = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
    n_bytes = math.prod(shape) * wanted.itemsize
    if not n_bytes:
        return np.zeros(shape, wanted)
    block = _Block(n_bytes)
    flat = host_array(block.address, (n_bytes,), (1,), np.uint8, owner=block)
    flat[:] = fill
    return flat.view(wanted).reshape(shape)


def exact_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy in C order, in an allocation of exactly its size."""
    copy = exact_array(array.shape, array.dtype)
    copy[...] = array
    return copy


def exact_rows(array: npt.NDArray[Any], row_bytes: int) -> npt.NDArray[Any]:
    """A copy whose rows lie ``row_bytes`` apart, with nothing behind the last one; the bytes between them are 7."""
    rows, width = array.shape
    flat = exact_array((rows - 1) * row_bytes + width * array.itemsize, np.uint8, fill=7)
    steps = (row_bytes, array.itemsize)
    copy = host_array(int(flat.ctypes.data), array.shape, steps, array.dtype, owner=flat)
    copy[...] = array
    return copy
