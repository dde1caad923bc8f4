"""FlashInfer: no page is reserved. Its CSR tables are `StepBatch`'s kv_indptr, kv_indices and kv_last_page_len."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool
from kvcanary.layouts.build import Part, fused, k_and_v, pool_of
from kvcanary.layouts.views import views_of
from kvcanary.tags import Half

_AXES = {"NHD": "bthd", "HND": "bhtd"}


def paged_kv_cache(
    kv_cache: Sequence[Any],
    kv_layout: str = "NHD",
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """What ``plan`` and ``run`` take: per layer [pages, 2, ...] of five axes, or a tuple of K and V of four.

    Args:
        kv_layout: "NHD", [pages, (2,) tokens, heads, dim], or "HND", [pages, (2,) heads, tokens, dim].

    Raises:
        LayoutError: another kv_layout, or arrays of another form.
    """
    if kv_layout not in _AXES:
        raise LayoutError(f"kv_layout={kv_layout!r}: give 'NHD' or 'HND'")
    axes = _AXES[kv_layout]
    if isinstance(kv_cache, (list, tuple)) and kv_cache and all(_is_pair(entry) for entry in kv_cache):
        k, v = ([entry[at] for entry in kv_cache] for at in (0, 1))
        parts = k_and_v(k, v, (axes,), ("kv_cache (K)", "kv_cache (V)"))
    else:
        parts = fused("kv_cache", kv_cache, f"b2{axes[1:]}", "or a tuple (K, V) of four axes for each layer")
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def mla(
    ckv_cache: Sequence[Any],
    kpe_cache: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """Latent caches: ckv [pages, tokens, 512] and kpe [pages, tokens, 64] per layer, often two views of one array."""
    parts = [
        Part(name, Half.K, source, views_of(source, arrays), ("btc",))
        for name, source, arrays in (("ckv", "ckv_cache", ckv_cache), ("kpe", "kpe_cache", kpe_cache))
    ]
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and len(entry) == 2
