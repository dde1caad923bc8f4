"""Honest load of every habit the engine has: the guard stays silent. ``kvcanary drill --soak --steps 100000``."""

from __future__ import annotations

import argparse
import multiprocessing
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvcanary.errors import ConfigError, KvCanaryError
from kvcanary.manager import CanaryManager
from kvcanary.sim import footprint, soak_options
from kvcanary.sim.behaviours import BEHAVIOURS, Watch, resident_set
from kvcanary.sim.disaggregated import PrefillEngine, receive
from kvcanary.sim.engine import SimEngine
from kvcanary.sim.footprint import Footprint
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.mix import Mix, draw, random_prompt
from kvcanary.sim.model import NumpyModel
from kvcanary.sim.protocols import NoGuard
from kvcanary.sim.requests import BlockCall, Request
from kvcanary.sim.scribe import ScribeModel

STEPS_PER_SEED = {"host": 1000, "cuda": 4000}  # then another engine, another page size, another mix
MAX_REQUESTS, MAX_NEW_TOKENS = 8, 128


@dataclass(frozen=True)
class SoakResult:
    """What one seed did: steps, requests, entries and digests checked, and how often each of `BEHAVIOURS` happened.

    `owned_blocks`: blocks that somebody held at the end, by the guard's ledger; 0 without lifecycle.
    """

    seed: int
    steps: int
    requests: int
    protected_tokens: int
    data_slots: int
    owned_blocks: int
    did: dict[str, int]


class FalseAlarmError(AssertionError):
    """The guard reported an honest engine; the text has the seed, the step and what was drawn."""


class ForwardFailedError(Exception):
    """A model that raises now and then."""


class FailingGuard(CanaryGuard):
    """A guard around forwards of which some raise, when `will_fail` says so: "before" or "after" the model wrote."""

    will_fail = ""

    @contextmanager
    def forward(self, arrays: Any) -> Iterator[None]:
        """HEAD; then TAIL, unless the forward fails."""
        fails = self.will_fail if arrays.max_rows != arrays.max_tokens else ""  # no graph is captured half-way
        with super().forward(arrays):
            if fails == "before":
                raise ForwardFailedError
            yield
            if fails == "after":
                raise ForwardFailedError


class OnlyOwners(NoGuard):
    """A guard that is not there yet, and is told all the same who owns which blocks."""

    def __init__(self, guard: CanaryGuard) -> None:
        self._guard = guard

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        """What the guard to come has to know."""
        self._guard.blocks(calls)


class Soak:
    """One seed: an engine that serves random prompts with the habits of its mix, and a guard that must stay silent."""

    def __init__(self, seed: int, backend: str = "host", mix: Mix | None = None) -> None:
        self.seed, self.backend = seed, backend
        self.mix = mix or draw(seed, backend)
        self.rng = np.random.default_rng([seed, 2])
        self.engine, self.manager, self.guard = self._make(self.mix.page_size, self.mix.n_blocks, is_prefill=False)
        self.watch = Watch(self.engine)
        self.is_paused = False
        self.prefill: PrefillEngine | None = None
        if self.mix.handoff_rate:
            engine, self.prefill_manager, guard = self._make(8, self.mix.max_len // 8 + 8, is_prefill=True)
            self.prefill = PrefillEngine(engine, guard)
        if self.mix.config.sweep_interval:
            self.manager.attach_resident_set(lambda: resident_set(self.engine.allocator))
        text = np.random.default_rng([seed, 3])
        self.families = [text.integers(32, 127, self.engine.max_len, dtype=np.uint8).tobytes() for _ in range(4)]
        self.asked: list[tuple[bytes, int]] = []

    def run(self, n_steps: int, on_step: Callable[[int], None] | None = None, until: float | None = None) -> SoakResult:
        """Serve for so many guarded steps, or until `time.perf_counter` says so.

        Raises:
            FalseAlarmError: the guard raised over an honest engine, or counted what it should not have.
        """
        absent = OnlyOwners(self.guard)
        for step in range(-self.mix.n_unguarded, n_steps):
            if until is not None and step > 0 and time.perf_counter() > until:
                n_steps = step
                break
            try:
                self._queue()
                self._between_steps()
                info = self.engine.step(self.guard if step >= 0 else absent)
            except ForwardFailedError:
                self.watch.did["failed forwards"] += 1
                self.engine.mover.finish_loading()
                continue
            except KvCanaryError as error:
                raise FalseAlarmError(f"seed {self.seed}, step {step} ({self.backend}): {error}\n{self.mix}") from error
            self.watch.note(info)
            if on_step is not None and step >= 0:
                on_step(step)
        return self._end(n_steps)

    def _end(self, n_steps: int) -> SoakResult:
        managers = [self.manager, *([self.prefill_manager] if self.prefill else [])]
        protected, data = 0, 0
        for manager in managers:
            manager.synchronize()
            stats = manager.stats()
            is_anchored = manager is not self.manager or not self.mix.leave_out
            if stats.observations_total or stats.unowned_writes or (is_anchored and stats.unanchored_rows):
                raise FalseAlarmError(f"seed {self.seed} ({self.backend}): {stats}\n{self.mix}")
            protected, data = protected + stats.protected_tokens, data + stats.data_slots
            manager.close()
        did = self.watch.counts()
        stats = self.manager.stats()
        did |= {"sweeps": stats.sweep_passes, "patrols": stats.scrub_passes, "adopted slots": stats.adopted_slots}
        did["lifecycle on" if self.mix.config.lifecycle else "lifecycle off"] += n_steps
        did["real data " + self.mix.config.real_data] += n_steps
        is_beside = self.backend == "cuda" and self.mix.config.overlap_head
        did["HEAD beside the model" if is_beside else "HEAD before the model"] += n_steps
        return SoakResult(self.seed, n_steps, len(self.asked), protected, data, stats.live_blocks, dict(did))

    def _make(
        self, page_size: int, n_blocks: int, *, is_prefill: bool
    ) -> tuple[SimEngine, CanaryManager, FailingGuard]:
        mix, config = self.mix, self.mix.config
        if is_prefill:
            config = replace(config, on_unwritten="violation", sweep_interval=0)
        model: Any
        runner, stream = None, None
        if self.backend == "cuda":
            from kvcanary.sim.cuda_scribe import CudaScribe, ScribeRunner

            model = CudaScribe(mix.model, n_blocks, page_size)
            runner, stream = ScribeRunner(model), model.stream
        else:
            model = (NumpyModel if mix.is_transformer else ScribeModel)(mix.model, n_blocks, page_size)
        manager = CanaryManager(config, [pool_of(model)], MAX_REQUESTS, MAX_NEW_TOKENS, backend=self.backend)
        engine = SimEngine(
            model,
            max_requests=MAX_REQUESTS,
            max_new_tokens=MAX_NEW_TOKENS,
            max_len=mix.max_len,
            chunk=mix.chunk,
            pad_slot=mix.pad_slot,
            execute=None if runner is None else runner.execute,
            habits=None if is_prefill else mix.habits,
        )
        if runner is not None:
            runner.engine = engine
        return engine, manager, FailingGuard(manager, stream, () if is_prefill else mix.leave_out)

    # ---- load --------------------------------------------------------------------------------------------------------
    def _queue(self) -> None:
        rng, engine = self.rng, self.engine
        while len(engine.scheduler.waiting) + len(engine.scheduler.running) < rng.integers(0, 12):
            if not self.asked or rng.random() >= 0.25:
                n_tokens = int(rng.integers(2, 40))
                room = min(engine.max_len, (self.mix.n_blocks - 1) * self.mix.page_size)
                self.asked.append((random_prompt(rng, self.families, room, n_tokens), n_tokens))
            prompt, n_tokens = self.asked[-1 if len(self.asked) % 2 else int(rng.integers(len(self.asked)))]
            salt = int(rng.integers(self.mix.n_adapters)) if self.mix.n_adapters else 0
            self.watch.did["adapters"] += salt > 0
            if self.prefill is not None and rng.random() < self.mix.handoff_rate:
                receive(engine, self.prefill.prefill(prompt, salt), n_tokens)
                self.watch.did["handoffs"] += 1
            else:
                end_byte = int(rng.integers(32, 127)) if rng.random() < self.mix.end_byte_rate else None
                engine.add_request(prompt, n_tokens, end_byte, salt)

    def _between_steps(self) -> None:
        rng, mix, did = self.rng, self.mix, self.watch.did
        if rng.random() < mix.fork_rate and (parent := self._any_running()) is not None:
            for _ in range(int(rng.integers(1, 4))):
                did["forks"] += self.engine.fork(parent, int(rng.integers(32, 127))) is not None
            if rng.random() < 0.3:  # a beam that its forks take the place of
                self.engine.scheduler.abort(parent)
                did["aborted requests"] += 1
        if rng.random() < mix.abort_rate and (request := self._any_running()) is not None:
            self.engine.scheduler.abort(request)
            did["aborted requests"] += 1
        if rng.random() < mix.refresh_rate and (request := self._any_running()) is not None:
            self.engine.refresh(request)
        if rng.random() < mix.reload_rate:
            self.engine.reload()
        if self.is_paused and rng.random() < 0.5:
            self.manager.resume()
            self.is_paused = False
        elif rng.random() < mix.pause_rate:
            self.manager.pause()
            self.is_paused = True
            did["pauses"] += 1
        fails = rng.random() < mix.failure_rate
        self.guard.will_fail = str(rng.choice(["before", "after"])) if fails else ""

    def _any_running(self) -> Request | None:
        running = self.engine.scheduler.running
        return running[int(self.rng.integers(len(running)))] if running else None


def soak(
    seed: int,
    n_steps: int,
    on_step: Callable[[int], None] | None = None,
    backend: str = "host",
    mix: Mix | None = None,
    until: float | None = None,
) -> SoakResult:
    """Serve random prompts, with random habits, for ``n_steps`` guarded steps; see `Soak.run` for what it raises."""
    return Soak(seed, backend, mix).run(n_steps, on_step, until)


@dataclass
class Stretch:
    """Seeds that one process served one after the other, what it held after each, and what went wrong."""

    results: list[SoakResult] = field(default_factory=list)
    held: list[Footprint] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def serve(self, seed: int, n_steps: int, backend: str, until: float | None = None) -> None:
        """One seed more; whatever goes wrong is a problem of that seed alone."""
        try:
            self.results.append(soak(seed, n_steps, None, backend, until=until))
        except FalseAlarmError as error:
            self.problems.append(f"FALSE ALARM: {error}")
        except Exception:  # noqa: BLE001  of the simulator, or of the machine
            self.problems.append(f"seed {seed} ({backend}) broke: {traceback.format_exc()}")


def soak_seeds(seeds: Sequence[int], steps: Sequence[int], backend: str) -> Stretch:
    """So many steps of each seed."""
    stretch = Stretch()
    for seed, n_steps in zip(seeds, steps, strict=True):
        stretch.serve(seed, n_steps, backend)
    return stretch


def soak_all(n_steps: int, processes: int, first_seed: int, backend: str) -> list[Stretch]:
    """``n_steps`` steps over as many seeds as `STEPS_PER_SEED` asks for; a GPU serves all of the processes."""
    per_seed = STEPS_PER_SEED[backend]
    n_seeds = -(-n_steps // per_seed)
    seeds = range(first_seed, first_seed + n_seeds)
    steps = [min(per_seed, n_steps - i * per_seed) for i in range(n_seeds)]
    if processes == 1:
        return [soak_seeds(seeds, steps, backend)]
    # A forked child cannot use the parent's GPU.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(soak_seeds, [[s] for s in seeds], [[n] for n in steps], [backend] * n_seeds))


def soak_for(minutes: float, first_seed: int, stride: int, backend: str) -> Stretch:
    """Seeds ``first_seed``, ``first_seed + stride``, ... for so many minutes; the last one may be cut short."""
    end, seed, stretch = time.perf_counter() + 60 * minutes, first_seed, Stretch()
    while seed == first_seed or time.perf_counter() < end:
        stretch.serve(seed, STEPS_PER_SEED[backend], backend, end)
        held = Footprint.now(on_gpu=backend == "cuda")
        stretch.held.extend([held] if held is not None else [])
        seed += stride
    return stretch


def soak_all_for(minutes: float, processes: int, first_seed: int, backend: str) -> list[Stretch]:
    """A stretch by each process, beside each other."""
    if processes == 1:
        return [soak_for(minutes, first_seed, 1, backend)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        firsts, n = range(first_seed, first_seed + processes), processes
        return list(pool.map(soak_for, [minutes] * n, firsts, [n] * n, [backend] * n))


def told(results: Sequence[SoakResult], seconds: float) -> str:
    """What was done, in words: the sums, and how often each behaviour happened."""
    steps, did = sum(r.steps for r in results), Counter[str]()
    for result in results:
        did.update(result.did)
    rate = steps / max(seconds, 1e-9)
    n_tokens, n_digests = sum(r.protected_tokens for r in results), sum(r.data_slots for r in results)
    lines = [
        f"{steps} guarded steps over {len(results)} seeds in {seconds:.0f} s, {rate:.0f} steps/s: violations=0",
        f"prompts={sum(r.requests for r in results)} protected_tokens={n_tokens} digests compared={n_digests}",
    ]
    width = max(map(len, BEHAVIOURS))
    lines += [f"  {name:<{width}}  {did[name] or 'never'}" for name in BEHAVIOURS]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """``kvcanary drill --soak`` without the rest of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    soak_options.add_arguments(parser)
    parser.add_argument("--backend", choices=["host", "cuda"], default="host")
    arguments = parser.parse_args(argv)
    try:
        soak_options.settle(arguments)
    except ConfigError as error:
        parser.error(str(error))
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Soak as `soak_options.settle` left it, and tell it; 1 if the guard reported anything, or something grew."""
    start, given = time.perf_counter(), (arguments.processes, arguments.first_seed, arguments.backend)
    is_timed = arguments.minutes > 0
    stretches = soak_all_for(arguments.minutes, *given) if is_timed else soak_all(arguments.steps, *given)
    problems = [problem for stretch in stretches for problem in stretch.problems]
    results = [result for stretch in stretches for result in stretch.results]
    for problem in problems:
        print(problem)
    if results:
        print(told(results, time.perf_counter() - start))
    timed = stretches if is_timed else []
    grown = [footprint.growth(stretch.held) for stretch in timed]
    for stretch, grew in zip(timed, grown, strict=True):
        print(footprint.told(stretch.held, grew))
    if not results and not problems:
        print("FAILED: nothing was played")
    if problems:
        print(f"FAILED: {len(problems)} of {len(problems) + len(results)} seeds")
    return bool(problems) or not results or any(grew is not None and not footprint.is_flat(grew) for grew in grown)


if __name__ == "__main__":
    raise SystemExit(main())
