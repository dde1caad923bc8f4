"""Launch kernels from a library that build.py made."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np

_ERROR_BYTES = 8192


class SimtError(Exception):
    """A launch was refused or stopped; the text says where and why."""


class KernelInfo(NamedTuple):
    """What a kernel demands of its launch."""

    max_block: int
    """Threads."""
    params_bytes: int


class SimtLibrary:
    """The kernels of one library; `kernels` are their names, sorted, `info` tells what each demands."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._launch = self._library.kvc_simt_launch
        text, number, size = ctypes.c_char_p, ctypes.c_uint, ctypes.c_size_t
        self._launch.argtypes = [text, number, number, number, text, size, ctypes.c_uint64, text, size]
        self.info: dict[str, KernelInfo] = dict(sorted(self._read_kernels()))
        self.kernels: list[str] = list(self.info)

    def launch(
        self, name: str, grid: int | tuple[int, int], block: int, params: np.void | np.ndarray, seed: int = 0
    ) -> None:
        """Runs a grid to its end; seed picks the order of blocks, warps and lanes.

        grid: blocks in x, or in x and y. params: one structured scalar, of the size of the kernel's struct; the arrays
        that its pointers name must outlive the call.
        Raises SimtError; memory then holds what was written before the error.
        """
        grid_x, grid_y = grid if isinstance(grid, tuple) else (grid, 1)
        data = params.tobytes()
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._launch(name.encode(), grid_x, grid_y, block, data, len(data), seed, error, _ERROR_BYTES):
            raise SimtError(error.value.decode())

    def _read_kernels(self):
        read = self._library.kvc_simt_kernel
        read.restype = ctypes.c_char_p
        read.argtypes = [ctypes.c_uint, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_size_t)]
        max_block, params_bytes = ctypes.c_uint(), ctypes.c_size_t()
        i = 0
        while (name := read(i, ctypes.byref(max_block), ctypes.byref(params_bytes))) is not None:
            yield name.decode(), KernelInfo(max_block.value, params_bytes.value)
            i += 1
