"""What a seed of the soak draws: sizes, habits, what the guard is told, and how often things happen between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvcanary.config import CanaryConfig
from kvcanary.sim.habits import Habits, ngram_drafts
from kvcanary.sim.model import ModelConfig

LEAVE_OUT = ((), ("token_history",), ("token_history", "request_slots", "request_ids"))  # what engines do not hand in
SMALL = ModelConfig(n_layers=2, n_heads=2, head_dim=16)
SHARE_OF_TRANSFORMERS = 0.2  # on the host; the others, and all on a GPU, are the model that only writes


@dataclass(frozen=True)
class Mix:
    """One engine and its guard. Rates are chances per step."""

    page_size: int
    max_len: int  # tokens
    n_blocks: int
    chunk: int
    pad_slot: int
    is_transformer: bool
    model: ModelConfig
    habits: Habits
    leave_out: tuple[str, ...]
    n_unguarded: int  # steps before the guard comes, which adopts what it finds
    config: CanaryConfig
    n_adapters: int = 0
    fork_rate: float = 0.0
    abort_rate: float = 0.0
    refresh_rate: float = 0.0
    reload_rate: float = 0.0
    handoff_rate: float = 0.0  # of prompts that a prefill engine computes
    pause_rate: float = 0.0
    failure_rate: float = 0.0  # of forwards that raise, before or after the model has written
    end_byte_rate: float = 0.0  # of requests that may end at some byte before their room is used up


def draw(seed: int, backend: str = "host") -> Mix:
    """The mix of a seed."""
    rng = np.random.default_rng(seed)
    leave_out, n_unguarded, lifecycle = random_inputs(np.random.default_rng([seed, 1]))
    page_size = int(rng.choice([4, 16, 32]))
    max_len = page_size * {4: 20, 16: 10, 32: 6}[page_size]
    window = random_window(rng, page_size)
    habits = random_habits(rng, window)
    is_transformer = backend == "host" and not habits.draft_trees and bool(rng.random() < SHARE_OF_TRANSFORMERS)
    return Mix(
        page_size=page_size,
        max_len=max_len,
        n_blocks=max_len // page_size + int(rng.integers(1, 25) if habits.overcommit else rng.integers(10, 70)),
        chunk=int(rng.choice([7, 32, 128])),
        pad_slot=int(rng.choice([-1, 0])),
        is_transformer=is_transformer,
        model=replace(SMALL, window=window),
        habits=habits,
        leave_out=leave_out,
        n_unguarded=n_unguarded,
        config=replace(random_config(rng, lifecycle, n_unguarded), overlap_head=is_beside(seed)),
        n_adapters=int(rng.choice([0, 3])),
        fork_rate=_rate(rng, 0.2) if habits.overcommit else 0.0,
        abort_rate=_rate(rng, 0.05),
        refresh_rate=_rate(rng, 0.1),
        reload_rate=_rate(rng, 0.004),
        handoff_rate=_rate(rng, 0.4),
        pause_rate=_rate(rng, 0.02),
        failure_rate=_rate(rng, 0.03),
        end_byte_rate=_rate(rng, 0.5),
    )


def _rate(rng: np.random.Generator, rate: float) -> float:
    return float(rate * (rng.random() < 0.5))


def random_config(rng: np.random.Generator, lifecycle: bool, n_unguarded: int) -> CanaryConfig:
    """Mode "raise", and everything else as deployments differ in it."""
    return CanaryConfig(
        mode="raise",
        lifecycle=lifecycle,
        on_unwritten="violation" if n_unguarded == 0 else "adopt",
        verify_data_every=int(rng.choice([1, 5, 127])),
        real_data=str(rng.choice(["all", "partial", "none"], p=[0.7, 0.2, 0.1])),
        scrub_bytes_per_step=int(rng.choice([0, 1, 20_000])) if lifecycle else 0,
        sweep_interval=int(rng.choice([0, 7])) if n_unguarded == 0 else 0,  # what was never stamped is not swept
        health_check_every_n_steps=10,
        health_check_warmup_steps=10,
        stats_print_every_n_steps=50,
    )


def is_beside(seed: int) -> bool:
    """Whether HEAD runs beside the model, which only a GPU does; drawn apart, so that all else is as it was."""
    return bool(np.random.default_rng([seed, 4]).random() < 0.5)


def random_inputs(rng: np.random.Generator) -> tuple[tuple[str, ...], int, bool]:
    """What the engine does not hand in, how many steps it served before the guard came, and whether it tells of blocks.

    The guard adopts what was written before it came; it is told of blocks, if at all, from the beginning.
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
    n_draft = int(rng.choice([0, 1, 3, 15], p=[0.4, 0.2, 0.2, 0.2]))
    return Habits(
        overcommit=bool(rng.random() < 0.6),
        claims_tails=bool(rng.random() < 0.5),
        n_draft=n_draft,
        draft_rule=seen.drafts if rng.random() < 0.5 else ngram_drafts,
        history_drafts=bool(rng.random() < 0.5),
        frees_window=frees_window,
        hits_window=frees_window and bool(rng.random() < 0.5),
        keeps_stale_ids=bool(rng.random() < 0.5),
        shares_early=bool(rng.random() < 0.5),
        cache_owns=bool(rng.random() < 0.5),
        zeroes=bool(rng.random() < 0.3),
        draft_trees=n_draft > 1 and bool(rng.random() < 0.6),
        n_offload=int(rng.choice([0, 60])),
        loads_by_layer=bool(rng.random() < 0.5),
        in_flight=n_draft == 0 and bool(rng.random() < 0.7),
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


def random_prompt(rng: np.random.Generator, families: Sequence[bytes], room: int, n_tokens: int) -> bytes:
    """A prompt that shares a random part of its beginning with others, and leaves room for so many tokens more."""
    length = int(rng.integers(1, room - n_tokens))
    shared = int(rng.integers(0, length + 1))
    own = rng.integers(32, 127, length - shared, dtype=np.uint8).tobytes()
    return families[int(rng.integers(len(families)))][:shared] + own
