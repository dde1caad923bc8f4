"""SGLang: a table of slots (``req_to_token``) or of pages; slot 0, with paging page 0, takes the writes of padding.

Buffers have ``size + page_size`` rows; what is left of them after the last whole page is never handed out. Plain fp8
has its scales outside the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool
from kvcanary.layouts.build import Part, fused, k_and_v, pool_of, row_parts
from kvcanary.layouts.views import views_of
from kvcanary.tags import Half, PoolKind

_BUFFERS, _SCALES = ("k_buffer", "v_buffer"), ("k_scale_buffer", "v_scale_buffer")
# KVLayout of the DeepSeek-V4 family: bytes of data, bytes of scales, unit that pages are padded to, scales in the row.
_KV_LAYOUTS = {
    "v4": (576, 8, 576, False),
    "v41": (512, 16, 512, False),
    "v41_fp4": (256, 32, 256, False),
    "uniform_fp8": (512, 0, 512, False),
    "v41_new": (512, 16, 528, True),
    "v41_fp4_new": (256, 32, 288, True),
}


def mha(
    k_buffer: Sequence[Any],
    v_buffer: Sequence[Any] | None = None,
    *,
    page_size: int = 1,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """MHATokenToKVPool, NHD: [slots, heads, dim] of K and of V per layer, in allocations of their own or in one.

    Args:
        v_buffer: None for a pool of K alone.
        page_size: of the server's arguments.
        dtype: of the elements; fp8 is stored as uint8, which does not tell it.
    """
    parts = k_and_v(k_buffer, v_buffer, ("shd",), _BUFFERS)
    return pool_of(parts, page_size=page_size, layers=layers, dtype=dtype, has_rest=True, pool=pool)


def mha_fused(
    kv_buffer: Sequence[Any],
    *,
    page_size: int = 1,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """The one allocation that holds K and V of a layer: [2, slots, heads, dim]."""
    parts = fused("kv_buffer", kv_buffer, "2shd", "k_buffer and v_buffer go to layouts.sglang.mha")
    return pool_of(parts, page_size=page_size, layers=layers, dtype=dtype, has_rest=True, pool=pool)


def mha_hnd(
    k_buffer: Sequence[Any],
    v_buffer: Sequence[Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """With SGLANG_USE_HND_KVCACHE: [pages, heads, page_size, dim] of K and of V per layer."""
    return pool_of(k_and_v(k_buffer, v_buffer, ("bhtd",), _BUFFERS), layers=layers, dtype=dtype, pool=pool)


def mha_fp4(
    k_buffer: Sequence[Any],
    v_buffer: Sequence[Any],
    k_scale_buffer: Sequence[Any],
    v_scale_buffer: Sequence[Any],
    *,
    page_size: int = 1,
    layers: Sequence[int] | None = None,
    **pool: Any,
) -> KvPool:
    """MHATokenToKVPoolFP4: data [slots, heads, dim / 2], scales [slots, heads * dim / 16], four planes a layer."""
    parts = [
        *k_and_v(k_buffer, v_buffer, ("shd",), _BUFFERS, dtype="uint8"),
        *k_and_v(k_scale_buffer, v_scale_buffer, ("sc",), _SCALES, "_scale", dtype="uint8"),
    ]
    return pool_of(parts, page_size=page_size, layers=layers, has_rest=True, pool=pool)


def mha_mxfp8(
    k_buffer: Sequence[Any],
    v_buffer: Sequence[Any],
    k_scale_buffer: Sequence[Any],
    v_scale_buffer: Sequence[Any],
    *,
    page_size: int = 128,
    layers: Sequence[int] | None = None,
    dtype: Any = "float8_e4m3fn",
    **pool: Any,
) -> KvPool:
    """MHATokenToKVPoolMXFP8: data [slots, heads, dim] and ue8m0 scales, four planes a layer.

    The scales are flat, [slots, heads, dim / 32], or, with pages of 128, interleaved,
    [pages, heads, 32, page / 32, dim / 32]: token t of a page at (t % 32, t // 32).
    """
    parts = [
        *k_and_v(k_buffer, v_buffer, ("shd",), _BUFFERS),
        *k_and_v(k_scale_buffer, v_scale_buffer, ("shd", "bhtrd"), _SCALES, "_scale", dtype="uint8"),
    ]
    return pool_of(parts, page_size=page_size, layers=layers, dtype=dtype, has_rest=True, pool=pool)


def mla(
    kv_buffer: Sequence[Any],
    kv_scale_buffer: Sequence[Any] | None = None,
    *,
    page_size: int = 1,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """MLATokenToKVPool: rows [slots, 1, kv_lora_rank + qk_rope_head_dim].

    Args:
        kv_scale_buffer: of MLATokenToKVPoolFP4: [slots, row / 16].
    """
    kind = dtype if kv_scale_buffer is None else "uint8"
    parts = [Part("latent", Half.K, "kv_buffer", views_of("kv_buffer", kv_buffer), ("shc", "sc"), dtype=kind)]
    if kv_scale_buffer is not None:
        scales = views_of("kv_scale_buffer", kv_scale_buffer)
        parts.append(Part("latent_scale", Half.K, "kv_scale_buffer", scales, ("sc",), dtype="uint8"))
    return pool_of(parts, page_size=page_size, layers=layers, has_rest=True, pool=pool)


def dsa_index_k(
    index_k_with_scale_buffer: Sequence[Any],
    *,
    page_size: int = 64,
    layers: Sequence[int] | None = None,
    **pool: Any,
) -> KvPool:
    """Keys of the sparse-attention indexer: pages of 64 rows of 128 bytes, then 64 scales of 4; one digest for both.

    Layers that take the top-k of the one before hold no keys: leave them out, and give ``layers``.
    """
    hint = "give pages of 64 tokens (index_kpool 1); leave out layers without keys, and give layers="
    rows = [("index_k", 128), ("index_k_scale", 4)]
    name = "index_k_with_scale_buffer"
    parts = row_parts(name, index_k_with_scale_buffer, page_size, rows, page_size * 132, hint)
    return pool_of(parts, layers=layers, pool=pool)


def deepseek_v4(
    kv_buffer: Sequence[Any],
    *,
    kv_layout: str = "v4",
    page_size: int,
    layers: Sequence[int] | None = None,
    **pool: Any,
) -> KvPool:
    """A sub-pool of DeepSeekV4TokenToKVPool: uint8 [pages, bytes of a page, padded] per layer.

    Args:
        kv_layout: of KVLayout: v4, v41, v41_fp4 and uniform_fp8 hold all data rows of a page, then all its scales;
            v41_new and v41_fp4_new each token's scales behind its data.
        page_size: tokens of a page of this sub-pool.

    Raises:
        LayoutError: an unknown kv_layout, or pages of another size.
    """
    name = str(getattr(kv_layout, "value", kv_layout)).lower()
    if name not in _KV_LAYOUTS:
        raise LayoutError(f"kv_layout={kv_layout!r}: give one of {', '.join(_KV_LAYOUTS)}")
    data, scale, align, is_interleaved = _KV_LAYOUTS[name]
    rows = [("latent", data), ("latent_scale", scale)] if scale and not is_interleaved else [("latent", data + scale)]
    n_bytes = -(-page_size * (data + scale) // align) * align
    hint = f"give the page_size and kv_layout of this sub-pool, {name} is padded to a multiple of {align}"
    parts = row_parts("kv_buffer", kv_buffer, page_size, rows, n_bytes, hint)
    return pool_of(parts, layers=layers, pool=pool)


def swa(
    full: KvPool,
    swa: KvPool,
    *,
    full_to_swa_index_mapping: Any,
    window: int,
) -> tuple[KvPool, KvPool]:
    """SWAKVPool: two pools behind one table.

    Args:
        full, swa: from `mha` or its sisters, each with the numbers of its ``layers``.
        full_to_swa_index_mapping: int64 [slots]: the slot in ``swa``; 0 = evicted, a trailing -1.
        window: tokens that a query sees, its own included: one more than the model runner's sliding_window_size.
    """
    name = "swa" if swa.name == full.name else swa.name
    windowed = replace(swa, name=name, kind=PoolKind.SWA, window=window, slot_lut=full_to_swa_index_mapping)
    return full, windowed
