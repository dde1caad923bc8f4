"""What a scenario expects of the guard, written down while it plays, and the judgement afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary.sim.museum.rows import BYSTANDERS
from kvcanary.tags import Reason
from kvcanary.violations import Violation


@dataclass(frozen=True)
class Expected:
    """A finding that must be reported.

    Attributes:
        request: whose check must see it; None = anybody's.
        slots: each of them; what is no slot of the pool is the raw value that the engine handed in.
        reasons: at least these, on each slot.
        latency: steps after the fault, the first and the last that will do.
        layers: of findings about bytes, exactly these layers; None = any.
        names: likewise, exactly these planes by name; None = any.
        tainted: requests whose rows the guard must have marked in that step.
    """

    request: int | None
    slots: tuple[int, ...]
    reasons: Reason
    latency: tuple[int, int]
    layers: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    tainted: tuple[int, ...] = ()

    def __str__(self) -> str:
        who = "" if self.request is None else f"request {self.request}, "
        what = "+".join(self.reasons.names())
        layers = "" if self.layers is None else f" on layers {','.join(map(str, self.layers))} only"
        names = "" if self.names is None else f" of {','.join(self.names)} only"
        first, last = self.latency
        steps = str(first) if first == last else f"{first} to {last}"
        return f"{what} at {who}slots {_ranges(self.slots)}{layers}{names}, latency {steps}"


class Wishes:
    """Expectations, what was seen, and what does not fit."""

    def __init__(self) -> None:
        self.seen: list[Violation] = []
        self.taints: dict[int, tuple[npt.NDArray[Any], list[int]]] = {}  #: step -> taint of its rows, their requests
        self.expected: list[Expected] = []
        self.refusals: list[str] = []
        self.problems: list[str] = []
        self.n_steps = 0
        self.fault_step: int | None = None
        self._silent: set[int] = set()
        self._allowed: list[tuple[int, Reason]] = []
        self.lifecycle: bool

    def fault(self) -> None:
        """The fault strikes in the next step, or before it: latencies count from there."""
        self.fault_step = self.n_steps + 1

    def expect(
        self,
        request: int | None,
        slots: Sequence[int],
        *reasons: Reason,
        latency: int = 0,
        within: int | None = None,
        lifecycle: Reason | None = None,
        layers: Sequence[int] | None = None,
        names: str | None = None,
        tainted: Sequence[int] = (),
    ) -> None:
        """Ask for a finding; ``lifecycle`` is asked for too where the guard knows the owners.

        Args:
            latency: steps after the fault; with ``within``, from there to that.
        """
        wanted = Reason(0)
        for reason in reasons:
            wanted |= reason
        if lifecycle is not None and self.lifecycle:
            wanted |= lifecycle
        if not wanted:
            return
        assert slots, "an expectation without slots could not fail"
        self.expected.append(
            Expected(
                request,
                tuple(slots),
                wanted,
                (latency, latency if within is None else within),
                None if layers is None else tuple(layers),
                None if names is None else tuple(names.split()),
                tuple(tainted),
            )
        )

    def expect_silence(self, *requests: int) -> None:
        """Nothing may be reported about these requests."""
        self._silent.update(requests)

    def allow(self, request: int, *reasons: Reason) -> None:
        """A twin may say this, as it is true: but nothing else."""
        for reason in reasons:
            self._allowed.append((request, reason))

    def latency_of(self, violation: Violation) -> int:
        """Steps from the fault to the report."""
        return violation.step - (self.fault_step or 1)

    def judge_positive(self) -> list[str]:
        """What does not fit; nothing if the guard said what it must."""
        problems = list(self.problems)
        if not self.expected and not self.refusals:
            problems.append("the scenario expects nothing")
        for v in self.seen:
            if self.latency_of(v) < 0:
                problems.append(f"reported before the fault: {v.summary()}")
            elif v.request_id in BYSTANDERS or v.request_id in self._silent:
                problems.append(f"reported about a request that is right: {v.summary()}")
        for wanted in self.expected:
            problems += self._missing(wanted)
        return problems

    def judge_silent(self) -> list[str]:
        """What was said although nothing is wrong."""
        return self.problems + [
            v.summary()
            for v in self.seen
            if not any(v.request_id == request and v.reasons in reason for request, reason in self._allowed)
        ]

    def _missing(self, wanted: Expected) -> list[str]:
        problems = []
        first, last = wanted.latency
        mine = [v for v in self.seen if wanted.request in (None, v.request_id) and first <= self.latency_of(v) <= last]
        for slot in wanted.slots:
            here = [v for v in mine if v.slot == slot]
            said = Reason(0)
            for v in here:
                said |= v.reasons
            if wanted.reasons not in said:
                names = "+".join(said.names()) or "nothing"
                problems.append(f"slot {slot}: {names} reported, {'+'.join(wanted.reasons.names())} expected")
            data = [v for v in here if v.reasons & (Reason.DATA | Reason.NONFINITE_RESERVED)]
            for field, want, got in (
                ("layers", wanted.layers, {v.layer for v in data}),
                ("planes", wanted.names, {v.plane_name for v in data}),
            ):
                if want is not None and got != set(want):
                    problems.append(f"slot {slot}: reported on {field} {sorted(map(str, got))}, {list(want)} expected")
        if wanted.tainted and self.taints:
            step = (self.fault_step or 1) + first
            taint, requests = self.taints.get(step, (np.zeros(0, np.uint32), []))
            marked = {r for r, bits in zip(requests, taint.tolist(), strict=True) if bits}
            if missing := set(wanted.tainted) - marked:
                problems.append(f"rows of requests {sorted(missing)} are not tainted in step {step}")
        return problems


def _ranges(slots: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot - 1:
            runs[-1][1] = slot
        else:
            runs.append([slot, slot])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
