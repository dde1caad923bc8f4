"""Numbers for people and exporters."""

from __future__ import annotations

from dataclasses import dataclass

from kvcanary import abi
from kvcanary.state import StateSnapshot


@dataclass(frozen=True)
class CanaryStats:
    """What the host knows; the fields from ``snapshot_step`` on are as of that step (0 = no snapshot yet).

    Attributes:
        step: steps ended.
        sweep_passes: sweeps over all resident sets.
        violations_total: first sightings.
        observations_total: all violations, repeated ones and those without a record too.
        snapshot_step: step of the newest delivered snapshot.
        forwards: forwards begun on the device.
        protected_tokens: entries handled, summed over tags (a slot counts once per tag and launch).
        data_slots: (slot, digest) pairs compared.
        unjudged_slots: prefix slots that were passed over because their forward never reached TAIL.
        unanchored_rows: rows whose chain nobody outside the cache knew.
        adopted_slots: slots adopted by on_unwritten="adopt".
        skipped_moves: entries of moves that named no slot, or one that could not be refreshed.
        dropped: violations that found the ring full.
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

    @classmethod
    def of(
        cls, step: int, sweep_passes: int, violations: int, observations: int, snapshot: StateSnapshot | None
    ) -> CanaryStats:
        if snapshot is None:
            return cls(step, sweep_passes, violations, observations)
        return cls(
            step,
            sweep_passes,
            violations,
            observations,
            snapshot_step=snapshot.step,
            forwards=snapshot.word(abi.STATE_FORWARD),
            protected_tokens=snapshot.protected_tokens,
            data_slots=snapshot.word(abi.STATE_DATA_SLOTS),
            unjudged_slots=snapshot.word(abi.STATE_UNJUDGED_SLOTS),
            unanchored_rows=snapshot.word(abi.STATE_UNANCHORED_ROWS),
            adopted_slots=snapshot.word(abi.STATE_ADOPTED_SLOTS),
            skipped_moves=snapshot.word(abi.STATE_SKIPPED_MOVES),
            dropped=snapshot.word(abi.STATE_DROPPED),
        )
