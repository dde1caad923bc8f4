"""TensorRT-LLM: one pool per window and head size; no block is reserved, block tables are padded with 0.

Rows that only pad a captured graph are requests with blocks of their own. The engine's tables hold offsets of K and of
V, in units of one layer's K or V block: give block ids (the offset of K / (layers * kv_factor) of its pool).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvcanary.arrays import view_of
from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool
from kvcanary.layouts.build import fused, pool_of
from kvcanary.layouts.views import select, split_axis

_AXES = {"NHD": "b2thd", "HND": "b2htd"}


def pool(
    primary_pool: Any,
    *,
    num_kv_heads: int,
    tokens_per_block: int,
    head_dim: int,
    kv_layout: str = "HND",
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """A whole pool, [blocks, layers, kv_factor, heads * tokens * dim]; kv_factor 1 (MLA) has K alone.

    Args:
        primary_pool: the pool in device memory; pages in the secondary pool are not seen.
        kv_layout: inside a block, "HND" (the TRTLLM kernels) or "NHD", as the attention backend takes it.
        layers: numbers of the pool's layers; None = 0, 1, ...

    Raises:
        LayoutError: another number of axes, or blocks of another size.
    """
    view = view_of(primary_pool, "primary_pool", LayoutError)
    sizes = {"H": num_kv_heads, "N": tokens_per_block, "D": head_dim}
    wanted = math.prod(sizes.values())
    if len(view.shape) != 4 or view.shape[3] != wanted:
        raise LayoutError(
            f"primary_pool has shape {view.shape}: give [blocks, layers, kv_factor, {wanted}], "
            f"{num_kv_heads} heads x {tokens_per_block} tokens x {head_dim} dim, or one array per layer to .buffers"
        )
    _axes(kv_layout)
    of_layers = [select(view, 1, layer) for layer in range(view.shape[1])]
    blocks = [split_axis(layer, 2, [sizes[letter] for letter in kv_layout]) for layer in of_layers]
    return buffers(blocks, kv_layout, layers=layers, dtype=dtype, **pool)


def buffers(
    buffers: Sequence[Any],
    kv_layout: str = "NHD",
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """What ``KVCacheManager.get_buffers(layer, kv_layout)`` gives for each layer.

    Args:
        buffers: per layer [pages, kv_factor, tokens, heads, dim] ("NHD") or [pages, kv_factor, heads, tokens, dim].
    """
    parts = fused("buffers", buffers, _axes(kv_layout), "the whole pool of 4 axes goes to .pool", may_be_latent=True)
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def _axes(kv_layout: str) -> str:
    if kv_layout not in _AXES:
        raise LayoutError(f"kv_layout={kv_layout!r}: give 'NHD' or 'HND'")
    return _AXES[kv_layout]
