"""The figures that the kernels should reach, and how a run is held against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RANDOM_LOSS = 0.04  # of the ceiling that single-slot pages in random order may cost


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        key: of the measurement, see `bench.cases.key`.
        kind: "share" of the read ceiling (at least), "us" (at most), or "ratio": time of ``over`` by time of ``key``
            (at least).
        over: of "ratio": the keys whose times are added up.
    """

    key: str
    kind: str
    bound: float
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: ``value`` (None = nothing), and ``cold`` with a flushed L2 (None = not taken)."""

    target: Target
    value: float | None
    cold: float | None = None

    @property
    def is_reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.target.bound if self.target.kind == "us" else self.value >= self.target.bound

    @property
    def word(self) -> str:
        return {None: "not measured", True: "reached", False: "NOT REACHED"}[self.is_reached]


def judge(targets: Sequence[Target], measurements: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Hold measurements (by key, with "us", "share" and, if taken, "cold_us", "cold_share") against the targets."""
    return [_judge(target, measurements) for target in targets]


def _judge(target: Target, measurements: Mapping[str, Mapping[str, Any]]) -> Verdict:
    found = measurements.get(target.key)
    if found is None or any(k not in measurements for k in target.over):
        return Verdict(target, None)
    if target.kind == "ratio":
        return Verdict(target, sum(measurements[k]["us"] for k in target.over) / found["us"])
    return Verdict(target, found[target.kind], found.get(f"cold_{target.kind}"))


def _data_targets() -> list[Target]:
    shares = {
        "nhd2048": 0.97,
        "hnd8x256": 0.95,
        "nhd1024": 0.95,
        "mla1152": 0.93,
        "nhd512": 0.92,
        "fp8_ds_mla656": 0.85,
        "split576+8": 0.85,
        "nhd256": 0.80,
        "64x2048": 0.93,
    }
    return [
        Target(f"verify_data/{layout}/{pages} digests_verify", "share", round(share - loss, 2))
        for pages, loss in (("pages", 0.0), ("slots", RANDOM_LOSS))
        for layout, share in shares.items()
    ]


def _stamp_targets() -> list[Target]:
    verify = {"256x4096": 20, "256x4096/slots": 38, "1024x1024": 20, "swa128x10240": 6}
    write = {"1x4096": 8, "1x16384": 14, "1x131072": 60, "32x128": 4, "256x1": 3.5}
    return [
        *(Target(f"verify_stamps/{name} stamps_verify", "us", us) for name, us in verify.items()),
        *(Target(f"write_stamps/{name} stamps_write", "us", us) for name, us in write.items()),
    ]


def _baseline_targets() -> list[Target]:
    data, stamps = "verify_data/nhd2048/pages", "verify_stamps/256x4096"
    write, digest = "write_stamps/1x4096", "digest_write/1x4096/nhd2048"
    return [
        Target(f"{data} digests_verify", "ratio", 2.5, (f"{data} fold_verify",)),
        Target(f"{stamps} stamps_verify", "ratio", 4.0, (f"{stamps} plan_verify",)),
        Target(f"{write} stamps_write", "ratio", 100.0, (f"{write} serial_write",)),
        Target(f"{digest} digests_write", "ratio", 1000.0, (f"{digest} serial_fold",)),
    ]


TARGETS: Sequence[Target] = (
    *_data_targets(),
    *_stamp_targets(),
    Target("digest_write/1x4096/nhd2048 digests_write", "us", 3.5),
    Target("digest_write/1x4096/64x2048 digests_write", "share", 0.85),
    *_baseline_targets(),
)
