"""Numbers by pool: launches and entries by tag, violations by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcanary.layout import KvPool
from kvcanary.state import CounterLayout, StateSnapshot
from kvcanary.tags import CanaryLaunchTag, Reason, Stage
from kvcanary.violations import READINGS


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """What the host knows of one pool; launches, entries and turns are as of the newest snapshot.

    Attributes:
        name: of the pool; ``n_slots`` its size.
        launches: tag -> launches that covered it: every tag that this pool can have.
        entries: tag -> entries handled: a slot counts once per tag and launch.
        data_launches: stage -> launches that digested bytes.
        violations: reason -> first sightings that are told under it (`leading_reason`), so that they add up.
        reasons: reason -> first sightings that have it, alone or with others.
        sweeps: launched for it.
        scrub_turns: of the patrol so far; ``scrub_turns_per_pass`` make a full pass, 0 = no patrol.
        sole_blocks: held by their primary owner alone, ``shared_blocks`` by several, ``free_blocks`` by nobody; by the
            ledger, now; all 0 without lifecycle.
    """

    name: str
    n_slots: int
    launches: Mapping[CanaryLaunchTag, int]
    entries: Mapping[CanaryLaunchTag, int]
    data_launches: Mapping[Stage, int]
    violations: Mapping[Reason, int]
    reasons: Mapping[Reason, int]
    sweeps: int = 0
    scrub_turns: int = 0
    scrub_turns_per_pass: int = 0
    sole_blocks: int = 0
    shared_blocks: int = 0
    free_blocks: int = 0


def leading_reason(reasons: Reason) -> Reason:
    """The one of several reasons that says most about the cause: the one under which a violation is told."""
    return next((reason for reason in READINGS if reason in reasons), Reason(0))


def digest_bytes(pools: Sequence[KvPool], real_data: str) -> float:
    """Mean bytes that a digest covers, over all slots and digests of the pools; 0 without digests."""
    n_bytes = n_digests = 0
    for pool in pools if real_data != "none" else ():
        n_bytes += pool.n_slots * sum(p.n_chunks * p.digested_chunk_bytes(real_data) for p in pool.planes)
        n_digests += pool.n_slots * len(pool.digest_units(real_data))
    return n_bytes / n_digests if n_digests else 0.0


def pool_stats(
    pools: Sequence[KvPool],
    snapshot: StateSnapshot | None,
    counts: Mapping[tuple[int, Reason], int],
    n_sweeps: Mapping[int, int],
    turns: Sequence[int] = (),
    blocks: Sequence[tuple[int, int, int]] = (),
) -> tuple[PoolStats, ...]:
    """One of each pool.

    Args:
        counts: (pool, reasons) -> first sightings.
        n_sweeps: pool -> sweeps.
        turns: of a full pass of the patrol, by pool.
        blocks: (live, shared, free) by pool; empty without lifecycle.
    """
    found = []
    runs, entries, data, scrubs = _counters(snapshot, len(pools))  # as Python's integers: cheaper one by one
    for i, pool in enumerate(pools):
        tags = [CanaryLaunchTag.of(stage, half, pool.kind) for stage in Stage for half in pool.halves]
        live, shared, free = blocks[i] if blocks else (0, 0, 0)
        violations, carried = dict.fromkeys(Reason, 0), dict.fromkeys(Reason, 0)
        for (index, reasons), n in counts.items():
            if index == i:
                if reasons:
                    violations[leading_reason(reasons)] += n
                for reason in (r for r in Reason if r in reasons):
                    carried[reason] += n
        found.append(
            PoolStats(
                name=pool.name,
                n_slots=pool.n_slots,
                launches={tag: runs[i][tag] for tag in tags},
                entries={tag: entries[i][tag] for tag in tags},
                data_launches={stage: data[i][stage] for stage in Stage},
                violations=violations,
                reasons=carried,
                sweeps=n_sweeps.get(i, 0),
                scrub_turns=scrubs[i],
                scrub_turns_per_pass=turns[i] if turns else 0,
                sole_blocks=live - shared,
                shared_blocks=shared,
                free_blocks=free,
            )
        )
    return tuple(found)


def _counters(snapshot: StateSnapshot | None, n_pools: int) -> tuple[Any, Any, Any, Any]:
    """Launches and entries by pool and tag, data launches by pool and stage, turns of the patrol by pool."""
    layout = CounterLayout(n_pools) if snapshot is None else snapshot.layout
    words = np.zeros(layout.n_words, np.uint64) if snapshot is None else snapshot.words
    views = (layout.kernel_runs, layout.slot_runs, layout.data_runs, layout.scrub_runs)
    runs, entries, data, scrubs = (view(words).tolist() for view in views)
    return runs, entries, data, scrubs
