"""What an observer is told at a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from kvcanary.state import CanaryDeviceState


class StepFacts(NamedTuple):
    """One outer step, as the host post-ops see it: after the sweep and the step increment.

    Attributes:
        step: the step that just ended; the first one is 1.
        stream: the step's stream, as the backend names it.
        state: the device state; an observer reads it through a deferred handler only.
        n_counted_steps: steps so far that had a forward and were not paused.
        sweep_passes: sweeps over all resident sets so far, as far as there was something to check.
        n_sweeps: pool index -> sweeps launched for it so far.
        violations_total: first sightings so far.
        observations_total: violations so far, repeated and dropped ones too.
    """

    step: int
    stream: Any
    state: CanaryDeviceState
    n_counted_steps: int
    sweep_passes: int
    n_sweeps: Mapping[int, int]
    violations_total: int
    observations_total: int


class Observer(Protocol):
    """What looks at the guard after each step, on the thread that ends it."""

    def is_due(self, step: int) -> bool:
        """Whether `step` has anything to do after step number ``step``; asked at every step."""

    def step(self, facts: StepFacts) -> None:
        """Look; must not wait for the device."""
