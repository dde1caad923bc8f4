"""From the lines of a black box to what happened: which findings belong together, whom they hit, what is behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcanary.advice import (
    CONTAIN,
    CONTAIN_RESERVED,
    CONTAIN_UNREAD,
    FALLEN,
    FALLEN_ON_HOST,
    RANK_GONE,
    STALLED,
    advice_on,
)
from kvcanary.box_reader import BoxRun
from kvcanary.causes import Cause, classify
from kvcanary.config import CanaryConfig
from kvcanary.records import as_dict
from kvcanary.tags import Detail
from kvcanary.violations import Violation

MIN_GAP = 256  # quiet steps after which a finding is told as another story


@dataclass(frozen=True)
class Moment:
    """The findings of one step.

    Attributes:
        step: as the device counts; ``time`` in seconds since the epoch, when the first was read.
        reasons: "TOKEN|CHAIN", say, and how many findings have just these.
        requests: ids, 0 = unnamed, or nobody's (the patrol, a sweep).
    """

    step: int
    time: float
    reasons: dict[str, int]
    requests: tuple[int, ...]


@dataclass(frozen=True)
class Episode:
    """Findings that belong together, as far as time tells.

    Attributes:
        violations: in the order of their sighting.
        moments: by step.
        causes: what would explain them, the most likely first.
        is_on_host: of KV in host memory.
        has_lifecycle: of a run with lifecycle=True.
    """

    violations: tuple[Violation, ...]
    moments: tuple[Moment, ...]
    causes: tuple[Cause, ...]
    is_on_host: bool = False
    has_lifecycle: bool = False

    @property
    def first(self) -> Violation:
        return self.violations[0]

    @property
    def requests(self) -> dict[int, int]:
        """Request id -> findings that name it as their reader or writer; without the unnamed ones."""
        return dict(Counter(v.request_id for v in self.violations if v.request_id))

    @property
    def slots(self) -> dict[str, list[int]]:
        """Pool -> the slots that the findings are about, in order."""
        found: dict[str, set[int]] = {}
        for v in self.violations:
            if v.is_in_pool:
                found.setdefault(v.pool_name, set()).add(v.slot)
        return {pool: sorted(slots) for pool, slots in found.items()}

    @property
    def planes(self) -> dict[str, int]:
        """ "k of layer 3" -> findings, of those about bytes."""
        names = (
            v.plane_name if v.layer is None else f"{v.plane_name} of layer {v.layer}"
            for v in self.violations
            if v.plane_name is not None
        )
        return dict(Counter(str(name) for name in names))

    @property
    def advice(self) -> list[str]:
        """What to do, the most urgent first."""
        return [contain(self.violations), self.advice_on(self.causes[0].class_id if self.causes else "")]

    def advice_on(self, class_id: str) -> str:
        """What to do about one of the causes."""
        return advice_on(class_id, self.is_on_host, self.has_lifecycle)


def contain(violations: Sequence[Violation]) -> str:
    """What to do first: about requests if any row is named, else about what nobody reads."""
    if any(v.row >= 0 or v.request_id for v in violations):
        return CONTAIN
    is_reserved = all(v.detail == Detail.RESERVED for v in violations)
    return CONTAIN_RESERVED if is_reserved else CONTAIN_UNREAD


def episodes_of(run: BoxRun) -> list[Episode]:
    """The findings of a run, parted where nothing was found for long.

    A damaged byte is found within ``verify_data_every`` forwards of its request: within twice that, findings may well
    have one cause.
    """
    gap = max(MIN_GAP, 2 * int(run.config.get("verify_data_every", CanaryConfig.verify_data_every)))
    parts: list[list[tuple[float, Violation]]] = []
    for time, v in run.violations:
        if not parts or v.step - parts[-1][-1][1].step > gap:
            parts.append([])
        parts[-1].append((time, v))
    has_lifecycle = bool(run.config.get("lifecycle", False))
    return [_episode(part, run.is_on_host, has_lifecycle) for part in parts]


def _episode(part: Sequence[tuple[float, Violation]], is_on_host: bool, has_lifecycle: bool) -> Episode:
    violations = tuple(v for _, v in part)
    by_step: dict[int, list[tuple[float, Violation]]] = {}
    for time, v in part:
        by_step.setdefault(v.step, []).append((time, v))
    moments = tuple(
        Moment(
            step,
            min(time for time, _ in found),
            dict(Counter("|".join(v.reasons.names()) for _, v in found)),
            tuple(sorted({v.request_id for _, v in found})),
        )
        for step, found in sorted(by_step.items())
    )
    return Episode(violations, moments, tuple(classify(violations)), is_on_host, has_lifecycle)


def stall_advice(run: BoxRun) -> list[str]:
    """What to do about the reports of the health check, and about ranks that did not come."""
    kinds = {stall.get("error") for stall in run.stalls}
    fallen = FALLEN_ON_HOST if run.is_on_host else FALLEN
    known = (("CanaryCounterError", fallen), ("CanaryStalledError", STALLED), ("RankStalledError", RANK_GONE))
    return [text for kind, text in known if kind in kinds]


def as_json(run: BoxRun) -> dict[str, Any]:
    """The story of a run as plain values; what is not known is None."""
    start = run.start or {}
    return {
        "run": run.run,
        "pid": run.pid,
        "host": start.get("host"),
        "versions": start.get("versions"),
        "config": start.get("config"),
        "pools": [{k: v for k, v in p.items() if k not in ("planes", "digests")} for p in run.pools],
        "first_time": run.first_time,
        "last_time": run.last_time,
        "ended": (run.end or {}).get("how"),
        "counters": run.counters,
        "episodes": [_episode_as_json(episode) for episode in episodes_of(run)],
        "stalls": [{k: stall.get(k) for k in ("time", "step", "error", "tags", "text")} for stall in run.stalls],
        "stall_advice": stall_advice(run),
    }


def _episode_as_json(episode: Episode) -> dict[str, Any]:
    return {
        "n_violations": len(episode.violations),
        "first_step": episode.moments[0].step,
        "last_step": episode.moments[-1].step,
        "first": {**as_dict(episode.first), "summary": episode.first.summary()},
        "moments": [vars(moment) for moment in episode.moments],
        "requests": {str(request): n for request, n in episode.requests.items()},
        "slots": episode.slots,
        "planes": episode.planes,
        "causes": [
            {
                "class_id": cause.class_id,
                "name": cause.name,
                "confidence": cause.confidence,
                "evidence": list(cause.evidence),
                "advice": episode.advice_on(cause.class_id),
            }
            for cause in episode.causes
        ],
        "advice": episode.advice,
    }
