"""What the guard adds to one decode step of the sim engine: microseconds eager and replayed, and graph nodes.

``python bench/bench_replay.py [--json FILE]`` on a GPU; with ``--backend host`` the NumPy engine and the NumPy guard.
Before a case is timed, its guarded output is compared with the unguarded one, and the guard must have been silent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcanary import CanaryConfig, CanaryManager
from kvcanary.sim.engine import NoGuard, SimEngine
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.model import ModelConfig, NumpyModel

QUIET = {"stats_print_every_n_steps": 0, "health_check_every_n_steps": 0}
CASES = [(rows, length, real_data) for rows, length in ((1, 900), (8, 900), (32, 400)) for real_data in ("none", "all")]
REPEATS = 7


def make_engine(backend: str, rows: int, length: int) -> tuple[Any, SimEngine, Any]:
    """A model and an engine with room for ``rows`` requests of ``length`` positions; the runner is None on the host."""
    blocks = 1 + rows * -(-(length + 32) // 16)
    if backend == "host":
        model: Any = NumpyModel(ModelConfig(), blocks)
        runner = None
    else:
        from kvcanary.sim.cuda_model import CudaModel, CudaRunner

        model = CudaModel(ModelConfig(), blocks)
        runner = CudaRunner(model)
    engine = SimEngine(
        model,
        max_requests=rows,
        max_new_tokens=max(256, rows),
        max_len=length + 32,
        graph_buckets=(rows,),
        prefix_sharing=False,
        execute=runner.execute if runner else None,
    )
    return model, engine, runner


def prefilled(engine: SimEngine, guard: Any, rows: int, length: int) -> list[list[int]]:
    """Serve prompts until every row has decoded a few tokens; returns what they decoded."""
    rng = np.random.default_rng(rows)
    requests = [engine.add_request(rng.integers(32, 127, length, dtype=np.uint8).tobytes(), 24) for _ in range(rows)]
    while min(len(r.output) for r in requests) < 8:
        engine.step(guard)
    return [list(r.output[:8]) for r in requests]


def median_us(run: Callable[[], None], n: int) -> tuple[float, float]:
    """Median and spread (max - min) of ``REPEATS`` timings of ``n`` runs, in microseconds a run."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(n):
            run()
        times.append((time.perf_counter() - start) / n * 1e6)
    return statistics.median(times), max(times) - min(times)


def device_us(stream: Any, run: Callable[[], None], n: int) -> tuple[float, float]:
    """The same by events on a stream, so that host time counts only where it holds the device up."""
    import cupy

    run()
    times = []
    for _ in range(REPEATS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        for _ in range(n):
            run()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / n * 1e3)
    return statistics.median(times), max(times) - min(times)


def capture(stream: Any, run: Callable[[], None]) -> tuple[Callable[[], None], int]:
    """Capture ``run`` on a stream; returns the launch of the graph and its number of nodes."""
    from cuda.bindings import driver

    def ok(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise RuntimeError(str(result[0]))
        return result[1:] if len(result) > 2 else result[-1]

    raw = driver.CUstream(stream.ptr)
    ok(driver.cuStreamBeginCapture(raw, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    run()
    graph = ok(driver.cuStreamEndCapture(raw))
    n_nodes = int(ok(driver.cuGraphGetNodes(graph))[1])
    executable = ok(driver.cuGraphInstantiate(graph, 0))
    return lambda: ok(driver.cuGraphLaunch(executable, raw)), n_nodes


def measure_cuda(rows: int, length: int, real_data: str) -> dict[str, Any]:
    """One case on the GPU: the state after the prefill is decoded over and over, at the same positions."""
    model, engine, _runner = make_engine("cuda", rows, length)
    plain = prefilled(engine, NoGuard(), rows, length)
    model, engine, _runner = make_engine("cuda", rows, length)
    config = CanaryConfig(real_data=real_data, **QUIET)
    manager = CanaryManager(config, [pool_of(model)], max_requests=rows, max_new_tokens=max(256, rows))
    guard = CanaryGuard(manager, model.stream)
    guarded = prefilled(engine, guard, rows, length)
    device = model.upload(engine.arrays_for(rows, rows))
    batch = guard.batch_of(device)

    def with_guard() -> None:
        with manager.forward(batch, model.stream):
            model.launch(device)

    def without() -> None:
        model.launch(device)

    replay_with, n_with = capture(model.stream, with_guard)
    replay_without, n_without = capture(model.stream, without)
    timings = {
        "eager_us": device_us(model.stream, without, 50),
        "eager_guarded_us": device_us(model.stream, with_guard, 50),
        "replay_us": device_us(model.stream, replay_without, 200),
        "replay_guarded_us": device_us(model.stream, replay_with, 200),
    }
    manager.synchronize()
    if guarded != plain or manager.stats().observations_total:
        raise SystemExit(f"rows={rows}: outputs differ or the guard reported something; no time is printed")
    result = {"nodes": n_without, "nodes_added": n_with - n_without, **timings}
    manager.close()
    return result


def measure_host(rows: int, length: int, real_data: str) -> dict[str, Any]:
    """One case on the host: the same, with the NumPy model and guard."""
    model, engine, _runner = make_engine("host", rows, length)
    plain = prefilled(engine, NoGuard(), rows, length)
    model, engine, _runner = make_engine("host", rows, length)
    config = CanaryConfig(real_data=real_data, **QUIET)
    manager = CanaryManager(config, [pool_of(model)], max_requests=rows, max_new_tokens=max(256, rows))
    guard = CanaryGuard(manager)
    guarded = prefilled(engine, guard, rows, length)
    arrays = engine.arrays_for(rows, rows)

    def with_guard() -> None:
        with guard.forward(arrays):
            model.forward(arrays)

    timings = {
        "eager_us": median_us(lambda: model.forward(arrays), 5),
        "eager_guarded_us": median_us(with_guard, 5),
    }
    if guarded != plain or manager.violations():
        raise SystemExit(f"rows={rows}: outputs differ or the guard reported something; no time is printed")
    return timings


def host_phases_us() -> tuple[float, float]:
    """Host time of an empty ``with manager.step()``, observers on, as an engine pays it at every step."""
    model = NumpyModel(ModelConfig(), 8)
    manager = CanaryManager(CanaryConfig(), [pool_of(model)], 4, 16)

    def step() -> None:
        with manager.step(idle=True):
            pass

    return median_us(step, 2000)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    measure = measure_cuda if args.backend == "cuda" else measure_host
    results = []
    for rows, length, real_data in CASES:
        found = measure(rows, length, real_data)
        results.append({"rows": rows, "length": length, "real_data": real_data, **found})
        words = [f"{name}={value[0]:.1f}(+-{value[1]:.1f})" for name, value in found.items() if name.endswith("_us")]
        nodes = [f"nodes={found['nodes']}", f"nodes_added={found['nodes_added']}"] if "nodes" in found else []
        added = [
            f"{kind}_added={found[f'{kind}_guarded_us'][0] - found[f'{kind}_us'][0]:.1f}us"
            for kind in ("eager", "replay")
            if f"{kind}_us" in found
        ]
        print(f"rows={rows} positions={length} real_data={real_data}", *nodes, *words, *added, flush=True)
    host = host_phases_us()
    print(f"host phases of a step (begin_step, end_step, observers on): {host[0]:.1f}(+-{host[1]:.1f}) us")
    if args.json:
        args.json.write_text(json.dumps({"backend": args.backend, "cases": results, "host_phases_us": host}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
