"""Engines on JAX: the paged attention of Pallas for GPUs, and MaxText; nothing is reserved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool
from kvcanary.layouts.build import k_and_v, pool_of


def pallas(
    k_pages: Sequence[Any],
    v_pages: Sequence[Any],
    k_scales_pages: Sequence[Any] | None = None,
    v_scales_pages: Sequence[Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """``paged_attention`` of jax.experimental.pallas.ops.gpu: [heads, pages, page_size, dim] of K and of V per layer.

    Args:
        k_scales_pages, v_scales_pages: [heads, pages, page_size] of quantised pages.
    """
    parts = [
        *k_and_v(k_pages, v_pages, ("hbtd",), ("k_pages", "v_pages")),
        *k_and_v(k_scales_pages, v_scales_pages, ("hbt",), ("k_scales_pages", "v_scales_pages"), "_scale", dtype=""),
    ]
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def maxtext(
    key: Sequence[Any],
    value: Sequence[Any],
    key_scale: Sequence[Any] | None = None,
    value_scale: Sequence[Any] | None = None,
    *,
    ar_cache_axis_order: str = "1,2,0,3",
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """MaxText's autoregressive cache as it is stored: [length, heads, batch, dim] by default.

    There is no table: row r is block r.

    Args:
        ar_cache_axis_order: of the configuration: which of (batch, length, heads, dim) each stored axis is.
        key_scale, value_scale: of quantised caches, in the same order.

    Raises:
        LayoutError: an order that does not name each of the four axes once.
    """
    try:
        order = [int(axis) for axis in ar_cache_axis_order.split(",")]
    except ValueError:
        order = []
    if sorted(order) != [0, 1, 2, 3]:
        raise LayoutError(f"ar_cache_axis_order={ar_cache_axis_order!r}: give an order of 0,1,2,3, as '1,2,0,3'")
    axes = ("".join("bthd"[axis] for axis in order),)
    parts = [
        *k_and_v(key, value, axes, ("key", "value")),
        *k_and_v(key_scale, value_scale, axes, ("key_scale", "value_scale"), "_scale", dtype=""),
    ]
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
