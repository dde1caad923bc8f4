"""The end of a step: what is counted, the health check and the lines that come of it, and what is never raised."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
from engine import ToyEngine, flip

from kvcanary import CanaryConfig, CanaryManager, CanaryStalledError, KvCanaryViolation, layouts
from kvcanary.tags import Stage


class TestSelfUnitManagerHealth:
    def run(self, engine: ToyEngine, n: int, *, with_forward: bool = True, idle: bool = False) -> None:
        for _ in range(n):
            with engine.manager.step(idle=idle):
                if with_forward:
                    batch = engine.batch((0, 0, 2))
                    with engine.manager.forward(batch):
                        engine.write(batch)

    def test_kernel_run_counter_watchdog_raises_on_zero(self) -> None:
        engine = ToyEngine(
            health_policy="raise",
            health_check_every_n_steps=2,
            health_check_warmup_steps=2,
            stats_print_every_n_steps=0,
        )
        with pytest.raises(CanaryStalledError) as caught:
            self.run(engine, 4, with_forward=False)
        assert isinstance(caught.value, RuntimeError)
        assert caught.value.step == 2
        assert {t.stage for t in caught.value.tags} == {Stage.HEAD, Stage.TAIL}

    def test_kernel_run_counter_watchdog_ignores_sweep_when_sweep_is_disabled(self) -> None:
        engine = ToyEngine(
            health_policy="raise", health_check_every_n_steps=1, health_check_warmup_steps=1, sweep_interval=0
        )
        engine.manager.attach_resident_set(lambda: None)
        self.run(engine, 5)
        swept = ToyEngine(
            health_policy="raise", health_check_every_n_steps=1, health_check_warmup_steps=1, sweep_interval=2
        )
        self.run(swept, 5)  # an interval, but nobody attached a resident set

    def test_periodic_stats_log_every_n_step(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(stats_print_every_n_steps=3, health_check_every_n_steps=0)
        with caplog.at_level(logging.INFO, "kvcanary"):
            self.run(engine, 10)
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
        steps = [int(re.match(r"\[canary\] step=(\d+) protected_tokens=", line)[1]) for line in lines]
        assert steps == [3, 6, 9]
        assert lines[0] == (
            "[canary] step=3 protected_tokens=24 sweep_passes=0 violations=0 launch_tags_active=4/4"
        )  # two tokens, K and V, HEAD and TAIL, three steps

    def test_a_guard_that_stops_is_found_and_mode_log_only_logs(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(health_check_every_n_steps=2, health_check_warmup_steps=2)
        self.run(engine, 4)
        assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
        self.run(engine, 4, with_forward=False)
        assert "did not run" in caplog.text

    def test_idle_steps_and_pauses_are_no_stall(self) -> None:
        engine = ToyEngine(health_policy="raise", health_check_every_n_steps=2, health_check_warmup_steps=2)
        self.run(engine, 6, with_forward=False, idle=True)
        self.run(engine, 4)
        engine.manager.pause()
        self.run(engine, 6, with_forward=False)

    def test_no_active_tags_no_check(self) -> None:
        engine = ToyEngine(health_policy="raise", health_check_every_n_steps=1, health_check_warmup_steps=1)
        engine.manager._health.active_tags = {}
        self.run(engine, 5, with_forward=False)

    def test_a_pool_that_need_not_run_every_step_is_not_expected(self) -> None:
        shape = (8, 4, 2, 8)
        pools = [
            layouts.nhd(k=[np.zeros(shape, np.uint8)], v=None, page_size=4, name="target"),
            layouts.nhd(k=[np.zeros(shape, np.uint8)], v=None, page_size=4, name="draft", expected_every_step=False),
        ]
        manager = CanaryManager(CanaryConfig(), pools, 4, 16)
        assert [len(manager.active_tags[i]) for i in (0, 1)] == [2, 0]

    def test_a_violation_does_not_keep_the_health_check_from_its_step(self) -> None:
        engine = ToyEngine(mode="raise", verify_data_every=1, health_check_every_n_steps=1, health_check_warmup_steps=1)
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        with pytest.raises(KvCanaryViolation):
            engine.step((0, 6, 1))
        engine.step((0, 7, 1))
        assert engine.manager._health.latest is not None and engine.manager._health.latest.step == 2


class TestLog:
    def test_a_log_handler_that_raises_does_not_reach_the_engine(self) -> None:
        class Full(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                raise OSError("disk full")

        engine = ToyEngine(verify_data_every=1, stats_print_every_n_steps=1)
        handler = Full()
        logging.getLogger("kvcanary").addHandler(handler)
        try:
            engine.step((0, 0, 6))
            flip(engine, 0, 5)
            for p in (6, 7, 8):
                engine.step((0, p, 1))
        finally:
            logging.getLogger("kvcanary").removeHandler(handler)
        assert [v.slot for v in engine.manager.violations()] == [5]
        assert engine.manager.n_observer_errors > 0 and engine.manager.step_number == 4

    def test_a_fault_that_goes_on_does_not_fill_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(max_requests=4)
        for _ in range(600):
            batch = engine.batch((0, 0, 2))
            batch.slot_mapping[:] += 1  # off by one, for ever
            with engine.manager.step(), engine.manager.forward(batch):
                engine.write(batch)
        lines = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert engine.manager.stats().violations_total > 1000
        assert len(lines) < 500
        assert "most are no longer written" in lines[-1].getMessage()
