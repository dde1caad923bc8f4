"""Honest load over random prompts, shared prefixes, chunks and padding: 2,000 guarded steps without an alarm."""

from __future__ import annotations

import pytest

from kvcanary.sim.soak import soak


@pytest.mark.parametrize("seed", range(8))
def test_an_honest_engine_is_never_reported(seed: int) -> None:
    result = soak(seed, 250)
    assert result.steps == 250 and result.requests > 5
    assert result.protected_tokens > 10_000


def test_the_load_shares_prefixes() -> None:
    assert sum(soak(seed, 60).shared_tokens for seed in (1, 2)) > 0
