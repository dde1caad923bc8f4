"""TensorRT's own cache layers; row r is block r (no table), none is reserved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.layout import KvPool
from kvcanary.layouts.build import k_and_v, pool_of


def kv_cache_update(
    k_cache: Sequence[Any],
    v_cache: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """IKVCacheUpdateLayer: [batch, heads, max_length, dim] of K and of V, whose output is the same memory.

    Args:
        k_cache, v_cache: what ``set_tensor_address`` is given, as (pointer, shape, None, itemsize) or an array.
    """
    parts = k_and_v(k_cache, v_cache, ("bhtd",), ("k_cache", "v_cache"))
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
