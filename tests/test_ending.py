"""Waiting for all that was launched, and the end of a manager."""

from __future__ import annotations

import pytest
from engine import ToyEngine

import kvcanary
from kvcanary import PhaseError


class TestEnding:
    def test_synchronize_brings_the_stats_up_to_date(self) -> None:
        engine = ToyEngine(stats_print_every_n_steps=0, health_check_every_n_steps=0)
        engine.step((0, 0, 6))
        assert engine.manager.stats().forwards == 0, "nothing was asked of the device yet"
        engine.manager.synchronize()
        stats = engine.manager.stats()
        assert (stats.step, stats.snapshot_step, stats.forwards) == (1, 1, 1) and stats.protected_tokens > 0

    def test_dropped_violations_are_counted_by_synchronize(self) -> None:
        engine = ToyEngine(ring_capacity=1, stats_print_every_n_steps=0, health_check_every_n_steps=0)
        batch = engine.batch((0, 0, 12))
        batch.slot_mapping[:] += 100000
        with engine.manager.step(), engine.manager.forward(batch):
            pass
        engine.manager.synchronize()
        words = engine.manager.backend.snapshot_words()
        assert engine.manager.stats().observations_total == words[kvcanary.abi.STATE_OBSERVATIONS] >= 12

    def test_after_close_every_call_is_refused_and_closing_again_is_not(self) -> None:
        engine = ToyEngine()
        engine.manager.close()
        engine.manager.close()
        with pytest.raises(PhaseError, match="closed"):
            engine.manager.begin_step()
        with pytest.raises(PhaseError, match="closed"):
            engine.manager.head(engine.batch((0, 0, 1)))
        assert engine.manager.violations() == () and engine.manager.poll() == ()
