"""Who may read and write a block, in NumPy: the twin of ``kernels/blocks.cuh`` and ``kernels/lifecycle.cu``.

Blocks are given as their words, BLOCK_STATE[n]. Without request ids nobody can tell whose a row is (``has_ids`` False).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.tags import Reason

Array: TypeAlias = npt.NDArray[Any]

_FLAGS_AFTER = {
    abi.OP_ALLOCATE: abi.BLOCK_LIVE,
    abi.OP_SHARE: abi.BLOCK_LIVE | abi.BLOCK_SHARED,
    abi.OP_LEAVE: abi.BLOCK_LIVE | abi.BLOCK_SHARED,
    abi.OP_UNSHARE: abi.BLOCK_LIVE,
    abi.OP_FREE: 0,
    abi.OP_CLAIM: abi.BLOCK_LIVE,
}


def may_not_read(block: Array, has_ids: bool, request_ids: Array) -> Array:
    """Blocks that neither belong to the reader nor are shared: bool[n]."""
    is_others: Array = (block["owner"] == 0) | (block["owner"] != request_ids)
    return is_others & ~_is_shared(block) & has_ids


def may_not_write(block: Array, has_ids: bool, request_ids: Array) -> Array:
    """Blocks whose primary owner is not the writer, or that are shared without one: bool[n]."""
    return np.where(block["owner"] != 0, block["owner"] != request_ids, _is_shared(block)) & has_ids


def is_unowned(block: Array) -> Array:
    """Blocks that nobody holds: bool[n]."""
    unowned: Array = (block["owner"] == 0) & ~_is_shared(block)
    return unowned


def epochs_of_writes(block: Array, has_ids: bool, request_ids: Array) -> Array:
    """The epoch that a stamp written there gets, 0 of a foreign one: u32[n]."""
    return np.where(may_not_write(block, has_ids, request_ids), 0, block["epoch"]).astype(np.uint32)


def epoch_reasons(block: Array, stamps: Array) -> Array:
    """What written stamps of another epoch are reported for: i64[n] reasons."""
    unwritten = np.where(stamps["epoch"] != 0, Reason.UNWRITTEN, 0)
    reasons: Array = np.where(stamps["epoch"] != block["epoch"], Reason.STALE_EPOCH | unwritten, 0)
    return reasons


def change_blocks(blocks: Array, op: int, ids: Array, owner: int, now: int) -> None:
    """What a call to allocate, share, free or claim does to the words of some blocks (kvc_blocks_update).

    Args:
        blocks: BLOCK_STATE[n_blocks], changed.
        op: ``abi.OP_*``.
        ids: int[n], none twice.
        now: the last forward begun.
    """
    words = blocks[ids]
    was_live = words["flags"] & abi.BLOCK_LIVE != 0
    if op == abi.OP_ALLOCATE:
        words["epoch"] = np.maximum(words["epoch"] + np.uint32(1), 1)  # 0 is the epoch of foreign writes
        words["owner"] = owner
    elif op == abi.OP_CLAIM:
        words["owner"] = owner
    elif op in (abi.OP_LEAVE, abi.OP_FREE):
        words["owner"] = 0
    keeps_since = was_live if op == abi.OP_SHARE else op == abi.OP_UNSHARE
    words["since"] = np.where(keeps_since, words["since"], now)
    words["flags"] = _FLAGS_AFTER[op]
    blocks[ids] = words


def _is_shared(block: Array) -> Array:
    shared: Array = block["flags"] & abi.BLOCK_SHARED != 0
    return shared
