"""The sweep: resident slots that no request reads are checked, every so many steps."""

from __future__ import annotations

import numpy as np
import pytest
from engine import ToyEngine, flip

from kvcanary import Reason
from kvcanary.tags import Stage


class TestSweep:
    def resident(self, *slots: int) -> tuple[np.ndarray, ...]:
        s = np.array(slots, np.int32)
        return s, np.arange(len(s), dtype=np.int32), np.concatenate([[-1], s[:-1]]).astype(np.int32)

    def test_a_cached_slot_that_nobody_reads_is_checked(self) -> None:
        engine = ToyEngine(sweep_interval=2, health_policy="raise", health_check_every_n_steps=4)
        engine.manager.attach_resident_set(lambda: self.resident(4, 5, 6, 7))
        engine.step((0, 0, 4))
        flip(engine, 1, 6)
        for p in range(4):
            engine.step((1, p, 1))
        assert engine.manager.stats().sweep_passes == 2
        assert [(v.slot, v.layer, v.tag.stage) for v in engine.manager.violations()] == [(6, 1, Stage.SWEEP)]
        runs = engine.manager.state.kernel_run_counters[0]
        assert [int(runs[t]) for t in engine.manager.active_tags[0] if t.stage == Stage.SWEEP] == [2, 2]

    def test_positions_predecessors_and_unwritten_slots(self) -> None:
        engine = ToyEngine(sweep_interval=1)
        engine.step((0, 0, 4))
        slots = np.array([4, 6, 5, 50], np.int32)
        answer = (slots, np.array([0, 1, 2, 3], np.int32), np.array([-1, 4, 6, 5], np.int32))
        engine.manager.attach_resident_set(lambda: answer)
        engine.step((1, 0, 1))
        found = {v.slot: v.reasons for v in engine.manager.violations()}
        assert found[6] == found[5] == Reason.POSITION | Reason.CHAIN
        assert found[50] == Reason.UNWRITTEN and 4 not in found

    def test_a_provider_that_raises_does_not_hurt_the_step(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(sweep_interval=1)

        def provider() -> None:
            raise OSError("no tree")

        engine.manager.attach_resident_set(provider)
        engine.step((0, 0, 4))
        assert "no tree" in caplog.text and engine.manager.step_number == 1

    @pytest.mark.parametrize("answer", [None, ([], [], [])])
    def test_a_resident_set_with_nothing_in_it_is_no_stall(self, answer: object) -> None:
        engine = ToyEngine(
            sweep_interval=2, health_policy="raise", health_check_every_n_steps=2, health_check_warmup_steps=2
        )
        engine.manager.attach_resident_set(lambda: answer)
        for p in range(8):
            engine.step((0, p, 1))
        assert engine.manager.stats().sweep_passes == 0
