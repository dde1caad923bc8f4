"""TensorRT's own cache layers, and TensorRT Edge-LLM; no block is reserved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.layout import KvPool
from kvcanary.layouts.build import fused, k_and_v, pool_of


def kv_cache_update(
    k_cache: Sequence[Any],
    v_cache: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """IKVCacheUpdateLayer: [batch, heads, max_length, dim] of K and of V, whose output is the same memory.

    There is no table: row r is block r.

    Args:
        k_cache, v_cache: what ``set_tensor_address`` is given, as (pointer, shape, None, itemsize) or an array.
    """
    parts = k_and_v(k_cache, v_cache, ("bhtd",), ("k_cache", "v_cache"))
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def edge_llm_paged(
    kv_caches: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any
) -> KvPool:
    """TensorRT Edge-LLM since 0.10: [2, pages, tokens, heads, dim] per layer.

    Its table has a lane of K and one of V, [rows, 2, max_pages]: give the batch the lane of K, ``table[:, 0]``.
    """
    parts = fused("kv_caches", kv_caches, "2bthd")
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
