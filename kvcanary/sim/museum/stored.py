"""What the scenarios of loads begin with: a prefix in a store, and foreign KV where it will be loaded to."""

from __future__ import annotations

from typing import Any

from kvcanary.sim.museum.places import Array
from kvcanary.sim.museum.rows import A, D, Row, X
from kvcanary.sim.museum.stage import Stage


def stored_prefix(s: Stage) -> tuple[Any, dict[str, Array]]:
    """A's two blocks as a store keeps them; blocks 3 and 4, which D was given for them, still hold X's KV."""
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([3, 4], X)
    s.forward(Row(X, 0, n, [3, 4]))
    s.free([3, 4], X)
    s.allocate([3, 4, 5], D)
    return stored
