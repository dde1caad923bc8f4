"""Numbers for people and exporters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvcanary import abi
from kvcanary.pool_stats import PoolStats
from kvcanary.state import StateSnapshot


@dataclass(frozen=True)
class CanaryStats:
    """What the host knows, all of it since the manager was made.

    From ``forwards`` to ``reserved_checks``, but for ``scrub_steps_per_pass``, and in ``digested_bytes``, it is what
    the device had counted as of ``snapshot_step``; all else is as of now.

    Attributes:
        step: steps ended, idle ones too.
        sweep_passes: sweeps over all resident sets.
        violations_total: first sightings.
        observations_total: all violations, repeated ones and those without a record too.
        snapshot_step: step of the newest delivered snapshot, 0 = none yet.
        forwards: forwards begun on the device.
        protected_tokens: entries handled, summed over tags (a slot counts once per tag and launch).
        data_slots: (slot, digest) pairs compared.
        unjudged_slots: prefix slots that were passed over because their forward never reached TAIL.
        unanchored_rows: rows whose chain nobody outside the cache knew.
        adopted_slots: slots adopted by on_unwritten="adopt".
        skipped_moves: entries of moves that named no slot, or one that could not be refreshed.
        dropped: violations that found the ring full.
        unowned_writes: new tokens written to blocks that nobody owned (lifecycle).
        scrub_slots: written slots that the patrol has checked; ``scrub_orphans`` it passed over, because nobody holds
            their block (each counts once per visit).
        scrub_passes: full passes of the patrol so far, over the pool that is furthest behind; a pass takes
            ``scrub_steps_per_pass`` steps with a forward. 0 without scrub_bytes_per_step.
        reserved_checks: (plane, reserved block) pairs that were looked through for NaN and Inf (check_reserved_every).
        live_blocks: blocks that somebody holds, ``shared_blocks`` of them shared, and ``free_blocks`` that nobody
            holds: of all pools, by the ledger; all 0 without lifecycle.
        digested_bytes: bytes that the digests compared cover, by the mean of all planes.
        is_on: False with mode "off", and of a closed manager; ``is_paused``: between `pause` and `resume`.
        health: what the health check last said: "off", "waiting" (for its first snapshot), "running", "stalled",
            "fallen" (a counter fell: the guard's memory was overwritten) or "closed".
        stalls_total: reports of the health check.
        observer_errors: as `CanaryManager.n_observer_errors`.
        snapshots_not_taken: snapshots that found all their buffers still waiting for the device.
        snapshot_interval: steps between two snapshots, as configured; 0 = none are taken.
        black_box_errors: events that could not be written to the black box.
        pools: the numbers of each pool, in the manager's order, see `kvcanary.pool_stats.PoolStats`.
    """

    step: int = 0
    sweep_passes: int = 0
    violations_total: int = 0
    observations_total: int = 0
    snapshot_step: int = 0
    forwards: int = 0
    protected_tokens: int = 0
    data_slots: int = 0
    unjudged_slots: int = 0
    unanchored_rows: int = 0
    adopted_slots: int = 0
    skipped_moves: int = 0
    dropped: int = 0
    unowned_writes: int = 0
    scrub_slots: int = 0
    scrub_orphans: int = 0
    scrub_passes: int = 0
    scrub_steps_per_pass: int = 0
    reserved_checks: int = 0
    live_blocks: int = 0
    shared_blocks: int = 0
    free_blocks: int = 0
    digested_bytes: int = 0
    is_on: bool = False
    is_paused: bool = False
    health: str = "off"
    stalls_total: int = 0
    observer_errors: int = 0
    snapshots_not_taken: int = 0
    snapshot_interval: int = 0
    black_box_errors: int = 0
    pools: tuple[PoolStats, ...] = ()

    @property
    def lag_steps(self) -> int:
        """Steps that ended since the newest snapshot was taken."""
        return self.step - self.snapshot_step

    @classmethod
    def of(
        cls,
        step: int,
        sweep_passes: int,
        violations: int,
        observations: int,
        snapshot: StateSnapshot | None,
        blocks: Sequence[tuple[int, int, int]] = (),
        scrub_turns: Sequence[int] = (),
    ) -> CanaryStats:
        """``blocks``: (live, shared, free) of each pool; ``scrub_turns``: turns of a full pass of each, 0 = none."""
        live, shared, free = (sum(counts) for counts in zip(*blocks, strict=True)) if blocks else (0, 0, 0)
        stats = cls(
            step,
            sweep_passes,
            violations,
            observations,
            live_blocks=live,
            shared_blocks=shared,
            free_blocks=free,
            scrub_steps_per_pass=max(scrub_turns, default=0),
        )
        if snapshot is None:
            return stats
        return replace(
            stats,
            snapshot_step=snapshot.step,
            forwards=snapshot.word(abi.STATE_FORWARD) + snapshot.word(abi.STATE_FORWARD_BASE),
            protected_tokens=snapshot.protected_tokens,
            data_slots=snapshot.word(abi.STATE_DATA_SLOTS),
            unjudged_slots=snapshot.word(abi.STATE_UNJUDGED_SLOTS),
            unanchored_rows=snapshot.word(abi.STATE_UNANCHORED_ROWS),
            adopted_slots=snapshot.word(abi.STATE_ADOPTED_SLOTS),
            skipped_moves=snapshot.word(abi.STATE_SKIPPED_MOVES),
            dropped=snapshot.word(abi.STATE_DROPPED),
            unowned_writes=snapshot.word(abi.STATE_UNOWNED_WRITES),
            scrub_slots=snapshot.word(abi.STATE_SCRUB_SLOTS),
            scrub_orphans=snapshot.word(abi.STATE_SCRUB_ORPHANS),
            reserved_checks=snapshot.word(abi.STATE_RESERVED_CHECKS),
            scrub_passes=min(
                (int(run) // n for run, n in zip(snapshot.scrub_run_counters, scrub_turns, strict=True) if n), default=0
            )
            if scrub_turns
            else 0,
        )
