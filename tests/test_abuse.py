"""What an engine does to the guard when things go wrong: each behaviour is told in the README, "What it survives"."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from abuse import flip, served, step_that_fails
from engine import ToyEngine

from kvcanary import CanaryManager, ConfigError, KvCanaryViolation, PhaseError


# ---- the engine raises -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["log", "raise"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("place", ["before", "in the forward", "behind it"])
def test_the_engines_own_error_comes_through_and_the_guard_goes_on(
    mode: str, error: type[BaseException], place: str
) -> None:
    engine = served(mode=mode)
    batch = engine.batch((0, 6, 2))

    def step() -> None:
        with engine.manager.step():
            if place == "before":
                raise error("engine")
            with engine.manager.forward(batch):
                if place == "in the forward":
                    raise error("engine")
                engine.write(batch)
            raise error("engine")

    with pytest.raises(error, match="engine"):
        step()
    engine.step((0, 6, 2))  # the same tokens once more, as an engine does
    engine.step((0, 8, 1))
    assert engine.manager.violations() == ()
    flip(engine)
    if mode == "raise":
        with pytest.raises(KvCanaryViolation):
            engine.step((0, 9, 1))
    else:
        engine.step((0, 9, 1))
    assert [v.slot for v in engine.manager.violations()] == [5]


def test_a_ring_that_was_overwritten_does_not_stand_before_the_engines_error() -> None:
    engine = served()
    flip(engine)

    def stray_write() -> None:
        engine.manager.state.violation_log["tag"] = 99  # there is no such tag

    with pytest.raises(ZeroDivisionError):
        step_that_fails(engine, stray_write)
    assert engine.manager.n_observer_errors == 1
    engine.step((0, 7, 1))


def test_of_two_errors_at_once_the_first_is_raised_and_the_other_is_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = served(mode="raise", health_check_every_n_steps=1, health_check_warmup_steps=1)
    engine.step((0, 6, 1))
    engine.manager.state.kernel_run_counters[...] = 0  # a stray write
    flip(engine)
    with pytest.raises(KvCanaryViolation, match="DATA"):
        engine.step((0, 7, 1))  # the snapshot that shows the stray write is delivered at the next step
    flip(engine, 6)
    with pytest.raises(KvCanaryViolation, match="DATA"):
        engine.step((0, 8, 1))
    assert "launch counters fell" in caplog.text


# ---- the end ---------------------------------------------------------------------------------------------------------
def test_closed_twice_from_two_threads() -> None:
    engine = served()
    threads = [threading.Thread(target=engine.manager.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.manager.close()
    with pytest.raises(PhaseError, match="closed"):
        engine.step((0, 6, 1))
    with pytest.raises(PhaseError, match="closed"):
        engine.manager.pause()
    assert engine.manager.poll() == () and engine.manager.stats().step == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.shadow_arrays(),
        lambda m: m.attach_resident_set(lambda: None),
        lambda m: m.attach_resident_set(None),
        lambda m: m.on_violation(print),
        lambda m: m.add_observer(m._stats_logger),
    ],
)
def test_what_is_attached_to_a_closed_manager_would_never_be_asked(call: Callable[[CanaryManager], object]) -> None:
    engine = served(sweep_interval=2)
    engine.manager.close()
    with pytest.raises(PhaseError, match="closed; make a new one"):
        call(engine.manager)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.lifecycle, lambda m: {"of an engine": [m]}])
def test_a_manager_is_neither_pickled_nor_copied(
    copied: Callable[[Any], object], part: Callable[[CanaryManager], Any]
) -> None:
    engine = served(lifecycle=True)
    if copied is copy.copy and isinstance(part(engine.manager), dict):
        assert copied(part(engine.manager)) is not None, "the engine's own dict may well be"
        return
    with pytest.raises(ConfigError, match=r"belongs to its process and its device.* make a manager there"):
        copied(part(engine.manager))


def test_closed_within_a_step_and_a_forward() -> None:
    engine = served()
    batch = engine.batch((0, 6, 1))

    def step() -> None:
        with engine.manager.step(), engine.manager.forward(batch):
            engine.manager.close()

    with pytest.raises(PhaseError, match="closed"):
        step()


# ---- construction ----------------------------------------------------------------------------------------------------
def test_what_fails_after_the_backend_was_made_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, closed = ToyEngine(), []
    backend = type(engine.manager.backend)
    monkeypatch.setattr(backend, "staging", lambda *_a: 1 / 0)
    monkeypatch.setattr(backend, "close", lambda self: (closed.append(self), None)[1])
    with pytest.raises(ZeroDivisionError):
        CanaryManager(engine.config, [engine.pool], 4, 64)
    assert len(closed) == 1
