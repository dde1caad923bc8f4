"""Pools whose planes noise describes: refused with a LayoutError, or inside their buffers, as a sanitizer sees."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from agree import PoolSpec

from kvcanary import Half, KvPool, LayoutError, Plane, PoolKind

_CHUNKS = (1, 2, 3, 4, 6, 8, 16, 16, 20, 32, 48, 96)
_NUMBERS = (0, 1, 2, 3, 4, 8, 15, 16, 17, 24, 33, 64, 100, 257, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32)
_FAR = (-(1 << 62), -64, -1, (1 << 62), (1 << 63) - 1, 1 << 64)
_DTYPES = ("", "uint8", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float32")


def hostile_pool(rng: random.Random) -> PoolSpec | None:
    """A pool of planes, mostly with something wrong in what is said of it; None where it was refused."""
    page, n_blocks = rng.choice((1, 2, 3, 4, 16)), rng.choice((1, 2, 4, 6))
    planes = [_plane(rng, page, n_blocks, i) for i in range(rng.randint(1, 3))]
    sizes = [plane.pop("n_bytes") for plane in planes]
    window = rng.choice((None, None, 1, 5, 40))
    fields: dict[str, Any] = {
        "page_size": page,
        "n_blocks": rng.choice((n_blocks, n_blocks, 0)),
        "kind": PoolKind.FULL if window is None else PoolKind.SWA,
        "window": window,
        "reserved_blocks": rng.choice(((), (0,), (0,), (n_blocks - 1,))),
        "token_offset": rng.choice((0, 0, 0, 1, -2)),
    }
    for _ in range(rng.choice((0, 1, 1, 2))):
        _spoil(rng, planes, sizes, fields)

    def build(given: Mapping[str, Any]) -> KvPool:
        described = [Plane(data=given[f"p{i}"], **plane) for i, plane in enumerate(planes)]
        return KvPool(planes=tuple(described), **fields)

    bytes_of = np.random.default_rng(rng.getrandbits(32))
    spec = PoolSpec({f"p{i}": bytes_of.integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}, build)
    try:
        build(spec.buffers).check()
    except LayoutError:
        return None
    return spec


def _plane(rng: random.Random, page: int, n_blocks: int, i: int) -> dict[str, Any]:
    """Strides that nest in some order, and how many bytes that takes."""
    counts = {"page_stride": n_blocks, "token_stride": page, "chunk_stride": rng.choice((1, 1, 2, 3))}
    dtype = rng.choice(_DTYPES)
    whole = 4 if dtype == "float32" else 2 if dtype in ("float16", "bfloat16") else 1
    chunk = rng.choice([n for n in _CHUNKS if n % whole == 0])
    plane: dict[str, Any] = {"chunk_bytes": chunk, "n_chunks": counts["chunk_stride"], "dtype": dtype, "layer": i}
    plane["half"] = Half.V if i and rng.random() < 0.3 else Half.K
    plane["offset"] = rng.choice((0, 0, 1, 8))
    extent, axes = chunk, list(counts)
    rng.shuffle(axes)
    for axis in axes:
        plane[axis] = extent + rng.choice((0, 0, 0, 1, 8, 16))
        extent = plane[axis] * counts[axis]
    plane["n_bytes"] = plane["offset"] + extent
    return plane


def _spoil(rng: random.Random, planes: list[dict[str, Any]], sizes: list[int], fields: dict[str, Any]) -> None:
    """One thing that is said is not so, any more."""
    i, what = rng.randrange(len(planes)), rng.randrange(5)
    if what == 0:
        name = rng.choice(("offset", "page_stride", "token_stride", "chunk_stride", "n_chunks", "chunk_bytes"))
        planes[i][name] = max(rng.choice((*_NUMBERS, *_FAR, planes[i][name] - 1, planes[i][name] + 1)), -(1 << 70))
    elif what == 1:
        sizes[i] = max(0, rng.choice((0, 1, sizes[i] - 1, sizes[i] // 2, sizes[i] + 40)))
    elif what == 2:
        fields["window"] = rng.choice((None, 0, 1, (1 << 31) - 1, 1 << 31, -1))
    elif what == 3:
        n_blocks = fields["n_blocks"]
        odd = ((n_blocks,), (0, 0), tuple(range(9)), (-1,), tuple(range(n_blocks)))
        fields["reserved_blocks"] = rng.choice(odd)
    else:
        planes[i] |= rng.choice(({"group": "g"}, {"layer": 0}, {"half": Half.V}, {"dtype": "float32"}))
        fields["token_offset"] = rng.choice((0, 40, (1 << 31) - 1, -(1 << 31) + 1, 1 << 31, -(1 << 31)))
