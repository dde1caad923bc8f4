"""Arrays of noise: random bytes, edges of the type and of what the pools hold, or plausible with a few of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EDGES = (-(1 << 31), -(1 << 31) + 1, -2, -1, 0, 1, 2, (1 << 31) - 2, (1 << 31) - 1, 1 << 16, 1 << 30)
WIDE_EDGES = (
    *(-(1 << 63), -(1 << 63) + 1, -(1 << 40), -(1 << 32), (1 << 31), (1 << 32) - 1, 1 << 32, (1 << 32) + 5),
    *((1 << 40) + 1, (1 << 62), (1 << 63) - 2, (1 << 63) - 1),
)


class Noise:
    """Makes noise of a seed.

    Args:
        near: numbers that the code compares with (slots, blocks, rows, ...): they and their neighbours come often.
    """

    def __init__(self, seed: int, near: Sequence[int]) -> None:
        self.rng = np.random.default_rng(seed)
        around = {n + d for n in near for d in (-1, 0, 1)}
        self._narrow = np.array(sorted({n for n in (*EDGES, *around) if -(1 << 31) <= n < 1 << 31}), np.int64)
        self._wide = np.array(sorted({*EDGES, *WIDE_EDGES, *around}), np.int64)

    def maybe(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def fill(self, shape: tuple[int, ...], dtype: Any, plausible: Array | None = None) -> Array:
        """An array of noise; now and then a plausible one of which some entries are noise."""
        dtype = np.dtype(dtype)
        n, kind = int(np.prod(shape)), self.below(5 if plausible is not None and plausible.size else 4)
        if kind == 0:
            found = np.frombuffer(self.rng.bytes(n * dtype.itemsize), dtype)
        elif kind == 1:
            found = self._edges(n, dtype)
        elif kind == 2:
            found = self.rng.integers(-3 if dtype.kind == "i" else 0, 70, n).astype(dtype)
        elif kind == 3:
            found = np.where(self.rng.random(n) < 0.2, self._edges(n, dtype), self.rng.integers(0, 40, n).astype(dtype))
        else:
            assert plausible is not None
            found = plausible.reshape(-1).copy()
            at = self.rng.integers(0, n, 1 + self.below(3))
            found[at] = self._edges(len(at), dtype)
        return found.reshape(shape)

    def _edges(self, n: int, dtype: np.dtype[Any]) -> Array:
        return self.rng.choice(self._wide if dtype.itemsize == 8 else self._narrow, n).astype(dtype)
