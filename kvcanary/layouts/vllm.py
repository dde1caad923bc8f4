"""vLLM: blocks of one group; block 0 is the null block, slot mappings are padded with -1, block tables with 0.

Read the *gathered* block table, the one that the kernels get: in the persistent one, freed blocks of a sliding window
still stand. Tensors of several groups may lie over each other: a pool each, a block belongs to one group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvcanary.arrays import contiguous_strides, view_of
from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool
from kvcanary.layouts.build import Part, fused, k_and_v, pool_of, row_parts
from kvcanary.layouts.views import page_bytes, region, views_of
from kvcanary.tags import Half

ORDERS = (
    "LBHNC",
    "LBNHC",
    "LHBNC",
    "BLHNC",
    "BLNHC",
    "BHLNC",
)  # physical order of layers, blocks, heads, tokens, content
_LEGACY = {"NHD": "LBNHC", "HND": "LBHNC"}
_ROW_BYTES = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}
_OTHERS = (
    "3 axes are latent rows, layouts.vllm.mla; 5 axes are a shape before 0.28, "
    "layouts.vllm.flash_attn ([2, blocks, ...]) or .flashinfer ([blocks, 2, ...])"
)


def packed(kv_caches: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any) -> KvPool:
    """Since 0.28: a view [blocks, heads, tokens, content] per layer, K and V packed in the content.

    Strides tell the physical order (`ORDERS`). Also for ``fp8``, whose scales are outside the cache, and for
    ``*_per_token_head``, whose content is K, its scale, V, its scale: give ``dtype="uint8"``, it is not of one type.

    Args:
        kv_caches: one view per layer, as ``forward_context[layer].kv_cache``; int8 ones do not tell their ``dtype``.
        layers, dtype, pool: as in `kvcanary.layouts.nhd`.
    """
    part = Part("kv", Half.K, "kv_caches", views_of("kv_caches", kv_caches), ("bhtc",), hint=_OTHERS)
    return pool_of([part], layers=layers, dtype=dtype, pool=pool)


def packed_tensor(
    tensor: Any,
    *,
    layout: str,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    content_bytes: int,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """The same from the one flat buffer of a group and the name of its order.

    Args:
        tensor: the buffer, in C order; the first bytes are those of layer 0, block 0.
        layout: one of `ORDERS`, or the older names NHD and HND (VLLM_KV_CACHE_LAYOUT).
        num_layers, num_blocks, num_kv_heads, block_size: of the group; a block has block_size slots.
        content_bytes: (head_size + head_size_v) * bytes of an element, and scales.

    Raises:
        LayoutError: an unknown order, or a buffer that is too small.
    """
    order = _LEGACY.get(layout, layout)
    if order not in ORDERS:
        raise LayoutError(f"layout={layout!r}: give one of {', '.join((*ORDERS, *_LEGACY))}")
    sizes = dict(zip("LBHNC", (num_layers, num_blocks, num_kv_heads, block_size, content_bytes), strict=True))
    shape = [sizes[axis] for axis in order]
    steps = dict(zip(order, contiguous_strides(shape, 1), strict=True))
    flat = view_of(tensor, "tensor", LayoutError)
    needed = steps[order[0]] * sizes[order[0]]
    if min(shape) < 1 or not flat.is_contiguous or flat.size * flat.itemsize < needed:
        raise LayoutError(
            f"tensor has {flat.size * flat.itemsize} bytes, strides {flat.strides}; {order} of {sizes} takes {needed} "
            "in C order: check the sizes (KVCacheConfig.kv_cache_tensors tells them)"
        )
    views = [
        replace(
            flat,
            pointer=flat.pointer + layer * steps["L"],
            shape=tuple(sizes[axis] for axis in "BHNC"),
            strides=tuple(steps[axis] for axis in "BHNC"),
            itemsize=1,
            dtype="",
            host=None,
        )
        for layer in range(num_layers)
    ]
    return packed(views, layers=layers, dtype=dtype, **pool)


def nvfp4(
    kv_caches: Sequence[Any],
    *,
    num_kv_heads: int,
    head_size: int,
    layers: Sequence[int] | None = None,
    **pool: Any,
) -> KvPool:
    """``kv_cache_dtype="nvfp4"``: a page is K data, K scales, V data, V scales, each [heads, tokens, bytes].

    Per head and token, data are ``head_size / 2`` bytes, scales ``head_size / 16``: four planes a layer.

    Args:
        kv_caches: one array per layer whose first axis is the block's; the rest of it in line.

    Raises:
        LayoutError: pages that are no whole number of tokens.
    """
    widths = (head_size // 2, head_size // 16) * 2
    pages = [page_bytes(view, f"kv_caches[{i}]") for i, view in enumerate(views_of("kv_caches", kv_caches))]
    token_bytes = num_kv_heads * sum(widths)
    if head_size % 16 or token_bytes < 1 or pages[0].shape[1] % token_bytes:
        raise LayoutError(
            f"kv_caches[0] has pages of {pages[0].shape[1]} bytes, no multiple of {token_bytes}, the bytes of a token "
            f"with num_kv_heads={num_kv_heads}, head_size={head_size} (a multiple of 16): give the sizes of this rank"
        )
    n_tokens = pages[0].shape[1] // token_bytes
    parts, start = [], 0
    for i, width in enumerate(widths):
        views = [region(view, start, (num_kv_heads, n_tokens, width)) for view in pages]
        name = "kv"[i // 2] + ("_scale" if i % 2 else "")
        parts.append(Part(name, Half(i // 2), "kv_caches", views, ("bhtd",), dtype="uint8"))
        start += num_kv_heads * n_tokens * width
    return pool_of(parts, layers=layers, pool=pool)


def mla(
    kv_caches: Sequence[Any],
    *,
    kv_cache_dtype: str = "auto",
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """Latent rows, [blocks, tokens, row] or [blocks, 1, tokens, row]: bf16 (576 elements), fp8_ds_mla, nvfp4_ds_mla,
    DeepSeek-V4.1 (528 or 288 bytes).

    Args:
        kv_cache_dtype: with ``fp8_ds_mla`` (656 bytes) and ``nvfp4_ds_mla`` (352) the row's length is checked, and its
            bytes are not taken for floats of one type.
    """
    views = views_of("kv_caches", kv_caches)
    wanted = _ROW_BYTES.get(kv_cache_dtype)
    row = views[0].shape[-1] * views[0].itemsize if views[0].shape else 0
    if wanted and row != wanted:
        raise LayoutError(
            f"kv_caches[0] has rows of {row} bytes, {kv_cache_dtype} has {wanted}: give the engine's kv_cache_dtype"
        )
    hint = "pages that hold their scales behind all rows are layouts.vllm.deepseek_v4 or .dsa_indexer"
    part = Part("latent", Half.K, "kv_caches", views, ("btc", "bhtc"), hint=hint)
    return pool_of([part], layers=layers, dtype="uint8" if wanted else dtype, pool=pool)


def deepseek_v4(
    kv_caches: Sequence[Any], *, block_size: int, layers: Sequence[int] | None = None, **pool: Any
) -> KvPool:
    """DeepSeek-V4's 584 bytes: a page is all its rows of 576 bytes (448 fp8, 64 bf16), then 8 bytes of scales for each.

    Args:
        kv_caches: one array per layer, [blocks, bytes of a page], pages rounded up to a multiple of 576 bytes.
    """
    n_bytes = -(-block_size * 584 // 576) * 576
    hint = "give the engine's block_size; rows with their scales in them are layouts.vllm.mla"
    parts = row_parts("kv_caches", kv_caches, block_size, [("latent", 576), ("latent_scale", 8)], n_bytes, hint)
    return pool_of(parts, layers=layers, pool=pool)


def dsa_indexer(
    kv_caches: Sequence[Any], *, block_size: int = 64, layers: Sequence[int] | None = None, **pool: Any
) -> KvPool:
    """The indexer's keys of sparse attention: a page is all its rows of 128 bytes, then a scale of 4 bytes for each.

    Both share one digest.

    Args:
        kv_caches: one array per layer, [blocks, tokens, 132] or [blocks, bytes of a page].
    """
    hint = "give the engine's block_size"
    rows = [("index_k", 128), ("index_k_scale", 4)]
    parts = row_parts("kv_caches", kv_caches, block_size, rows, block_size * 132, hint)
    return pool_of(parts, layers=layers, pool=pool)


def flash_attn(
    kv_caches: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any
) -> KvPool:
    """FlashAttention before 0.28: [2, blocks, tokens, heads, dim] per layer; strides tell NHD and HND apart."""
    parts = fused("kv_caches", kv_caches, "2bthd", "the blocks-first shape is layouts.vllm.flashinfer")
    return pool_of(parts, layers=layers, dtype=dtype, pool=pool)


def flashinfer(
    kv_caches: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any
) -> KvPool:
    """FlashInfer and Triton before 0.28: [blocks, 2, tokens, heads, dim] per layer; strides tell NHD and HND apart."""
    parts = fused("kv_caches", kv_caches, "b2thd", "the K-and-V-first shape is layouts.vllm.flash_attn")
    return pool_of(parts, layers=layers, dtype=dtype, pool=pool)


def paged_attention(
    key_caches: Sequence[Any],
    value_caches: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """PagedAttention of version 0: K [blocks, heads, dim / x, tokens, x], V [blocks, heads, dim, tokens].

    An element of V lies ``tokens`` elements from the next: its digest takes loads of one element.
    """
    parts = [
        *k_and_v(key_caches, None, ("bhxtc",), ("key_caches", "")),
        Part("v", Half.V, "value_caches", views_of("value_caches", value_caches), ("bhdt",)),
    ]
    return pool_of(parts, layers=layers, dtype=dtype, pool=pool)
