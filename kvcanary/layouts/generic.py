"""Pools of the common layouts, described from the arrays' own shapes and strides; one array per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcanary.layout import KvPool
from kvcanary.layouts.build import Part, k_and_v, pool_of
from kvcanary.layouts.views import views_of
from kvcanary.tags import Half

_SLICE = "slice a fused array, kv[:, 0] and kv[:, 1]"


def nhd(
    *,
    k: Sequence[Any],
    v: Sequence[Any] | None = None,
    page_size: int | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """Tokens before heads: [n_blocks, page_size, heads, dim], or [n_slots, heads, dim].

    Args:
        k: one array per layer, of any strides; a fused K and V array counts as K.
        v: likewise, or None.
        page_size: slots per block; needed only where the arrays have no block axis (default 16).
        layers: numbers of the layers; None = 0, 1, ...
        dtype: name or type object of the elements, where the arrays do not tell it (uint8, uint16, raw pointers).
        pool: further fields of `KvPool`: name, kind, window, reserved_blocks, token_offset, slot_lut, ...
    """
    parts = k_and_v(k, v, ("bthd", "shd"), hint=_SLICE)
    return pool_of(parts, page_size=page_size, layers=layers, dtype=dtype, pool=pool)


def hnd(
    *,
    k: Sequence[Any],
    v: Sequence[Any] | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """Heads before tokens: [n_blocks, heads, page_size, dim]; a static cache has one block per sequence.

    Args:
        k, v, layers, dtype, pool: as in `nhd`; a static cache has no reserved block: ``reserved_blocks=()``.
    """
    return pool_of(k_and_v(k, v, ("bhtd",), hint=_SLICE), layers=layers, dtype=dtype, pool=pool)


def token_major(
    *,
    latent: Sequence[Any],
    page_size: int | None = None,
    half: Half = Half.K,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    **pool: Any,
) -> KvPool:
    """One row per token, as in latent (MLA) caches: [n_blocks, page_size, row], or [n_slots, row].

    Args:
        latent: one array per layer.
        page_size, layers, dtype, pool: as in `nhd`.
    """
    part = Part("latent", half, "latent", views_of("latent", latent), ("btc", "sc"), hint=_SLICE)
    return pool_of([part], page_size=page_size, layers=layers, dtype=dtype, pool=pool)
