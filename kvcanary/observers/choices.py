"""Which pools the forwards take: one that is left out now and then is no stalled guard."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from kvcanary.tags import CanaryLaunchTag, Stage

_IN_FORWARD = [tag for tag in CanaryLaunchTag if tag.stage != Stage.SWEEP]


class PoolChoices:
    """The sets of pools that forwards were bound with so far (``pools=``).

    With replays of a graph the host does not see which pools a forward takes, only what was bound. But every step that
    counts has a first forward (``index=0``), so that all pools of one of these sets run in it, and those that are in
    all of them always do.
    """

    def __init__(self) -> None:
        self._first: set[frozenset[int]] = set()
        self._others: set[frozenset[int]] = set()

    def note(self, pools: Iterable[int], *, is_first: bool) -> None:
        """A forward was bound to pools with these indices; the first one of its step, or a later one."""
        (self._first if is_first else self._others).add(frozenset(pools))

    def left_out(self, before: npt.NDArray[np.uint64], now: npt.NDArray[np.uint64]) -> Collection[int]:
        """The pools that did not run between two snapshots because no forward may have taken them.

        None as long as none of the sets has run as a whole: then it is the guard that stopped.

        Args:
            before, now: u64[pools, 12], launches by pool and tag.
        """
        sets = self._first or self._others
        moved = (now != before)[:, _IN_FORWARD].any(axis=1)
        running = frozenset(np.flatnonzero(moved).tolist())
        if not any(pools <= running for pools in sets):
            return ()
        return frozenset(range(len(moved))) - running
