"""What a demo found, judged against what the guard promises, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvcanary.sim.faults import Fault
from kvcanary.sim.serve import Divergence, Served, divergences
from kvcanary.violations import Violation

MAX_LINES = 10  # violations that are written out
EXCERPT = 24  # bytes of differing output


@dataclass
class Outcome:
    """The runs of one demo; `fault` and `unguarded` are None where nothing went wrong on purpose."""

    backend: str
    fault_name: str
    fault: Fault | None
    verify_data_every: int
    clean: Served
    guarded: Served
    violations: tuple[Violation, ...]
    protected_tokens: int  # sum of slot_run_counters: a slot counts once per launch tag and step
    graph_launches: int | None  # of the guarded run; None on the host
    unguarded: Served | None = None

    @property
    def diverged(self) -> list[Divergence]:
        """Where the output differs from the clean run without a guard; of an undamaged run, with it."""
        return divergences(self.clean, self.unguarded or self.guarded)


@dataclass(frozen=True)
class Verdict:
    """Whether the guard said just what it promises: `reason` is empty if so."""

    expected: str
    detected_after_steps: int | None  # from the struck step to the step whose check reported it
    reason: str

    @property
    def ok(self) -> bool:
        return not self.reason


def judge(outcome: Outcome) -> Verdict:
    """Compare what was found with what was promised."""
    if outcome.fault is None:
        reason = f"{len(outcome.violations)} violations without a fault" if outcome.violations else ""
        if outcome.diverged:
            reason = "the guarded output differs from the unguarded one"
        return Verdict("no violation, and the same output as without the guard", None, reason)
    fault, injected = outcome.fault, outcome.fault.injected
    assert injected is not None
    within = fault.max_steps(outcome.verify_data_every)
    place = f"request {injected.request}" if fault.name == "stale-table" else f"slot {injected.slot}"
    layer = "" if injected.layer is None else f", layer {injected.layer}"
    when = f"within {_steps(within)}" if within else "in the same step"
    expected = f"{' or '.join(fault.promised.names())} at {place}{layer}, {when}; nothing that is not of this damage"
    after = min((v.step - injected.step for v in outcome.violations if fault.is_seen_in(v)), default=None)
    strays = [
        v
        for v in outcome.violations
        if v.step < injected.step or not (v.request_id == injected.request or fault.is_seen_in(v))
    ]
    reason = ""
    if after is None:
        reason = "it was not detected"
    elif after > within:
        reason = f"it was detected only after {_steps(after)}"
    elif strays:
        reason = f"{len(strays)} violations have nothing to do with it, the first: {strays[0].summary()}"
    return Verdict(expected, after, reason)


# ---- JSON ------------------------------------------------------------------------------------------------------------
def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything as plain values; steps count from 1, null = never."""
    verdict, diverged = judge(outcome), outcome.diverged
    injected = outcome.fault.injected if outcome.fault is not None else None
    return {
        "backend": outcome.backend,
        "steps": outcome.guarded.n_steps,
        "decode_steps": outcome.guarded.n_decode_steps,
        "graph_launches": outcome.graph_launches,
        "requests": len(outcome.guarded.outputs),
        "protected_tokens": outcome.protected_tokens,
        "verify_data_every": outcome.verify_data_every,
        "fault": outcome.fault_name,
        "injected": None if injected is None else asdict(injected),
        "expected": verdict.expected,
        "ok": verdict.ok,
        "violations": [_violation_as_json(v) for v in outcome.violations],
        "detected_after_steps": verdict.detected_after_steps,
        "output_diverged_at": diverged[0].step if diverged else None,
        "diverged": [d._asdict() for d in diverged],
    }


def _violation_as_json(violation: Violation) -> dict[str, Any]:
    return {
        "reasons": list(violation.reasons.names()),
        "launch_tag": violation.tag.name,
        "slot": violation.slot,
        "position": violation.position,
        "request": violation.request_id,
        "layer": violation.layer,
        "step": violation.step,
    }


# ---- text ------------------------------------------------------------------------------------------------------------
def print_outcome(outcome: Outcome) -> None:
    """What was done, what was found, what it did to the output, and whether that was to be expected."""
    verdict = judge(outcome)
    injected = outcome.fault.injected if outcome.fault is not None else None
    print(f"\ninjected: {'nothing' if injected is None else injected.words}")
    print(f"expected: {verdict.expected}")
    n, after = len(outcome.violations), verdict.detected_after_steps
    when = "" if after is None else ", in the same step" if after == 0 else f", after {_steps(after)}"
    print(f"reported: {n or 'no'} violation{'' if n == 1 else 's'}{when}")
    _print_violations(outcome)
    _print_divergence(outcome)
    print("outcome:  " + ("as expected" if verdict.ok else f"NOT as expected: {verdict.reason}"))


def _steps(n: int) -> str:
    return f"{n} step{'' if n == 1 else 's'}"


def _print_violations(outcome: Outcome) -> None:
    """A line per kind of finding, what was promised first, and the first one as the log has it."""
    fault = outcome.fault
    kinds: dict[tuple[int, ...], list[Violation]] = {}
    for v in sorted(outcome.violations, key=lambda v: (fault is None or not fault.is_seen_in(v), v.step, v.position)):
        kinds.setdefault((v.step, v.request_id, v.reasons, -1 if v.plane is None else v.plane), []).append(v)
    for same in list(kinds.values())[:MAX_LINES]:
        v, last = same[0], same[-1]
        plane = "" if v.layer is None else f", layer {v.layer} {(v.plane_name or '').upper()}"
        place = f"slot {v.slot}" if v.is_in_pool else f"{v.detail.name} {v.slot}"
        where = f"position {v.position}, {place}{plane}"
        if len(same) > 1:
            where = f"{len(same)} positions from {v.position} ({place}) to {last.position}{plane}"
        print(f"  step {v.step}, {v.tag.name}: {'|'.join(v.reasons.names())}: request {v.request_id}, {where}")
    if len(kinds) > MAX_LINES:
        print(f"  and {len(kinds) - MAX_LINES} more kinds")
    if kinds:
        print(f"in full:  {next(iter(kinds.values()))[0].summary()}")


def _print_divergence(outcome: Outcome) -> None:
    who = "with" if outcome.unguarded is None else "without"
    if not outcome.diverged:
        print(f"output:   {who} the guard, the same as in the clean run")
        return
    first, other = outcome.diverged[0], outcome.unguarded or outcome.guarded
    print(
        f"output:   {who} the guard, request {first.request} goes wrong at byte {first.byte} (step {first.step}), "
        f"unnoticed; {len(outcome.diverged)} of {len(other.outputs)} requests are affected"
    )
    for label, served in (("clean", outcome.clean), ("damaged", other)):
        text = served.outputs[first.request - 1]
        print(f"  {label:8}{text[max(0, first.byte - 8) : first.byte + EXCERPT]!r}")
