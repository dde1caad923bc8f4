"""The metrics: their names, labels and words, and how each is read from what the host knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

from kvcanary.observers.health import Health
from kvcanary.pool_stats import PoolStats
from kvcanary.stats import CanaryStats

Samples: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
_SNAPSHOT = "as of the newest snapshot"


class Reading(NamedTuple):
    """What one manager tells at one time, without asking the device."""

    stats: CanaryStats
    build: tuple[str, ...]  #: values of the labels of kvcanary_build_info
    memory_bytes: int


class Family(NamedTuple):
    """A metric.

    Attributes:
        name: in full; counters end in ``_total``.
        help: one sentence.
        labels: besides those that are the same for all metrics of a manager.
        read: (label values, value) of each time series; the label values of one manager are always the same.
        mode: of a gauge, how several processes are put together (``multiprocess_mode`` of prometheus_client).
    """

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Reading], Samples]
    mode: str = "livesum"

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")


def read_manager(manager: Any) -> Reading:
    """A manager's numbers; from any thread."""
    import kvcanary

    backend = manager.backend.name if manager.is_on else "none"
    build = (kvcanary.__version__, backend, manager.config.mode, manager.config.real_data)
    return Reading(manager.stats(), build, manager.memory_bytes)


def _number(name: str) -> Callable[[Reading], Samples]:
    return lambda reading: [((), getattr(reading.stats, name))]


def _by_pool(value: Callable[[PoolStats], float]) -> Callable[[Reading], Samples]:
    return lambda reading: [((pool.name,), value(pool)) for pool in reading.stats.pools]


def _by_key(name: str) -> Callable[[Reading], Samples]:
    return lambda reading: [
        ((pool.name, key.name), n) for pool in reading.stats.pools for key, n in getattr(pool, name).items()
    ]


def _blocks(reading: Reading) -> Samples:
    return [
        ((pool.name, state), getattr(pool, f"{state}_blocks"))
        for pool in reading.stats.pools
        for state in ("sole", "shared", "free")
    ]


def _health(reading: Reading) -> Samples:
    return [((state.value,), float(reading.stats.health == state.value)) for state in Health]


def _passes(pool: PoolStats) -> float:
    return pool.scrub_turns // pool.scrub_turns_per_pass if pool.scrub_turns_per_pass else 0


def _pass_ratio(pool: PoolStats) -> float:
    n = pool.scrub_turns_per_pass
    return pool.scrub_turns % n / n if n else 0.0


FAMILIES: tuple[Family, ...] = (
    Family(
        "kvcanary_build_info",
        "Always 1; the labels tell which guard runs here, and how it is set.",
        ("version", "backend", "mode", "real_data"),
        lambda reading: [(reading.build, 1.0)],
        mode="livemax",
    ),
    Family("kvcanary_enabled", "1 unless mode is off, or the guard was closed.", (), _number("is_on"), mode="livemin"),
    Family("kvcanary_paused", "1 while the guard is paused and judges nothing.", (), _number("is_paused")),
    Family(
        "kvcanary_health",
        "1 for what the health check last said: off, waiting (for its first snapshot), running, stalled, fallen (a "
        "counter fell: the guard's memory was overwritten), or closed, as the manager was. With several processes: how "
        "many of them say so.",
        ("state",),
        _health,
    ),
    Family(
        "kvcanary_memory_bytes", "Device and pinned memory that the guard holds.", (), lambda r: [((), r.memory_bytes)]
    ),
    Family("kvcanary_pool_slots", "Slots of the pool.", ("pool",), _by_pool(lambda pool: pool.n_slots)),
    Family(
        "kvcanary_blocks",
        "Blocks of the pool by the ledger: with one owner (sole), several (shared), none (free). 0 without lifecycle.",
        ("pool", "state"),
        _blocks,
    ),
    # ---- how much it does ----------------------------------------------------------------------------------------
    Family("kvcanary_steps_total", "Outer engine steps that ended.", (), _number("step")),
    Family("kvcanary_forwards_total", f"Forwards begun on the device, {_SNAPSHOT}.", (), _number("forwards")),
    Family(
        "kvcanary_launches_total",
        f"Launches that covered the tag, also with nothing to do, {_SNAPSHOT}.",
        ("pool", "tag"),
        _by_key("launches"),
    ),
    Family(
        "kvcanary_data_launches_total",
        f"Launches that digested bytes, {_SNAPSHOT}.",
        ("pool", "stage"),
        _by_key("data_launches"),
    ),
    Family(
        "kvcanary_verified_slots_total",
        f"Slots whose stamps were verified or written, once per tag and launch, {_SNAPSHOT}.",
        ("pool", "tag"),
        _by_key("entries"),
    ),
    Family(
        "kvcanary_verified_digests_total",
        f"Digests compared with the bytes of their slots, {_SNAPSHOT}.",
        (),
        _number("data_slots"),
    ),
    Family(
        "kvcanary_verified_bytes_total",
        f"KV bytes compared with their digests, {_SNAPSHOT}: digests times their mean size, so exact where all digests "
        "cover as many bytes.",
        (),
        _number("digested_bytes"),
    ),
    Family(
        "kvcanary_reserved_checks_total",
        f"Planes of reserved blocks looked through for NaN and Inf, {_SNAPSHOT}.",
        (),
        _number("reserved_checks"),
    ),
    Family("kvcanary_sweeps_total", "Sweeps launched for the pool.", ("pool",), _by_pool(lambda pool: pool.sweeps)),
    Family("kvcanary_sweep_passes_total", "Sweeps over all resident sets.", (), _number("sweep_passes")),
    Family(
        "kvcanary_scrubbed_slots_total", f"Slots that the patrol has checked, {_SNAPSHOT}.", (), _number("scrub_slots")
    ),
    Family(
        "kvcanary_scrub_orphan_slots_total",
        f"Slots that the patrol has passed over, as nobody holds their block, {_SNAPSHOT}.",
        (),
        _number("scrub_orphans"),
    ),
    Family("kvcanary_scrub_passes_total", f"Full passes of the patrol, {_SNAPSHOT}.", ("pool",), _by_pool(_passes)),
    Family(
        "kvcanary_scrub_pass_ratio",
        f"How much of the pass at hand the patrol has done, {_SNAPSHOT}.",
        ("pool",),
        _by_pool(_pass_ratio),
        mode="livemin",
    ),
    # ---- what it found -------------------------------------------------------------------------------------------
    Family(
        "kvcanary_violations_total",
        "Findings, each once, by the reason that says most about the cause.",
        ("pool", "reason"),
        _by_key("violations"),
    ),
    Family(
        "kvcanary_violation_reasons_total",
        "Reasons of the findings: a finding with several counts under each of them.",
        ("pool", "reason"),
        _by_key("reasons"),
    ),
    Family(
        "kvcanary_observations_total",
        "Violations seen, repeated ones too, and those known to have found the ring full.",
        (),
        _number("observations_total"),
    ),
    Family(
        "kvcanary_dropped_records_total",
        f"Violations that found the ring full: counted, but without a record, {_SNAPSHOT}.",
        (),
        _number("dropped"),
    ),
    # ---- what it left out ----------------------------------------------------------------------------------------
    Family(
        "kvcanary_unjudged_slots_total",
        f"Prefix slots passed over because their forward never ended, {_SNAPSHOT}.",
        (),
        _number("unjudged_slots"),
    ),
    Family(
        "kvcanary_unanchored_rows_total",
        f"Rows whose chain nobody outside the cache knew, {_SNAPSHOT}.",
        (),
        _number("unanchored_rows"),
    ),
    Family("kvcanary_adopted_slots_total", f"Slots adopted, {_SNAPSHOT}.", (), _number("adopted_slots")),
    Family(
        "kvcanary_skipped_moves_total",
        f"Entries of moves that named no slot, {_SNAPSHOT}.",
        (),
        _number("skipped_moves"),
    ),
    Family(
        "kvcanary_unowned_writes_total",
        f"New tokens written to blocks that nobody owned, {_SNAPSHOT}.",
        (),
        _number("unowned_writes"),
    ),
    # ---- the guard itself ----------------------------------------------------------------------------------------
    Family(
        "kvcanary_guard_lag_steps",
        "Steps since the newest snapshot: how old the counters of the device are.",
        (),
        _number("lag_steps"),
        mode="livemax",
    ),
    Family(
        "kvcanary_snapshot_interval_steps",
        "Steps between two snapshots, as configured; 0 = none are taken, and the counters of the device stay.",
        (),
        _number("snapshot_interval"),
        mode="livemax",
    ),
    Family(
        "kvcanary_snapshots_not_taken_total",
        "Snapshots that found all their buffers waiting for the device.",
        (),
        _number("snapshots_not_taken"),
    ),
    Family("kvcanary_stalls_total", "Reports of the health check.", (), _number("stalls_total")),
    Family(
        "kvcanary_observer_errors_total",
        "Steps at which an observer, a log handler say, raised something.",
        (),
        _number("observer_errors"),
    ),
    Family(
        "kvcanary_black_box_errors_total",
        "Events that could not be written to the black box.",
        (),
        _number("black_box_errors"),
    ),
)
