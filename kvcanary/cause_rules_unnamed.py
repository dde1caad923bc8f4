"""The rules of `kvcanary.causes` for engines that give no request ids: rows and positions, and nobody's stamps."""

from __future__ import annotations

from kvcanary.cause_rules_bytes import Found
from kvcanary.cause_rules_writes import over_own
from kvcanary.evidence import Records
from kvcanary.evidence_runs import Run, slots_of
from kvcanary.tags import Reason
from kvcanary.violations import Violation

_WHOSE = "whose it is, nobody knows without request_ids"


def unnamed_duplicates(records: Records) -> Found:
    for run in records.runs(records.duplicates):
        v = run.records[0]
        if records.is_astray(run):
            continue
        what = f"{run.reader} and another token of forward {v.forward} both went to {run.words}"
        if run.starts_block and len(run.slots) > 1:
            yield "C03", 0.8, f"{what}: a block that two were given"
            yield "C21", 0.5, f"{what}: a block that two share"
        else:
            yield "C21", 0.8, f"{what}: the tail of a block whose beginning two rows share"
            yield "C03", 0.5, f"{what}: a block that two were given"
        yield "C10", 0.5, f"{what}: a padded row may be mapped to a live slot"


def unnamed_writes(records: Records) -> Found:
    rows: dict[tuple[int, int, int], list[Violation]] = {}
    for v in records.writes:
        if Reason.WRITE_POSITION in v.reasons:
            rows.setdefault((v.pool, v.row, v.forward), []).append(v)
    for (pool, row, forward), writes in rows.items():
        slots = slots_of(writes)
        homes = sorted({v.prev_slot for v in writes})
        where = f"slots {slots}" if len(slots) > 1 else f"slot {slots[0]}"
        what = f"row {row} wrote {where} in forward {forward}, its table says {homes}"
        readers = [r for r in records.reads if r.pool == pool and r.slot in slots]
        own = [r for r in readers if (r.row, r.forward) == (row, forward)]
        if own and records.is_window(own[0]):
            yield "C19", 0.8, f"{what}, where a token of its own window was"
        elif own:
            yield from over_own(records, writes, own, what)
        else:
            is_short = len(writes) == 1 and writes[0].position == 0
            yield "C10", 0.85 if is_short else 0.5, f"{what}: a padded or dummy row may do that; {_WHOSE}"
            yield "C08", 0.7 if readers else 0.5, f"{what}: a slot mapping of another step or row"
            yield "C12", 0.65, f"{what}: a slot mapping of another table, or a place that was computed wrongly"


def unnamed_reads(records: Records) -> Found:
    for run in records.read_runs():
        v = run.records[0]
        where = f"{run.words} of {run.reader}, written in forward {v.stamp_step},"
        shifted = next((r for r in run.records if r.stored_position != r.position), None)
        if all(r.reasons == Reason.CHAIN for r in run.records):
            yield from _seam(run, where)
        elif shifted is None:
            text = f"{where} {'is' if len(run.slots) == 1 else 'are'} another text's"
            yield "C07", 0.6, f"{text}: a table row that names another's block; {_WHOSE}"
            yield "C04", 0.6, f"{text}: a prefix hit on a block that changed; {_WHOSE}"
            yield "C20", 0.5, f"{text}: its own drafts may have been kept; {_WHOSE}"
        else:
            yield from _elsewhere(records, run, shifted, where)


def _elsewhere(records: Records, run: Run, shifted: Violation, where: str) -> Found:
    """KV of other positions."""
    verb = "holds" if len(run.slots) == 1 else "hold"
    holds = f"{where} {verb} position {shifted.stored_position} where {shifted.position} is read"
    if records.is_window(shifted):
        yield "C19", 0.75, f"{holds}: a ring or window that is mapped to another place"
    if run.page > 1 and (shifted.stored_position - shifted.position) % run.page == 0:
        yield "C07", 0.7, f"{holds}: whole blocks away: a table row that is shifted, or names another's block"
        yield "C03", 0.65, f"{holds}: whole blocks away: a block that two were given; {_WHOSE}"
        yield "C14", 0.6, f"{holds}: whole blocks away: a copy or load that landed in another block"
    else:
        yield "C03", 0.65, f"{holds}: a slot that two were given; {_WHOSE}"
        yield "C12", 0.6, f"{holds}: no whole number of blocks away: a place that was computed wrongly"


def _seam(run: Run, where: str) -> Found:
    """Right positions under a chain that breaks."""
    is_one = len(run.slots) == 1
    if run.positions[0] == 0:
        root = f"{where} {'is' if is_one else 'are'} under another root"
        yield "C05", 0.85, f"{root}: another adapter, tenant or image, and the key does not say so"
        return
    breaks = f"{where} {'does' if is_one else 'do'} not continue what is in front"
    yield "C07", 0.65, f"{breaks}: from there on, or up to there, the table row names another's blocks; {_WHOSE}"
    yield "C04", 0.65, f"{breaks}: a prefix hit on a block that changed; {_WHOSE}"
    yield "C03", 0.6, f"{breaks}: a block that two were given; {_WHOSE}"
    yield "C20", 0.4, f"{breaks}: drafts that were kept, or a token that was chosen again"
