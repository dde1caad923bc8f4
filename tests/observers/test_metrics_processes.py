"""Metrics of several processes behind one exposition: PROMETHEUS_MULTIPROC_DIR, as prometheus_client has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcanary.observers.metric_families import FAMILIES

client = pytest.importorskip("prometheus_client", reason='pip install "kvcanary[metrics]"')
multiprocess = pytest.importorskip("prometheus_client.multiprocess")

TESTS = Path(__file__).resolve().parents[1]
WORKER = """
import sys
from engine import PAGE, ToyEngine
from kvcanary.observers.metrics import ProcessMetrics, register

n_steps, every, labels = int(sys.argv[1]), int(sys.argv[2]), dict(item.split("=") for item in sys.argv[3:])
engine = ToyEngine(verify_data_every=1, stats_print_every_n_steps=2)
metrics = register(engine.manager, every_n_steps=every, **labels)
assert isinstance(metrics, ProcessMetrics)
engine.step((0, 0, 2))
engine.k[1][1, 1, 0, 0] ^= 1
for p in range(2, 1 + n_steps):
    engine.step((0, p, 1))
"""


def run(folder: Path, *arguments: object) -> int:
    """Run a worker to its end; returns its pid."""
    paths = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": paths}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, arguments)], env=environ, stderr=subprocess.PIPE, text=True
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return process.pid


def shown(folder: Path) -> Any:
    registry = client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(folder))
    return registry


def test_counters_add_up_and_gauges_follow_their_mode(tmp_path: Path) -> None:
    run(tmp_path, 9, 1)
    pid = run(tmp_path, 5, 1)
    registry = shown(tmp_path)
    value = registry.get_sample_value
    assert value("kvcanary_steps_total") == 14
    assert value("kvcanary_violations_total", {"pool": "full", "reason": "DATA"}) == 2
    assert value("kvcanary_violations_total", {"pool": "full", "reason": "CHAIN"}) == 0
    # 2 launches of HEAD a forward; the newest snapshots are of steps 8 and 4, delivered at 9 and 5.
    assert value("kvcanary_forwards_total") == 12
    assert value("kvcanary_launches_total", {"pool": "full", "tag": "HEAD_K_FULL"}) == 2 * 12
    assert value("kvcanary_guard_lag_steps") == 1  # the largest, not the sum
    assert value("kvcanary_pool_slots", {"pool": "full"}) == 2 * 64
    build = [s for f in registry.collect() for s in f.samples if s.name == "kvcanary_build_info"]
    assert [(s.value, s.labels["backend"]) for s in build] == [(1, "host")]
    multiprocess.mark_process_dead(pid, str(tmp_path))
    assert shown(tmp_path).get_sample_value("kvcanary_pool_slots", {"pool": "full"}) == 64
    assert shown(tmp_path).get_sample_value("kvcanary_steps_total") == 14


def test_labels_keep_processes_apart_and_every_metric_is_there(tmp_path: Path) -> None:
    run(tmp_path, 4, 1, "rank=0")
    run(tmp_path, 6, 1, "rank=1")
    registry = shown(tmp_path)
    assert [registry.get_sample_value("kvcanary_steps_total", {"rank": r}) for r in "01"] == [4, 6]
    names = {s.name for f in registry.collect() for s in f.samples}
    assert names == {family.name for family in FAMILIES}


def test_what_the_last_update_missed_is_written_at_the_end_of_the_process(tmp_path: Path) -> None:
    run(tmp_path, 7, 1000)
    assert shown(tmp_path).get_sample_value("kvcanary_steps_total") == 7


def test_a_violation_brings_the_update_forward(tmp_path: Path) -> None:
    worker = WORKER + "import os; os._exit(0)\n"  # no update at the end
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    environ["PYTHONPATH"] = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    subprocess.run([sys.executable, "-c", worker, "4", "1000"], env=environ, check=True, timeout=120)
    assert shown(tmp_path).get_sample_value("kvcanary_violations_total", {"pool": "full", "reason": "DATA"}) == 1
    assert shown(tmp_path).get_sample_value("kvcanary_steps_total") == 2  # the step that found it


HEALTH_WORKER = """
import logging, os, sys
from engine import ToyEngine
from kvcanary.observers.metrics import register

logging.disable()
engine = ToyEngine(health_check_every_n_steps=4, health_check_warmup_steps=4, health_policy="log")
register(engine.manager, every_n_steps=1000)
for p in range(int(sys.argv[1])):
    engine.step((0, p, 1))
for _ in range(int(sys.argv[2])):
    with engine.manager.step():
        pass
if sys.argv[3] != "open":
    engine.manager.close()
if sys.argv[3] == "next":
    engine = ToyEngine(health_check_every_n_steps=4, health_check_warmup_steps=4)
    register(engine.manager, every_n_steps=1000)
    engine.step((0, 0, 1))
else:
    os._exit(0)  # no update at the end
"""


def state_after(folder: Path, *arguments: object) -> tuple[list[str], Any]:
    """States of kvcanary_health that are 1, and what reads a metric, after HEALTH_WORKER."""
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    environ["PYTHONPATH"] = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    subprocess.run([sys.executable, "-c", HEALTH_WORKER, *map(str, arguments)], env=environ, check=True, timeout=120)
    registry = shown(folder)
    samples = [s for f in registry.collect() for s in f.samples if s.name == "kvcanary_health"]
    return [s.labels["state"] for s in samples if s.value], registry.get_sample_value


def test_a_stall_is_shown_in_the_step_that_reports_it(tmp_path: Path) -> None:
    states, value = state_after(tmp_path, 4, 5, "open")  # the snapshot of step 8 is judged in step 9
    assert states == ["stalled"] and value("kvcanary_stalls_total") == 1 and value("kvcanary_steps_total") == 9


def test_a_guard_that_runs_again_is_shown_at_once(tmp_path: Path) -> None:
    states, value = state_after(tmp_path, 5, 0, "open")
    assert states == ["running"] and value("kvcanary_steps_total") == 5


def test_a_closed_manager_shows_its_last_numbers_and_that_it_is_closed(tmp_path: Path) -> None:
    states, value = state_after(tmp_path, 7, 0, "closed")
    assert states == ["closed"] and value("kvcanary_enabled") == 0 and value("kvcanary_memory_bytes") == 0
    assert value("kvcanary_steps_total") == value("kvcanary_forwards_total") == 7


def test_a_closed_manager_does_not_write_over_the_next_one(tmp_path: Path) -> None:
    states, value = state_after(tmp_path, 7, 0, "next")
    assert states == ["waiting"] and value("kvcanary_enabled") == 1 and value("kvcanary_steps_total") == 8
