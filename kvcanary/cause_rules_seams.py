"""Rules of `kvcanary.causes` that reason from where a substitution ends: what was written behind it, and when."""

from __future__ import annotations

from kvcanary.cause_rules_bytes import Found
from kvcanary.evidence import Records
from kvcanary.evidence_runs import Run
from kvcanary.tags import Reason
from kvcanary.violations import Violation

_WRONG = Reason.TOKEN | Reason.POSITION | Reason.UNWRITTEN


def later_seam(records: Records, run: Run) -> Violation | None:
    """The record right behind a run of foreign stamps, if its own stamp is younger than all of them.

    It was written behind other KV than lies there now. Had that been overwritten since, the stamps in its place would
    be the younger ones: the row named another block then. None where the stamps are moved, or of one forward.
    """
    last = run.records[-1]
    newest = max(v.stamp_step for v in run.records)
    for v in records.reads:
        is_next = (v.pool, v.request_id, v.forward) == (last.pool, last.request_id, last.forward)
        if is_next and v.position == last.position + 1 and Reason.CHAIN in v.reasons and not v.reasons & _WRONG:
            return v if v.stamp_owner and v.stamp_step > newest else None
    return None


def other_entry(records: Records, run: Run, seam: Violation) -> Found:
    """A running request's row leads to older KV of another request, in front of what it wrote or hit later."""
    where = f"{run.story}; what lies behind it, in slot {seam.slot}, was written later, in forward {seam.stamp_step}"
    blocks = f"block{'s' * (len(run.blocks) > 1)} {', '.join(map(str, run.blocks))}"
    yield "C07", 0.85, f"{where}, and continues other KV: the row did not name {blocks} then"
    yield "C08", 0.6, f"{where}, and continues other KV: the row may have been overwritten while it was read"


def lost_in_window(run: Run, what: str) -> Found:
    """One slot in a window: beside a wrong mapping of the window, its write may have been lost."""
    if len(run.slots) == 1:
        yield "C09", 0.7, f"{what}; one slot, as a write that was lost leaves it: slot mapping -1, or another step's"
