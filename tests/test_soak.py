"""Honest load over random prompts, shared prefixes, padding and habits: 2,000 guarded steps without an alarm."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from kvcanary.sim.habits import Habits
from kvcanary.sim.soak import LEAVE_OUT, SeenText, random_habits, random_inputs, random_window, soak


@pytest.mark.parametrize("seed", range(8))
def test_an_honest_engine_is_never_reported(seed: int) -> None:
    result = soak(seed, 250)
    lifecycle = random_inputs(np.random.default_rng([seed, 1]))[2]
    assert (result.owned_blocks > 0) == lifecycle
    assert result.steps == 250 and result.requests > 5
    assert result.protected_tokens > 10_000


def test_the_load_shares_prefixes() -> None:
    assert sum(soak(seed, 60).shared_tokens for seed in (1, 2)) > 0


def test_each_habit_is_drawn_and_left_out() -> None:
    for name in (field.name for field in fields(Habits)):
        drawn = {getattr(random_habits(np.random.default_rng(seed), 9), name) for seed in range(8)}
        assert len(drawn) > 1, name
    inputs = [random_inputs(np.random.default_rng([seed, 1])) for seed in range(8)]  # of the seeds above
    assert {leave_out for leave_out, _, _ in inputs} == set(LEAVE_OUT)
    assert {n > 0 for _, n, _ in inputs} == {lifecycle for _, _, lifecycle in inputs} == {True, False}
    assert any(lifecycle and not leave_out for leave_out, _, lifecycle in inputs), "readers are judged by their ids"
    windows = [random_window(np.random.default_rng(seed), 4) for seed in range(40)]
    assert None in windows and {window for window in windows if window is not None} >= {1, 2, 8, 16}


def test_repeated_text_is_drafted() -> None:
    seen = SeenText()
    text = np.arange(100, 112, dtype=np.int32)
    for n in range(5, len(text) + 1):
        assert seen.drafts(text[:n], 3) == []
    assert seen.drafts(text[:6], 3) == [106, 107, 108]
    assert seen.drafts(text[:10], 3) == [110, 111]
