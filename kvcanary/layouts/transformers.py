"""Hugging Face transformers: static caches without a table, and the paged cache of continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool
from kvcanary.layouts.build import k_and_v, pool_of


def static_cache(
    keys: Sequence[Any],
    values: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """StaticCache: [batch, heads, max_cache_len, dim] per layer; row r is block r (no table), none is reserved.

    Args:
        keys, values: ``layer.keys`` and ``layer.values`` of each layer; a sliding layer is a pool of its own.
    """
    parts = k_and_v(keys, values, ("bhtd",), ("keys", "values"))
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def paged_cache(
    key_cache: Sequence[Any],
    value_cache: Sequence[Any],
    *,
    block_size: int = 256,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """PagedAttentionCache: [(num_blocks + 2) * block_size, heads, dim] per layer; the block table is padded with -1.

    The last two blocks are reserved: one stays zero and is read for what is not there, the other takes padded writes.
    """
    parts = k_and_v(key_cache, value_cache, ("shd",), ("key_cache", "value_cache"))
    found = pool_of(parts, page_size=block_size, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
    if found.n_blocks < 3:
        raise LayoutError(
            f"key_cache[0] has {found.n_blocks} blocks of {block_size} tokens, two of which are the cache's own: "
            "give its block_size"
        )
    trash = (found.n_blocks - 2, found.n_blocks - 1)
    return replace(found, reserved_blocks=pool.get("reserved_blocks", trash))
