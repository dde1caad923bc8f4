"""Parts of arrays as views: of any library, on any device, without a copy and without that library's own slicing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvcanary.arrays import ArrayView, contiguous_strides, view_of
from kvcanary.errors import LayoutError


def views_of(name: str, arrays: Any) -> list[ArrayView]:
    """The arrays of an argument, one per layer, resolved.

    Raises:
        LayoutError: no list, none in it, or an array that does not tell where it lies.
    """
    is_one_array = not isinstance(arrays, (list, tuple)) or (len(arrays) > 0 and isinstance(arrays[0], int))
    if is_one_array or not arrays:
        raise LayoutError(f"{name}={type(arrays).__name__}: give a list with one array per layer, at least one")
    return [view_of(array, f"{name}[{i}]", LayoutError) for i, array in enumerate(arrays)]


def select(view: ArrayView, axis: int, index: int) -> ArrayView:
    """``view[..., index, ...]``: one index of an axis, which goes away."""
    shape, strides = list(view.shape), list(view.strides)
    del shape[axis]
    return _moved(view, index * strides.pop(axis), shape, strides)


def split_axis(view: ArrayView, axis: int, sizes: Sequence[int]) -> ArrayView:
    """One axis as several, their sizes in C order; their product is its size."""
    steps = contiguous_strides(sizes, view.strides[axis])
    shape = [*view.shape[:axis], *sizes, *view.shape[axis + 1 :]]
    return _moved(view, 0, shape, [*view.strides[:axis], *steps, *view.strides[axis + 1 :]])


def page_bytes(view: ArrayView, label: str) -> ArrayView:
    """[blocks, bytes of a page]: the first axis is the block's, the others lie in C order without gaps.

    Raises:
        LayoutError: they do not, or there is no block.
    """
    inner = replace(view, shape=view.shape[1:], strides=view.strides[1:], host=None)
    if len(view.shape) < 2 or not view.size or not inner.is_contiguous:
        raise LayoutError(
            f"{label} has shape {view.shape}, strides {view.strides}: give [blocks, bytes of a page], "
            "in which the bytes of a page lie in line"
        )
    n = math.prod(inner.shape) * view.itemsize
    return replace(view, shape=(view.shape[0], n), strides=(view.strides[0], 1), itemsize=1, dtype="", host=None)


def region(pages: ArrayView, start: int, shape: Sequence[int]) -> ArrayView:
    """Of `page_bytes`: ``shape`` bytes in C order from byte ``start`` of every page on, [blocks, *shape]."""
    strides = (pages.strides[0], *contiguous_strides(shape, 1))
    return _moved(pages, start, (pages.shape[0], *shape), strides)


def _moved(view: ArrayView, offset: int, shape: Sequence[int], strides: Sequence[int]) -> ArrayView:
    pointer = view.pointer + offset if math.prod(shape) else view.pointer
    return replace(view, pointer=pointer, shape=tuple(shape), strides=tuple(strides), host=None)
