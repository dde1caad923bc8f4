"""Metrics over HTTP, as Prometheus scrapes them: every one, with the right value, after a run with a fault in it."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine

import kvcanary
from kvcanary import CanaryConfig, CanaryManager, ConfigError, KvPool, Reason, Stage, abi
from kvcanary.cli.rig import Rig, Sizes, make_rig
from kvcanary.observers.metric_families import FAMILIES
from kvcanary.observers.metrics import CanaryCollector, register
from kvcanary.sim.faults import BitFlip
from kvcanary.sim.serve import serve
from kvcanary.tags import CanaryLaunchTag, Half, PoolKind

client = pytest.importorskip("prometheus_client", reason='pip install "kvcanary[metrics]"')
parser = pytest.importorskip("prometheus_client.parser")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
PROMPTS = [b"the quick brown fox jumps over the lazy dog " * 3, b"pack my box with five dozen liquor jugs " * 2]
EVERY = 5


def scrape(port: int) -> Samples:
    """(name, labels) -> value, as a Prometheus server reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.status == 200
        text = answer.read().decode()
    found: Samples = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def at(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return f"kvcanary_{name}", tuple(sorted(labels.items()))


def resident(rig: Rig) -> tuple[Any, ...] | None:
    """(slots, positions, predecessors) of the request that runs longest, as a prefix cache would know them."""
    running = rig.engine.scheduler.running
    if not running or not running[0].n_computed:
        return None
    positions, page = np.arange(running[0].n_computed), rig.engine.model.page_size
    slots = np.array(running[0].blocks)[positions // page] * page + positions % page
    return tuple(a.astype(np.int32) for a in (slots, positions, np.concatenate(([-1], slots[:-1]))))


@pytest.fixture
def served() -> Iterator[tuple[Rig, int, list[Samples]]]:
    """A guarded run of the small engine with a flipped bit, scraped on the way and served at a port."""
    config = CanaryConfig(
        verify_data_every=4,
        stats_print_every_n_steps=EVERY,
        health_check_every_n_steps=EVERY,
        health_check_warmup_steps=EVERY,
        lifecycle=True,
        scrub_bytes_per_step=1 << 16,
        check_reserved_every=2,
        sweep_interval=7,
    )
    registry = client.CollectorRegistry()
    with make_rig("host", Sizes.of(PROMPTS, 24), config) as rig:
        assert rig.manager is not None
        rig.manager.attach_resident_set(partial(resident, rig))
        register(rig.manager, registry)
        server, thread = client.start_http_server(0, addr="127.0.0.1", registry=registry)
        try:
            on_the_way: list[Samples] = []
            BitFlip(rig.engine, 12, min_steps_left=6)

            def on_step(info: Any, _n: int) -> None:
                if info.step % 3 == 0:
                    on_the_way.append(scrape(server.server_port))

            serve(rig.engine, PROMPTS, 24, rig.guard, on_step)
            yield rig, server.server_port, on_the_way
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def expected(manager: CanaryManager) -> Samples:
    """Every metric but those told apart below, from the device's words and the violations themselves."""
    words, layout = manager.backend.snapshot_words(), manager.state.layout
    runs, entries, data = layout.kernel_runs(words), layout.slot_runs(words), layout.data_runs(words)
    tags = [CanaryLaunchTag.of(s, h, PoolKind.FULL) for s in Stage for h in Half]
    found: Samples = {}
    for tag in tags:
        found[at("launches_total", pool="full", tag=tag.name)] = int(runs[0, tag])
        found[at("verified_slots_total", pool="full", tag=tag.name)] = int(entries[0, tag])
    for stage in Stage:
        found[at("data_launches_total", pool="full", stage=stage.name)] = int(data[0, stage])
    leading: Counter[str] = Counter()
    carried: Counter[str] = Counter()
    for v in manager.violations():
        carried.update(v.reasons.names())
        leading["DATA" if v.reasons == Reason.DATA else "?"] += 1
    for reason in Reason:
        found[at("violations_total", pool="full", reason=str(reason.name))] = leading[str(reason.name)]
        found[at("violation_reasons_total", pool="full", reason=str(reason.name))] = carried[str(reason.name)]
    plane = manager.pools[0].planes[0]
    found |= {
        at("build_info", version=kvcanary.__version__, backend="host", mode="log", real_data="all"): 1,
        at("enabled"): 1,
        at("paused"): 0,
        at("memory_bytes"): manager.memory_bytes,
        at("pool_slots", pool="full"): manager.pools[0].n_slots,
        at("steps_total"): manager.step_number,
        at("forwards_total"): int(words[abi.STATE_FORWARD]),
        at("verified_digests_total"): int(words[abi.STATE_DATA_SLOTS]),
        at("verified_bytes_total"): int(words[abi.STATE_DATA_SLOTS]) * plane.n_bytes,
        at("reserved_checks_total"): int(words[abi.STATE_RESERVED_CHECKS]),
        at("sweeps_total", pool="full"): manager.step_number // 7,
        at("sweep_passes_total"): manager.step_number // 7,
        at("scrubbed_slots_total"): int(words[abi.STATE_SCRUB_SLOTS]),
        at("scrub_orphan_slots_total"): int(words[abi.STATE_SCRUB_ORPHANS]),
        at("observations_total"): int(words[abi.STATE_OBSERVATIONS]),
        at("dropped_records_total"): int(words[abi.STATE_DROPPED]),
        at("unjudged_slots_total"): int(words[abi.STATE_UNJUDGED_SLOTS]),
        at("unanchored_rows_total"): int(words[abi.STATE_UNANCHORED_ROWS]),
        at("adopted_slots_total"): int(words[abi.STATE_ADOPTED_SLOTS]),
        at("skipped_moves_total"): int(words[abi.STATE_SKIPPED_MOVES]),
        at("unowned_writes_total"): int(words[abi.STATE_UNOWNED_WRITES]),
        at("guard_lag_steps"): 0,
        at("snapshot_interval_steps"): EVERY,
        at("snapshots_not_taken_total"): 0,
        at("stalls_total"): 0,
        at("observer_errors_total"): 0,
        at("black_box_errors_total"): 0,
    }
    states = ("off", "waiting", "running", "stalled", "fallen", "closed")
    found |= {at("health", state=s): s == "running" for s in states}
    turns, per_pass = int(layout.scrub_runs(words)[0]), manager.stats().scrub_steps_per_pass
    found[at("scrub_passes_total", pool="full")] = turns // per_pass
    found[at("scrub_pass_ratio", pool="full")] = turns % per_pass / per_pass
    ((live, shared, free),) = manager.lifecycle.counts()
    found |= {
        at("blocks", pool="full", state=s): n for s, n in (("sole", live - shared), ("shared", shared), ("free", free))
    }
    return found


class TestScrape:
    def test_every_metric_has_its_value(self, served: tuple[Rig, int, list[Samples]]) -> None:
        rig, port, _ = served
        assert rig.manager is not None
        rig.manager.synchronize()
        assert scrape(port) == expected(rig.manager)
        stats = rig.manager.stats()
        assert min(stats.violations_total, stats.scrub_slots, stats.reserved_checks, stats.sweep_passes) > 0
        assert {name for name, _ in scrape(port)} == {family.name for family in FAMILIES}

    def test_between_snapshots_the_lag_tells_how_old_the_counters_are(
        self, served: tuple[Rig, int, list[Samples]]
    ) -> None:
        _, _, on_the_way = served
        steps = [found[at("steps_total")] for found in on_the_way]
        lags = [found[at("guard_lag_steps")] for found in on_the_way]
        # A snapshot of the host backend arrives at the step after the one that takes it.
        assert steps == [3.0 * i for i in range(1, len(steps) + 1)] and len(steps) > 3
        assert lags == [step - (step - 1) // EVERY * EVERY for step in steps]
        forwards = [found[at("forwards_total")] for found in on_the_way]
        assert forwards == [step - lag for step, lag in zip(steps, lags, strict=True)]

    def test_a_scrape_does_not_touch_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine, registry = ToyEngine(verify_data_every=1), client.CollectorRegistry()
        register(engine.manager, registry)
        engine.step((0, 0, 6))

        class OnlyNames:
            name, memory_bytes = "host", 7

        monkeypatch.setattr(engine.manager, "_backend", OnlyNames())
        assert registry.get_sample_value("kvcanary_memory_bytes") == 7

    def test_health_tells_a_stalled_guard(self) -> None:
        engine = ToyEngine(health_check_every_n_steps=2, health_check_warmup_steps=2, health_policy="log")
        registry = client.CollectorRegistry()
        register(engine.manager, registry)
        for p in range(4):
            engine.step((0, p, 1))
        assert registry.get_sample_value("kvcanary_health", {"state": "running"}) == 1
        for _ in range(4):
            with engine.manager.step():
                pass
        assert registry.get_sample_value("kvcanary_health", {"state": "stalled"}) == 1
        assert registry.get_sample_value("kvcanary_stalls_total") == engine.manager.stats().stalls_total > 0

    def test_a_finding_with_several_reasons_counts_once_and_under_each(self) -> None:
        engine, registry = ToyEngine(verify_data_every=1), client.CollectorRegistry()
        register(engine.manager, registry)
        engine.step((0, 0, 6), (1, 0, 6))
        batch = engine.batch((0, 6, 1), (1, 6, 1))
        batch.block_table[0] = batch.block_table[1]
        with engine.manager.step(), engine.manager.forward(batch):
            engine.write(batch)
        found = engine.manager.violations()
        assert any(len(v.reasons.names()) > 1 for v in found)
        total = sum(s.value for f in registry.collect() for s in f.samples if s.name == "kvcanary_violations_total")
        assert total == len(found)
        for reason in Reason:
            n = sum(reason in v.reasons for v in found)
            value = registry.get_sample_value(
                "kvcanary_violation_reasons_total", {"pool": "full", "reason": str(reason.name)}
            )
            assert value == n, reason

    def test_label_values_are_bounded_whatever_happens(self) -> None:
        engine, registry = ToyEngine(verify_data_every=1), client.CollectorRegistry()
        register(engine.manager, registry)

        def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
            return {(s.name, tuple(s.labels.items())) for f in registry.collect() for s in f.samples}

        before = series()
        for p in range(8):
            engine.step((0, p, 1), (1, p, 1))
            engine.k[0][1 + p % 2, p % PAGE, 0, 0] ^= 1
        assert engine.manager.violations()
        assert series() == before


class TestRegister:
    def test_managers_are_told_apart_by_labels_and_go_when_they_go(self) -> None:
        registry = client.CollectorRegistry()
        engines = [ToyEngine(), ToyEngine()]
        for rank, engine in enumerate(engines):
            register(engine.manager, registry, rank=str(rank))
        engines[1].step((0, 0, 2))
        steps = [registry.get_sample_value("kvcanary_steps_total", {"rank": r}) for r in "01"]
        assert steps == [0, 1]
        with pytest.raises(ConfigError, match="another manager has them"):
            register(engines[0].manager, registry, rank="1")
        with pytest.raises(ConfigError, match=r"before it have the names \['rank'\]; give this one the same names"):
            register(engines[0].manager, registry, worker="1")
        del engines[1:], engine
        assert registry.get_sample_value("kvcanary_steps_total", {"rank": "1"}) is None

    def test_what_the_message_says_about_managers_without_labels_can_be_followed(self) -> None:
        registry = client.CollectorRegistry()
        first, second = ToyEngine(), ToyEngine()
        register(first.manager, registry)
        for labels in ({}, {"rank": "0"}):
            with pytest.raises(ConfigError, match=r"register\(other, rank='0'\) say, then .* rank='1'\)"):
                register(second.manager, registry, **labels)
        register(first.manager, registry, rank="0")
        register(second.manager, registry, rank="1")
        second.step((0, 0, 2))
        steps = [registry.get_sample_value("kvcanary_steps_total", {"rank": r}) for r in "01"]
        assert steps == [0, 1] and registry.get_sample_value("kvcanary_steps_total") is None
        with pytest.raises(ConfigError, match=r"other values of \['rank'\] than \[\['0'\], \['1'\]\]"):
            register(ToyEngine().manager, registry, rank="1")
        register(second.manager, registry, rank="2")
        assert registry.get_sample_value("kvcanary_steps_total", {"rank": "1"}) is None
        first.manager.close()
        second.manager.close()
        register(ToyEngine().manager, registry)

    def test_a_closed_manager_gives_its_labels_to_the_next_and_is_shown_until_then(self) -> None:
        registry = client.CollectorRegistry()
        first, other, second = ToyEngine(), ToyEngine(), ToyEngine()
        for p, engine in enumerate((first, other, other)):
            engine.step((0, p, 1))
        register(first.manager, registry, rank="0")
        register(other.manager, registry, rank="1")
        first.manager.close()
        steps = lambda rank: registry.get_sample_value("kvcanary_steps_total", {"rank": rank})  # noqa: E731
        assert (steps("0"), steps("1")) == (1, 2)
        register(second.manager, registry, rank="0")
        assert (steps("0"), steps("1")) == (0, 2)
        assert registry.get_sample_value("kvcanary_enabled", {"rank": "0"}) == 1
        for engine in (other, second):
            engine.manager.close()
        register(ToyEngine().manager, registry, worker="a")  # nobody is left who has the other names
        assert steps("0") is None

    def test_a_forked_child_shows_its_own_managers_under_the_labels_of_the_parents(self) -> None:
        registry = client.CollectorRegistry()
        parents, own = ToyEngine(), ToyEngine()
        register(parents.manager, registry, rank="0")
        parents.manager.after_fork()
        assert registry.get_sample_value("kvcanary_enabled", {"rank": "0"}) is None
        register(own.manager, registry, rank="0")
        assert registry.get_sample_value("kvcanary_enabled", {"rank": "0"}) == 1

    @pytest.mark.parametrize("manager", [None, 5, ToyEngine])
    def test_what_is_no_manager_is_refused(self, manager: Any) -> None:
        with pytest.raises(ConfigError, match=r"register\(.*\): give the CanaryManager"):
            register(manager, client.CollectorRegistry(), rank="0")

    @pytest.mark.parametrize("label", ["pool", "reason", "with space", "0th"])
    def test_labels_that_cannot_be_are_refused(self, label: str) -> None:
        with pytest.raises(ConfigError, match="label"):
            register(ToyEngine().manager, client.CollectorRegistry(), **{label: "x"})

    def test_a_guard_that_is_off_or_closed_says_so(self) -> None:
        registry = client.CollectorRegistry()
        pool = KvPool(planes=(), page_size=4, n_blocks=4)
        off = CanaryManager(CanaryConfig(mode="off"), [pool], 2, 8)
        engine = ToyEngine()
        register(off, registry, rank="off")
        register(engine.manager, registry, rank="closed")
        engine.step((0, 0, 2))
        engine.manager.close()
        for rank in ("off", "closed"):
            assert registry.get_sample_value("kvcanary_enabled", {"rank": rank}) == 0
            assert registry.get_sample_value("kvcanary_memory_bytes", {"rank": rank}) == 0
        assert registry.get_sample_value("kvcanary_steps_total", {"rank": "closed"}) == 1
        assert registry.get_sample_value("kvcanary_health", {"rank": "closed", "state": "closed"}) == 1

    def test_names_follow_the_conventions(self) -> None:
        for family in CanaryCollector().describe():
            assert family.name.startswith("kvcanary_") and family.documentation.endswith(".")
            assert family.type in ("counter", "gauge")
        units = ("_bytes", "_slots", "_steps", "_ratio", "_info", "_total", "_enabled", "_paused", "_health", "_blocks")
        assert all(family.name.endswith(units) for family in FAMILIES)
        labels = {label for family in FAMILIES for label in family.labels}
        assert labels == {"version", "backend", "mode", "real_data", "state", "pool", "tag", "stage", "reason"}

    def test_without_the_package_the_command_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
        with pytest.raises(ConfigError, match=r'pip install "kvcanary\[metrics\]"'):
            register(ToyEngine().manager)
