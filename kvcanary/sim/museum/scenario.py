"""What a scenario is, the list of all, and how one is run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvcanary.causes import Cause, classify
from kvcanary.errors import KvCanaryError
from kvcanary.sim.museum.places import Place
from kvcanary.sim.museum.shapes import GENERAL, SHAPES
from kvcanary.sim.museum.stage import MissingError, Stage
from kvcanary.sim.museum.wishes import Expected
from kvcanary.violations import Violation

Play = Callable[[Stage], None]

POSITIVE, NEGATIVE, BLIND = "positive", "negative", "blind"


@dataclass(frozen=True)
class Scenario:
    """A story that ends in a fault (positive), in nothing (negative), or in what no guard of this kind can see (blind).

    Attributes:
        id: its class in the museum, and the variant behind a dash.
        play: the story; its docstring tells it and cites the threads.
        shapes: names of the pools that it is played on.
        lifecycle: whether it is played without and with ownership.
        config: settings of the guard that it needs.
    """

    id: str
    kind: str
    title: str
    play: Play
    shapes: tuple[str, ...] = GENERAL
    lifecycle: tuple[bool, ...] = (False, True)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_id(self) -> str:
        """The root-cause class, "C01" of "C01-write"."""
        return self.id.split("-")[0]

    @property
    def story(self) -> str:
        """The docstring, without its sources."""
        return inspect.getdoc(self.play) or ""

    @property
    def sources(self) -> list[str]:
        """The threads that the docstring cites, as "owner/repository#number"."""
        return re.findall(r"[\w.-]+/[\w.-]+#\d+", self.story)


SCENARIOS: dict[str, Scenario] = {}


def _register(kind: str, id_: str, title: str, **fields: Any) -> Callable[[Play], Play]:
    def add(play: Play) -> Play:
        assert id_ not in SCENARIOS, f"{id_} is there already"
        SCENARIOS[id_] = Scenario(id_, kind, title, play, **fields)
        return play

    return add


def positive(id_: str, title: str, **fields: Any) -> Callable[[Play], Play]:
    """Declare a scenario whose fault must be reported."""
    return _register(POSITIVE, id_, title, **fields)


def negative(id_: str, title: str, **fields: Any) -> Callable[[Play], Play]:
    """Declare a legal twin, over which the guard must be silent."""
    return _register(NEGATIVE, id_, title, **fields)


def blind(id_: str, title: str, **fields: Any) -> Callable[[Play], Play]:
    """Declare a fault that the guard is stated not to see: silence is what was promised."""
    return _register(BLIND, id_, title, **fields)


@dataclass(frozen=True)
class Outcome:
    """One scenario on one shape: ``problems`` is None when it could not be played, for lack of ``missing``."""

    scenario: Scenario
    shape: str
    lifecycle: bool
    expected: tuple[Expected, ...]
    reported: tuple[Violation, ...]
    latencies: tuple[int, ...]
    refusals: tuple[str, ...]
    problems: tuple[str, ...] | None
    missing: str = ""
    causes: tuple[Cause, ...] = ()

    @property
    def ok(self) -> bool | None:
        """Whether the guard said just what it must; None if nobody knows."""
        return None if self.problems is None else not self.problems


def play(scenario: Scenario, place: Place, shape: str, lifecycle: bool) -> Outcome:
    """Run one scenario on one shape."""
    stage: Stage | None = None
    try:
        stage = Stage(place, SHAPES[shape], lifecycle, **scenario.config)
        scenario.play(stage)
    except MissingError as error:
        if stage is not None:
            stage.abandon()
        return Outcome(scenario, shape, lifecycle, (), (), (), (), None, missing=str(error))
    except KvCanaryError as error:  # the guard refused what an engine may do
        if stage is not None:
            stage.abandon()
        return Outcome(scenario, shape, lifecycle, (), (), (), (), (f"{type(error).__name__}: {error}",))
    seen = tuple(stage.finish())
    problems = stage.judge_positive() if scenario.kind == POSITIVE else stage.judge_silent()
    return Outcome(
        scenario,
        shape,
        lifecycle,
        tuple(stage.expected),
        seen,
        tuple(stage.latency_of(v) for v in seen),
        tuple(stage.refusals),
        tuple(problems),
        causes=tuple(classify(seen)) if scenario.kind == POSITIVE else (),
    )
