"""The rules of `kvcanary.causes` for a row as a whole: its table, its length, its own tokens, whether it had ended."""

from __future__ import annotations

from kvcanary import abi, readings
from kvcanary.cause_rules_bytes import Found
from kvcanary.evidence import Records
from kvcanary.evidence_runs import Run
from kvcanary.tags import Reason
from kvcanary.violations import Violation

_WHICH = "no record tells a lost write, a row replayed with the arguments of the step before, and a wrong count apart"


# ---- what a row's findings say together ------------------------------------------------------------------------------
def row_of(records: Records, v: Violation) -> list[Violation]:
    """All findings in the pool about v's request in v's forward."""
    return records.rows.get((v.pool, v.request_id, v.forward), [])


def moved_entries(records: Records, v: Violation) -> list[Violation]:
    """What v's row finds of its own at other places of its table, and misses where that belongs.

    A block that is named twice is missed nowhere: where its KV belongs, it is found.
    """
    row = row_of(records, v)
    wrong = {r.position for r in row if r.reasons & (Reason.POSITION | Reason.TOKEN | Reason.UNWRITTEN)}
    moved = [r for r in row if readings.is_whole_blocks_away(r) and not is_older(records, r)]
    # What went elsewhere by the slot mapping is the mapping's doing.
    missed = any(r.stored_position in wrong for r in moved if (r.slot, r.stamp_step) not in records.explained)
    return moved if missed and len(moved) > 1 else []


def is_older(records: Records, v: Violation) -> bool:
    """Whether the slot may hold what the block held before the request that reads it came, or came back, to it."""
    if v.stamp_step == v.forward:
        return False
    if records.knows_owners(v):
        return Reason.UNWRITTEN in v.reasons or not readings.is_of_this_allocation(v)
    return not v.flags & abi.ROW_REGISTERED


def late_write(records: Records, v: Violation) -> Violation | None:
    """The write, in v's forward, of a request that may have ended: by its own table, into a block that was given on.

    A request that runs holds at least one of the blocks that its findings name.
    """
    row = [r for r in row_of(records, v) if r.request_id]
    if any(r.block_owner == r.request_id or Reason.WRITE_POSITION in r.reasons for r in row):
        return None
    writes = (r for r in row if Reason.FOREIGN_WRITE in r.reasons and r.block_owner and readings.was_handed_on(r))
    return next(writes, None)


def has_older_kv(records: Records, v: Violation) -> bool:
    """Whether v's row leads to KV that the request wrote itself, in blocks that were given on since."""
    return any(r.stamp_owner == r.request_id and 0 < r.stamp_epoch < r.block_epoch for r in row_of(records, v))


# ---- rules -----------------------------------------------------------------------------------------------------------
def ended_row(records: Records, write: Violation) -> Found:
    """A row of a request that had given its blocks back when its step ran."""
    request, block = write.request_id, write.slot // write.page_size
    what = f"request {request} wrote slot {write.slot} in forward {write.forward}, by its own table, in block {block}"
    what = f"{what}; {records.handover(write)}"
    if has_older_kv(records, write):
        yield "C01", 0.9, f"{what}, and what request {request} wrote before is still there: its blocks had been freed"
        yield "C07", 0.5, f"{what}: the row of request {request} may still name blocks that it gave back"
    else:
        yield "C01", 0.7, f"{what}: a write that came late"
        yield "C07", 0.65, f"{what}: the row of request {request} may still name it, or be another request's"


def moved_row(records: Records, v: Violation, moved: list[Violation]) -> Found:
    first = moved[0]
    shifts = {r.stored_position - r.position for r in moved}
    n = next(iter(shifts)) // first.page_size
    how = f"shifted by {abs(n)} block{'' if abs(n) == 1 else 's'}" if len(shifts) == 1 else "in another order"
    what = (
        f"in forward {v.forward} request {v.request_id} finds its own position {first.stored_position} where position "
        f"{first.position} is read, and so on, {len({r.slot for r in moved})} in all"
    )
    yield "C07", 0.9, f"{what}: whole blocks, each missed where it belongs: the table row is {how}"
    yield "C08", 0.5, f"{what}: the row may have been overwritten while it was read"


def exchanged_rows(run: Run) -> Found:
    """Two rows that lead to each other's blocks."""
    pair = "requests {} and {}".format(*sorted((run.records[0].request_id, run.owner)))
    what = f"{pair} each read the other's KV in forward {run.records[0].forward}, from its first position on"
    yield "C08", 0.9, f"{what}: their table rows were exchanged, or are of another order of the batch"
    yield "C07", 0.6, f"{what}: each table row names the other's blocks"


def other_root(run: Run) -> Found:
    """The first position with the right token, under another root."""
    text = f"{run.reader} finds its own tokens in {run.words}, under another root"
    if run.positions[0]:
        text = f"{run.reader} finds no wrong token in {run.words}, but another text in front, or another root"
        yield "C04", 0.5, f"{text}: without token_history, the block may be any text's"
    if run.is_own and run.is_registered:
        yield "C05", 0.9, f"{text} than it wrote them under: its salt is not what it was, or the row has another's"
        yield "C08", 0.5, f"{text} than it wrote them under: salts may have been overwritten while they were read"
    else:
        yield "C05", 0.9, f"{text}: another adapter, tenant or image wrote them, and the key does not say so"


def own_tokens(records: Records, run: Run) -> Found:
    """A request's own stamps, and they are wrong."""
    v = run.records[0]
    what = f"other tokens of request {v.request_id} itself are in {run.words}, written in forward {v.stamp_step}"
    if any(Reason.POSITION in r.reasons for r in run.records):
        yield from _own_positions(records, run)
    elif run.shift == 1:
        yield "C22", 0.9, f"{what}: each is the token of the position before"
    elif run.shift:
        n = run.shift
        again = f"{what}: each is the token of {n} positions before, so that {n} tokens were brought twice"
        yield "C20", 0.9, f"{again}: a chunk that overlaps the one before, or drafts that were committed twice"
    elif other := records.has_tokens_of(run):
        yield "C08", 0.95, f"{what}, with the token that request {other} should have had in that forward"
    elif records.differs_from_the_start(v.request_id):
        text = f"{what}, from its first position on, which no draft ever is"
        yield "C08", 0.85, f"{text}: a request slot, a history row, or input ids of another request"
    elif hole := records.hole_behind(v):
        yield "C14", 0.8, f"{what}, and its position {hole} is missing: the position counter was set back"
    elif all(Reason.TOKEN not in r.reasons for r in run.records):
        seam = f"{run.words} of request {v.request_id}, written in forward {v.stamp_step}, continue what is no longer"
        yield "C20", 0.6, f"{seam} in front of it: a draft that was taken back, or a token that was chosen again"
        yield "C08", 0.55, f"{seam} in front of it: input ids of another step or row"
    else:
        yield "C20", 0.85, f"{what}: a draft that was not accepted, or not the token that was chosen"
        yield "C08", 0.6, f"{what}: input ids of another step or row"


def _own_positions(records: Records, run: Run) -> Found:
    v = next(r for r in run.records if Reason.POSITION in r.reasons)
    where = f"{run.words}, where position {v.position} was, hold position {v.stored_position} of the same request"
    if len(run.slots) == 1:
        where = where.replace(" hold ", " holds ")
    if records.is_window(v):
        yield "C19", 0.85, f"{where}: a ring that was not written where it should be, or wrapped at another place"
    elif moved := moved_entries(records, v):
        yield from moved_row(records, v, moved)
    elif readings.is_whole_blocks_away(v) and is_older(records, v):
        yield "C16", 0.7, f"{where}, from before it came back to these blocks: its load, or write, did not come"
        yield "C03", 0.5, f"{where}: the table may name one block twice"
        yield "C07", 0.5, f"{where}: the table row may be an older one"
    elif readings.is_whole_blocks_away(v):
        yield "C03", 0.8, f"{where}, and nothing is missed where that belongs: the table names one block twice"
    else:
        yield "C12", 0.7, f"{where}: no whole number of blocks away, so no table: the place was computed wrongly"
        yield "C09", 0.65, f"{where}: it may be the place of another step"
        yield "C20", 0.5, f"{where}: a position may have been counted wrongly"


def one_missing(records: Records, run: Run, what: str) -> Found:
    """One slot that was counted and never written, behind what was."""
    v = run.records[0]
    others = sorted({h.request_id for h in records.holes if h.forward == v.forward} - {v.request_id})
    text = f"{what}, right behind what was written"
    if records.block_owner(v) == v.request_id != 0 and not run.is_registered:
        yield "C21", 0.5, f"{text}: if the block was copied or loaded, that was done before its last token was written"
    if run.is_registered:
        lost = f"{text}, in a forward that it ran in: the write was lost, a slot mapping of -1 or of another step"
        yield "C09", 0.85, lost
        yield "C12", 0.5, f"{text}: the write may have gone to a wrongly computed place"
    elif others:
        yield "C09", 0.8, f"{text}, and request {others[0]} misses one too: arguments of another step, for the batch"
        yield "C20", 0.6, f"{text}: a position that was counted, but never computed"
    elif run.ends_block:
        yield "C20", 0.8, f"{text}: a position that was counted, but never computed"
        yield "C09", 0.55, f"{text}: a slot mapping of -1 or of another step, or a replay with the arguments of one"
    else:
        yield "C20", 0.6, f"{text}: a position that was counted, but never computed; {_WHICH}"
        yield "C09", 0.6, f"{text}: slot_mapping was -1, or the row was replayed with the step before; {_WHICH}"
