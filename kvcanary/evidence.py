"""Violations seen together: runs of neighbouring slots, who wrote what, who read whose."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

from kvcanary import readings
from kvcanary.evidence_runs import Run
from kvcanary.tags import Detail, PoolKind, Reason, Stage
from kvcanary.violations import Violation

_READ = Reason.TOKEN | Reason.POSITION | Reason.CHAIN
_WRITE = Reason.WRITE_POSITION | Reason.FOREIGN_WRITE


class Records:
    """All findings of one fault."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.all = tuple(violations)
        in_pool = [v for v in self.all if v.is_in_pool]
        has_reader = [v for v in self.all if v.row >= 0]
        self.is_named = not has_reader or any(v.request_id or v.stamp_owner for v in has_reader)
        self.writes = [v for v in in_pool if v.reasons & _WRITE and v.tag.stage == Stage.HEAD]
        self.inputs = [v for v in in_pool if Reason.WRITE_TOKEN in v.reasons and v.tag.stage == Stage.HEAD]
        self.duplicates = [v for v in in_pool if Reason.DUPLICATE_WRITE in v.reasons]
        self.stale_only = [v for v in in_pool if _is_stale_only(v)]
        self.holes = [v for v in in_pool if Reason.UNWRITTEN in v.reasons and not _is_stale_only(v)]
        self.data = [v for v in in_pool if Reason.DATA in v.reasons]
        self.reads = [v for v in in_pool if v.reasons & _READ and Reason.UNWRITTEN not in v.reasons]

    # ---- grouping ----------------------------------------------------------------------------------------------------
    @cached_property
    def rows(self) -> dict[tuple[int, int, int], list[Violation]]:
        """Findings in the pool by (pool, request, forward)."""
        rows: dict[tuple[int, int, int], list[Violation]] = {}
        for v in self.all:
            if v.is_in_pool:
                rows.setdefault((v.pool, v.request_id, v.forward), []).append(v)
        return rows

    @cached_property
    def writes_by_row(self) -> dict[tuple[int, int], list[Violation]]:
        """Reported writes by (request, forward)."""
        rows: dict[tuple[int, int], list[Violation]] = {}
        for v in self.writes:
            rows.setdefault((v.request_id, v.forward), []).append(v)
        return rows

    def runs(self, found: Iterable[Violation]) -> list[Run]:
        """Runs of neighbouring positions of one request, under stamps of one writer."""
        runs: list[list[Violation]] = []
        for v in sorted(found, key=lambda v: (*_whose(v), v.position)):
            last = runs[-1][-1] if runs else None
            if last is not None and _whose(last) == _whose(v) and v.position - last.position <= 1:
                runs[-1].append(v)
            else:
                runs.append([v])
        return [Run(run, self.is_named) for run in runs]

    @cached_property
    def explained(self) -> set[tuple[int, int]]:
        """(slot, forward) of stamps that a reported write or input explains."""
        astray = [v for v in self.writes if Reason.WRITE_POSITION in v.reasons or not v.request_id]
        twice = [v for v in self.duplicates if v.stamp_owner == v.request_id]
        return {(v.slot, v.forward) for v in (*astray, *self.inputs, *twice)}

    def read_runs(self) -> list[Run]:
        """Runs of foreign or wrong stamps, without those that are explained."""
        reads = [v for v in self.reads if (v.slot, v.stamp_step) not in self.explained]
        # CHAIN alone is the seam of a substitution that is told by its tokens: what tells of these tells more.
        told = {v.request_id for v in self.reads if v.reasons & (Reason.TOKEN | Reason.POSITION)}
        return self.runs(v for v in reads if v.request_id not in told or v.reasons != Reason.CHAIN)

    # ---- questions ---------------------------------------------------------------------------------------------------
    def is_window(self, v: Violation) -> bool:
        return v.tag.pool_kind == PoolKind.SWA

    def block_owner(self, v: Violation) -> int:
        """Who owns the block of the slot, 0 if nobody, or if the guard is not told of owners."""
        return int(getattr(v, "block_owner", 0))

    def knows_owners(self, v: Violation) -> bool:
        """Whether the guard is told of owners (lifecycle)."""
        return bool(v.block_epoch or v.block_flags)

    def may_have_ended_before(self, v: Violation) -> bool:
        """Whether the request can have had the block before whoever has it, and no block in this forward."""
        has_blocks = any(w.request_id == w.block_owner == v.request_id for w in self.all if w.forward == v.forward)
        return readings.was_handed_on(v) and not has_blocks

    def may_have_ended(self, writer: int, forward: int) -> bool:
        """Whether what a request read from others' blocks, in one forward, can have been its own before."""
        read = [v for v in (*self.reads, *self.stale_only) if (v.request_id, v.forward) == (writer, forward)]
        return any(not readings.is_strangers(v) or self.may_have_ended_before(v) for v in read)

    def is_anothers_row(self, write: Violation) -> bool:
        """Whether the row names, right before a write that goes elsewhere, a slot with another request's KV."""
        row = [
            r for r in self.reads if (r.pool, r.request_id, r.forward) == (write.pool, write.request_id, write.forward)
        ]
        theirs = [r for r in row if r.stamp_owner not in (0, write.request_id)]
        blocks = {r.slot // r.page_size for r in theirs}
        return write.slot // write.page_size not in blocks and any(r.position == write.position - 1 for r in theirs)

    def is_of_anothers_block(self, hole: Violation) -> bool:
        """Whether the hole is in a block of another's, of which the same row finds KV: it is read by mistake."""
        if not readings.is_strangers(hole) or hole.block_owner in (0, hole.request_id):
            return False
        block = hole.slot // hole.page_size
        row = self.rows.get((hole.pool, hole.request_id, hole.forward), [])
        read = (r for r in row if r.reasons & (_READ | Reason.STALE_EPOCH) and Reason.UNWRITTEN not in r.reasons)
        return any(r.slot // r.page_size == block and r.stamp_owner == r.block_owner for r in read)

    def is_exchange(self, run: Run) -> bool:
        """Whether the writer of what a row reads, reads in the same forward what this one wrote, in other blocks."""
        v = run.records[0]
        if run.owner == 0 or run.positions[0] or v.stamp_step >= v.forward:
            return False
        pair = (v.pool, v.forward, run.owner, v.request_id)
        back = [r for r in self.reads if (r.pool, r.forward, r.request_id, r.stamp_owner) == pair]
        theirs = {r.slot // r.page_size for r in back}
        mine = {r.slot // r.page_size for r in run.records if r.forward == v.forward}
        return any(r.position == 0 for r in back) and not theirs & mine

    def is_mutual(self, v: Violation) -> bool:
        """Whether the owner of the block reads, in the same forward, blocks of this reader's."""
        return any(
            readings.is_strangers(r)
            and (r.forward, r.request_id, r.block_owner) == (v.forward, v.block_owner, v.request_id)
            for r in self.stale_only
        )

    def differs_from_the_start(self, request: int) -> bool:
        """Whether a request's own first token is not the one that it should be."""
        own = [v for v in self.reads if v.request_id == request == v.stamp_owner]
        return any(v.position == 0 and Reason.TOKEN in v.reasons and Reason.POSITION not in v.reasons for v in own)

    def ends_inside_block(self, v: Violation) -> bool:
        """Whether the last finding of this row lies inside a block: prefix hits end with blocks, decoding does not."""
        row = [r for r in self.reads if (r.pool, r.request_id, r.forward) == (v.pool, v.request_id, v.forward)]
        last = max(row, key=lambda r: r.position)
        return last.slot % last.page_size != last.page_size - 1

    def handover(self, v: Violation) -> str:
        """Since when the block is whose."""
        owner, since, block = self.block_owner(v), int(getattr(v, "block_since", 0)), v.slot // v.page_size
        if owner:
            return f"block {block} was given to request {owner}" + (f" after forward {since}" if since else "")
        if v.stamp_owner and v.stamp_owner != v.request_id:
            return f"block {block} was, by its table, request {v.request_id}'s"
        return f"block {block} is nobody's"

    def gave_up(self, v: Violation, reader: int) -> bool:
        """Whether the block was given to somebody else."""
        return self.block_owner(v) not in (0, reader)

    def is_whole_prefix(self, run: Run) -> bool:
        """From the first position to the last one before the new tokens: its end breaks too, or the write behind it."""
        v = run.records[-1]
        astray = any(w.request_id == v.request_id and w.position == v.position + 1 for w in self.writes)
        return run.positions[0] == 0 and (astray or Reason.CHAIN in v.reasons)

    def is_older_epoch(self, run: Run) -> bool:
        """Whether the stamps are from before the block was given to whoever has it."""
        stale = [v for v in run.records if v.reasons & (Reason.UNWRITTEN | Reason.STALE_EPOCH)]
        return any(Reason.UNWRITTEN in v.reasons or not readings.is_of_this_allocation(v) for v in stale)

    def wrote_elsewhere(self, hole: Violation) -> bool:
        """Whether the token that is missing was reported on its way to another slot, or another pool."""
        mine = [v for v in self.writes if v.request_id == hole.request_id and Reason.WRITE_POSITION in v.reasons]
        astray = {v.position for v in self.all if v.request_id == hole.request_id and v.detail == Detail.SLOT_MAPPING}
        return bool(mine) or hole.position in astray

    def was_substituted(self, request: int, before: int | None = None, at: int | None = None) -> bool:
        """Whether a request read through another's blocks before a forward, or in one."""
        return any(
            v.request_id == request
            and v.stamp_owner not in (0, request)
            and (before is None or v.forward < before)
            and (at is None or v.forward == at)
            for v in (*self.reads, *self.stale_only)
        )

    def has_hole(self, request: int, positions: Collection[int], after: int) -> bool:
        """Whether a request misses one of these positions later."""
        return any(v.request_id == request and v.position in positions and v.forward > after for v in self.holes)

    def has_hole_after_read(self, request: int, forward: int) -> bool:
        return any(v.request_id == request and v.forward > forward for v in self.holes)

    def has_tokens_of(self, run: Run) -> int:
        """Another request, whose slots of one forward miss the tokens that this one's hold; 0: none, or not told."""
        stored = {(v.stamp_step, v.stored_token) for v in run.records if v.stored_token is not None}
        missed = (
            v.request_id
            for v in self.reads
            if v.request_id == v.stamp_owner != run.owner and (v.stamp_step, v.expected_token) in stored
        )
        return next(missed, 0)

    def hole_behind(self, v: Violation) -> int | None:
        """A position behind, of the same request, that is missing."""
        return next((h.position for h in self.holes if h.request_id == v.request_id and h.position > v.position), None)

    def overwrote_own(self, hole: Violation) -> int | None:
        """An earlier position of the same request under a later token of its own."""
        for v in self.reads:
            if (
                v.request_id == hole.request_id == v.stamp_owner
                and v.position < hole.position
                and v.reasons & Reason.TOKEN
                and (Reason.POSITION not in v.reasons or v.stored_position == hole.position)
            ):
                return v.position
        return None

    def is_astray(self, run: Run) -> bool:
        """Whether one of two requests came to these slots by a slot mapping that its table does not agree with."""
        v = run.records[0]
        is_of_two = v.stamp_owner != v.request_id or not self.is_named
        return is_of_two and all((r.slot, r.forward) in self._astray for r in run.records)

    @cached_property
    def _astray(self) -> set[tuple[int, int]]:
        """(slot, forward) of writes that the table does not agree with; of rows without an id only if none has one."""
        writes = (w for w in self.writes if w.request_id or not self.is_named)
        return {(w.slot, w.forward) for w in writes if Reason.WRITE_POSITION in w.reasons}

    def is_duplicate(self, run: Run) -> bool:
        return any(v.slot in run.slots for v in self.duplicates)


def _whose(v: Violation) -> tuple[int, ...]:
    """What findings of one run have in common: the pool, who reads (without an id: the row), and who wrote."""
    return (v.pool, v.request_id or ~v.row, v.stamp_owner)


def _is_stale_only(v: Violation) -> bool:
    """Whether nothing is wrong with a stamp but whose block it is in by now."""
    return Reason.STALE_EPOCH in v.reasons and (
        v.reasons == Reason.STALE_EPOCH or (not v.reasons & _READ and v.stamp_owner == v.request_id)
    )
