"""Python time of the guard on the host, in microseconds, and its memory: what an engine's scheduler thread pays.

``python bench/bench_host.py [--backend twin|cuda|host] [--json FILE]``. The twin launches nothing, so its times are the
guard's Python alone and can be measured anywhere; "cuda" adds the calls into CuPy and the driver. Default: the twin,
and cuda where there is a GPU. Every call is timed by itself; medians, with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from host_twin import PAGE, TwinStream, llama_pool, memory, raw_batch, twin_backend

from kvcanary import BackendError, CanaryConfig, CanaryManager, StepBatch, layouts
from kvcanary.abi import N_STATE_WORDS
from kvcanary.deferred import DelayedDeviceHostHandler

ROWS = 64
N_STEPS = 20_000  # timed steps, of which one in EVERY has snapshots due
EVERY = 100  # default steps between two stats lines, and between two health checks
TARGETS = {  # microseconds unless the name says otherwise
    "step, nothing due": 8.0,
    "step, a snapshot due": 40.0,
    "step, a snapshot delivered": 40.0,
    "construct again, 64 planes, 1 M slots (ms)": 500.0,
}
MEMORY_TARGET = 0.7  # percent of the KV bytes of the 8B model; stated for the others
N_AROUND = 8  # steps from one that is due on in which its snapshot may be delivered


class Rig(NamedTuple):
    """A manager with a batch; ``replay`` does what a replayed graph does to the guard's counters, untimed."""

    manager: CanaryManager
    batch: StepBatch
    stream: Any
    replay: Callable[[], None]
    wait: Callable[[], None]  # for the device, so that no queue fills up


# ---- rigs ------------------------------------------------------------------------------------------------------------
def twin_rig(config: CanaryConfig) -> Rig:
    """The 8B model's pool over a driver that does nothing; a replay only counts the launches."""
    manager = CanaryManager(config, [llama_pool(1 << 12)], ROWS, ROWS, backend=twin_backend)
    return Rig(manager, raw_batch(ROWS, 4), TwinStream(), _count_launches(manager), lambda: None)


def host_rig(config: CanaryConfig) -> Rig:
    """The NumPy backend over a small pool; a replay only counts the launches."""
    shape = (1 + ROWS, PAGE, 2, 8)
    pool = layouts.nhd(k=[np.zeros(shape, np.uint8)], v=[np.zeros(shape, np.uint8)], page_size=PAGE)
    manager = CanaryManager(config, [pool], ROWS, ROWS)
    return Rig(manager, _first_tokens(np), None, _count_launches(manager), lambda: None)


def cuda_rig(config: CanaryConfig) -> Rig:
    """The CUDA backend over a small pool; a replay is a graph of one guarded forward, all rows at their first token."""
    import cupy

    shape = (1 + ROWS, PAGE, 2, 8)
    pool = layouts.nhd(k=[cupy.zeros(shape, np.uint8)], v=[cupy.zeros(shape, np.uint8)], page_size=PAGE)
    manager = CanaryManager(config, [pool], ROWS, ROWS)
    batch, stream = _first_tokens(cupy), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with manager.forward(batch, stream):
        pass
    stream.begin_capture()
    with manager.forward(batch, stream):
        pass
    graph = stream.end_capture()
    return Rig(manager, batch, stream, lambda: graph.launch(stream), stream.synchronize)


def _count_launches(manager: CanaryManager) -> Callable[[], None]:
    words = manager.state.words

    def replay() -> None:
        words[N_STATE_WORDS:] += 1

    return replay


def _first_tokens(xp: Any) -> StepBatch:
    """Every row writes its first token: nothing to verify, nothing to report."""
    blocks = 1 + xp.arange(ROWS, dtype=np.int32)
    return StepBatch(
        block_table=blocks.reshape(ROWS, 1),
        seq_lens=xp.ones(ROWS, np.int32),
        query_start_loc=xp.arange(ROWS + 1, dtype=np.int32),
        input_ids=xp.arange(ROWS, dtype=np.int32),
        slot_mapping=blocks.astype(np.int64) * PAGE,
        request_slots=xp.arange(ROWS, dtype=np.int32),
        request_ids=xp.arange(1, ROWS + 1, dtype=np.uint32),
    )


RIGS: dict[str, Callable[[CanaryConfig], Rig]] = {"twin": twin_rig, "cuda": cuda_rig, "host": host_rig}


# ---- timing ----------------------------------------------------------------------------------------------------------
def timed_us(run: Callable[[], object], n: int, before: Callable[[], object] | None = None) -> np.ndarray[Any, Any]:
    """Microseconds of each of ``n`` calls of ``run``; ``before`` precedes each and is not timed: float[n]."""
    clock, times = time.perf_counter_ns, np.empty(n, np.int64)
    for i in range(n):
        if before is not None:
            before()
        start = clock()
        run()
        times[i] = clock() - start
    return times / 1e3


def summary(times: np.ndarray[Any, Any]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and the number of calls."""
    low, median, high = np.percentile(times, (10, 50, 90))
    return {"median": float(median), "p10": float(low), "p90": float(high), "n": len(times)}


def _pacing(rig: Rig) -> Callable[[], None]:
    """A replay before each call, and a wait now and then, so that a device that is behind does not hold the host up."""
    calls = 0

    def before() -> None:
        nonlocal calls
        calls += 1
        rig.replay()
        if calls % 50 == 0:
            rig.wait()

    return before


def step_times(make: Callable[[CanaryConfig], Rig]) -> dict[str, dict[str, float]]:
    """`manager.step()` around nothing, with default observers, by what was due; and its primitives."""
    one = whole_step_times(make, CanaryConfig(stats_print_every_n_steps=0))  # the health check's snapshot alone
    both = whole_step_times(make, CanaryConfig())
    return {
        "step, nothing due": both["plain"],
        "step, nothing due, after stats()": both["plain, cold"],  # whose Python has used up the caches
        "step, a snapshot due": one["due"],
        "step, a snapshot due, after stats()": one["due, cold"],
        "step, a snapshot delivered": one["delivered"],
        "step, two snapshots due": both["due"],
        "step, two snapshots delivered": both["delivered"],
        "begin_step": both["begin_step"],
        "end_step": both["end_step"],
    }


def whole_step_times(make: Callable[[CanaryConfig], Rig], config: CanaryConfig) -> dict[str, dict[str, float]]:
    """The same of one configuration."""
    rig = make(config)
    manager, stream, before = rig.manager, rig.stream, _pacing(rig)

    def step() -> None:
        with manager.step(stream):
            pass

    def begin() -> None:
        manager.begin_step(stream)

    timed_us(step, 2 * EVERY, before)  # warm up, beyond the health checker's own warm-up

    def in_flight() -> int:
        return sum(handler.n_in_flight for handler in manager._handlers)

    n_snapshots = 2 if config.stats_print_every_n_steps else 1  # that fall due together
    plain, cold, since_due = np.empty(N_STEPS), np.empty(N_STEPS), np.empty((2, N_STEPS), np.int64)
    is_delivered = np.empty(N_STEPS, bool)
    for i in range(N_STEPS):
        n = in_flight()
        plain[i] = timed_us(step, 1, before)[0]
        since_due[0, i], is_delivered[i] = manager.step_number % EVERY, n == n_snapshots and not in_flight()
    for i in range(N_STEPS):
        manager.stats()
        cold[i] = timed_us(step, 1, before)[0]
        since_due[1, i] = manager.step_number % EVERY
    begins, ends = np.empty(N_STEPS // 4), np.empty(N_STEPS // 4)
    for i in range(len(ends)):
        begins[i] = timed_us(begin, 1, before)[0]
        ends[i] = timed_us(manager.end_step, 1)[0]
    _must_be_silent(rig)
    return {
        "plain": summary(plain[since_due[0] >= N_AROUND]),
        "due": summary(plain[since_due[0] == 0]),
        "delivered": summary(plain[is_delivered]),
        "plain, cold": summary(cold[since_due[1] >= N_AROUND]),
        "due, cold": summary(cold[since_due[1] == 0]),
        "begin_step": summary(begins),
        "end_step": summary(ends),
    }


def part_times(make: Callable[[CanaryConfig], Rig]) -> dict[str, dict[str, float]]:
    """The deferred handler alone and `poll`."""
    rig = make(CanaryConfig())
    manager, stream, words = rig.manager, rig.stream, rig.manager.state.words
    handler = DelayedDeviceHostHandler(manager.backend.staging(4), "bench")

    def receive(words: Any) -> None: ...

    def stage() -> None:
        handler.step(lambda: words, receive, stream)

    def nothing() -> None:
        handler.step(lambda: None, receive, stream)

    found = {
        "handler.step, staging": summary(timed_us(stage, 4000, handler.drain)),
        "handler.step, nothing to do": summary(timed_us(nothing, 4000)),
        "poll, no violation": summary(timed_us(manager.poll, 4000)),
        "stats": summary(timed_us(manager.stats, 4000)),
    }
    handler.close()
    _must_be_silent(rig)
    return found


def eager_times(backend: str) -> dict[str, dict[str, float]]:
    """A HEAD and TAIL that are not captured; on a GPU with HEAD beside the model, too."""
    found = {}
    for overlap_head in (False, True) if backend == "cuda" else (False,):
        rig = RIGS[backend](CanaryConfig(overlap_head=overlap_head))

        def forward(rig: Rig = rig) -> None:
            with rig.manager.forward(rig.batch, rig.stream):
                pass

        timed_us(forward, 20)
        name = "eager HEAD beside the model, and TAIL" if overlap_head else "eager HEAD and TAIL"
        found[name] = summary(timed_us(forward, 1000, _pacing(rig)))
        _must_be_silent(rig)
    return found


def _must_be_silent(rig: Rig) -> None:
    rig.manager.synchronize()
    if rig.manager.stats().observations_total or rig.manager.n_observer_errors:
        raise SystemExit("the guard reported something, or an observer raised; no time is printed")
    rig.manager.close()


def construct_times(backend: str) -> dict[str, dict[str, float]]:
    """Making a manager of 64 planes and 2^20 slots, milliseconds: the first in this process, and those after it."""
    pool, chosen = llama_pool(1 << 20), twin_backend if backend == "twin" else backend
    times = []
    for _ in range(6):
        start = time.perf_counter()
        manager = CanaryManager(CanaryConfig(), [pool], 256, 8192, backend=chosen)
        times.append(1e3 * (time.perf_counter() - start))
        manager.close()
        gc.collect()
    return {
        "construct first, 64 planes, 1 M slots (ms)": summary(np.array(times[:1])),
        "construct again, 64 planes, 1 M slots (ms)": summary(np.array(times[1:])),
    }


# ---- the program -----------------------------------------------------------------------------------------------------
def has_gpu() -> bool:
    from kvcanary.backends.cuda import check_driver, import_cuda

    try:
        check_driver()
        import_cuda()
    except BackendError:
        return False
    return True


def verdict(value: float, target: float | None) -> str:
    return "" if target is None else f"  target <= {target:g}: {'ok' if value <= target else 'MISSED'}"


def measure(backend: str) -> dict[str, dict[str, float]]:
    """All times of one backend; garbage collection is off meanwhile, as engines keep it frozen."""
    make = RIGS[backend]
    gc.collect()
    gc.disable()
    try:
        found = {**step_times(make), **part_times(make), **eager_times(backend)}
    finally:
        gc.enable()
    return found if backend == "host" else {**found, **construct_times(backend)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=tuple(RIGS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    logging.getLogger("kvcanary").addHandler(logging.StreamHandler(sys.stdout))
    logging.getLogger("kvcanary").setLevel(logging.WARNING)
    backends = [args.backend] if args.backend else ["twin", *(["cuda"] if has_gpu() else [])]
    results: dict[str, Any] = {"python": platform.python_version(), "machine": platform.processor(), "times": {}}
    for backend in backends:
        results["times"][backend] = found = measure(backend)
        for name, s in found.items():
            line = f"{backend:5} {name:42} {s['median']:8.2f} ({s['p10']:.2f} to {s['p90']:.2f})"
            print(line + verdict(s["median"], TARGETS.get(name)), flush=True)
    results["memory"] = memory()
    for m in results["memory"]:
        line = f"memory {m['pool']}, real_data={m['real_data']}: {m['guard_bytes_per_slot']:.0f} B a slot over"
        target = MEMORY_TARGET if m["pool"].startswith("8B") else None
        print(f"{line} {m['kv_bytes_per_slot']} = {m['percent']:.2f} %{verdict(m['percent'], target)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
