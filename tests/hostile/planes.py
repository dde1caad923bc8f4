"""Pools whose planes noise describes: refused with a LayoutError, or inside their buffers, as a sanitizer sees."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from agree import PoolSpec

from kvcanary import Half, KvPool, LayoutError, Plane, PoolKind

_SIZES = (0, 1, 2, 3, 4, 6, 8, 15, 16, 17, 20, 24, 32, 33, 48, 64, 96, 128)
_FAR = (-(1 << 62), -64, -1, 257, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 62), (1 << 63) - 1, 1 << 64)


def hostile_pool(rng: random.Random) -> PoolSpec | None:
    """A pool of planes that noise describes; None where the description was refused."""
    n_planes = rng.randint(1, 3)
    page, n_blocks = rng.choice((1, 2, 3, 4, 16)), rng.choice((0, 1, 2, 4, 6))
    sizes = [rng.choice((0, 1, 64, 257, 1024, 4096)) for _ in range(n_planes)]
    numbers = [_numbers(rng, page, max(1, n_blocks)) for _ in range(n_planes)]
    if rng.random() < 0.4:  # one number of a plane that may have been right
        spoiled = rng.choice(numbers)
        spoiled[rng.choice(sorted(spoiled))] = rng.choice((*_SIZES, *_FAR))
    window = rng.choice((None, 0, 1, 5, 1 << 31))
    fields: dict[str, Any] = {
        "page_size": page,
        "n_blocks": n_blocks,
        "kind": PoolKind.FULL if window is None else PoolKind.SWA,
        "window": window,
        "reserved_blocks": rng.choice(((), (0,), (n_blocks - 1,), (0, 0), tuple(range(9)))),
        "token_offset": rng.choice((0, 0, 0, 1, -2, 1 << 31)),
    }
    dtypes = [rng.choice(("", "uint8", "float16", "bfloat16", "float8_e5m2", "float8_e5m2")) for _ in range(n_planes)]
    groups = [rng.choice((None, None, "g")) for _ in range(n_planes)]
    halves = [rng.choice((Half.K, Half.K, Half.V)) for _ in range(n_planes)]

    def build(given: Mapping[str, Any]) -> KvPool:
        planes = [
            Plane(data=given[f"p{i}"], layer=i % 2, half=halves[i], group=groups[i], dtype=dtypes[i], **numbers[i])
            for i in range(n_planes)
        ]
        return KvPool(planes=tuple(planes), **fields)

    bytes_of = np.random.default_rng(rng.getrandbits(32))
    spec = PoolSpec({f"p{i}": bytes_of.integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}, build)
    try:
        build(spec.buffers).check()
    except LayoutError:
        return None
    return spec


def _numbers(rng: random.Random, page: int, n_blocks: int) -> dict[str, int]:
    """Strides that nest in some order, mostly."""
    counts = {"page_stride": n_blocks, "token_stride": page, "chunk_stride": rng.choice((1, 1, 2, 3))}
    found = {"chunk_bytes": rng.choice(_SIZES[1:]), "n_chunks": counts["chunk_stride"]}
    found["offset"] = rng.choice((0, 0, 1, 8))
    extent, axes = found["chunk_bytes"], list(counts)
    rng.shuffle(axes)
    for axis in axes:
        found[axis] = extent + rng.choice((0, 0, 0, 0, 1, 8, 16, -1))
        extent = max(1, found[axis]) * counts[axis]
    return found
