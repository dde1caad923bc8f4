"""The patrol, in NumPy: what kernels/scrub.cu does, in the same order."""

from __future__ import annotations

import numpy as np

from kvcanary import abi, hashing
from kvcanary.backends.reference_arrays import Array, PoolArrays
from kvcanary.backends.reference_data import judgeable
from kvcanary.backends.reference_records import new_records, put_stamps
from kvcanary.backends.reference_stamps import continued_slots, is_fresh, is_older, is_relative
from kvcanary.tags import Detail, Reason, Stage


def patrolled_slots(pool: PoolArrays, forward: int) -> tuple[Array, int]:
    """The slots that the turn at hand checks, i64[n], and how many written ones it passes over as orphans.

    Checked are slots whose stamps are whole, of an earlier forward and of their block's epoch, in blocks that somebody
    holds. Orphans lie in blocks that nobody holds. Bytes that were moved and that no forward has verified since may
    still be on their way, as in a load layer by layer: the first forward that reads them sees to them.
    """
    assert pool.blocks is not None
    n_blocks, each = len(pool.blocks), pool.scrub_blocks
    first = (int(pool.state["scrub_turn"]) - 1) % -(-n_blocks // each) * each
    slots = np.arange(first * pool.page_size, min(first + each, n_blocks) * pool.page_size)
    slots = slots[~np.isin(slots // pool.page_size, pool.reserved)]
    head, tail_step = pool.head[0][slots], pool.tail[0]["step"][slots]
    whole = (head["step"] != 0) & (head["step"] != forward) & (head["step"] == tail_step)
    held = pool.block_states(slots)["flags"] & abi.BLOCK_LIVE != 0
    checked = whole & held & judgeable(pool, 0, slots, forward) & ~is_fresh(pool, slots)
    return slots[checked], int((whole & ~held).sum())


def judge_links(pool: PoolArrays, half: int, slots: Array) -> Array:
    """CHAIN of slots whose stamp does not continue the one that it says it continued: VIOLATION[n]."""
    assert pool.blocks is not None
    stamp = pool.head[half][slots]
    before = continued_slots(stamp)
    inside = (before >= 0) & (before < pool.n_slots)
    previous = pool.head[half][np.where(inside, before, 0)]
    block = pool.block_states(np.where(inside, before, 0))
    links = inside & (stamp["token"] != abi.NO_TOKEN) & (previous["token"] != abi.NO_TOKEN)
    links &= (previous["step"] != 0) & is_older(pool, before, previous["step"], stamp["step"])
    links &= is_relative(stamp) | ~is_relative(previous)
    # Not in a block that was given away since; one that its owner has left to those who share it cannot be written.
    links &= (block["flags"] & abi.BLOCK_LIVE != 0) & (previous["epoch"] == block["epoch"])
    links &= (block["owner"] == 0) | (block["since"] < stamp["step"])
    chain = hashing.link(previous["chain"], stamp["token"], stamp["position"])
    broken = np.flatnonzero(links & (stamp["chain"] != chain))
    v = new_records(len(broken), pool, pool.tag(Stage.HEAD, half))
    v["detail"], v["reasons"] = Detail.SCRUB, Reason.CHAIN
    v["slot"], v["position"] = slots[broken], stamp["position"][broken]
    put_stamps(v, stamp[broken])
    v["expected_chain"] = chain[broken]
    return v
