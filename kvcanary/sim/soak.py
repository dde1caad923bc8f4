"""Honest load of every habit the engine has: the guard stays silent. ``python -m kvcanary.sim.soak --steps 100000``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvcanary.config import CanaryConfig
from kvcanary.manager import CanaryManager
from kvcanary.sim.engine import NoGuard, SimEngine
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.habits import Habits, ngram_drafts
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.scheduler import BlockCall

SMALL = ModelConfig(n_layers=2, n_heads=2, head_dim=16)
STEPS_PER_SEED = 1000  # then another engine, another page size, another mix
LEAVE_OUT = ((), ("token_history",), ("token_history", "request_slots", "request_ids"))  # what engines do not hand in


@dataclass(frozen=True)
class SoakResult:
    """What one seed did: steps, finished requests, tokens found in the prefix cache, entries and digests checked.

    `owned_blocks`: blocks that somebody held at the end, by the guard's ledger; 0 without lifecycle.
    """

    seed: int
    steps: int
    requests: int
    shared_tokens: int
    protected_tokens: int
    data_slots: int
    owned_blocks: int


class OnlyOwners(NoGuard):
    """A guard that is not there yet, and is told all the same who owns which blocks."""

    def __init__(self, guard: CanaryGuard) -> None:
        self._guard = guard

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        """What the guard to come has to know."""
        self._guard.blocks(calls)


def soak(seed: int, n_steps: int, on_step: Callable[[int], None] | None = None) -> SoakResult:
    """Serve random prompts, with random habits, for ``n_steps`` guarded steps on the host backend.

    Raises:
        KvCanaryError: the guard raised over an honest engine: a false alarm.
    """
    rng = np.random.default_rng(seed)
    leave_out, n_unguarded, lifecycle = random_inputs(np.random.default_rng([seed, 1]))
    page_size = int(rng.choice([4, 16, 32]))
    model_config = replace(SMALL, window=random_window(rng, page_size))
    habits = random_habits(rng, model_config.window)
    n_blocks = int(rng.integers(21, 45) if habits.overcommit else rng.integers(30, 90))
    model = NumpyModel(model_config, n_blocks, page_size)
    config = CanaryConfig(
        mode="raise",
        lifecycle=lifecycle,
        on_unwritten="violation" if n_unguarded == 0 else "adopt",
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
        habits=habits,
    )
    guard = CanaryGuard(manager, leave_out=leave_out)
    absent = OnlyOwners(guard)
    families = [rng.integers(32, 127, engine.max_len, dtype=np.uint8).tobytes() for _ in range(4)]
    asked: list[tuple[bytes, int]] = []
    n_shared = 0
    for step in range(-n_unguarded, n_steps):
        while len(engine.scheduler.waiting) + len(engine.scheduler.running) < rng.integers(1, 12):
            is_asked_again = asked and rng.random() < 0.25
            asked.append(asked[rng.integers(len(asked))] if is_asked_again else _request(rng, families, engine, model))
            engine.add_request(*asked[-1])
        info = engine.step(guard if step >= 0 else absent)
        n_shared += sum(r.n_shared_tokens for r in info.finished)
        if on_step is not None and step >= 0:
            on_step(step)
    manager.synchronize()
    stats = manager.stats()
    if stats.observations_total or stats.unowned_writes or (not leave_out and stats.unanchored_rows):
        raise AssertionError(f"seed {seed}: {stats}")
    manager.close()
    return SoakResult(seed, n_steps, len(asked), n_shared, stats.protected_tokens, stats.data_slots, stats.live_blocks)


def random_inputs(rng: np.random.Generator) -> tuple[tuple[str, ...], int, bool]:
    """What the engine does not hand in, how many steps it served before the guard came, and if it tells who owns blocks.

    The guard adopts what was written before it came.
    """
    leave_out = LEAVE_OUT[rng.choice(3, p=[0.5, 0.3, 0.2])]
    return leave_out, int(rng.choice([0, 40], p=[0.7, 0.3])), bool(rng.random() < 0.6)


def random_window(rng: np.random.Generator, page_size: int) -> int | None:
    """None, a few tokens, or a few pages."""
    if rng.random() < 0.5:
        return None
    return int(rng.integers(1, 6)) if rng.random() < 0.3 else int(rng.integers(1, 4 * page_size + 1))


def random_habits(rng: np.random.Generator, window: int | None) -> Habits:
    """Each habit on or off; half of the drafting engines draft from what all requests said before."""
    seen = SeenText()
    frees_window = window is not None and bool(rng.random() < 0.8)
    return Habits(
        overcommit=bool(rng.random() < 0.6),
        n_draft=int(rng.choice([0, 1, 3, 15], p=[0.4, 0.2, 0.3, 0.1])),
        draft_rule=seen.drafts if rng.random() < 0.5 else ngram_drafts,
        history_drafts=bool(rng.random() < 0.5),
        frees_window=frees_window,
        hits_window=frees_window and bool(rng.random() < 0.5),
        keeps_stale_ids=bool(rng.random() < 0.5),
        shares_early=bool(rng.random() < 0.5),
    )


class SeenText:
    """A draft rule that learns what came after four tokens in any request: right where a prompt is repeated."""

    ORDER = 4

    def __init__(self) -> None:
        self._next: dict[bytes, int] = {}

    def drafts(self, known: NDArray[np.int32], n: int) -> list[int]:
        """At most `n` tokens after `known: i32[any]`."""
        text = [int(token) for token in known[-2 * self.ORDER :]]
        for end in range(self.ORDER, len(text)):
            self._next[bytes(text[end - self.ORDER : end])] = text[end]
        context, found = text[-self.ORDER :], list[int]()
        while len(found) < n and (token := self._next.get(bytes(context))) is not None:
            found.append(token)
            context = [*context[1:], token]
        return found


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
        f"protected_tokens={total.protected_tokens}, digests compared={total.data_slots}, "
        f"blocks owned at the end of a seed={total.owned_blocks}, violations=0"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
