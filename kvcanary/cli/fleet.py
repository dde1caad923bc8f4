"""`kvcanary drill --soak --workers N`: a soak as Dask tasks, one worker per GPU, or per process on the host.

Every worker plays one seed at a time; the next seed goes to whoever is free. What each did is gathered by GPU (its
UUID, which stays the same over machines and restarts) or, on the host, by process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import kvcanary
from kvcanary.cli import child
from kvcanary.cli.outputs import write_output
from kvcanary.cli.rig import choose_backend
from kvcanary.errors import BackendError, ConfigError, KvCanaryError
from kvcanary.sim import soak

INSTALL = 'pip install "kvcanary[fleet]"'
LOOK_EVERY_S = 2.0  # between looks for workers that are gone
START_TIMEOUT_S = 120.0


class Job(NamedTuple):
    """One seed, for so many guarded steps."""

    seed: int
    steps: int


class Place(NamedTuple):
    """What a worker runs on: ``name`` is the GPU's UUID, or host name and process id; equal ones are told together."""

    name: str
    host: str
    backend: str
    version: str


@dataclass(frozen=True)
class Report:
    """What became of a job: ``result``, or in ``problem`` why there is none."""

    job: Job
    place: str
    seconds: float
    result: soak.SoakResult | None = None
    problem: str = ""


# ---- what runs in a worker -------------------------------------------------------------------------------------------
def survey(backend: str) -> Place:
    """What this process would run a soak on.

    Raises:
        BackendError: backend "cuda", and no GPU can be used here.
    """
    host = socket.gethostname()
    chosen = choose_backend(backend).backend
    name = child.driver()["gpus"][_current_device()]["uuid"] if chosen == "cuda" else f"{host}:{os.getpid()}"
    return Place(name, host, chosen, kvcanary.__version__)


def _current_device() -> int:
    from kvcanary.backends.cuda import CudaDriver

    return CudaDriver(None).device_id


def play(job: Job, backend: str, place: str) -> Report:
    """One seed; whatever goes wrong is told in the report."""
    start, result, problem = time.perf_counter(), None, ""
    try:
        result = soak.soak(job.seed, job.steps, None, backend)
    except soak.FalseAlarmError as error:
        problem = f"FALSE ALARM: {error}"
    except Exception as error:  # noqa: BLE001  a broken machine of the fleet is a line of the table
        problem = f"{type(error).__name__}: {error}"
    return Report(job, place, time.perf_counter() - start, result, problem)


# ---- the client ------------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse._ActionsContainer) -> None:
    """What a fleet is told."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="soak on N Dask workers: of this machine (one per GPU), or of --scheduler",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="a running Dask scheduler (tcp://HOST:8786)")


def is_asked(arguments: argparse.Namespace) -> bool:
    """Whether the soak is one of a fleet."""
    return arguments.workers is not None or arguments.scheduler is not None


def run(arguments: argparse.Namespace) -> int:
    """Soak on the fleet, and tell it; 0 only if every seed was played and the guard stayed silent."""
    if arguments.processes != 1:
        raise ConfigError(f"--processes {arguments.processes} with a fleet: a worker is one process; give --workers")
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: give at least 1")
    start = time.perf_counter()
    with _client(arguments.scheduler, arguments.workers, arguments.backend) as client:
        places = find_places(client, arguments.workers, arguments.backend)
        backend = next(iter(places.values())).backend
        print(f"backend {backend} on {len(places)} workers", flush=True)
        most, minutes = soak.STEPS_PER_SEED[backend], arguments.minutes
        jobs = list_jobs(arguments.steps, arguments.first_seed, len(places), most)
        given = jobs_for(minutes, arguments.first_seed, most) if minutes > 0 else iter(jobs)
        reports = play_all(client, {address: place.name for address, place in places.items()}, given, backend)
    n_jobs = len(reports) if minutes > 0 else len(jobs)
    print(told(reports, n_jobs, time.perf_counter() - start))
    if arguments.json is not None:
        write_output("--json", arguments.json, json.dumps([asdict(r) for r in reports], indent=1) + "\n")
        print(f"written to {arguments.json}")
    return 0 if len(reports) == n_jobs and all(report.result for report in reports) else 1


def list_jobs(n_steps: int, first_seed: int, n_workers: int, most_per_seed: int) -> list[Job]:
    """``n_steps`` steps over seeds of at most so many steps, and at least a seed for each worker."""
    per_seed = min(most_per_seed, -(-n_steps // n_workers))
    starts = range(0, n_steps, per_seed)
    return [Job(first_seed + i, min(per_seed, n_steps - start)) for i, start in enumerate(starts)]


def jobs_for(minutes: float, first_seed: int, steps_per_seed: int) -> Iterator[Job]:
    """Jobs until so many minutes have gone by; at least one."""
    end, seed = time.perf_counter() + 60 * minutes, first_seed
    while seed == first_seed or time.perf_counter() < end:
        yield Job(seed, steps_per_seed)
        seed += 1


@contextmanager
def _client(scheduler: str | None, n_workers: int | None, backend: str) -> Iterator[Any]:
    """A client of the scheduler, or of a cluster of this machine's own that ends with it."""
    distributed = import_distributed()
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout=START_TIMEOUT_S / 4)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--scheduler {scheduler}: no scheduler answers there ({error})") from error
        with client:
            yield client
        return
    assert n_workers is not None
    uuids = _gpus(n_workers, backend)
    with make_cluster(distributed, n_workers, uuids) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(n_workers, timeout=START_TIMEOUT_S)
        yield client


def import_distributed() -> Any:
    """``distributed``, or a `BackendError` with the install command."""
    try:
        import distributed
    except ImportError as error:
        raise BackendError(f"a fleet needs dask and distributed ({error}): {INSTALL}") from error
    return distributed


def _gpus(n_workers: int, backend: str) -> list[str]:
    """UUIDs of the GPUs that this machine's workers get, one each; none where the soak runs on the host."""
    if backend == "host":
        return []
    uuids = [gpu["uuid"] for gpu in child.ask("driver", START_TIMEOUT_S)["gpus"]]
    if uuids and len(uuids) < n_workers:
        raise ConfigError(f"--workers {n_workers}: this machine has {len(uuids)} GPUs, and a worker takes one")
    return uuids[:n_workers]


def make_cluster(distributed: Any, n_workers: int, uuids: Sequence[str]) -> Any:
    """A `LocalCluster` of processes with one thread each, of which each sees one of the GPUs, if any are given."""

    class Cluster(distributed.LocalCluster):  # type: ignore[misc]
        def new_worker_spec(self) -> Any:
            specs = {}
            for name, worker in super().new_worker_spec().items():  # one dict, the same for all workers
                gpu = {"CUDA_VISIBLE_DEVICES": uuids[self.n_made % len(uuids)]} if uuids else {}
                options = worker["options"]
                env = {**options.get("env", {}), "OPENBLAS_NUM_THREADS": "1", **gpu}
                specs[name] = {**worker, "options": {**options, "env": env}}
                self.n_made += 1
            return specs

        n_made = 0

    cluster = Cluster(n_workers=0, threads_per_worker=1, processes=True, dashboard_address=None)
    cluster.scale(n_workers)
    return cluster


def find_places(client: Any, n_workers: int | None, backend: str) -> dict[str, Place]:
    """Address -> what that worker runs on; all of them can play on one backend.

    Raises:
        ConfigError: too few workers, other versions of this package, or some with a GPU and some without.
        BackendError: a worker that cannot do its work.
    """
    addresses = sorted(_workers(client))
    if len(addresses) < (n_workers or 1):
        raise ConfigError(
            f"--workers {n_workers or 1}: the scheduler has {len(addresses)}; start more, or ask for fewer"
        )
    addresses = addresses[:n_workers]
    places = {}
    for address, future in {a: _submit(client, a, survey, backend) for a in addresses}.items():
        try:
            places[address] = future.result(timeout=START_TIMEOUT_S)
        except Exception as error:  # what the worker raised, or what Dask says of it
            hint = "" if isinstance(error, KvCanaryError) else "; is the same kvcanary installed there?"
            raise BackendError(f"worker {address}: {type(error).__name__}: {error}{hint}") from error
    versions, backends = {p.version for p in places.values()}, {p.backend for p in places.values()}
    if versions != {kvcanary.__version__}:
        raise ConfigError(f"the workers have kvcanary {', '.join(sorted(versions))}, this is {kvcanary.__version__}")
    if len(backends) > 1:
        raise ConfigError("some workers have a GPU and some have none: choose with --backend host or cuda")
    return places


def play_all(client: Any, places: dict[str, str], jobs: Iterator[Job], backend: str) -> list[Report]:
    """Every job on a worker that is free; a job whose worker is gone is lost, and no job goes there any more."""
    import distributed

    running, reports = dict[Any, tuple[str, Job, float]](), list[Report]()

    def give_to(address: str) -> None:
        if (job := next(jobs, None)) is not None:
            future = _submit(client, address, play, job, backend, places[address])
            running[future] = (address, job, time.perf_counter())

    for address in places:
        give_to(address)
    while running:
        with suppress(TimeoutError):
            distributed.wait(list(running), timeout=LOOK_EVERY_S, return_when="FIRST_COMPLETED")
        there = _workers(client)
        for future in list(running):
            address, job, start = running[future]
            is_lost = not future.done() and address not in there
            if not future.done() and not is_lost:
                continue
            del running[future]
            report = _report_of(future, job, places[address], time.perf_counter() - start, is_lost)
            reports.append(report)
            if report.problem:
                print(f"seed {job.seed} on {report.place}: {report.problem}", flush=True)
            if address in there:
                give_to(address)
    return reports


def _report_of(future: Any, job: Job, place: str, seconds: float, is_lost: bool) -> Report:
    if is_lost:
        future.cancel()
        return Report(job, place, seconds, None, "lost: its worker is gone (see that machine's log)")
    try:
        report: Report = future.result()
    except Exception as error:  # noqa: BLE001  of Dask: the task never ran, or its answer cannot be read
        return Report(job, place, seconds, None, f"{type(error).__name__}: {error}")
    return report


def _workers(client: Any) -> dict[str, Any]:
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    return workers


def _submit(client: Any, address: str, function: Callable[..., Any], *given: Any) -> Any:
    return client.submit(function, *given, workers=[address], allow_other_workers=False, pure=False, retries=0)


# ---- in words --------------------------------------------------------------------------------------------------------
def told(reports: Sequence[Report], n_jobs: int, seconds: float) -> str:
    """The sums, how often each behaviour happened, and a line for each GPU or process."""
    results = [report.result for report in reports if report.result is not None]
    rows = [("worker", "seeds", "steps", "steps/s", "entries", "digests", "verdict")]
    for place in sorted({report.place for report in reports}):
        here = [report for report in reports if report.place == place]
        done = [report.result for report in here if report.result is not None]
        steps, busy = sum(r.steps for r in done), sum(report.seconds for report in here)
        n_bad = len(here) - len(done)
        rows.append(
            (
                place,
                str(len(here)),
                str(steps),
                f"{steps / max(busy, 1e-9):.0f}",
                str(sum(r.protected_tokens for r in done)),
                str(sum(r.data_slots for r in done)),
                f"{n_bad} of {len(here)} seeds failed" if n_bad else "silent",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    problems = Counter(report.problem.split(":")[0] for report in reports if report.problem)
    n_not_played = n_jobs - len(reports)
    if n_not_played:
        problems["not played, as no worker is left"] = n_not_played
    verdict = "; ".join(f"{n} x {problem}" for problem, n in problems.items()) or "all silent"
    head = soak.told(results, seconds) if results else "no seed was played to its end"
    return "\n".join([head, "", *lines, "", f"{len(results)} of {n_jobs} seeds as expected: {verdict}"])
