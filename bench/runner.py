"""One case: make it, compare it with the reference, time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from bench.baselines import BASELINES, baseline_key
from bench.cases import Case, key, label
from bench.checks import check, check_silent
from bench.rig import Place, Rig
from bench.timing import COLD_FACTOR, Timer, Timing


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run leaves out.

    Attributes:
        keys: measurements to take; None = all.
        has_cold: whether to time with a flushed L2 too, where the data might stay in it.
        has_baselines: whether to time the baselines.
    """

    keys: frozenset[str] | None = None
    has_cold: bool = True
    has_baselines: bool = True

    def takes(self, name: str) -> bool:
        return self.keys is None or name in self.keys


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of a report; microseconds, bytes, 1e12 bytes per second; shares and floors by the read ceiling.

    Attributes:
        x: place on the case's axis (slots verified, or bytes of a plane); 0 without an axis.
        is_in_l2: whether the bytes fit into L2, so that repeats mostly read from there.
        cold_us: with a flushed L2; None = not taken.
    """

    key: str
    case: str
    group: str
    measure: str
    note: str = ""
    axis: str = ""
    x: int = 0
    layout: str = ""
    us: float
    spread_us: float
    n_copies: int
    n_replays: int
    bytes: int
    tb_s: float
    share: float
    floor_us: float
    is_in_l2: bool
    cold_us: float | None = None
    cold_spread_us: float | None = None
    cold_share: float | None = None

    def line(self) -> str:
        """One line for a terminal."""
        parts = [
            f"{self.key:<58}",
            f"{self.us:>10.2f} us (+-{self.spread_us:.2f})",
            f"{self.bytes / 1e6:>9.2f} MB",
            f"{self.tb_s:>6.3f} TB/s",
            f"{self.share:>6.3f} of the ceiling",
            f"floor {self.floor_us:.2f} us",
        ]
        if self.cold_us is not None:
            parts.append(f"cold {self.cold_us:.2f} us (+-{self.cold_spread_us or 0:.2f}) {self.cold_share or 0:.3f}")
        if self.is_in_l2:
            parts.append("fits L2")
        return "  ".join([*parts, self.note] if self.note else parts)

    def record(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return asdict(self)


def run_case(
    case: Case,
    place: Place,
    timer: Timer,
    ceiling_tb_s: float,
    options: Options,
    on_result: Callable[[Measurement], None],
) -> None:
    """Every measurement of a case, handed out as it is taken.

    Raises:
        CheckFailed: something differs from the reference; nothing of what was not compared yet was timed.
    """
    with closing(Rig(case, place)) as rig:
        check(rig)
        n_known = rig.n_observations
        for found in _own(rig, timer, ceiling_tb_s, options):
            check_silent(rig, n_known)  # the timed launches were as silent as they should be
            on_result(found)
        for name in case.baselines if options.has_baselines else ():
            if options.takes(baseline_key(case, name)):
                on_result(_baseline(rig, name, timer, ceiling_tb_s))


def _own(rig: Rig, timer: Timer, ceiling: float, options: Options) -> Iterator[Measurement]:
    case = rig.case
    for measure in case.measures:
        if not options.takes(key(case, measure)):
            continue
        rig.run()
        launch, n_bytes = rig.launcher(measure), rig.bytes_of(measure)
        timing = timer.time(launch)
        cold = timer.cold(launch) if options.has_cold and n_bytes < COLD_FACTOR * rig.place.l2_bytes else None
        rig.run()  # `kvc_begin` alone leaves a forward that never ended
        yield _measurement(rig, key(case, measure), label(measure), n_bytes, (timing, cold), ceiling)


def _baseline(rig: Rig, name: str, timer: Timer, ceiling: float) -> Measurement:
    baseline = BASELINES[name](rig, timer)
    timing = baseline.run()
    name_of = baseline_key(rig.case, name)
    return _measurement(rig, name_of, name, baseline.n_bytes, (timing, None), ceiling, baseline.note)


def _measurement(
    rig: Rig,
    name: str,
    measure: str,
    n_bytes: int,
    timings: tuple[Timing, Timing | None],
    ceiling: float,
    note: str = "",
) -> Measurement:
    """``note`` is what a baseline says of itself; the guard's own launches have none."""
    (timing, cold), case = timings, rig.case
    floor_us = n_bytes / ceiling / 1e6
    return Measurement(
        key=name,
        case=case.name,
        group="baselines" if note else case.group,
        measure=measure,
        note=note,
        axis=case.axis,
        x={"": 0, "slots": case.n_verified, "plane_bytes": case.layout.plane_bytes[0]}[case.axis],
        layout=case.layout.name,
        us=timing.us,
        spread_us=timing.spread_us,
        n_copies=timing.n_copies,
        n_replays=timing.n_replays,
        bytes=n_bytes,
        tb_s=n_bytes / timing.us / 1e6 if timing.us else 0.0,
        share=floor_us / timing.us if timing.us else 0.0,
        floor_us=floor_us,
        is_in_l2=n_bytes <= rig.place.l2_bytes,
        cold_us=cold.us if cold else None,
        cold_spread_us=cold.spread_us if cold else None,
        cold_share=floor_us / cold.us if cold and cold.us else None,
    )
