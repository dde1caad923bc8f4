"""What a drill found, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import or_
from typing import Any

from kvcanary.sim.museum.scenario import BLIND, NEGATIVE, POSITIVE, Outcome
from kvcanary.sim.sdc import shares
from kvcanary.sim.sdc_run import SdcCount
from kvcanary.tags import Reason

MIN_SCORE = 0.9  # share of positive scenarios whose root cause must be named first
TITLES = {
    POSITIVE: "Faults: each must be reported",
    NEGATIVE: "Legal twins: the guard must be silent",
    BLIND: "Stated blind spots: the guard is silent, as stated",
}
REFUSED = "refused at the call"
_WIDTH = 62  # of titles


def verdict_of(ok: bool | None) -> str:
    """A word for an outcome."""
    return "skipped" if ok is None else "ok" if ok else "FAILED"


def by_row(outcomes: Iterable[Outcome]) -> Iterator[list[Outcome]]:
    """The outcomes of one scenario and lifecycle, its shapes together."""
    for _, group in groupby(outcomes, lambda o: (o.scenario.id, o.lifecycle)):
        yield list(group)


def score(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """(right, all) positive scenarios with records; right is one whose class is named first on all of its shapes.

    A scenario counts once without and once with ownership, since the records tell more with it.
    """
    rows = list(by_row(o for o in outcomes if o.scenario.kind == POSITIVE and o.reported))
    return sum(all(o.causes[0].class_id == o.scenario.class_id for o in row) for row in rows), len(rows)


def causes_ok(outcomes: Iterable[Outcome]) -> bool:
    """Whether the root cause was named first often enough."""
    right, n = score(outcomes)
    return right >= MIN_SCORE * n


# ---- tables ----------------------------------------------------------------------------------------------------------
def print_table(outcomes: Sequence[Outcome]) -> None:
    """One line per scenario and lifecycle, the kinds one after the other."""
    for kind, title in TITLES.items():
        of_kind = [o for o in outcomes if o.scenario.kind == kind]
        if not of_kind:
            continue
        print(f"\n{title}")
        print(f"{'scenario':22} {'owners':7} {'title':{_WIDTH}} {'expected':34} {'reported':44} {'steps':6} verdict")
        for row in by_row(of_kind):
            _print_row(row)


def _print_row(row: list[Outcome]) -> None:
    scenario, owners = row[0].scenario, "known" if row[0].lifecycle else "-"
    played = [o for o in row if o.problems is not None]
    head = f"{scenario.id:22} {owners:7} {scenario.title[:_WIDTH]:{_WIDTH}}"
    if not played:
        print(f"{head} {'':34} {'':44} {'':6} skipped: needs {row[0].missing}")
        return
    latencies = sorted({n for o in played for n in o.latencies})
    steps = "-" if not latencies else "..".join(dict.fromkeys(map(str, (latencies[0], latencies[-1]))))
    failed = [o for o in played if o.problems]
    verdict = f"ok ({len(played)} shapes)" if not failed else f"FAILED ({len(failed)} of {len(played)} shapes)"
    print(f"{head} {expected_words(played):34} {reported_words(played):44} {steps:6} {verdict}")
    for outcome in failed:
        for problem in (outcome.problems or ())[:4]:
            print(f"    {outcome.shape}: {problem}")


def expected_words(row: Sequence[Outcome]) -> str:
    """The reasons that a scenario asks for."""
    if row[0].scenario.kind != POSITIVE:
        return "silence"
    return "+".join(_union(e.reasons for o in row for e in o.expected).names()) or REFUSED


def reported_words(row: Sequence[Outcome]) -> str:
    """The reasons that were reported."""
    refused = [REFUSED] if any(o.refusals for o in row) else []
    return "+".join([*reported_reasons(row).names(), *refused]) or "nothing"


def reported_reasons(outcomes: Iterable[Outcome]) -> Reason:
    """All reasons that were reported."""
    return _union(v.reasons for o in outcomes for v in o.reported)


def _union(reasons: Iterable[Reason]) -> Reason:
    return reduce(or_, reasons, Reason(0))


def print_causes(outcomes: Sequence[Outcome]) -> None:
    """Which root cause is named first, by class."""
    judged = [o for o in outcomes if o.scenario.kind == POSITIVE and o.reported]
    if not judged:
        return
    print("\nRoot causes: what is named first, from the records alone")
    print(f"{'scenario':22} {'owners':7} {'named':10} evidence")
    for row in by_row(judged):
        scenario = row[0].scenario
        named = Counter(o.causes[0].class_id or "?" for o in row)
        first = row[0].causes[0]
        words = "/".join(named)
        mark = "" if set(named) == {scenario.class_id} else " (wrong)"
        evidence = first.evidence[0]
        print(f"{scenario.id:22} {'known' if row[0].lifecycle else '-':7} {words + mark:10} {evidence}")
    right, n = score(outcomes)
    print(f"named first and right: {right} of {n} scenarios ({right / n:.1%})")


def print_sdc(counts: Sequence[SdcCount]) -> None:
    """What became of the injected corruptions."""
    if not counts:
        return
    n = sum(c.injected for c in counts)
    print(f"\nSilent data corruption: {n} injections from the published distribution")
    print(f"{'layout':36} {'injected':>9} {'seen':>9} {'missed':>7} {'false':>6}  without effect")
    for c in counts:
        no_ops = ", ".join(f"{k} {why}" for why, k in c.no_ops.items()) or "-"
        print(f"{c.family:36} {c.injected:9} {c.seen:9} {c.missed:7} {c.false_alarms:6}  {no_ops}")
        if c.first_missed:
            print(f"    first missed: {c.first_missed}")
    drawn = shares([i for c in counts for i in c.injections])
    print("drawn: " + ", ".join(f"{name} {share:.4f}" for name, share in drawn.items()))


# ---- JSON ------------------------------------------------------------------------------------------------------------
def as_json(outcome: Outcome) -> dict[str, Any]:
    """One run as plain values; ``ok`` is null where it was not played."""
    scenario = outcome.scenario
    return {
        "id": scenario.id,
        "kind": scenario.kind,
        "title": scenario.title,
        "shape": outcome.shape,
        "lifecycle": outcome.lifecycle,
        "sources": scenario.sources,
        "expected": _expected_as_json(outcome),
        "reported": [
            {
                "reasons": list(v.reasons.names()),
                "slot": v.slot,
                "position": v.position,
                "request": v.request_id,
                "layer": v.layer,
                "latency_steps": latency,
            }
            for v, latency in zip(outcome.reported, outcome.latencies, strict=True)
        ],
        "refused": list(outcome.refusals),
        "problems": list(outcome.problems or ()),
        "skipped": f"needs {outcome.missing}" if outcome.ok is None else None,
        "causes": [
            {"class": c.class_id, "name": c.name, "confidence": c.confidence, "evidence": list(c.evidence)}
            for c in outcome.causes
        ],
        "ok": outcome.ok,
    }


def _expected_as_json(outcome: Outcome) -> list[str]:
    if outcome.scenario.kind != POSITIVE:
        return ["silence"]
    return [*map(str, outcome.expected)] or [REFUSED]


def sdc_as_json(counts: Sequence[SdcCount]) -> list[dict[str, Any]]:
    """The injections of each layout as a scenario of its own."""
    return [
        {
            "id": "SDC",
            "kind": POSITIVE,
            "title": f"corruptions drawn from published faults: {c.family}",
            "expected": ["DATA at every corruption that changes a byte"],
            "reported": [],
            "injected": c.injected,
            "seen": c.seen,
            "missed": c.missed,
            "false_alarms": c.false_alarms,
            "no_ops": dict(c.no_ops),
            "ok": c.ok,
        }
        for c in counts
    ]
