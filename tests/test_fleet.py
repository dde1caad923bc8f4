"""A soak as Dask tasks, on this machine or any scheduler; who fails or dies is told, not waited for."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary.cli import fleet, main
from kvcanary.cli.fleet import Job, Report, jobs_for, list_jobs, play_all, told
from kvcanary.sim import soak

MOST_PER_SEED = 1000


@pytest.fixture
def distributed() -> Any:
    return pytest.importorskip("distributed", reason='needs pip install "kvcanary[fleet]"')


@pytest.fixture
def threads(distributed: Any) -> Iterator[str]:
    """The address of a scheduler with one worker, a thread of this process."""
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(n_workers=1, **options) as cluster:
        yield cluster.scheduler_address


def drill(*options: str) -> int:
    return main(["drill", "--soak", "--backend", "host", *options])


def test_two_workers_of_this_machine(distributed: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert drill("--workers", "2", "--steps", "12", "--json", str(tmp_path / "fleet.json")) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"^(\S+:\d+) +(\d+) +(\d+) +\d+ +\d+ +\d+ +silent$", text, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == 2, text
    assert [row[1:] for row in rows] == [("1", "6"), ("1", "6")]
    assert "2 of 2 seeds as expected: all silent" in text
    reports = json.loads((tmp_path / "fleet.json").read_text())
    assert sorted((r["job"][0], r["result"]["steps"], r["problem"]) for r in reports) == [(0, 6, ""), (1, 6, "")]
    assert {r["place"] for r in reports} == {name for name, _, _ in rows}


def test_each_worker_sees_a_gpu_of_its_own(distributed: Any) -> None:
    with fleet.make_cluster(distributed, 2, ["GPU-a", "GPU-b"]) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(2, timeout=60)
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    assert sorted(seen.values()) == ["GPU-a", "GPU-b"]


def test_a_running_scheduler(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drill("--scheduler", threads, "--steps", "4", "--first-seed", "7") == 0
    assert f":{os.getpid()} " in capsys.readouterr().out  # its worker is this process


def test_a_false_alarm_and_a_broken_seed_are_told_with_their_seeds(
    threads: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(seed: int, n_steps: int, on_step: None, backend: str) -> soak.SoakResult:
        if seed == 1:
            raise soak.FalseAlarmError("seed 1, step 3 (host): DATA")
        if seed == 2:
            raise MemoryError("no more")
        return soak.SoakResult(seed, n_steps, 1, 10, 5, 0, {})

    monkeypatch.setattr(soak, "soak", one)
    monkeypatch.setitem(soak.STEPS_PER_SEED, "host", 2)
    assert drill("--scheduler", threads, "--steps", "7") == 1
    text = capsys.readouterr().out
    assert "seed 1 on" in text and "FALSE ALARM: seed 1, step 3 (host): DATA" in text
    assert "seed 2 on" in text and "MemoryError: no more" in text
    assert "2 of 4 seeds as expected: 1 x FALSE ALARM; 1 x MemoryError" in text
    assert re.search(r" 4 +3 +\d+ +20 +10 +2 of 4 seeds failed$", text, re.MULTILINE), text


def die_of_seed_0(job: Job, backend: str, place: str) -> Report:
    if job.seed == 0:
        os._exit(1)
    return Report(job, place, 0.0, soak.SoakResult(job.seed, job.steps, 1, 10, 5, 0, {}))


def test_a_worker_that_dies_loses_its_seed_and_the_others_go_on(
    distributed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "play", die_of_seed_0)
    jobs = [Job(seed, 1) for seed in range(4)]
    with fleet.make_cluster(distributed, 2, []) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(2, timeout=60)
        places = {address: address for address in fleet.find_places(client, 2, "host")}
        reports = play_all(client, places, iter(jobs), "host")
    lost = [report for report in reports if report.problem]
    assert sorted(report.job.seed for report in reports) == [0, 1, 2, 3]
    assert [report.job.seed for report in lost] == [0] and "lost" in lost[0].problem
    assert len({report.place for report in reports} - {lost[0].place}) == 1


def test_when_no_worker_is_left_what_was_not_played_is_told() -> None:
    jobs = [Job(seed, 5) for seed in range(3)]
    text = told([Report(jobs[0], "a:1", 1.0, None, "lost: its worker is gone")], len(jobs), 1.0)
    assert "0 of 3 seeds as expected: 1 x lost; 2 x not played, as no worker is left" in text


def test_seeds_go_out_until_the_time_is_over() -> None:
    assert list(jobs_for(1e-9, 7, 100)) == [Job(7, 100)]
    jobs = list(jobs_for(0.001, 7, 100))
    assert len(jobs) > 1 and [job.seed for job in jobs] == list(range(7, 7 + len(jobs)))


@given(st.integers(1, 5000), st.integers(0, 99), st.integers(1, 16))
def test_jobs_share_the_steps_out(n_steps: int, first_seed: int, n_workers: int) -> None:
    jobs = list_jobs(n_steps, first_seed, n_workers, MOST_PER_SEED)
    assert sum(job.steps for job in jobs) == n_steps
    assert [job.seed for job in jobs] == list(range(first_seed, first_seed + len(jobs)))
    assert all(1 <= job.steps <= MOST_PER_SEED for job in jobs)
    assert len(jobs) > n_workers // 2 or len(jobs) == n_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "0"), "--workers 0: give at least 1"),
        (("--workers", "2", "--processes", "2"), "a worker is one process"),
        (("--workers", "1", "--steps", "0"), "--steps 0"),
    ],
)
def test_arguments_that_cannot_work(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drill(*options) == 2
    assert message in capsys.readouterr().err


def test_a_fleet_without_a_soak(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--workers", "2"]) == 2
    assert "add --soak" in capsys.readouterr().err


def test_too_few_workers_and_no_scheduler(
    threads: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drill("--scheduler", threads, "--workers", "3") == 2
    assert "--workers 3: the scheduler has 1" in capsys.readouterr().err
    monkeypatch.setattr(fleet, "START_TIMEOUT_S", 2.0)
    assert drill("--scheduler", "tcp://127.0.0.1:9") == 2
    assert "no scheduler answers there" in capsys.readouterr().err


def test_workers_of_another_version_are_refused(
    threads: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "survey", lambda backend: fleet.Place("a:1", "a", backend, "0.0.1"))
    assert drill("--scheduler", threads) == 2
    assert "the workers have kvcanary 0.0.1" in capsys.readouterr().err


def test_without_dask_the_install_command_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert drill("--workers", "2") == 2
    assert 'pip install "kvcanary[fleet]"' in capsys.readouterr().err


@pytest.mark.gpu
def test_one_worker_for_each_gpu(distributed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    count = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))
    n = min(count.value, 2)
    assert main(["drill", "--soak", "--backend", "cuda", "--workers", str(n), "--steps", "200"]) == 0
    rows = re.findall(r"^(GPU-[0-9a-f-]{36}) .* silent$", capsys.readouterr().out, re.MULTILINE)
    assert len(set(rows)) == n
