"""MLC-LLM on TVM: PagedKVCache; no page is reserved, append positions of -1 are not written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.layout import KvPool
from kvcanary.layouts.build import Part, fused, pool_of
from kvcanary.layouts.views import views_of
from kvcanary.tags import Half


def paged_kv_cache(
    pages: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any
) -> KvPool:
    """[num_total_pages, 2, heads, page_size, dim] per layer; with NVSHMEM, the layers of one array."""
    parts = fused("pages", pages, "b2htd", "of MLA, give them to layouts.tvm.mla")
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def mla(pages: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any) -> KvPool:
    """[num_total_pages, page_size, qk_head_dim] per layer."""
    part = Part("latent", Half.K, "pages", views_of("pages", pages), ("btc",))
    return pool_of([part], layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
