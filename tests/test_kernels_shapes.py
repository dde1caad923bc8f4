"""Planes of every size, alignment and chunking that the digest kernels treat differently: all sides agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from agree import PoolSpec, Side, SimtSide
from agree_twins import Twins
from simt.runner import SimtLibrary

from kvcanary import KvPool, Reason, layouts
from kvcanary.layout import Plane

PAGE, N_TOKENS = 4, 37  # one slot more than a warp has lanes, and some
N_BLOCKS = 1 + -(-(N_TOKENS + 1) // PAGE)
# Around each border: one load, 2 4 8 16 32 lanes, 1 to 4 rounds, a rest of few or many pieces, long planes.
SIZES = (
    *(8, 16, 24, 32, 40, 48, 64, 80, 128, 144, 256, 272, 384, 512, 528, 576, 640, 656, 1024, 1032, 1040, 1152, 1168),
    *(1536, 1600, 1680, 2040, 2048, 2056, 2064, 2560, 4096, 4112, 65536),
)


def rows_of(*sizes: int) -> PoolSpec:
    """Planes side by side in a page, the rows of each together; every plane has a digest of its own."""

    def build(given: Mapping[str, Any]) -> KvPool:
        planes, offset = [], 0
        for i, n in enumerate(sizes):
            place = {"offset": offset, "page_stride": PAGE * sum(sizes), "token_stride": n, "chunk_bytes": n}
            planes.append(Plane(data=given["kv"], name=f"p{i}", layer=i, **place))
            offset += PAGE * n
        return KvPool(planes=tuple(planes), page_size=PAGE, n_blocks=N_BLOCKS)

    return PoolSpec({"kv": np.zeros(N_BLOCKS * PAGE * sum(sizes), np.uint8)}, build)


def heads_of(n_heads: int, n_bytes: int) -> PoolSpec:
    """Chunks of n_bytes, one per head."""
    buffers = {"k": np.zeros((N_BLOCKS, n_heads, PAGE, n_bytes), np.uint8)}
    return PoolSpec(buffers, lambda given: layouts.hnd(k=[given["k"]]))


def check(library: SimtLibrary, spec: PoolSpec, damaged_digests: Sequence[int] = (0,)) -> None:
    """Digests written, found right, found wrong after one flip in each of some digests' planes, and right again."""
    twins = Twins([spec], [Side(), SimtSide(library), SimtSide(library, 2, seed=3)], 2, N_TOKENS, verify_data_every=1)
    rng = np.random.default_rng(1)
    table = (1 + rng.permutation(N_BLOCKS - 1)).astype(np.int32)[None]

    def forward(first: int, n: int) -> None:
        position = np.arange(first, first + n)
        slots = table[0, position // PAGE].astype(np.int64) * PAGE + position % PAGE
        arrays = {
            "block_table": table,
            "seq_lens": np.array([first + n], np.int32),
            "query_start_loc": np.array([0, n], np.int32),
            "input_ids": position.astype(np.int32),
            "slot_mapping": slots,
            "request_slots": np.zeros(1, np.int32),
            "request_ids": np.ones(1, np.uint32),
            "verify_all": np.ones(1, np.uint8),
        }
        twins.forward(arrays, model=lambda: twins.write_kv(0, slots, rng))

    forward(0, N_TOKENS)
    forward(N_TOKENS, 1)
    assert len(twins.records) == 0
    pool, struck = twins.pools[0], {}
    for d in damaged_digests:
        position = int(rng.integers(N_TOKENS))
        slot = int(table[0, position // PAGE]) * PAGE + position % PAGE
        plane = pool.ordered_planes[pool.digest_units()[d].first_plane]
        data = pool.host_bytes(plane)[slot // PAGE, slot % PAGE].reshape(-1)
        at = int(rng.integers(data.size))
        data_view = pool.host_bytes(plane)[slot // PAGE, slot % PAGE]
        data_view[at // data_view.shape[1], at % data_view.shape[1]] ^= 1 << int(rng.integers(8))
        struck[d] = slot
    forward(N_TOKENS, 1)
    assert set(twins.records["reasons"]) == {int(Reason.DATA)}
    assert dict(zip(twins.records["plane"].tolist(), twins.records["slot"].tolist(), strict=True)) == struck


@pytest.mark.parametrize("n_bytes", SIZES)
def test_one_plane(library: SimtLibrary, n_bytes: int) -> None:
    check(library, rows_of(n_bytes))


@pytest.mark.parametrize(
    ("n_heads", "n_bytes"),
    [(8, 256), (3, 16), (5, 48), (2, 1024), (7, 80), (4, 24), (3, 8), (129, 16), (1, 64), (2, 2), (3, 6)],
)
def test_chunks(library: SimtLibrary, n_heads: int, n_bytes: int) -> None:
    check(library, heads_of(n_heads, n_bytes))


@pytest.mark.parametrize("sizes", [(576, 8), (16, 16), (2048, 16, 8), (8, 8, 8), (6, 16), (16, 6, 8), (1152, 4, 16)])
def test_small_planes_beside_others(library: SimtLibrary, sizes: tuple[int, ...]) -> None:
    """A plane of one load is read along with the digest before it."""
    check(library, rows_of(*sizes), range(len(sizes)))
