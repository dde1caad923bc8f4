"""Where memory of a GPU lies: on which device, and in which context. Asks the driver itself; imports nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool

_CONTEXT, _MEMORY_TYPE, _BUFFER_ID, _IS_MANAGED, _ORDINAL = 1, 2, 7, 8, 9  # CU_POINTER_ATTRIBUTE_*
_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE


def libcuda() -> Any:
    """The driver's library; None without one."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def check_devices(pools: Sequence[KvPool]) -> None:
    """Refuse planes whose memory is on another device than they say, as far as the driver knows it.

    Raises:
        LayoutError: so it is.
    """
    driver = libcuda()
    for pool in pools if driver is not None else ():
        for plane in pool.planes:
            view = plane.view
            kind = _attribute(driver, _MEMORY_TYPE, view.pointer, ctypes.c_uint())
            if kind != _DEVICE_MEMORY or _attribute(driver, _IS_MANAGED, view.pointer, ctypes.c_uint()):
                continue
            ordinal = _attribute(driver, _ORDINAL, view.pointer, ctypes.c_int())
            if ordinal is not None and view.device != f"cuda:{ordinal}":
                raise LayoutError(
                    f"pool {pool.name!r}: {plane.label} is said to be on {view.device}, but its memory, at "
                    f"{view.pointer:#x}, is on cuda:{ordinal}: a raw tuple names its device as fifth element"
                )


def foreign_context(pools: Sequence[KvPool]) -> int | None:
    """The context that the KV lies in, if it is not its device's primary one; else None.

    That of the first plane's memory; where the driver does not tell it (or there is no plane), the one that is current
    in this thread.
    """
    driver = libcuda()
    if driver is None:
        return None
    pointer = next((plane.view.pointer for pool in pools for plane in pool.planes), 0)
    context = _attribute(driver, _CONTEXT, pointer, ctypes.c_void_p()) if pointer else None
    device = _attribute(driver, _ORDINAL, pointer, ctypes.c_int()) if pointer else None
    if not context:
        current, ordinal = ctypes.c_void_p(), ctypes.c_int()
        if driver.cuCtxGetCurrent(ctypes.byref(current)) or not current.value:
            return None
        if driver.cuCtxGetDevice(ctypes.byref(ordinal)) or device not in (None, ordinal.value):
            return None
        context, device = current.value, ordinal.value
    return None if device is None or context == _primary_context(driver, device) else context


def buffer_id(pointer: int) -> int | None:
    """The driver's number of the allocation at an address, given once in a process; None where there is none."""
    driver = libcuda()
    found: int | None = None if driver is None else _attribute(driver, _BUFFER_ID, pointer, ctypes.c_ulonglong())
    return found


def _primary_context(driver: Any, ordinal: int) -> int | None:
    """The device's primary context, if there is one; it is not made."""
    device, flags, is_active, context = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    if driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(is_active)) or not is_active.value:
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    driver.cuDevicePrimaryCtxRelease_v2(device)
    return context.value


def _attribute(driver: Any, attribute: int, pointer: int, out: Any) -> Any:
    """What the driver knows of an address; None if nothing."""
    status = driver.cuPointerGetAttribute(ctypes.byref(out), attribute, ctypes.c_uint64(pointer))
    return None if status else out.value
