"""Stand-ins for the libraries' arrays: as much of each as is read."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvcanary import dlpack
from kvcanary.arrays import ArrayView

ADDRESS = 0x7F00_0000_1000


def summary(view: ArrayView) -> tuple[Any, ...]:
    return view.pointer, view.shape, view.strides, view.itemsize, view.device, view.dtype, view.readonly


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
