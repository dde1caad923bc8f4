"""What stamps and claims say, in NumPy: relative or not, of which epoch, moved, older than others, never completed."""

from __future__ import annotations

import numpy as np

from kvcanary import abi
from kvcanary.backends.reference_arrays import Array, PoolArrays


def is_relative(stamps: Array) -> Array:
    """Whether the chain of each stamp is relative: bool[n]."""
    relative: Array = stamps["prev_slot"] <= abi.PREV_RELATIVE
    return relative


def continued_slots(stamps: Array) -> Array:
    """The slot of the stamp that each one continues, or negative: i32[n]."""
    prev = stamps["prev_slot"]
    return np.where(prev <= abi.PREV_RELATIVE_BASE, abi.PREV_RELATIVE_BASE - prev, prev)


# ---- epochs ----------------------------------------------------------------------------------------------------------
def block_epochs(pool: PoolArrays, slots: Array) -> Array:
    """The epoch that a stamp made now for each slot gets: u32[n]; of any block where a slot is negative."""
    if pool.blocks is None:
        return np.zeros(len(slots), np.uint32)
    epochs: Array = pool.block_states(slots)["epoch"]
    return epochs


def is_outlived(pool: PoolArrays, slots: Array, stamps: Array) -> Array:
    """Stamps of an epoch that is over: they say nothing of what the block holds now: bool[n]."""
    if pool.blocks is None:
        return np.zeros(len(stamps), bool)
    outlived: Array = (stamps["epoch"] != 0) & (stamps["epoch"] != pool.block_states(slots)["epoch"])
    return outlived


# ---- moves and rewrites ----------------------------------------------------------------------------------------------
def is_fresh(pool: PoolArrays, slots: Array) -> Array:
    """Whether each slot was moved or adopted, and its bytes were not verified since: bool[n]."""
    fresh: Array = pool.claims[slots] & np.uint64(0xFFFFFFFF) == abi.CLAIM_FRESH
    return fresh


def was_moved(pool: PoolArrays, slots: Array) -> Array:
    """Slots whose stamps were moved there or adopted by a call: bool[n]; anything where a slot is no slot."""
    claims = pool.claims[np.clip(slots, 0, pool.n_slots - 1)] & np.uint64(0xFFFFFFFF)
    moved: Array = (claims == 0) | (claims == abi.CLAIM_FRESH)
    return moved


def arrivals(pool: PoolArrays, slots: Array, steps: Array) -> Array:
    """When stamps came to their slots: the forward that wrote them or, of moved ones, the forward before the move.

    What a forward that never ended has stamped keeps that number when it is moved. Anything where a slot is no slot.
    """
    numbers = pool.claims[np.clip(slots, 0, pool.n_slots - 1)] >> np.uint64(32)
    came: Array = np.where(was_moved(pool, slots), np.maximum(numbers, steps.astype(np.uint64)), steps)
    return came


def is_older(pool: PoolArrays, before: Array, before_steps: Array, steps: Array) -> Array:
    """Whether the stamps in ``before`` are surely older than those of ``steps``, wherever these came from: bool[n].

    Of two moves of one number nobody knows.
    """
    came = arrivals(pool, before, before_steps)
    older: Array = (came < steps) | ((came == steps) & ~was_moved(pool, before))
    return older


def is_rewritten(pool: PoolArrays, before: Array, before_steps: Array, slots: Array, steps: Array) -> Array:
    """Whether the stamps in ``before`` are younger than those in ``slots``: bool[n]; anything where a slot is negative.

    A move has the number of the forward before it, so that of two equal numbers the moved one is the younger, unless
    both were moved.
    """
    came_before, came = arrivals(pool, before, before_steps), arrivals(pool, slots, steps)
    later = was_moved(pool, before) & ~was_moved(pool, slots)
    younger: Array = (came_before > came) | ((came_before == came) & later)
    return younger


# ---- failed forwards -------------------------------------------------------------------------------------------------
def is_aborted(pool: PoolArrays, forwards: Array) -> Array:
    """Whether each forward is known never to have reached TAIL."""
    n = min(int(pool.state["n_aborted"]), abi.N_ABORTED)
    known: Array = (forwards <= pool.state["aborted_floor"]) | np.isin(forwards, pool.state["aborted"][:n])
    return known


def was_left(pool: PoolArrays, forwards: Array) -> Array:
    """Outside a forward: whether each never reached TAIL: bool[n].

    It is known as such already, or it is the pool's last, which the next one will make known.
    """
    state = pool.state
    is_open: Array = (forwards == state["head_forward"]) & (forwards != state["tail_forward"])
    return is_aborted(pool, forwards) | is_open
