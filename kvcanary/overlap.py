"""Which planes share bytes, told from their strides: exactly, and without going through their slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from kvcanary.planes import Plane, axes_of

Axes: TypeAlias = tuple[tuple[int, int], ...]  # (stride, count) of each
_MAX_TRIES = 4096  # multiples of strides that are tried before two grids count as apart


class Placed(NamedTuple):
    """A plane of a pool, with what tells where its slots lie; ``pool`` is a number."""

    plane: Plane
    n_blocks: int
    page_size: int
    pool: int = 0


def overlapping(placed: Sequence[Placed], *, in_one_pool: bool) -> Iterator[tuple[Placed, Placed]]:
    """Pairs of planes that share a byte, either of one pool each or of two; what cannot be decided cheaply is apart."""
    starts = [p.plane.view.pointer + p.plane.offset for p in placed]
    axes = [tuple(axes_of(*p[:3])) for p in placed]
    spans = [p.plane.chunk_bytes + sum(s * (n - 1) for s, n in grid) for p, grid in zip(placed, axes, strict=True)]
    ends = [start + span for start, span in zip(starts, spans, strict=True)]
    order = sorted(range(len(placed)), key=starts.__getitem__)
    for at, i in enumerate(order):
        for j in order[at + 1 :]:
            if starts[j] >= ends[i]:
                break
            a, b = placed[i], placed[j]
            if (a.pool == b.pool) != in_one_pool:
                continue
            n_bytes = a.plane.chunk_bytes, b.plane.chunk_bytes
            if _share_a_byte(starts[j] - starts[i], axes[i], n_bytes[0], axes[j], n_bytes[1]):
                yield (a, b) if i < j else (b, a)


@lru_cache(maxsize=1 << 14)  # the layers of a pool lie alike
def _share_a_byte(
    distance: int,
    axes: tuple[tuple[int, int], ...],
    n_bytes: int,
    other_axes: tuple[tuple[int, int], ...],
    n_other: int,
) -> bool:
    """Whether a run of ``n_bytes`` of the first grid meets a run of ``n_other`` of the second, ``distance`` behind it.

    Two runs meet if the second begins less than ``n_bytes`` behind the first and the first less than ``n_other`` behind
    the second. The distance of two runs is ``distance`` and, for each stride, a multiple of it in a known range: the
    multiples are tried from the largest stride down, only those from which the finer strides can still get there.
    """
    ranges: dict[int, tuple[int, int]] = {}
    for sign, grid in ((-1, axes), (1, other_axes)):
        for stride, n in grid:
            low, high = ranges.get(stride, (0, 0))
            ranges[stride] = (low - (n - 1), high) if sign < 0 else (low, high + n - 1)
    steps = [(stride, *ranges[stride]) for stride in sorted(ranges, reverse=True)]
    reach = [(0, 0)]  # of the strides from the i-th on
    for stride, low, high in reversed(steps):
        reach.append((reach[-1][0] + stride * low, reach[-1][1] + stride * high))
    reach.reverse()
    open_ends = [(0, distance)]
    for _ in range(_MAX_TRIES):
        if not open_ends:
            return False
        i, at = open_ends.pop()
        if i == len(steps):
            return True
        (stride, low, high), (back, ahead) = steps[i], reach[i + 1]
        # -n_other < at + multiple * stride + [back, ahead] < n_bytes
        first = max(low, (-n_other - at - ahead) // stride + 1)
        last = min(high, -((at + back - n_bytes) // stride) - 1)
        open_ends.extend(
            (i + 1, at + multiple * stride) for multiple in range(first, min(last, first + _MAX_TRIES) + 1)
        )
    return False
