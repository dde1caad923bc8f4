"""From violations to what probably went wrong: a pure function of the records.

The records are physical: which slot holds whose stamp, of which position, written in which forward; whose bytes differ,
on which layers. The rules (`cause_rules.py`) reason from that. A transfer moves whole blocks, a late write one slot; a
flipped bit stays on one plane; two requests that damage each other shared a block; a request's own stamp under a wrong
token is its own doing. Records of several findings of one fault belong together: give all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcanary.cause_rules import RULES, UNNAMED_RULES
from kvcanary.evidence import Records
from kvcanary.violations import Violation

# The museum's classes: what engines do.
NAMES = {
    "C01": "block freed while a dispatched step still uses it",
    "C02": "block freed while a transfer still uses it",
    "C03": "one block with two owners",
    "C04": "prefix index points at a block that changed",
    "C05": "cache key too small, or a collision",
    "C06": "block published before it was written",
    "C07": "stale or missing block table entry followed",
    "C08": "metadata overwritten while the device reads it",
    "C09": "graph replayed with a stale argument",
    "C10": "padding or dummy row writes real memory",
    "C12": "write to a wrongly computed place",
    "C13": "restore with the wrong layout",
    "C14": "restore to the wrong position",
    "C15": "load still in flight when it is read",
    "C16": "transfer reported complete, part of it missing",
    "C17": "memory zeroed after it was written",
    "C18": "quantisation scales lost",
    "C19": "sliding window or ring mapped wrongly",
    "C20": "draft tokens kept, or counted wrongly",
    "C21": "fork without a copy",
    "C22": "prefix off by one",
    "C24": "bits changed in memory",
}
CANNOT_TELL = "cannot tell"
MAX_SENTENCES = 4  # of evidence for one cause


@dataclass(frozen=True)
class Cause:
    """A root cause that would explain the records.

    Attributes:
        name: in words, or "cannot tell".
        class_id: class of `NAMES`, "" with "cannot tell".
        confidence: 0 to 1, for the order; not a probability.
        evidence: sentences, each about something that the records say; what tells most comes first.
    """

    name: str
    class_id: str
    confidence: float
    evidence: tuple[str, ...]


def classify(violations: Sequence[Violation]) -> list[Cause]:
    """Causes that explain the records, the most likely first; empty only if there are no records.

    Args:
        violations: of one fault, in any order: that of one forward's records is not the same on every GPU.
    """
    if not violations:
        return []
    violations = sorted(violations, key=_place)
    records = Records(violations)
    told: dict[str, list[tuple[float, str]]] = {}
    for rule in RULES if records.is_named else UNNAMED_RULES:
        for class_id, confidence, evidence in rule(records):
            told.setdefault(class_id, []).append((confidence, evidence))
    found = sorted((_cause(*item) for item in told.items()), key=lambda cause: -cause.confidence)
    return found or [Cause(CANNOT_TELL, "", 0.0, (f"{violations[0].summary()}; nothing else is known",))]


def _place(v: Violation) -> tuple[int, ...]:
    """Of records of one forward: HEAD before TAIL, then by rows."""
    numbers = (v.forward, v.tag.stage, v.pool, v.row, v.position, v.slot, v.tag, v.plane, int(v.reasons), v.detail)
    return tuple(-1 if n is None else int(n) for n in numbers)


def _cause(class_id: str, told: list[tuple[float, str]]) -> Cause:
    told = sorted(told, key=lambda one: -one[0])
    evidence = tuple(dict.fromkeys(sentence for _, sentence in told[:MAX_SENTENCES]))
    return Cause(NAMES[class_id], class_id, told[0][0], evidence)
