"""Pools of the common layouts, described from the arrays' own shapes and strides; one array per layer."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

from kvcanary.arrays import ArrayView, view_of
from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool, Plane
from kvcanary.tags import Half

DEFAULT_PAGE_SIZE = 16  # slots per block of arrays that do not show their blocks

# One letter per axis: b = block, t = token in the block, s = slot (block and token in one axis), any other = content.
_NHD = ("bthd", "shd")
_HND = ("bhtd",)
_TOKEN_MAJOR = ("btc", "sc")


class _Place(NamedTuple):
    """What one array says about the pool and the plane."""

    n_blocks: int
    page_size: int
    page_stride: int
    token_stride: int
    chunk_stride: int
    n_chunks: int
    chunk_bytes: int


def nhd(
    *,
    k: Sequence[Any],
    v: Sequence[Any] | None = None,
    page_size: int | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """Tokens before heads: [n_blocks, page_size, heads, dim], or [n_slots, heads, dim].

    Args:
        k: one array per layer, of any strides; a fused K and V array counts as K.
        v: likewise, or None.
        page_size: slots per block; needed only where the arrays have no block axis (default 16).
        layers: numbers of the layers; None = 0, 1, ...
        dtype: name or type object of the elements, where the arrays do not tell it (uint8, uint16, raw pointers).
        pool: further fields of `KvPool`: name, kind, window, reserved_blocks, token_offset, slot_lut, ...
    """
    return _pool(_NHD, [("k", Half.K, k), ("v", Half.V, v)], page_size, layers, dtype, pool)


def hnd(
    *,
    k: Sequence[Any],
    v: Sequence[Any] | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """Heads before tokens: [n_blocks, heads, page_size, dim]; a static cache has one block per sequence.

    Args:
        k, v, layers, dtype, pool: as in `nhd`; a static cache has no reserved block: ``reserved_blocks=()``.
    """
    return _pool(_HND, [("k", Half.K, k), ("v", Half.V, v)], None, layers, dtype, pool)


def token_major(
    *,
    latent: Sequence[Any],
    page_size: int | None = None,
    half: Half = Half.K,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """One row per token, as in latent (MLA) caches: [n_blocks, page_size, row], or [n_slots, row].

    Args:
        latent: one array per layer.
        page_size, layers, dtype, pool: as in `nhd`.
    """
    return _pool(_TOKEN_MAJOR, [("latent", half, latent)], page_size, layers, dtype, pool)


def _pool(
    axes: tuple[str, ...],
    parts: Sequence[tuple[str, Half, Sequence[Any] | None]],
    page_size: int | None,
    layers: Sequence[int] | None,
    dtype: Any,
    pool: dict[str, Any],
) -> KvPool:
    numbers = _layer_numbers(parts, layers)
    planes: list[Plane] = []
    first: _Place | None = None
    for i, layer in enumerate(numbers):
        for name, half, arrays in parts:
            if arrays is None:
                continue
            label = f"{name}[{i}]"
            view = view_of(arrays[i], label, LayoutError)
            place = _place(view, axes, page_size, label)
            first = first or place
            if place[:2] != first[:2]:
                raise LayoutError(
                    f"{label} has {place.n_blocks} blocks of {place.page_size}, the first array {first.n_blocks} of "
                    f"{first.page_size}: one pool has one slot index space, make a pool of each kind"
                )
            geometry = {field: getattr(place, field) for field in _Place._fields[2:]}
            planes.append(Plane(data=view, half=half, layer=layer, name=name, dtype=dtype, **geometry))
    assert first is not None
    return KvPool(planes=tuple(planes), page_size=first.page_size, n_blocks=first.n_blocks, **pool)


def _layer_numbers(parts: Sequence[tuple[str, Half, Sequence[Any] | None]], layers: Sequence[int] | None) -> list[int]:
    counts: dict[str, int] = {}
    for name, _, arrays in parts:
        if arrays is None and name != parts[0][0]:
            continue
        is_one_array = not isinstance(arrays, (list, tuple)) or (len(arrays) > 0 and isinstance(arrays[0], int))
        if is_one_array or not arrays:
            raise LayoutError(f"{name}={type(arrays).__name__}: give a list with one array per layer, at least one")
        counts[name] = len(arrays)
    if layers is not None:
        if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
            raise LayoutError(f"layers={layers!r}: give a list with the number of each layer, or None for 0, 1, ...")
        counts["layers"] = len(layers)
    if len(set(counts.values())) != 1:
        raise LayoutError(f"{', '.join(f'{n} for {c} layers' for n, c in counts.items())}: give as many of each")
    return list(layers) if layers is not None else list(range(next(iter(counts.values()))))


def _place(view: ArrayView, axes: tuple[str, ...], page_size: int | None, label: str) -> _Place:
    letters = next((a for a in axes if len(a) == len(view.shape)), None)
    if letters is None:
        known = " or ".join(f"{len(a)} axes ({a})" for a in axes)
        raise LayoutError(f"{label} has shape {view.shape}: give {known}; slice a fused array, kv[:, 0] and kv[:, 1]")
    size, step = dict(zip(letters, view.shape, strict=True)), dict(zip(letters, view.strides, strict=True))
    if page_size is not None and (isinstance(page_size, bool) or not isinstance(page_size, Integral)):
        raise LayoutError(f"page_size={page_size!r}: give the slots of a block, an integer")
    if "s" in letters:
        page = DEFAULT_PAGE_SIZE if page_size is None else page_size
        if page < 1 or size["s"] % page:
            raise LayoutError(
                f"{label} has {size['s']} slots, no multiple of page_size={page}: give the engine's page size"
            )
        n_blocks, page_stride, token_stride = size["s"] // page, page * step["s"], step["s"]
    else:
        page = size["t"]
        if page_size not in (None, page):
            raise LayoutError(
                f"{label} has shape {view.shape}, that is {page} slots a block, but page_size={page_size}"
            )
        n_blocks, page_stride, token_stride = size["b"], step["b"], step["t"]
    content = [(step[a], size[a]) for a in letters if a not in "bts"]
    return _Place(n_blocks, page, page_stride, token_stride, *_chunks(content, view.itemsize, label))


def _chunks(content: list[tuple[int, int]], itemsize: int, label: str) -> tuple[int, int, int]:
    """chunk_stride, n_chunks and chunk_bytes of content axes (stride, size), merged where they touch."""
    run, chunk_stride, n_chunks = itemsize, 0, 1
    for stride, n in sorted((stride, n) for stride, n in content if n != 1):
        if n_chunks == 1 and stride == run:
            run *= n
        elif n_chunks == 1:
            chunk_stride, n_chunks = stride, n
        elif stride == chunk_stride * n_chunks:
            n_chunks *= n
        else:
            raise LayoutError(
                f"{label}: the content axes of a slot, {content} (stride in bytes, size), are not one row of equal "
                "chunks: describe it by several Planes, one per index of an axis"
            )
    return chunk_stride, n_chunks, run
