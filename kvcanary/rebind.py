"""The same pool over other arrays: for engines whose KV buffers move between steps, as under JAX's donation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import fields, replace
from typing import Any

from kvcanary.arrays import ArrayView, view_of
from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool
from kvcanary.planes import Plane

_GEOMETRY = tuple(f.name for f in fields(Plane) if f.name != "data")


def arrays_of(pool: KvPool) -> tuple[ArrayView, ...]:
    """The distinct arrays that a pool's planes lie in, in the order in which the planes name them."""
    return tuple({_place(plane.view): plane.view for plane in pool.planes}.values())


def rebound_pool(pool: KvPool, arrays: KvPool | Sequence[Any]) -> KvPool:
    """``pool`` with its planes in other arrays of the same geometry; all else stays, a ``slot_lut`` where it lies.

    Args:
        arrays: a pool of the same layout over the new arrays, or the new arrays, one for each of `arrays_of`.

    Returns:
        ``pool`` itself if nothing has moved.

    Raises:
        LayoutError: arrays of another number, shape, order of bytes, element type or device.
    """
    planes = _planes_of(pool, arrays) if isinstance(arrays, KvPool) else _planes_over(pool, arrays)
    if all(_place(new.view) == _place(old.view) for old, new in zip(pool.planes, planes, strict=True)):
        return pool  # mostly: a donated buffer is written in place
    # Of one geometry: what was checked of the old pool holds for the new one, but for where the arrays lie together.
    new, own = object.__new__(KvPool), {f.name: getattr(pool, f.name) for f in fields(pool)}
    vars(new).update(own, planes=planes, slot_lut=pool.lut_view)
    new.check_overlaps()
    return new


def _moved(plane: Plane, view: ArrayView) -> Plane:
    """The plane in another array, of elements as it always had them: a raw address does not tell, an array does."""
    new, view = copy(plane), replace(view, dtype=plane.view.dtype)
    vars(new).update(data=view, view=view)
    return new


def _planes_over(pool: KvPool, arrays: Sequence[Any]) -> tuple[Plane, ...]:
    old = arrays_of(pool)
    is_one_array = not isinstance(arrays, (list, tuple)) or (len(arrays) > 0 and isinstance(arrays[0], int))
    if is_one_array or len(arrays) != len(old):
        given = type(arrays).__name__ if is_one_array else f"{len(arrays)} arrays"
        raise LayoutError(
            f"rebind: pool {pool.name!r} lies in {len(old)} arrays, given was {given}: give a list of as many, in the "
            "order of the pool's planes, or a pool made like it over the new arrays"
        )
    views = [view_of(array, f"rebind: array {i}", LayoutError) for i, array in enumerate(arrays)]
    new = dict(zip(map(_place, old), views, strict=True))
    for plane in pool.planes:
        _check_same(plane, new[_place(plane.view)])
    return tuple(_moved(plane, new[_place(plane.view)]) for plane in pool.planes)


def _planes_of(pool: KvPool, other: KvPool) -> tuple[Plane, ...]:
    shape, given = (pool.page_size, pool.n_blocks), (other.page_size, other.n_blocks)
    if shape != given or len(pool.planes) != len(other.planes):
        raise LayoutError(
            f"rebind: pool {pool.name!r} has {len(pool.planes)} planes, page_size and n_blocks {shape}, the pool given "
            f"{len(other.planes)} and {given}: make it with the same constructor over arrays of the same shape"
        )
    for old, new in zip(pool.planes, other.planes, strict=True):
        differing = next((f for f in _GEOMETRY if getattr(old, f) != getattr(new, f)), None)
        if differing is not None:
            raise LayoutError(
                f"rebind: {old.label} has {differing}={getattr(old, differing)!r}, the pool given "
                f"{getattr(new, differing)!r}: make it with the same constructor over arrays of the same shape"
            )
        if new.view.device != old.view.device:
            raise LayoutError(f"rebind: {old.label} is on {old.view.device}, its new array on {new.view.device}")
    return tuple(_moved(old, new.view) for old, new in zip(pool.planes, other.planes, strict=True))


def _check_same(plane: Plane, new: ArrayView) -> None:
    old = plane.view
    for name in ("device", "shape", "strides", "itemsize", "dtype"):
        was, given = getattr(old, name), getattr(new, name)
        if was != given and not (name == "dtype" and "" in (was, given)):
            raise LayoutError(
                f"rebind: the array of {plane.label} had {name} {was!r}, the new one has {given!r} (strides in bytes): "
                "give an array of the same geometry, or make a new CanaryManager"
            )


def _place(view: ArrayView) -> tuple[Any, ...]:
    return view.pointer, view.shape, view.strides, view.itemsize
