"""The rules of `kvcanary.causes` for blocks in the wrong hands: who owns a block, and since when."""

from __future__ import annotations

from kvcanary import abi, readings
from kvcanary.cause_rules_bytes import Found
from kvcanary.evidence import Records
from kvcanary.evidence_runs import Run
from kvcanary.tags import Reason


def given_away(records: Records, run: Run) -> Found:
    """A running request finds in its slots the stamps of whoever owns the block."""
    v = run.records[0]
    what = f"{run.story}; {records.handover(v)}"
    is_whole = records.is_whole_prefix(run)
    if not readings.was_handed_on(v) or (is_whole and not records.may_have_ended_before(v)):
        yield from _not_its_own(run, what)
    elif is_whole:
        yield "C01", 0.8, f"{what}: request {v.request_id} had ended when its step ran"
        yield "C08", 0.5, f"{what}: the row of request {v.request_id} was overwritten with the other's"
    else:
        yield "C07", 0.8, f"{what}, but the row of request {v.request_id} still names it"
        yield "C01", 0.5, f"{what}: the step may have been dispatched before the block was freed"


def _not_its_own(run: Run, what: str) -> Found:
    """The block was never the reader's, or the reader still runs in blocks of its own."""
    reader = run.reader
    why = f"{reader} holds other blocks" if readings.was_handed_on(run.records[0]) else "nobody had it before"
    yield "C07", 0.8, f"{what}, and {why}: the table row of {reader} names a block of another request"
    yield "C08", 0.6, f"{what}: the row of {reader} was overwritten with the other's while it was read"
    yield "C03", 0.4, f"{what}: both were given the block, and only one was told to the guard"


def stale_rule(records: Records) -> Found:
    """Slots that are still right, in blocks that are no longer, or never were, the reader's."""
    for run in records.runs(records.stale_only):
        v = run.records[0]
        what = f"{run.reader} reads {run.words}; {records.handover(v)}"
        if readings.is_never_allocated(v):
            never = f"{run.reader} reads {run.words}, and block {v.slot // v.page_size} was never allocated"
            yield "C07", 0.6, f"{never}: allocate_blocks() was not told, or the row names a block that nobody was given"
        elif not readings.is_strangers(v):
            yield from _own_again(records, run, what)
        elif run.is_own and not v.stamp_epoch and records.block_owner(v):
            yield "C03", 0.85, f"{what}, yet it wrote there in forward {v.stamp_step}, as if it had been given to both"
        elif run.is_own:
            yield from _used_after_free(records, run, what)
        elif records.is_mutual(v):
            pair = f"requests {v.request_id} and {v.block_owner} each read the other's blocks in forward {v.forward}"
            yield "C08", 0.85, f"{pair}, and find what they expect: the request_ids of the two rows were exchanged"
        elif not run.is_registered:
            hit = f"{what}; the KV is what {run.reader} expects: a prefix hit"
            yield "C04", 0.7, f"{hit} that share_blocks() was not told of, or of an index that was not told who has it"
            yield "C07", 0.5, f"{what}: the row may be another request's"
        elif not records.block_owner(v) or (records.may_have_ended_before(v) and records.is_whole_prefix(run)):
            yield from _used_after_free(records, run, what)
        else:
            yield "C07", 0.7, f"{what}, but the row of {run.reader} names it"
            yield "C01", 0.5, f"{what}: the step may have been dispatched before {run.reader} gave the block up"


def _used_after_free(records: Records, run: Run, what: str) -> Found:
    is_whole = records.is_whole_prefix(run)
    if records.is_window(run.records[0]) and not is_whole:
        yield "C19", 0.8, f"{what}, inside its window or sink: the block was given back before they had left it"
    yield "C01", 0.85 if is_whole else 0.7, f"{what}: a step that still uses it; nothing is overwritten there yet"
    yield "C07", 0.5 if is_whole else 0.6, f"{what}: the table row of {run.reader} may still name a block it gave back"


def _own_again(records: Records, run: Run, what: str) -> Found:
    """Nothing speaks against the reader; when or by whom it was written is what is wrong."""
    v = run.records[0]
    if Reason.UNWRITTEN in v.reasons:
        if records.is_window(v) and run.is_own:
            yield "C19", 0.85, f"{what}, inside its window or sink: the block was given anew before they had left it"
        yield "C16", 0.8, f"{what}, and what is there is older: what should have been loaded or written did not come"
        yield "C20", 0.5, f"{what}: a counter that was not set back when the blocks were given up"
    else:
        who = f"request {v.stamp_owner}" if v.stamp_owner else "a row that is no request's"
        wrote = f"{what}; {who} wrote there in forward {v.stamp_step} without owning it"
        if v.block_flags & abi.BLOCK_SHARED:
            yield "C21", 0.7, f"{wrote}: a block that is shared should be copied before it is written"
            return
        yield "C03", 0.7, f"{wrote}: as if it had been given to both, or before it was told to the guard"
        yield "C01", 0.5, f"{wrote}: a write that came late"
