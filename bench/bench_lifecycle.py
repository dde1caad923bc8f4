"""What block ownership costs: host time of its calls, and how fast the patrol reads. Needs a GPU.

``PYTHONPATH=. python bench/bench_lifecycle.py [--json FILE]``; see `bench/RESULTS.md` for what came out.
Calls are timed in ten processes one after the other, each bound to one core: how fast a host is depends on the core and
on its neighbours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu import GpuPlace
from bench.timing import N_REPLAYS
from kvcanary import CanaryConfig, CanaryManager, KvPool, StepBatch, abi, layouts

PAGE, N_IDS, N_CALLS, N_PROCESSES = 16, 1000, 200, 10
CALL_TARGET_US, SHARE_TARGET = 25.0, 0.9
OFF: dict[str, Any] = {"stats_print_every_n_steps": 0, "health_check_every_n_steps": 0}
# layers x (K and V) x bytes a slot; slots. More than L2 holds, and of one plane as well as of many.
PATROLS = {
    "64 planes of 2048 B": (32, 2048, 16384),
    "2 planes of 2048 B": (1, 2048, 262144),
    "122 planes of 576 B": (61, 576, 32768),
}


def call_times(place: GpuPlace) -> dict[str, float]:
    """Median host microseconds of a call about 1,000 blocks, ids as an int32 array; a launch each.

    Every round has blocks that never came together before, as an allocator gives them. They are shared and freed as
    they were allocated, in turn with those of a second request.
    """
    n_blocks = 1 << 16
    planes = place.xp.zeros((n_blocks, PAGE, 1, 8), np.uint8)
    config = CanaryConfig(real_data="none", lifecycle=True, **OFF)
    manager = CanaryManager(config, [layouts.nhd(k=[planes], page_size=PAGE)], 16, 64)
    rng = np.random.default_rng(0)
    calls = {
        "allocate_blocks": manager.allocate_blocks,
        "share_blocks": lambda ids, owner: manager.share_blocks(ids, owner + 1),
        "free_blocks, shared": lambda ids, owner: manager.free_blocks(ids, owner + 1),
        "free_blocks": manager.free_blocks,
    }
    spent: dict[str, list[float]] = {name: [] for name in calls}
    with manager.step(place.stream):
        for _ in range(N_CALLS):
            ids = 1 + rng.choice(n_blocks - 1, 2 * N_IDS, replace=False).astype(np.int32)
            turns = [(ids[:N_IDS].copy(), 7), (ids[N_IDS:].copy(), 17)]
            for (name, call), (blocks, owner) in itertools.product(calls.items(), turns):
                start = time.perf_counter_ns()
                call(blocks, owner)
                spent[name].append((time.perf_counter_ns() - start) / 1e3)
            place.synchronize()
    manager.close()
    return {name: float(np.median(times)) for name, times in spent.items()}


def calls_in_processes(n: int) -> dict[str, list[float]]:
    """`call_times` of ``n`` new processes: one float[n] per call, sorted."""
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, list[float]] = {}
    for i in range(n):
        core = cores[i % len(cores)]
        run = [sys.executable, __file__, "--calls-on", str(core)]
        told = json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE).stdout)
        for name, us in told.items():
            found.setdefault(name, []).append(us)
    return {name: sorted(times) for name, times in found.items()}


class PatrolRig:
    """A pool whose blocks all belong to one request, written once, and a patrol that takes all of it in one turn."""

    def __init__(self, place: GpuPlace, n_layers: int, n_bytes: int, n_slots: int) -> None:
        shape = (n_slots // PAGE, PAGE, 1, n_bytes)
        planes = [place.random_bytes(n_slots * n_bytes, i).reshape(shape) for i in range(2 * n_layers)]
        self.pool: KvPool = layouts.nhd(k=planes[:n_layers], v=planes[n_layers:], page_size=PAGE)
        config = CanaryConfig(lifecycle=True, scrub_bytes_per_step=1 << 40, verify_data_every=1 << 20, **OFF)
        n_tokens = n_slots - PAGE  # block 0 is reserved
        self.manager = CanaryManager(config, [self.pool], 1, n_tokens)
        self.manager.allocate_blocks(np.arange(1, n_slots // PAGE, dtype=np.int32), 7, stream=place.stream)
        self._forward(place, 0, n_tokens - 1)
        batch = self._forward(place, n_tokens - 1, 1)
        place.synchronize()
        (call,) = self.manager._bind(batch, True, None).calls
        (self.scrub,) = [k for k in call.batch.head if k.kernel is self.manager.backend._kernels["kvc_scrub"]]  # type: ignore[attr-defined]
        halves = len(self.pool.halves)
        # Per slot: its bytes and digests, four stamps (HEAD of both halves, and of what they continue) and one of TAIL.
        per_slot = 2 * n_layers * (n_bytes + 8) + (halves + 1) * abi.STAMP.itemsize
        self.n_bytes = (n_tokens - 1) * per_slot
        self._check()

    def _forward(self, place: GpuPlace, first: int, n: int) -> StepBatch:
        xp = place.xp
        n_blocks = self.pool.n_blocks - 1
        batch = StepBatch(
            block_table=xp.arange(1, n_blocks + 1, dtype=np.int32).reshape(1, -1),
            seq_lens=xp.array([first + n], np.int32),
            query_start_loc=xp.array([0, n], np.int32),
            input_ids=xp.arange(first, first + n, dtype=np.int32),
            slot_mapping=PAGE + xp.arange(first, first + n, dtype=np.int64),
            request_slots=xp.zeros(1, np.int32),
            request_ids=xp.full(1, 7, np.uint32),
        )
        place.synchronize()
        with self.manager.step(place.stream), self.manager.forward(batch, place.stream):
            pass
        return batch

    def _check(self) -> None:
        """The turn of the second forward has looked at all that the first one wrote, and found nothing."""
        words = self.manager.backend.snapshot_words()
        wanted = self.pool.n_slots - PAGE - 1
        found = int(words[abi.STATE_SCRUB_SLOTS]), int(words[abi.STATE_CLAIMED])
        if found != (wanted, 0):
            raise SystemExit(f"the patrol checked and reported {found}, not {(wanted, 0)}: no time is printed")


def main() -> int:
    """Print, and write, what was measured; the exit status is 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=N_PROCESSES, help=f"for the calls (default {N_PROCESSES})")
    parser.add_argument(
        "--calls-on", type=int, metavar="CORE", help="print the times of the calls, from this core, as JSON"
    )
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: give at least 1")
    if args.calls_on is not None:
        os.sched_setaffinity(0, {args.calls_on})
        print(json.dumps(call_times(GpuPlace())))
        return 0
    calls = calls_in_processes(args.processes)
    place = GpuPlace()
    timer = place.timer(N_REPLAYS)
    machine, ceiling = place.describe(), place.ceilings(timer)["read_tb_s"]
    print(f"{machine['gpu']}, {machine['date']}, commit {machine['commit']}; read ceiling {ceiling:.3f} TB/s")
    results: dict[str, Any] = {"machine": machine, "read_tb_s": ceiling, "calls_us": calls, "patrol": {}}
    is_good = True
    for name, times in calls.items():
        us, within = float(np.median(times)), sum(t <= CALL_TARGET_US for t in times)
        is_good &= us <= CALL_TARGET_US
        print(f"{name:24} {us:6.1f} us for {N_IDS} ids   target <= {CALL_TARGET_US:.0f}: {_word(us <= CALL_TARGET_US)}")
        print(f"  of {len(times)} processes, {times[0]:.1f} to {times[-1]:.1f}; {within} within the target")
    for name, shape in PATROLS.items():
        rig = PatrolRig(place, *shape)
        timing = timer.time(rig.scrub.launch)
        share = rig.n_bytes / timing.us / 1e6 / ceiling
        is_good &= share >= SHARE_TARGET
        results["patrol"][name] = {"us": timing.us, "spread_us": timing.spread_us, "bytes": rig.n_bytes, "share": share}
        print(f"patrol, {name:22} {timing.us:9.1f} us (+-{timing.spread_us:.1f}) for {rig.n_bytes / 1e6:.0f} MB")
        print(f"  {share:.3f} of the ceiling   target >= {SHARE_TARGET}: {_word(share >= SHARE_TARGET)}")
        rig.manager.close()
        del rig
        place.release()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0 if is_good else 1


def _word(is_reached: bool) -> str:
    return "ok" if is_reached else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
