"""Whose bytes are compared with their digests, in NumPy: what may be judged, what falls due, what is fresh no more."""

from __future__ import annotations

import numpy as np

from kvcanary import abi, hashing
from kvcanary.backends.reference_arrays import Array, BatchArrays, PoolArrays
from kvcanary.backends.reference_prefix import Entries
from kvcanary.backends.reference_slots import OK
from kvcanary.backends.reference_stamps import is_fresh, is_outlived


def judgeable(pool: PoolArrays, half: int, slots: Array, forward: int) -> Array:
    """Whether the data of each slot may be judged: HEAD and TAIL stamps are of one earlier forward: bool[n].

    Nor are bytes of an epoch that is over: nobody's any more, they may be overwritten at any time.
    """
    step = pool.head[half]["step"][slots]
    may: Array = (step != 0) & (step != forward) & (pool.tail[half]["step"][slots] == step)
    may &= ~is_outlived(pool, slots, pool.head[half][slots])
    return may


def due_slots(pool: PoolArrays, batch: BatchArrays, rows: Array, entries: Entries) -> Array:
    """Which entries' data fall due in this forward: bool[n]."""
    flags = rows["flags"][entries.row]
    share = hashing.share_of(np.maximum(entries.at.slot, 0), abi.SHARE_RUN, batch.verify_data_every)
    due: Array = (flags & abi.ROW_FULL_DATA != 0) | (share == rows["share"][entries.row])
    if pool.state["n_fresh"]:
        slots = np.maximum(entries.at.slot, 0)
        stamps = pool.head[0][slots]
        # Of a stamp that says nothing of what the block holds now, there is nothing to verify: adoption may take it.
        due |= is_fresh(pool, slots) & (stamps["step"] != 0) & ~is_outlived(pool, slots, stamps)
    due &= (entries.at.status == OK) & (flags & abi.ROW_PENDING == 0)
    return due


def settle_fresh(pool: PoolArrays, rows: Array, entries: Entries) -> None:
    """After HEAD has verified their bytes, the fresh slots of the prefixes are so no more."""
    verified = (entries.at.status == OK) & (rows["flags"][entries.row] & abi.ROW_PENDING == 0)
    slots = np.unique(entries.at.slot[verified])
    slots = slots[is_fresh(pool, slots)]
    pool.claims[slots] &= ~np.uint64(0xFFFFFFFF)
    pool.state["n_fresh"] -= np.uint32(len(slots))
