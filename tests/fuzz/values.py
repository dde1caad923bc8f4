"""Values that callers hand in by mistake, and arrays that are nearly right."""

from __future__ import annotations

from typing import Any

import numpy as np

from .source import Source

_ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        16,
        64,
        1 << 20,
        (1 << 31) - 1,
        1 << 31,
        1 << 32,
        1 << 63,
        1 << 64,
        1 << 70,
    ),
    *(-(1 << 31), -(1 << 63), -(1 << 70), 0.0, 1.0, 1.5, -0.5, float("nan"), float("inf"), 1j, "", "1", "log", "full"),
    *(
        "K",
        "k\0",
        "9" * 5000,
        "\ud800",
        b"",
        b"1",
        (),
        (1,),
        (1, 2),
        [],
        [0],
        [1, 2],
        [[1]],
        [None],
        ["1"],
        [1.5],
        {},
        {1: 2},
    ),
    *({1}, range(3), slice(1), Ellipsis, int, object, np.int32(1), np.int64(-1), np.float32(1), np.bool_(True), np.nan),
    *(np.zeros(0), np.zeros(3), np.arange(3), np.array(3), np.array(["a"]), np.array([None]), np.datetime64("nat")),
)
_DTYPES = ("i4", "i8", "u4", "u8", "u1", "i2", "f4", "f8", "?", ">i4", "S3", "O", "M8[s]", "c8", "i4,u2", "V4", "U1")


def odd(source: Source) -> Any:
    """Anything; always the same object for the same byte."""
    return source.choice(_ODD)


def array(source: Source, shape: tuple[int, ...], dtype: str) -> Any:
    """An array of this shape and type, perhaps with something wrong with it; its memory is there, whatever it says."""
    what = source.below(48)  # 0, which is also what comes past the end, is nothing wrong
    if what == 0 or what > 8:
        return _filled(source, shape, dtype)
    if what == 8:
        return odd(source)
    if what == 1:
        return _filled(source, shape, source.choice(_DTYPES))
    if what == 2:
        return _filled(source, tuple(source.below(5) for _ in range(source.below(4))), dtype)
    found = _filled(source, shape, dtype)
    if what == 3:
        return _viewed(source, found)
    if what == 4:
        return _raw(source, found)
    if what == 5:
        return [found] * source.below(4) if source.maybe() else tuple([found] * source.below(4))
    if what == 6:
        return found.tolist()
    found.flags.writeable = False
    return found


def _filled(source: Source, shape: tuple[int, ...], dtype: str) -> Any:
    kind = np.dtype(dtype)
    if kind.hasobject or kind.kind in "SUMV":
        return np.zeros(shape, kind)
    data = source.some(int(np.prod(shape)) * kind.itemsize if source.maybe() else 0)
    room = np.zeros(int(np.prod(shape)) * kind.itemsize, np.uint8)
    room[: len(data)] = np.frombuffer(data, np.uint8)
    return room.view(kind).reshape(shape) if kind.fields is None else np.zeros(shape, kind)


def _viewed(source: Source, found: Any) -> Any:
    """Another view of the same memory."""
    what = source.below(7)
    if what == 0:
        return found[::-1]
    if what == 1:
        return found[..., ::2]
    if what == 2:
        return found.T
    if what == 3:
        return np.broadcast_to(found[:1], (3, *found.shape[1:])) if found.ndim and len(found) else found
    if what == 4:
        return found[None]
    if what == 5:
        room = np.zeros(found.nbytes + 8, np.uint8)
        return room[1 : 1 + found.nbytes].view(found.dtype).reshape(found.shape)
    return memoryview(found)


def _raw(source: Source, found: Any) -> Any:
    """(pointer, shape, strides, itemsize, device), right, or of a device that is not there and with something odd."""
    address = int(found.ctypes.data) if found.size else 0
    parts: list[Any] = [address, found.shape, source.choice((None, found.strides)), found.itemsize]
    if source.maybe():
        parts.append(source.choice(("cuda:0", "cuda:1", "tpu", "", None, 3)))
        parts[source.below(5)] = odd(source)
        if isinstance(parts[4], str) and parts[4] == "cpu":
            parts[4] = "cuda:0"
        return tuple(parts)
    return (*parts, "cpu")
