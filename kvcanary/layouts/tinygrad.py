"""tinygrad's llm: a static cache per block; row r is block r (no table), none is reserved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.layout import KvPool
from kvcanary.layouts.build import Part, fused, pool_of
from kvcanary.layouts.views import views_of
from kvcanary.tags import Half


def cache_kv(cache_kv: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any) -> KvPool:
    """``block.cache_kv``: [2, batch, n_kv_heads, max_context, head_dim] per block.

    Args:
        cache_kv: (address of the buffer, shape, None, itemsize) of each: tinygrad exports no arrays.
    """
    parts = fused("cache_kv", cache_kv, "2bhtd", "of MLA, give cache_k to layouts.tinygrad.cache_k")
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def cache_k(cache_k: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any) -> KvPool:
    """``block.cache_k`` of MLA: [batch, 1, max_context, kv_lora_rank + rope] per block."""
    part = Part("latent", Half.K, "cache_k", views_of("cache_k", cache_k), ("bhtc",))
    return pool_of([part], layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
