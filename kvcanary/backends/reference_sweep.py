"""The sweep, in NumPy: what is wrong with the stamps of resident slots, outside of any forward."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcanary import abi, hashing
from kvcanary.backends import ownership
from kvcanary.backends.reference_arrays import Array, PoolArrays
from kvcanary.backends.reference_records import new_records, put_stamps
from kvcanary.backends.reference_stamps import continued_slots, is_outlived, is_relative, is_rewritten, was_left
from kvcanary.tags import Detail, Reason, Stage


def judge_resident(pool: PoolArrays, resident: Any, half: int, inside: Array) -> Array:
    """UNWRITTEN, STALE_EPOCH, POSITION, TOKEN and CHAIN of resident slots of one half: VIOLATION[n].

    Args:
        inside: bool[n], those that lie inside the pool.
    """
    slots, positions, before = (np.asarray(a)[inside].astype(np.int64) for a in resident[:3])
    expected = np.full(len(slots), abi.NO_TOKEN) if resident.tokens is None else np.asarray(resident.tokens)[inside]
    stamp, tail_step = pool.head[half][slots], pool.tail[half]["step"][slots]
    written = stamp["step"] != 0
    known = written & (stamp["token"] != abi.NO_TOKEN)
    reasons = np.where(written, 0, Reason.UNWRITTEN)
    reasons |= np.where(written & (stamp["position"] != positions), Reason.POSITION, 0)
    wrong_token = known & (expected >= 0) & (stamp["token"] != expected)
    reasons |= np.where(wrong_token, Reason.TOKEN, 0)
    has_before = (before >= 0) & (before < pool.n_slots)
    prev = pool.head[half][np.where(has_before, before, 0)]
    chain = hashing.link(prev["chain"], stamp["token"], stamp["position"])
    follows = (continued_slots(stamp) == before) & ~is_rewritten(pool, before, prev["step"], slots, stamp["step"])
    links = known & has_before & np.where(is_relative(stamp), follows, ~is_relative(prev))
    links &= (prev["step"] != 0) & (prev["token"] != abi.NO_TOKEN)
    links &= ~is_outlived(pool, np.where(has_before, before, 0), prev)
    broken = links & (stamp["chain"] != chain)
    reasons |= np.where(broken, Reason.CHAIN, 0)
    unfinished = written & (tail_step != stamp["step"]) & ~was_left(pool, stamp["step"])
    reasons |= np.where(unfinished, Reason.UNWRITTEN, 0)
    if pool.blocks is not None:
        reasons |= np.where(written, ownership.epoch_reasons(pool.block_states(slots), stamp), 0)
    v = new_records(len(slots), pool, pool.tag(Stage.SWEEP, half))
    v["reasons"], v["slot"], v["position"] = reasons, slots, positions
    v["detail"] = np.where(unfinished, Detail.UNFINISHED, Detail.SLOT)
    v["expected_token"] = np.where(wrong_token, expected, abi.NO_TOKEN)
    v["expected_chain"] = np.where(broken, chain, 0)
    put_stamps(v, stamp)
    bad: Array = v[reasons != 0]
    return bad
