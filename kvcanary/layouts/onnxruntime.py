"""ONNX Runtime and ONNX Runtime GenAI: no block is reserved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.layout import KvPool
from kvcanary.layouts.build import fused, k_and_v, pool_of


def share_buffer(
    past_key: Sequence[Any],
    past_value: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """``past_present_share_buffer``: [batch * beams, heads, max_length, dim] per layer; row r is block r (no table).

    Args:
        past_key, past_value: OrtValues, or (pointer, shape, None, itemsize) of them.
    """
    parts = k_and_v(past_key, past_value, ("bhtd",), ("past_key", "past_value"))
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def combined(past: Sequence[Any], *, layers: Sequence[int] | None = None, dtype: Any = "", **pool: Any) -> KvPool:
    """The older combined cache: [2, batch * beams, heads, max_length, dim] per layer; row r is block r (no table)."""
    parts = fused("past", past, "2bhtd", "separate OrtValues go to layouts.onnxruntime.share_buffer")
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})


def genai_paged(
    key_cache: Sequence[Any],
    value_cache: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """GenAI's engine: [num_blocks, block_size, heads, dim] per layer; the block table is padded with -1.

    Windowed layers have a table of their own whose ids repeat: a pool of their own.
    """
    parts = k_and_v(key_cache, value_cache, ("bthd",), ("key_cache", "value_cache"))
    return pool_of(parts, layers=layers, dtype=dtype, pool={"reserved_blocks": (), **pool})
