"""The rules of `kvcanary.causes`: what each kind of finding says about its cause.

A rule takes all records of a fault and yields (class, confidence, evidence); it reasons from what is physically there.
"""

from __future__ import annotations

from collections.abc import Callable

from kvcanary import readings
from kvcanary.cause_rules_bytes import Found, data_rule
from kvcanary.cause_rules_holes import holes_rule
from kvcanary.cause_rules_owners import given_away, stale_rule
from kvcanary.cause_rules_rows import (
    ended_row,
    exchanged_rows,
    late_write,
    other_root,
    own_tokens,
)
from kvcanary.cause_rules_seams import later_seam, lost_in_window, other_entry
from kvcanary.cause_rules_unnamed import unnamed_duplicates, unnamed_reads, unnamed_writes
from kvcanary.cause_rules_writes import duplicates_rule, foreign_writes_rule, inputs_rule, writes_rule
from kvcanary.evidence import Records
from kvcanary.evidence_runs import Run, reader_name
from kvcanary.tags import Detail, Reason


# ---- what the engine handed in ---------------------------------------------------------------------------------------
def _bad_entries(records: Records) -> Found:
    for v in records.all:
        if v.is_in_pool:
            continue
        what = f"{reader_name(v)} at position {v.position}"
        if v.detail == Detail.SLOT_MAPPING:
            yield (
                "C12",
                0.9,
                f"slot_mapping sends {what} to {v.slot}, which is no slot of this pool: other units, or overflow",
            )
        elif v.detail == Detail.SEQ_LEN or (v.detail == Detail.TABLE_ENTRY and v.slot == v.position):
            yield "C07", 0.9, f"{what} lies beyond the end of its block table row"
        elif v.detail == Detail.TABLE_ENTRY and Reason.OUT_OF_RANGE in v.reasons:
            yield "C07", 0.85, f"the table entry for {what} is {v.slot}: memory that nobody filled"
        elif v.detail == Detail.TABLE_ENTRY and records.is_window(v):
            yield "C19", 0.85, f"the window's mapping has no slot for {what}, which is inside the window"
        elif v.detail == Detail.TABLE_ENTRY:
            yield (
                "C07",
                0.75,
                f"the table entry for {what} is {v.slot}, which names no block, though the row is read there",
            )
            yield "C08", 0.4, f"the table entry for {what} is {v.slot}: the row may have been cleared while it was read"
        else:
            yield "C08", 0.7, f"the row of {what} cannot be: {v.detail.name} is {v.slot}"


def _poisoned(records: Records) -> Found:
    found = [v for v in records.all if v.detail == Detail.RESERVED]
    if found:
        blocks = " and ".join(map(str, sorted({v.slot // v.page_size for v in found})))
        layers = sorted({v.layer for v in found if v.layer is not None})
        yield (
            "C10",
            0.95,
            f"NaN or Inf in reserved block {blocks}, layers {layers}: only padding and dummy rows write there",
        )


# ---- what was another's ----------------------------------------------------------------------------------------------
def _reads(records: Records) -> Found:
    for run in records.read_runs():
        v = run.records[0]
        only_chains = all(r.reasons == Reason.CHAIN for r in run.records)
        if only_chains and (v.position == 0 or not (run.is_registered or run.is_moved)):
            yield from other_root(run)
        elif (write := late_write(records, v)) is not None:
            yield from ended_row(records, write)
        elif run.is_moved:
            yield from _moved(run)
        elif run.owner == v.request_id:
            yield from own_tokens(records, run)
        elif records.is_exchange(run):
            yield from exchanged_rows(run)
        elif records.is_window(v):
            yield "C19", 0.85, f"{run.story}, and it is inside the window of request {v.request_id}"
            if not records.knows_owners(v) and v.stamp_step < v.forward:
                yield from lost_in_window(run, f"{run.story}, which may be what the block held before")
        elif run.is_registered:
            yield from _overwritten(records, run)
        else:
            yield from _wrong_hit(records, run)


def _moved(run: Run) -> Found:
    v = run.records[0]
    what = f"{run.words} came by a copy or load in forward {v.stamp_step}"
    is_shifted = any(Reason.POSITION in r.reasons for r in run.records)
    is_lone = run.is_registered and len(run.slots) == 1 < run.page
    if is_lone:
        wrote = f"an unnamed writer left its position {v.stored_position} in {run.words} in forward {v.stamp_step}"
        yield "C10", 0.85, f"{wrote}: one slot, as a padding row writes it; copies and loads move whole blocks"
    if is_shifted:
        yield (
            "C14",
            0.7 if is_lone else 0.95,
            f"{what}: position {v.stored_position} landed where position {v.position} is read",
        )
    elif run.is_registered:
        yield (
            "C02",
            0.7 if is_lone else 0.9,
            f"{what}, onto request {v.request_id}, which was running: the transfer was another's",
        )
    else:
        yield (
            "C02",
            0.85,
            f"{what}, with other tokens than the key promises: they were overwritten before they were saved",
        )
        yield "C04", 0.5, f"{what}: they may have been saved under a stale key"


def _overwritten(records: Records, run: Run) -> Found:
    """A running request finds another's stamps in its slots."""
    v = run.records[0]
    owner, reader = run.owner, v.request_id
    is_back = records.was_substituted(owner, at=v.stamp_step)
    if records.is_duplicate(run):
        yield "C21", 0.6, f"{run.story}, in the forward in which both wrote it"
    elif is_back and records.has_hole(owner, run.positions, after=v.stamp_step):
        yield "C08", 0.9, f"{run.story}, while request {owner} read through request {reader}'s row, and misses it since"
    elif is_back and not records.may_have_ended(owner, v.stamp_step):
        wrote = f"{run.story}: request {owner} read and wrote there through a row"
        yield "C07", 0.85, f"{wrote} that names request {reader}'s blocks, which it never had"
        yield "C08", 0.7, f"{wrote} that was overwritten with request {reader}'s while it was read"
    elif is_back:
        yield "C01", 0.9, f"{run.story}, after {records.handover(v)}: a write by a request that had ended"
    elif (seam := later_seam(records, run)) is not None:
        yield from other_entry(records, run, seam)
    elif any(r.stored_position != r.position for r in run.records):
        yield from _other_index(records, run)
    elif records.has_hole_after_read(reader, v.forward):
        yield (
            "C08",
            0.9,
            f"{run.story}; request {reader} reads its own blocks again later, and its token is missing there",
        )
    elif records.block_owner(v) == owner and records.gave_up(v, reader):
        yield from given_away(records, run)
    elif len(run.blocks) > 1 or (len(run.slots) == 1 and not run.starts_block):
        yield "C01", 0.7, f"{run.story}: all that request {reader} had there, as after its end"
        yield "C03", 0.5, f"{run.story}: both may have been given these blocks"
        yield "C08", 0.4, f"{run.story}: the table row of request {reader} may be another request's"
    else:
        have = "both have" if records.knows_owners(v) else "both may have"
        yield "C03", 0.8, f"{run.story}, and request {reader} has run up to there: {have} block {run.blocks[0]}"
        yield "C01", 0.5, f"{run.story}: request {reader} may have ended, and its last step come late"


def _other_index(records: Records, run: Run) -> Found:
    """Foreign stamps of other positions: the writer has the block at another place of its table."""
    v = run.records[0]
    owner, reader = run.owner, v.request_id
    what = f"{run.story} as its position {v.stored_position}"
    if run.is_padding:
        yield "C07", 0.85, f"{what}, one and the same token in each: padding, through the tail of its table row"
    if records.block_owner(v) == owner:
        yield "C07", 0.8, f"{what}; the block was given to request {owner}: the row of {reader} still names it"
    elif run.reaches_end_of(owner, records):
        yield "C07", 0.6, f"{what}: an entry behind the writer's own blocks"
    if records.knows_owners(v):
        yield "C03", 0.7, f"{what}: both tables name block {run.blocks[0]}, at different places"
        yield "C07", 0.65, f"{what}: a stale entry in the tail of request {owner}'s row"
    else:
        yield "C03", 0.7, f"{what}: both tables may name block {run.blocks[0]}, at different places"
        yield "C07", 0.65, f"{what}: it may be older, and a stale or foreign table entry lead there"


def _wrong_hit(records: Records, run: Run) -> Found:
    """A request's first forward finds another's stamps in its prefix."""
    v = run.records[0]
    owner = records.block_owner(v)
    is_shifted = any(Reason.POSITION in r.reasons for r in run.records)
    may_be_older = not records.knows_owners(v) and v.stamp_step < v.forward
    if not run.starts_block and may_be_older and (is_shifted or records.ends_inside_block(v)):
        yield (
            "C16",
            0.65,
            f"{run.story}, which may be what the block held before: the write or load of {run.words} was lost",
        )
        counted = (
            f"{run.story}, where {run.reader} has counted positions (from {v.position}) that it may never have written"
        )
        yield "C20", 0.7 if len(run.slots) == 1 else 0.6, counted
        yield "C06", 0.55, f"{run.story}: the block may have been announced before it was written"
        if not is_shifted:
            yield "C05", 0.4, f"{run.story}: the key may not hold the whole text"
    elif not run.starts_block and readings.is_strangers(v):
        yield "C07", 0.8, f"{run.story}; {records.handover(v)}: the row may be that of another request"
        yield "C05", 0.5, f"{run.story}: the key may not hold the whole text"
    elif not run.starts_block:
        yield "C05", 0.85, f"{run.story}; the beginning of the block is right: a key that does not hold the whole text"
        yield "C20", 0.5, f"{run.story}; the beginning of the block is right: drafts may have been published with it"
        yield "C04", 0.4, f"{run.story}: the block may have been rewritten in part"
    elif records.is_older_epoch(run) and owner == v.request_id:
        yield "C16", 0.85, f"{run.story}, before request {owner} was given the block: its load did not come"
    elif records.is_older_epoch(run):
        yield "C06", 0.85, f"{run.story}, before the block was given away: its new owner has not written it"
    else:
        yield (
            "C04",
            0.8,
            f"{run.story}; what {run.reader} expects there is older: an index that was not told",
        )
        if is_shifted and all(Reason.TOKEN not in r.reasons for r in run.records):
            yield "C05", 0.6, f"{run.story}, and no token is wrong there: the key may not hold what is in front"
        if readings.is_strangers(v):
            yield "C07", 0.55, f"{run.story}; {records.handover(v)}: the row may be that of another request"
        yield "C06", 0.5, f"{run.story}: the prefix may have been announced before it was computed"
        yield "C16", 0.4, f"{run.story}: the load of {run.reader}'s prefix may not have come"


RULES: tuple[Callable[[Records], Found], ...] = (
    *(_bad_entries, _poisoned, duplicates_rule, writes_rule, foreign_writes_rule, inputs_rule),
    *(holes_rule, _reads, stale_rule, data_rule),
)
UNNAMED_RULES: tuple[Callable[[Records], Found], ...] = (
    *(_bad_entries, _poisoned, unnamed_duplicates, unnamed_writes, inputs_rule),
    *(holes_rule, unnamed_reads, stale_rule, data_rule),
)
