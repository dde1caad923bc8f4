"""The patrol's plan: how many blocks of each pool a turn looks at, and how many turns make a full pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvcanary import abi
from kvcanary.config import CanaryConfig
from kvcanary.layout import KvPool


class Patrol(NamedTuple):
    """A pool's part of the patrol.

    Attributes:
        n_blocks: blocks of a turn, from the cursor on, held or not; 0 = no patrol.
        n_turns: turns, which is steps with a forward, of a full pass.
        n_bytes: bytes that a turn checks at most.
    """

    n_blocks: int
    n_turns: int
    n_bytes: int


def checked_bytes_per_slot(config: CanaryConfig, pool: KvPool) -> int:
    """Bytes of a slot that the patrol looks at: what is digested, or else its stamps."""
    planes = pool.planes if config.real_data != "none" else ()
    digested = sum(p.n_chunks * p.digested_chunk_bytes(config.real_data) for p in planes)
    return digested or 2 * len(pool.halves) * abi.STAMP.itemsize


def plan_patrol(config: CanaryConfig, pools: Sequence[KvPool]) -> list[Patrol]:
    """A plan for each pool: the budget is shared out by size, so that all pools are through at about the same step.

    At least one block of each pool is looked at in a turn, also where that is more than the budget.
    """
    if not config.scrub_bytes_per_step:
        return [Patrol(0, 0, 0) for _ in pools]
    of_block = [p.page_size * checked_bytes_per_slot(config, p) for p in pools]
    total = sum(n * p.n_blocks for n, p in zip(of_block, pools, strict=True))
    plans = []
    for pool, n_bytes in zip(pools, of_block, strict=True):
        n = min(pool.n_blocks, max(1, config.scrub_bytes_per_step * pool.n_blocks // total))
        plans.append(Patrol(n, -(-pool.n_blocks // n), n * n_bytes))
    return plans
