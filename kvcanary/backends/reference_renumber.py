"""Moving the numbers of forwards down, in NumPy: what ``kernels/renumber.cu`` must agree with bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcanary import abi
from kvcanary.backends.reference_arrays import Array, PoolArrays
from kvcanary.backends.reference_stamps import is_relative, was_left
from kvcanary.state import CanaryDeviceState


def renumber(pools: Sequence[PoolArrays], state: CanaryDeviceState) -> None:
    """The last ``abi.RENUMBER_KEEP`` forwards keep their order; older ones become 2, or 1 where TAIL never came."""
    words, control = state.words, state.control
    forward = int(words[abi.STATE_FORWARD])
    if abi.RENUMBER_KEEP + 2 < forward < abi.LAST_FORWARD:
        old = forward - abi.RENUMBER_KEEP
        for pool in pools:
            _renumber_pool(pool, old)
            _renumber_state(pool.state, old)
        for word in (abi.STATE_FORWARD, abi.STATE_FORWARD_DONE):
            words[word] = int(_renumbered(words[word : word + 1].astype(np.int64), old)[0])
        words[abi.STATE_FORWARD_BASE] += np.uint64(old - 2)
    control[abi.CONTROL_RENUMBER] = 0


def _renumbered(numbers: Array, old: int) -> Array:
    """New numbers of i64[n]: those up to ``old`` become 2, 0 stays."""
    return np.where(numbers > old, numbers - old + 2, np.where(numbers != 0, 2, 0))


def _renumbered_claims(claims: Array, old: int) -> Array:
    numbers = _renumbered((claims >> np.uint64(32)).astype(np.int64), old).astype(np.uint64)
    return numbers << np.uint64(32) | claims & np.uint64(0xFFFFFFFF)


def _renumber_pool(pool: PoolArrays, old: int) -> None:
    for head, tail in zip(pool.head, pool.tail, strict=True):
        heads, tails = head["step"].astype(np.int64), tail["step"].astype(np.int64)
        of_head, of_tail = _renumbered(heads, old), _renumbered(tails, old)
        differs = heads != tails
        of_head[differs & (of_head == 2) & was_left(pool, head["step"])] = 1
        of_tail = np.where(differs, np.where(of_tail == of_head, 3 - of_head, of_tail), of_head)
        for stamps, numbers in ((head, of_head), (tail, of_tail)):
            is_old = (stamps["step"] != 0) & (stamps["step"] <= old)
            unknown = np.where(is_relative(stamps), abi.PREV_RELATIVE, abi.PREV_NONE)
            stamps["prev_slot"] = np.where(is_old, unknown, stamps["prev_slot"])
            stamps["step"] = numbers
    pool.claims[:] = _renumbered_claims(pool.claims, old)
    pool.register_claims[:] = _renumbered_claims(pool.register_claims, old)
    if pool.blocks is not None:
        pool.blocks["since"] = _renumbered(pool.blocks["since"].astype(np.int64), old)


def _renumber_state(state: Array, old: int) -> None:
    """A pool's POOL_STATE."""
    head, tail, floor = (int(state[name]) for name in ("head_forward", "tail_forward", "aborted_floor"))
    of_head, of_tail = _renumbered(np.array([head, tail]), old).tolist()
    if head != tail:
        of_head = 1 if of_head == 2 else of_head  # never reached TAIL
        of_tail = 3 - of_tail if of_tail == of_head else of_tail
    state["head_forward"], state["tail_forward"] = of_head, of_tail
    aborted = _renumbered(state["aborted"].astype(np.int64), old)
    state["aborted"] = np.where(aborted == 2, 1, aborted)
    state["aborted_floor"] = floor - old + 2 if floor > old else 1
