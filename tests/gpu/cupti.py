"""A trace of CUDA driver calls through CUPTI's callback interface, by ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DRIVER_API, _ENTER = 1, 0  # CUPTI_CB_DOMAIN_DRIVER_API, CUPTI_API_ENTER


class _CallbackData(ctypes.Structure):
    _fields_ = (("site", ctypes.c_int), ("function_name", ctypes.c_char_p))


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(_CallbackData))


def find_cupti() -> ctypes.CDLL | None:
    """The CUPTI library of the installed wheels or of the toolkit; None when there is none."""
    names = ["libcupti.so.13", "libcupti.so.12", "libcupti.so"]
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    found = [str(p) for root in roots for p in sorted(root.rglob("libcupti.so*"))]
    found += [str(p) for p in sorted(Path("/usr/local/cuda").glob("**/libcupti.so*"))]
    for name in names + found:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@contextmanager
def driver_calls() -> Iterator[Counter[str]]:
    """Count the driver calls of the whole process by name while the context is open."""
    cupti = find_cupti()
    assert cupti is not None, "no libcupti: ask find_cupti first"
    calls: Counter[str] = Counter()

    def note(_user: object, _domain: int, _id: int, data: object) -> None:
        if data.contents.site == _ENTER:
            calls[data.contents.function_name.decode()] += 1

    callback = _Callback(note)
    subscriber = ctypes.c_void_p()
    _check(cupti.cuptiSubscribe(ctypes.byref(subscriber), callback, None), "cuptiSubscribe")
    try:
        _check(cupti.cuptiEnableDomain(1, subscriber, _DRIVER_API), "cuptiEnableDomain")
        yield calls
    finally:
        _check(cupti.cuptiUnsubscribe(subscriber), "cuptiUnsubscribe")


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} answers CUPTI error {status}")
