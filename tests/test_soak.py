"""Honest load over random prompts, shared prefixes, padding and habits: 2,000 guarded steps without an alarm."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest

from kvcanary.cli import main
from kvcanary.sim import soak as soak_module
from kvcanary.sim.behaviours import BEHAVIOURS
from kvcanary.sim.habits import Habits
from kvcanary.sim.memory import Mover
from kvcanary.sim.mix import LEAVE_OUT, SeenText, draw, random_habits, random_inputs, random_window
from kvcanary.sim.soak import STEPS_PER_SEED, FalseAlarmError, SoakResult, soak, soak_all, soak_for

N_SEEDS, N_STEPS = 20, 100  # together they do everything that there is


@cache
def soaked(seed: int) -> SoakResult:
    return soak(seed, N_STEPS)


@pytest.mark.parametrize("seed", range(N_SEEDS))
def test_an_honest_engine_is_never_reported(seed: int) -> None:
    result = soaked(seed)
    assert (result.owned_blocks > 0) == draw(seed).config.lifecycle
    assert result.steps == N_STEPS and result.requests > 5
    assert result.protected_tokens > 2_000


def test_every_behaviour_happens() -> None:
    did: Counter[str] = sum((Counter(soaked(seed).did) for seed in range(N_SEEDS)), Counter())
    assert set(did) <= set(BEHAVIOURS)
    assert [name for name in BEHAVIOURS if not did[name]] == ["HEAD beside the model"], "which only a GPU does"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_long_soak(backend: str) -> None:
    """SOAK_STEPS=20000 takes minutes on the host; a GPU does 1000000."""
    n_steps = int(os.environ.get("SOAK_STEPS", "500"))
    stretches = soak_all(n_steps, 2, 1000, backend)
    assert [problem for stretch in stretches for problem in stretch.problems] == []
    assert sum(result.steps for stretch in stretches for result in stretch.results) == n_steps


def test_what_an_engine_does_wrong_is_told_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(seed for seed in range(99) if (mix := draw(seed)).refresh_rate and mix.config.real_data == "all")
    mix = draw(seed)
    mix = replace(mix, refresh_rate=0.5, config=replace(mix.config, verify_data_every=1))
    monkeypatch.setattr(Mover, "_refresh", lambda self, move, guard: self.memory.coarsen(move.slots))
    with pytest.raises(FalseAlarmError, match=rf"(?s)seed {seed}, step \d+ \(host\).*DATA.*Mix\("):
        soak(seed, N_STEPS, mix=mix)


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS_PER_SEED, "host", 6)
    assert main(["drill", "--soak", "--backend", "host", "--steps", "10", "--first-seed", "3"]) == 0
    told = capsys.readouterr().out
    assert "10 guarded steps over 2 seeds" in told and "violations=0" in told
    assert all(name in told for name in BEHAVIOURS)


def test_a_seed_is_cut_short_when_time_is_over() -> None:
    start = time.perf_counter()
    stretch = soak_for(0.02, 0, 1, "host")
    assert time.perf_counter() - start < 20  # a whole one takes longer
    assert stretch.results[-1].steps < STEPS_PER_SEED["host"] and not stretch.problems
    assert len(stretch.held) == len(stretch.results)


@pytest.mark.parametrize(
    ("error", "said"),
    [(FalseAlarmError("a story"), "FALSE ALARM: a story"), (KeyError("gone"), "seed 4 (host) broke: Traceback")],
)
def test_one_seed_that_goes_wrong_is_told_beside_the_others(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(seed: int, n_steps: int, on_step: None, backend: str, until: None) -> SoakResult:
        if seed == 4:
            raise error
        return soak(seed, n_steps, on_step, backend)

    monkeypatch.setitem(STEPS_PER_SEED, "host", 6)
    monkeypatch.setattr(soak_module, "soak", play)
    assert main(["drill", "--soak", "--backend", "host", "--steps", "18", "--first-seed", "3"]) == 1
    told = capsys.readouterr().out
    assert said in told and "12 guarded steps over 2 seeds" in told and "FAILED: 1 of 3 seeds" in told


def test_each_habit_is_drawn_and_left_out() -> None:
    for name in (field.name for field in fields(Habits)):
        drawn = {getattr(random_habits(np.random.default_rng(seed), 9), name) for seed in range(20)}
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
