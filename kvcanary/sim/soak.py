"""Honest load, and nothing else: the guard must stay silent. ``python -m kvcanary.sim.soak --steps 100000``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from kvcanary.config import CanaryConfig
from kvcanary.manager import CanaryManager
from kvcanary.sim.engine import SimEngine
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.model import ModelConfig, NumpyModel

SMALL = ModelConfig(n_layers=2, n_heads=2, head_dim=16)
STEPS_PER_SEED = 1000  # then another engine, another page size, another mix


@dataclass(frozen=True)
class SoakResult:
    """What one seed did: steps, finished requests, tokens found in the prefix cache, entries and digests checked."""

    seed: int
    steps: int
    requests: int
    shared_tokens: int
    protected_tokens: int
    data_slots: int


def soak(seed: int, n_steps: int, on_step: Callable[[int], None] | None = None) -> SoakResult:
    """Serve random prompts for ``n_steps`` guarded steps on the host backend.

    Raises:
        KvCanaryError: the guard raised over an honest engine: a false alarm.
    """
    rng = np.random.default_rng(seed)
    model = NumpyModel(SMALL, n_blocks=int(rng.integers(30, 90)), page_size=int(rng.choice([4, 16, 32])))
    config = CanaryConfig(
        mode="raise",
        verify_data_every=int(rng.choice([1, 5, 127])),
        real_data=str(rng.choice(["all", "partial", "none"], p=[0.7, 0.2, 0.1])),
        health_check_every_n_steps=10,
        health_check_warmup_steps=10,
        stats_print_every_n_steps=50,
    )
    manager = CanaryManager(config, [pool_of(model)], max_requests=8, max_new_tokens=128)
    engine = SimEngine(
        model,
        max_requests=8,
        max_new_tokens=128,
        max_len=model.page_size * 20,
        chunk=int(rng.choice([7, 32, 128])),
        pad_slot=int(rng.choice([-1, 0])),
    )
    guard = CanaryGuard(manager)
    families = [rng.integers(32, 127, engine.max_len, dtype=np.uint8).tobytes() for _ in range(4)]
    n_requests = n_shared = 0
    for step in range(n_steps):
        while len(engine.scheduler.waiting) + len(engine.scheduler.running) < rng.integers(1, 12):
            engine.add_request(*_request(rng, families, engine, model))
            n_requests += 1
        info = engine.step(guard)
        n_shared += sum(r.n_shared_tokens for r in info.finished)
        if on_step is not None:
            on_step(step)
    manager.synchronize()
    stats = manager.stats()
    if stats.observations_total or stats.unanchored_rows:
        raise AssertionError(f"seed {seed}: {stats}")
    manager.close()
    return SoakResult(seed, n_steps, n_requests, n_shared, stats.protected_tokens, stats.data_slots)


def _request(
    rng: np.random.Generator, families: Sequence[bytes], engine: SimEngine, model: NumpyModel
) -> tuple[bytes, int]:
    """A prompt that shares a random part of its beginning with others, and how many bytes to generate."""
    room = min(engine.max_len, (model.n_blocks - 1) * model.page_size)
    n_tokens = int(rng.integers(1, 40))
    length = int(rng.integers(1, room - n_tokens))
    shared = int(rng.integers(0, length + 1))
    own = rng.integers(32, 127, length - shared, dtype=np.uint8).tobytes()
    return families[int(rng.integers(len(families)))][:shared] + own, n_tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``--steps`` steps in ``--processes`` processes, a seed per thousand steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args(argv)
    seeds = range(args.first_seed, args.first_seed + -(-args.steps // STEPS_PER_SEED))
    start = time.perf_counter()
    with ProcessPoolExecutor(args.processes) as pool:
        results = list(pool.map(soak, seeds, [STEPS_PER_SEED] * len(seeds)))
    total = SoakResult(-1, *(sum(getattr(r, f) for r in results) for f in list(SoakResult.__dataclass_fields__)[1:]))
    print(
        f"{total.steps} guarded steps over {len(seeds)} seeds in {time.perf_counter() - start:.0f} s: "
        f"{total.requests} requests, {total.shared_tokens} tokens from shared prefixes, "
        f"protected_tokens={total.protected_tokens}, digests compared={total.data_slots}, violations=0"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
