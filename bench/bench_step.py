"""What the guard adds to a captured decode step of an 8B model: microseconds, percent, graph nodes.

``python bench/bench_step.py [--json FILE] [--scale F]`` on a GPU with 52 GB free; ``--scale 0.125`` takes an eighth of
the layers, for a quick try. 64 requests of 4096 positions decode the same positions again at every replay, which the
guard takes for a rejected draft; each replay is another forward, so another share of the data is due. Replays with and
without the guard alternate in blocks. No time of a case is printed unless the guard was silent over all its replays,
compared every prefix slot as often as it should have, agrees with `kvcanary.hashing`, and then names a planted fault.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_replay import capture
from step_kernels import LAYERS, MAX_NEW, PREFIX, ROWS, TOKEN_BYTES, DecodeModel, needed_bytes

from kvcanary import CanaryConfig, CanaryManager, KvCanaryError, Reason, abi, hashing

MIN_REPLAYS = 130
BLOCK = 10  # replays in a row of one kind
MAX_NODES_ADDED = 6


class Case(NamedTuple):
    """A configuration, the new tokens of a row, and the most that the guard may add, in percent.

    ``overlap_head``: HEAD beside the model.
    """

    name: str
    real_data: str
    verify_data_every: int
    n_new: int
    target: float
    overlap_head: bool = False

    @property
    def n_replays(self) -> int:
        """A multiple of ``verify_data_every``, so that every share of the data is due equally often."""
        every = self.verify_data_every if self.real_data != "none" else 1
        return -(-MIN_REPLAYS // every) * every


BASE = (
    Case("stamps only", "none", 127, 1, 0.3),
    Case("all data, every 127", "all", 127, 1, 1.0),
    Case("all data, every 61", "all", 61, 1, 1.8),
    Case("all data, every 127, 4 drafts", "all", 127, MAX_NEW, 1.2),
)
CASES = (*BASE, *(c._replace(name=f"{c.name}, HEAD beside the model", overlap_head=True) for c in BASE))


class Failure(Exception):
    """The guard did not do what it should, so its time means nothing."""


class Guarded(NamedTuple):
    """A case with its manager; both steps captured."""

    case: Case
    model: DecodeModel
    manager: CanaryManager
    plain: Callable[[], None]
    replay: Callable[[], None]
    n_nodes: int
    n_added: int

    def step(self) -> None:
        """What an engine does at a step."""
        with self.manager.step(self.model.stream):
            self.replay()

    def data_slots(self) -> int:
        """(slot, digest) pairs compared so far; waits."""
        return int(self.manager.backend.snapshot_words()[abi.STATE_DATA_SLOTS])


def guarded(model: DecodeModel, case: Case) -> Guarded:
    """A new manager that has seen the prefill, and the two graphs."""
    config = CanaryConfig(
        real_data=case.real_data,
        verify_data_every=case.verify_data_every,
        overlap_head=case.overlap_head,
        health_policy="raise",
    )
    manager = CanaryManager(config, [model.pool], max_requests=ROWS, max_new_tokens=ROWS * PREFIX)
    with manager.step(model.stream), manager.forward(model.prefill, model.stream):
        pass
    model.stream.synchronize()

    def with_guard() -> None:
        with manager.forward(model.decode[case.n_new], model.stream):
            model.launch(case.n_new)

    plain, n_nodes = capture(model.stream, lambda: model.launch(case.n_new))
    replay, n_with = capture(model.stream, with_guard)
    return Guarded(case, model, manager, plain, replay, n_nodes, n_with - n_nodes)


# ---- timing ----------------------------------------------------------------------------------------------------------
def times_us(model: DecodeModel, runs: Sequence[Callable[[], None]], n: int) -> list[np.ndarray[Any, Any]]:
    """Microseconds of ``n`` launches of each of ``runs`` by events, in alternating blocks: one float[n] per run."""
    event = model.cupy.cuda.Event
    pairs: list[list[tuple[Any, Any]]] = [[] for _ in runs]
    for i, start in enumerate(range(0, n, BLOCK)):
        runs[0]()  # not timed: the device is idle, and would wait for the host
        order = list(zip(runs, pairs, strict=True))
        for run, found in order if i % 2 == 0 else reversed(order):
            for _ in range(min(BLOCK, n - start)):
                begin, end = event(), event()
                begin.record(model.stream)
                run()
                end.record(model.stream)
                found.append((begin, end))
        model.stream.synchronize()
    elapsed = model.cupy.cuda.get_elapsed_time  # milliseconds
    return [np.array([1e3 * elapsed(begin, end) for begin, end in found]) for found in pairs]


def ceiling(model: DecodeModel) -> float:
    """The most bytes a second that a kernel reads here: the weights of all layers in one launch."""
    (times,) = times_us(model, [lambda: model.read_weights(slice(None))], 20)
    return float(model.weights.nbytes / (times.min() / 1e6))


def floor_bytes(case: Case, model: DecodeModel) -> int:
    """What the guard cannot do without reading at a step, in bytes.

    Two stamps of each half of every prefix slot, and the token history; of the data a share of the prefix and its
    digests, and the bytes of the new tokens.
    """
    prefix, pool = ROWS * PREFIX, model.pool
    n_bytes = prefix * (2 * len(pool.halves) * abi.STAMP.itemsize + 4)
    if case.real_data == "none":
        return n_bytes
    per_slot = pool.bytes_per_slot + 8 * len(pool.digest_units(case.real_data))
    return n_bytes + prefix * per_slot // case.verify_data_every + ROWS * case.n_new * pool.bytes_per_slot


# ---- is it right? ----------------------------------------------------------------------------------------------------
def check(g: Guarded, compared: int) -> None:
    """Raise `Failure` unless the guard was silent, did its work, and names what is planted now."""
    g.manager.synchronize()
    stats = g.manager.stats()
    if stats.observations_total:
        first = g.manager.violations()[0].summary()
        raise Failure(f"the guard reported {stats.observations_total} times what is in order, first: {first}")
    if g.manager.n_observer_errors:
        raise Failure("an observer raised, see the log")
    n_digests = len(g.model.pool.digest_units(g.case.real_data))
    wanted = ROWS * PREFIX * n_digests * g.case.n_replays // g.case.verify_data_every if n_digests else 0
    if compared != wanted:
        raise Failure(f"{compared} digests were compared over {g.case.n_replays} replays, not {wanted}")
    if n_digests:
        check_digests(g, n_digests)
        check_flip(g, row=ROWS // 2, position=PREFIX * 5 // 8, digest=n_digests - 1)
    check_token(g, row=ROWS // 3, position=PREFIX // 3)


def check_digests(g: Guarded, n_digests: int) -> None:
    """Digests on the device against `kvcanary.hashing` over the bytes themselves, of new tokens and of the prefix."""
    stored = g.manager.backend._arrays[0]["digests"]  # u64[digests, slots]; no public way leads to them
    rng = np.random.default_rng(1)
    for i in range(24):
        row, digest = int(rng.integers(ROWS)), int(rng.integers(n_digests))
        position = PREFIX + g.case.n_new - 1 if i % 3 == 0 else int(rng.integers(PREFIX))
        slot = int(g.model.slots[row, position])
        data = g.model.plane(digest)[slot].get().reshape(1, TOKEN_BYTES)
        wanted = int(hashing.digest(data, digest, np.array([position]))[0])
        found = int(stored[digest, slot].get())
        if found != wanted:
            raise Failure(f"digest {digest} of slot {slot} is {found:#x}, the reference says {wanted:#x}")


def named(g: Guarded) -> list[tuple[int, int, int | None, str | None]]:
    """A step; then (reasons, slot, layer, plane) of each violation that was not seen before."""
    known = len(g.manager.violations())
    g.step()
    g.manager.synchronize()
    return [(int(v.reasons), v.slot, v.layer, v.plane_name) for v in g.manager.violations()[known:]]


def must_name(g: Guarded, wanted: list[tuple[int, int, int | None, str | None]], what: str) -> None:
    """A step must report just ``wanted``."""
    found = named(g)
    if found != wanted:
        raise Failure(f"{what}: the guard named {found}, not {wanted}, as (reasons, slot, layer, plane)")


def check_flip(g: Guarded, row: int, position: int, digest: int) -> None:
    """One flipped bit of a prefix slot is named, just it, when the whole prefix is verified; then it is restored."""
    slot = int(g.model.slots[row, position])
    address = g.model.plane(digest).data.ptr + slot * TOKEN_BYTES + TOKEN_BYTES // 3
    g.model.verify_all[row] = 1
    g.model.cupy.cuda.runtime.deviceSynchronize()
    wanted = (int(Reason.DATA), slot, digest // 2, "kv"[digest % 2])
    try:
        must_name(g, [], "before the flip")
        g.manager.backend.flip_byte(address, 4, g.model.stream)
        must_name(g, [wanted], "a flipped bit")
    finally:
        g.manager.backend.flip_byte(address, 4, g.model.stream)
    must_name(g, [], "restored")
    g.model.verify_all[row] = 0
    g.model.cupy.cuda.runtime.deviceSynchronize()


def check_token(g: Guarded, row: int, position: int) -> None:
    """Another token in the request's history is named at just its slot; then it is restored."""
    slot, history = int(g.model.slots[row, position]), g.model.history
    wait = g.model.cupy.cuda.runtime.deviceSynchronize
    history[row, position] += 1
    wait()
    try:
        must_name(g, [(int(Reason.TOKEN), slot, None, None)], "another token")
    finally:
        history[row, position] -= 1
        wait()
    must_name(g, [], "token restored")


# ---- the program -----------------------------------------------------------------------------------------------------
def measure(model: DecodeModel, case: Case, bytes_per_s: float) -> dict[str, Any]:
    """Times and checks of one case; raises `Failure`."""
    g = guarded(model, case)
    try:
        for _ in range(3):
            g.plain()
            g.step()
        before = g.data_slots()
        without, with_guard = times_us(model, [g.plain, g.step], case.n_replays)
        check(g, g.data_slots() - before)
    finally:
        g.manager.close()
    added = {how: float(f(with_guard) - f(without)) for how, f in (("median", np.median), ("mean", np.mean))}
    # An added time is as sure as the two means are.
    error = float(np.sqrt(with_guard.var() / len(with_guard) + without.var() / len(without)))
    step_us, n_bytes = float(np.median(without)), floor_bytes(case, model)
    return {
        **case._asdict(),
        "n_replays": case.n_replays,
        "nodes": g.n_nodes,
        "nodes_added": g.n_added,
        "step_us": step_us,
        "step_spread_us": [float(x) for x in np.percentile(without, (10, 90))],
        "step_tb_per_s": model.step_bytes(case.n_new) / step_us / 1e6,
        "guarded_us": float(np.median(with_guard)),
        "guarded_spread_us": [float(x) for x in np.percentile(with_guard, (10, 90))],
        "added_us": added,
        "added_percent": {how: 100 * x / step_us for how, x in added.items()},
        "added_standard_error_us": error,
        "floor_bytes": n_bytes,
        "floor_us": n_bytes / bytes_per_s * 1e6,
        "is_within_target": 100 * max(added.values()) / step_us <= case.target and g.n_added <= MAX_NODES_ADDED,
    }


def lines(r: dict[str, Any], bytes_per_s: float, is_whole: bool) -> str:
    """A result in words."""
    us, percent = r["added_us"], r["added_percent"]
    target = f"targets <= {r['target']} % and <= {MAX_NODES_ADDED} nodes: "
    target += ("ok" if r["is_within_target"] else "MISSED") if is_whole else "not judged at this scale"
    share = r["step_tb_per_s"] * 1e12 / bytes_per_s
    return (
        f"{r['name']}: {r['nodes']} nodes + {r['nodes_added']}; {r['n_replays']} replays each\n"
        f"  without {r['step_us']:.1f} us ({r['step_spread_us'][0]:.1f} to {r['step_spread_us'][1]:.1f}), "
        f"{r['step_tb_per_s']:.2f} TB/s, {share:.2f} of the ceiling\n"
        f"  with    {r['guarded_us']:.1f} us ({r['guarded_spread_us'][0]:.1f} to {r['guarded_spread_us'][1]:.1f})\n"
        f"  added   median {us['median']:.1f} us = {percent['median']:.2f} %, mean {us['mean']:.1f} us = "
        f"{percent['mean']:.2f} % (+-{r['added_standard_error_us']:.1f} us); floor {r['floor_us']:.1f} us for "
        f"{r['floor_bytes'] / 1e6:.1f} MB\n  {target}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 32 layers, in (0, 1]")
    parser.add_argument("--only", metavar="NAME", default="", help="cases with this in their name")
    args = parser.parse_args(argv)
    n_layers = max(1, min(LAYERS, round(LAYERS * args.scale)))
    logging.getLogger("kvcanary").setLevel(logging.ERROR)  # the planted faults need no lines
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    if needed_bytes(n_layers) > free:
        raise SystemExit(
            f"{n_layers} layers need {needed_bytes(n_layers) / 1e9:.1f} GB, {free / 1e9:.1f} of {total / 1e9:.1f} GB "
            f"are free: give --scale {0.95 * args.scale * free / needed_bytes(n_layers):.2f} or less"
        )
    model = DecodeModel(n_layers, cupy.cuda.Stream(non_blocking=True))
    bytes_per_s = ceiling(model)
    gpu = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    print(f"{gpu}: {n_layers} layers, read ceiling {bytes_per_s / 1e12:.2f} TB/s", flush=True)
    results, failures = [], []
    for case in (case for case in CASES if args.only in case.name):
        try:
            results.append(measure(model, case, bytes_per_s))
            print(lines(results[-1], bytes_per_s, n_layers == LAYERS), flush=True)
        except (Failure, KvCanaryError) as failure:
            failures.append(f"{case.name}: {failure}")
            print(f"{failures[-1]}; no time is printed", file=sys.stderr, flush=True)
    if args.json:
        found = {"gpu": gpu, "layers": n_layers, "ceiling": bytes_per_s, "cases": results, "failures": failures}
        args.json.write_text(json.dumps(found, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
