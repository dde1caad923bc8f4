"""What is attached to a manager: callbacks, resident sets."""

from __future__ import annotations

import threading

import pytest
from engine import ToyEngine, flip

from kvcanary import BatchError, PhaseError
from kvcanary.observers import StepFacts


class TestAttached:
    def test_callbacks_and_polling_from_another_thread(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        seen: list[int] = []
        engine.manager.on_violation(lambda v: seen.append(v.slot))
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        batch = engine.batch((0, 6, 1))
        engine.manager.begin_step()
        with engine.manager.forward(batch):
            engine.write(batch)
        thread = threading.Thread(target=engine.manager.poll)
        thread.start()
        thread.join()
        engine.manager.end_step()
        assert seen == [5]

    def test_a_callback_may_close_the_manager(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.manager.on_violation(lambda _v: engine.manager.close())
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        engine.step((0, 6, 1))
        with pytest.raises(PhaseError, match="closed"):
            engine.manager.begin_step()

    def test_an_observer_of_the_engines_whose_call_is_refused_is_counted_and_ends_no_step(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Exporter:
            def is_due(self, step: int) -> bool:
                return True

            def step(self, facts: StepFacts) -> None:
                raise BatchError(f"slots that are none, at step {facts.step}")

        engine = ToyEngine(mode="raise")
        engine.manager.add_observer(Exporter())
        engine.step((0, 0, 6))
        engine.step((0, 6, 1))
        assert engine.manager.n_observer_errors == 2
        assert "Exporter raised; the step goes on" in caplog.text

    def test_a_resident_set_that_is_never_swept_is_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        ToyEngine().manager.attach_resident_set(lambda: None)
        assert "sweep_interval is 0: nothing is swept" in caplog.text
