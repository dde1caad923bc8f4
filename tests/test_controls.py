"""Pause, reset, and the proof that a flipped bit is seen."""

from __future__ import annotations

import numpy as np
import pytest
from engine import PAGE, ToyEngine, flip

import kvcanary
from kvcanary import BatchError, CanaryManager, Reason, layouts


class TestPauseAndReset:
    def test_nothing_is_judged_while_paused_and_nothing_is_wrong_after(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        engine.manager.pause()
        flip(engine, 0, 5)
        engine.step((0, 6, 1))
        engine.step((0, 7, 1))
        assert engine.manager.violations() == ()
        engine.manager.resume()
        engine.step((0, 8, 1))
        assert [(v.slot, v.reasons) for v in engine.manager.violations()] == [(5, Reason.DATA)]

    def test_reset_forgets_the_cache(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        for layer in (*engine.k, *engine.v):
            layer[:] = 0
        engine.manager.reset()
        engine.history[0] = -1
        engine.step((0, 0, 6))
        engine.step((0, 6, 1))
        assert engine.manager.violations() == ()
        engine.manager.reset("full")
        engine.step((0, 7, 1))  # reads a prefix that the guard was told to forget
        assert {v.reasons for v in engine.manager.violations()} == {Reason.UNWRITTEN}

    def test_adoption_takes_what_was_there_before_the_guard(self) -> None:
        engine = ToyEngine(verify_data_every=1, on_unwritten="adopt")
        engine.history[0, :6] = 7
        engine.step((0, 6, 1))
        flip(engine, 0, 5)
        engine.step((0, 7, 1))
        assert [(v.slot, v.reasons) for v in engine.manager.violations()] == [(5, Reason.DATA)]
        assert engine.manager.backend.snapshot_words()[kvcanary.abi.STATE_ADOPTED_SLOTS] == 6


class TestProve:
    def test_prove_names_every_plane_and_restores_every_bit(self) -> None:
        engine = ToyEngine(n_layers=5)
        batch = engine.step((0, 0, 6), (1, 0, 3))
        before = [a.copy() for a in (*engine.k, *engine.v)]
        proof = engine.manager.prove(batch)
        assert proof.ok and len(proof.planes) == 10, str(proof)
        assert all(np.array_equal(a, b) for a, b in zip(before, (*engine.k, *engine.v), strict=True))
        assert engine.manager.violations() == ()

    def test_prove_says_when_a_slot_is_already_damaged(self) -> None:
        engine = ToyEngine()
        batch = engine.step((0, 0, 6))
        flip(engine, 0, 4 + 5)  # position 5, the one that is probed
        proof = engine.manager.prove(batch)
        assert not proof.ok and "before any bit was flipped" in str(proof)

    def test_prove_needs_a_live_row(self) -> None:
        engine = ToyEngine()
        with pytest.raises(BatchError, match="run a guarded"):
            engine.manager.prove(engine.batch((0, 0, 4)))

    def test_prove_refuses_memory_that_it_may_not_write(self) -> None:
        engine = ToyEngine()
        batch = engine.step((0, 0, 6))
        for layer in engine.k:
            layer.setflags(write=False)
        pool = layouts.nhd(k=engine.k, v=engine.v, page_size=PAGE)
        manager = CanaryManager(engine.config, [pool], 4, 64)
        with pytest.raises(BatchError, match="read-only"):
            manager.prove(batch)
