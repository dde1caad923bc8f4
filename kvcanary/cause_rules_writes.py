"""The rules of `kvcanary.causes` for what was seen while it was written: slots, owners, tokens."""

from __future__ import annotations

from kvcanary import abi, readings
from kvcanary.cause_rules_bytes import Found
from kvcanary.cause_rules_rows import ended_row, late_write, moved_entries, moved_row
from kvcanary.evidence import Records
from kvcanary.evidence_runs import positions_of, slots_of
from kvcanary.ledger import owner_name
from kvcanary.tags import Reason, Stage
from kvcanary.violations import Violation


def duplicates_rule(records: Records) -> Found:
    for run in records.runs(records.duplicates):
        first = run.records[0]
        if records.is_astray(run):
            continue
        if all(readings.is_other_target(v) for v in run.records):
            what = f"request {first.request_id} was told {run.words} at the end of forward {first.forward}"
            yield "C08", 0.9, f"{what}, and others when it began: slot_mapping was changed while the forward ran"
            continue
        who = f"requests {first.request_id} and {first.stamp_owner} both wrote {run.words} in forward {first.forward}"
        if all(readings.is_repeated(v) for v in run.records):
            twice = f"request {first.request_id} wrote its position {first.position} twice in forward {first.forward}"
            yield "C10", 0.9, f"{twice}, to {run.words}: a second row brought it, as padding that repeats a live row"
            yield "C12", 0.5, f"{twice}, to {run.words}"
        elif first.stamp_owner == first.request_id:
            yield "C12", 0.7, f"request {first.request_id} wrote {run.words} twice in forward {first.forward}"
        elif run.starts_block and len(run.slots) > 1:
            yield "C03", 0.9, f"{who}: a block that both were given"
        else:
            yield "C21", 0.9, f"{who}: the tail of a block whose beginning they share"


def writes_rule(records: Records) -> Found:
    for (request, forward), writes in records.writes_by_row.items():
        slots = slots_of(writes)
        where = f"slots {slots}" if len(slots) > 1 else f"slot {slots[0]}"
        if request == 0:
            has_slot = writes[0].request_slot >= 0
            hint = ": padding, or a request whose request_ids entry is not filled in" if has_slot else ": padding"
            yield "C10", 0.95, f"a row that is no request's wrote {where} in forward {forward}{hint}"
            continue
        if moved := moved_entries(records, writes[0]):
            yield from moved_row(records, writes[0], moved)
            continue
        homes = sorted({v.prev_slot for v in writes if Reason.WRITE_POSITION in v.reasons})
        if not homes:
            continue
        what = f"request {request} wrote {where} in forward {forward}, its table says {homes}"
        lost = [
            v for v in records.holes if v.request_id == request and v.tag.stage == Stage.HEAD and v.forward > forward
        ]
        yield from _astray(records, writes, what, lost)


def _astray(records: Records, writes: list[Violation], what: str, lost: list[Violation]) -> Found:
    """A row's tokens went elsewhere than its table says: by who reads there."""
    request, slots = writes[0].request_id, slots_of(writes)
    own = [v for v in records.reads if v.request_id == request and v.slot in slots]
    others = [v for v in records.reads if v.request_id not in (0, request) and v.slot in slots]
    if lost:
        gone = positions_of(lost)
        yield (
            "C12",
            0.9,
            f"{what}, and its positions {gone} went nowhere: the place of every token was computed wrongly",
        )
    elif own and others and len(slots) > 1:
        yield (
            "C20",
            0.85,
            f"{what}: tokens ahead of its length, in a block that request {others[0].request_id} reads too",
        )
    elif own and others and records.was_substituted(request, at=writes[0].forward):
        led = f"{what}, through a row that names request {others[0].request_id}'s blocks"
        yield "C07", 0.75, f"{led}: the row is another request's, or a padded one with stale arguments"
        yield "C10", 0.6, f"{led}: a padded row with the arguments of another may do that"
    elif own and records.is_window(own[0]):
        yield "C19", 0.85, f"{what}, where a token of its own window was"
    elif own:
        yield from over_own(records, writes, own, what)
    elif others:
        yield "C08", 0.6 if len(slots) == 1 else 0.85, f"{what}; request {others[0].request_id} reads there"
        yield "C12", 0.55, f"{what}: the mapping may be that of another table"
    elif all(records.is_anothers_row(v) for v in writes):
        yield "C07", 0.75, f"{what}, behind another request's KV: the row, not the mapping, is another request's"
    elif records.is_window(writes[0]):
        yield "C19", 0.75, f"{what}; nobody reads there: a place behind its window, or of a ring that went round"
        yield "C12", 0.6, f"{what}; nobody reads there: it may be a slot mapping of another table"
    else:
        yield "C12", 0.7, f"{what}; nobody reads there: a slot mapping of another table"
        yield "C09", 0.5, f"{what}; nobody reads there: it may be a slot mapping of another step"


def over_own(records: Records, writes: list[Violation], own: list[Violation], what: str) -> Found:
    """A row's tokens went to places where earlier ones of its own were."""
    v = own[0]
    where = f"{what}, where its own position {v.position} was"
    shift = v.stored_position - v.position
    has_tokens = v.request_slot >= 0  # without a request slot no token is judged
    is_right = has_tokens and v.stamp_step == writes[0].forward and not any(r.reasons & Reason.TOKEN for r in own)
    if is_right and len(writes) == 1 and shift > 0 and (shift % v.page_size or v.page_size == 1):
        yield "C20", 0.87, f"{where}, and no other token than belongs there: the row was counted {shift} too long"
    yield "C09", 0.85, f"{where}: the place of an earlier step"
    if shift == v.page_size > 1 and _begin_pages(writes):
        forwards = {w[0].forward for w in records.writes_by_row.values() if _begin_pages(w)}
        again = f", in {len(forwards)} forwards" if len(forwards) > 1 else ""
        page = f"{where}, just one block before its own, at the beginning of a page{again}"
        yield "C12", 0.9 if again else 0.7, f"{page}: the index into the table is one off there"
    else:
        yield "C12", 0.6, f"{where}: the place may have been computed wrongly"
    yield "C20", 0.4, f"{what}: drafts may have been written without room for them"


def _begin_pages(writes: list[Violation]) -> bool:
    """Whether each of a row's stray tokens should begin a page, and went to the beginning of another."""
    return all(
        Reason.WRITE_POSITION in v.reasons and v.position and v.position % v.page_size == v.slot % v.page_size == 0
        for v in writes
    )


def inputs_rule(records: Records) -> Found:
    """Tokens that the model was given, and should not have been."""
    forwards = sorted({v.forward for v in records.inputs})
    for forward in forwards:
        wrong = [v for v in records.inputs if v.forward == forward]
        rows = sorted({v.request_id for v in wrong})
        n = len({(v.row, v.position) for v in wrong})  # once, whatever the number of pools
        who = f"request {rows[0]}" if len(rows) == 1 else f"{len(rows)} requests ({rows[0]} to {rows[-1]})"
        what = f"forward {forward} gave the model other tokens than were meant, for {who}, {n} in all"
        meant = {v.expected_token: v.request_id for v in wrong if v.expected_token is not None}
        others = [(v.request_id, meant.get(v.stored_token, 0)) for v in wrong if v.stored_token is not None]
        for request, other in [pair for pair in others if pair[1] not in (0, pair[0])][:1]:
            yield "C08", 0.9, f"{what}: request {request} got what was meant for request {other}"
        yield "C08", 0.8, f"{what}: input ids that were overwritten before the forward had read them"
        yield "C09", 0.7, f"{what}: a graph that was replayed with the input ids of another step"


def foreign_writes_rule(records: Records) -> Found:
    """Writes that follow the writer's own table, into a block that is not the writer's."""
    for (request, forward), writes in records.writes_by_row.items():
        foreign = [v for v in writes if v.reasons & (Reason.FOREIGN_WRITE | Reason.WRITE_POSITION)]
        if not request or any(Reason.WRITE_POSITION in v.reasons for v in foreign):
            continue
        v = foreign[0]
        block = v.slot // v.page_size
        what = f"request {request} wrote slot {v.slot} in forward {forward}, by its own table, in block {block}"
        if v.block_flags & abi.BLOCK_SHARED and not v.block_owner:
            is_sole = not any(r.slot in slots_of(foreign) for r in (*records.reads, *records.holes))
            mend = f"copy the block before it is written, or claim_blocks() if request {request} is its last holder"
            yield "C21", 0.85 if is_sole else 0.6, f"{what}, which is shared and nobody's own: {mend}"
        elif v.block_flags & abi.BLOCK_SHARED:
            whose = f"{what}, which is {owner_name(v.block_owner)}'s, and shared"
            yield "C21", 0.6, f"{whose}: the block should have been copied before it was written"
        elif (late := late_write(records, v)) is not None:
            yield from ended_row(records, late)
        elif records.may_have_ended_before(v):
            whose = f"{what}; {records.handover(v)}"
            yield "C01", 0.55, f"{whose}: a write that came late"
            yield "C07", 0.5, f"{whose}: the row of request {request} may still name it"
        else:
            whose = f"{what}; {records.handover(v)}"
            yield "C07", 0.55, f"{whose}: the row of request {request} names a block of another request"
            yield "C03", 0.5, f"{whose}: both may have been given the block"
