"""llama.cpp: cells of streams; a sequence's tokens may lie in any cells of its stream; none is reserved.

There is no table on the device: give the batch one of cells, entries "slots" of stream * kv_size + cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.layout import KvPool
from kvcanary.layouts.build import Part, k_and_v, pool_of
from kvcanary.layouts.views import views_of
from kvcanary.tags import Half


def cache(
    k: Sequence[Any],
    v: Sequence[Any],
    *,
    v_trans: bool,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """K [n_stream, kv_size, n_embd_k_gqa] per layer; V the same, or transposed [n_stream, n_embd_v_gqa, kv_size].

    Quantised rows are bytes: q8_0 has 34 for each 32 elements, so [n_stream, kv_size, n_embd / 32 * 34] of uint8.

    Args:
        k, v: arrays, or (address of the tensor's data, shape, None, itemsize).
        v_trans: whether V is transposed: it is, unless flash attention is on. An element of V then lies ``kv_size``
            elements from the next: its digest takes loads of one element.
    """
    hint = "with v_trans=True, V is [n_stream, n_embd, kv_size]"
    parts = [
        *k_and_v(k, None, ("btc",), ("k", ""), hint=hint),
        Part("v", Half.V, "v", views_of("v", v), ("bct",) if v_trans else ("btc",), hint=hint),
    ]
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
