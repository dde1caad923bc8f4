"""Which planes share bytes: against every byte of small grids; and which overlaps are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import CanaryConfig, CanaryManager, ConfigError, KvPool, LayoutError, Plane, layouts
from kvcanary.overlap import _share_a_byte

GRIDS = st.lists(st.tuples(st.integers(1, 12), st.integers(2, 4)), max_size=3).map(tuple)


def bytes_of(start: int, axes: tuple[tuple[int, int], ...], n: int) -> set[int]:
    starts = {start}
    for stride, count in axes:
        starts = {s + stride * i for s in starts for i in range(count)}
    return {s + i for s in starts for i in range(n)}


@given(st.integers(0, 40), GRIDS, st.integers(1, 5), GRIDS, st.integers(1, 5))
def test_grids_share_a_byte_if_some_byte_is_in_both(
    distance: int, axes: Any, n_bytes: int, other_axes: Any, n_other: int
) -> None:
    mine, others = bytes_of(0, axes, n_bytes), bytes_of(distance, other_axes, n_other)
    expected = bool(mine & others)
    if distance < max(mine) + 1:  # else the ranges are apart, which is seen before
        assert _share_a_byte(distance, axes, n_bytes, other_axes, n_other) is expected


def plane(data: Any, **fields: Any) -> Plane:
    return Plane(data=data, **{"page_stride": 64, "token_stride": 16, "chunk_bytes": 16, **fields})


def test_planes_of_one_pool_that_share_a_byte_are_refused() -> None:
    memory = np.zeros(1024, np.uint8)
    KvPool(
        planes=(plane(memory, chunk_bytes=8), plane(memory, offset=8, chunk_bytes=8, layer=1)), page_size=4, n_blocks=4
    )
    with pytest.raises(LayoutError, match="plane 'k' of layer 0 and plane 'k' of layer 1 share bytes: give shared"):
        KvPool(planes=(plane(memory), plane(memory, offset=8, chunk_bytes=8, layer=1)), page_size=4, n_blocks=4)


def test_layers_woven_into_one_array_are_apart() -> None:
    woven = np.zeros((9, 40, 2, 4, 2, 8), np.float16)  # block, layer, K and V, token, head, dim
    k, v = ([woven[:, layer, half] for layer in range(40)] for half in range(2))
    pool = layouts.nhd(k=k, v=v)
    assert len(pool.planes) == 80
    other = layouts.nhd(k=[woven[:, 39, 1]], name="other")
    with pytest.raises(
        LayoutError, match="plane 'v' of layer 39 of pool 'full' and plane 'k' of layer 0 of pool 'other'"
    ):
        CanaryManager(CanaryConfig(), [pool, other], 2, 8)


def two_pools(dtype: Any = np.float16, **fields: Any) -> list[KvPool]:
    """Two groups of layers over one memory: 8 blocks of 4 slots, and of 8 slots of half the size."""
    memory = np.zeros(8 * 256, np.uint8)
    wide, narrow = memory.view(np.float16).reshape(8, 4, 2, 16), memory.view(dtype).reshape(8, 8, 2, -1)
    names = ("wide", "narrow")
    return [layouts.nhd(k=[k], name=n, **fields) for k, n in zip((wide, narrow), names, strict=True)]


def test_pools_that_share_memory_must_both_say_so() -> None:
    wide, narrow = two_pools()
    with pytest.raises(LayoutError, match="of pool 'wide' and plane 'k' of layer 0 of pool 'narrow' share bytes: give"):
        CanaryManager(CanaryConfig(lifecycle=True), [wide, narrow], 2, 8)
    one_of_them = KvPool(planes=wide.planes, page_size=4, name="wide", may_alias=True)
    with pytest.raises(LayoutError, match="make both pools with may_alias=True"):
        CanaryManager(CanaryConfig(lifecycle=True), [one_of_them, narrow], 2, 8)
    with CanaryManager(CanaryConfig(lifecycle=True), two_pools(may_alias=True), 2, 8) as manager:
        assert manager.describe().count("shares memory with other pools") == 2
    CanaryManager(CanaryConfig(mode="off"), two_pools(), 2, 8)


def test_shared_memory_needs_lifecycle() -> None:
    with pytest.raises(ConfigError, match="pool 'wide' has may_alias=True, but lifecycle=False"):
        CanaryManager(CanaryConfig(), two_pools(may_alias=True), 2, 8)


def test_reserved_blocks_of_two_types_are_not_looked_through() -> None:
    config = CanaryConfig(lifecycle=True, check_reserved_every=2)
    with pytest.raises(ConfigError, match=r"check_reserved_every=2: .* not the type of their elements"):
        CanaryManager(config, two_pools(np.float32, may_alias=True), 2, 8)
    CanaryManager(config, two_pools(np.float16, may_alias=True), 2, 8).close()
