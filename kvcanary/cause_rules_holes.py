"""The rule of `kvcanary.causes` for what is not there: never written, not any more, or only in part."""

from __future__ import annotations

from kvcanary import abi
from kvcanary.cause_rules_bytes import Found
from kvcanary.cause_rules_rows import ended_row, has_older_kv, late_write, moved_entries, moved_row, one_missing
from kvcanary.cause_rules_seams import lost_in_window
from kvcanary.evidence import Records
from kvcanary.evidence_runs import Run
from kvcanary.tags import Detail, Stage


def holes_rule(records: Records) -> Found:
    for run in records.runs(records.holes):
        v = run.records[0]
        if records.wrote_elsewhere(v) or records.is_of_anothers_block(v):
            continue
        if moved := moved_entries(records, v):
            yield from moved_row(records, v, moved)
            continue
        if (write := late_write(records, v)) is not None and has_older_kv(records, v):
            yield from ended_row(records, write)
            continue
        what = f"{run.reader} reads {run.words} (position {run.positions[0]}), where nothing was written for it"
        if v.detail == Detail.UNFINISHED:
            yield "C16", 0.7, f"{run.words} is half written: its HEAD and TAIL stamps are of different forwards"
        elif v.tag.stage == Stage.TAIL and (over := records.overwrote_own(v)) is not None:
            yield "C12", 0.85, f"{what}: that token was written over its position {over} instead"
            yield "C09", 0.65, f"{what}: that token was written over its position {over}, the place of an earlier step"
        elif v.tag.stage == Stage.TAIL:
            yield "C08", 0.9, f"{what}: when its forward ended, the table named another slot than when it began"
        elif v.tag.stage == Stage.SWEEP:
            yield "C16", 0.75, f"{what}: it was loaded, and the load did not come"
            yield "C06", 0.6, f"{what}: it may have been announced before it was computed"
        else:
            yield from _missing(records, run, what)


def _missing(records: Records, run: Run, what: str) -> Found:
    """A row reads what was never written."""
    v = run.records[0]
    if records.was_substituted(v.request_id, before=v.forward):
        yield "C08", 0.95, f"{what}, after it had read, and written, through another request's table row"
    elif records.is_window(v):
        yield "C19", 0.85, f"{what}, inside its window"
        yield from lost_in_window(run, what)
    elif (over := records.overwrote_own(v)) is not None:
        yield "C14", 0.85, f"{what}: that token was written over its position {over} instead"
        yield "C20", 0.7, f"{what}: that token was written over its position {over}, as a length that is short does it"
    elif not run.starts_block and len(run.slots) == 1:
        yield from one_missing(records, run, what)
    elif run.starts_block and run.is_registered and run.positions[0] and not run.ends_block:
        yield from _missing_tail(run, what)
    elif run.starts_block and not run.ends_block and len(run.slots) < run.page:
        yield "C21", 0.8, f"{what}: the first {len(run.slots)} of a block, a tail that should have been copied"
        yield "C16", 0.7, f"{what}: the first {len(run.slots)} of a block, as a load that was cut short leaves it"
        if len(run.slots) == 1:
            yield (
                "C09",
                0.65,
                f"{what}: one slot, as a write that was lost, or a replay with the step before, leaves it",
            )
        yield "C20", 0.5, f"{what}: a position may have been counted before its token was computed"
    else:
        yield from _missing_block(records, run, what)


def _missing_tail(run: Run, what: str) -> Found:
    """The beginning of a block of a request that has run up to here: it was not forked."""
    ran = f"{what}, though it has run up to here"
    n = len(run.slots)
    lost = f"{ran}: the first {n} of a block that it came back to without" if n > 1 else f"{ran}: the write was lost"
    yield "C16", 0.85 if n > 1 else 0.6, f"{ran}: what should have been loaded there did not come"
    yield "C09", 0.5 if n > 1 else 0.8, f"{lost}: a slot mapping of -1 or of another step"
    yield "C21", 0.5, f"{ran}: the tail may belong to a block that should have been copied"


def _missing_block(records: Records, run: Run, what: str) -> Found:
    v = run.records[0]
    owner = records.block_owner(v)
    if owner and owner != v.request_id:
        yield "C06", 0.9, f"{what}; the block is request {owner}'s, which has not written it yet"
        return
    if owner:
        yield "C16", 0.9, f"{what} since it was given the block: what should have been loaded there did not come"
        if run.is_registered and run.positions[0] == 0:
            yield "C20", 0.7, f"{what} since it was given the block: its count was not set back when it gave up the old"
        return
    if records.knows_owners(v) and v.block_flags & abi.BLOCK_SHARED:
        yield "C06", 0.85, f"{what}; whoever was to write the block let go of it before that"
    is_first = run.positions[0] == 0
    yield "C06", 0.7 if is_first else 0.6, f"{what}: a prefix hit before the prefix was computed"
    yield (
        "C16",
        0.6 if is_first else 0.7,
        f"{what}: a load that never came" + ("" if is_first else ", though the blocks before did"),
    )
