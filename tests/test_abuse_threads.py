"""Forks, and threads that come at the wrong moment."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from abuse import Blocks, flip, served
from engine import ToyEngine

from kvcanary import PhaseError, Reason, abi, turns

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")


# ---- another process -------------------------------------------------------------------------------------------------
def in_child(work: Callable[[], None]) -> str:
    """What ``work`` raises in a forked child; "" if nothing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            work()
        except BaseException as error:  # noqa: BLE001  told to the parent
            text = f"{type(error).__name__}: {error}" if isinstance(error, PhaseError) else traceback.format_exc()
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return text


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
class TestFork:
    @pytest.mark.parametrize(
        "call",
        [
            lambda e: e.step((0, 6, 1)),
            lambda e: e.manager.head(e.batch((0, 6, 1))),
            lambda e: e.manager.poll(),
            lambda e: e.manager.violations(),
            lambda e: e.manager.stats(),
            lambda e: e.manager.pause(),
            lambda e: e.manager.reset(),
            lambda e: e.manager.synchronize(),
            lambda e: e.manager.allocate_blocks([9], 7),
            lambda e: e.manager.lifecycle.apply([("allocate", [9], 7)]),
            lambda e: e.manager.copy_slots([4], [8]),
            lambda e: e.manager.export_slots([4]),
            lambda e: e.manager.shadow_arrays(),
            lambda e: e.manager.attach_resident_set(lambda: None),
            lambda e: e.manager.on_violation(print),
            lambda e: e.manager.add_observer(e.manager._stats_logger),
            lambda e: e.manager.prove(e.batch((0, 6, 1))),
        ],
    )
    def test_a_child_may_not_use_the_parents_guard(self, call: Callable[[ToyEngine], object]) -> None:
        engine = served(lifecycle=True)
        touched: list[str] = []
        engine.manager.backend.head = lambda *_a: touched.append("head")  # type: ignore[method-assign]
        text = in_child(lambda: (call(engine), touched and 1 / 0))  # type: ignore[func-returns-value]
        assert text.startswith("PhaseError") and "forked" in text and "make a manager of its own" in text, text

    def test_the_parent_goes_on(self) -> None:
        engine = served()
        assert "forked" in in_child(lambda: engine.step((0, 6, 1)))
        flip(engine)
        engine.step((0, 6, 1))
        assert [v.slot for v in engine.manager.violations()] == [5]

    def test_a_child_may_close_collect_and_make_its_own(self) -> None:
        engine = served()
        closed: list[str] = []
        backend = weakref.ref(engine.manager.backend)
        engine.manager.backend.close = lambda: closed.append("closed")  # type: ignore[method-assign]

        def work() -> None:
            with engine.manager:
                pass
            engine.manager.close()
            engine.manager.abandon_step()
            del engine.manager
            gc.collect()
            assert not closed and backend() is not None, "the parent has it still"
            served().step((0, 0, 4))

        assert in_child(work) == ""

    def test_forked_within_a_step_the_engines_error_is_its_own(self) -> None:
        engine = served()

        def work() -> None:
            with engine.manager.step(), engine.manager.forward(engine.batch((0, 6, 1))):
                if text := in_child_of_step():
                    raise AssertionError(text)

        def in_child_of_step() -> str:
            def fail() -> None:
                raise ZeroDivisionError

            return in_child(fail)

        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            work()
        assert engine.manager.step_number == 1

    def test_forked_by_a_callback_while_another_thread_waits(self) -> None:
        engine, texts = served(), []
        engine.manager.on_violation(lambda _v: texts.append(in_child(engine.manager.pause)))
        flip(engine)
        engine.step((0, 6, 1))
        assert len(texts) == 1 and "forked" in texts[0]
        engine.manager.pause()

    def test_a_child_that_is_forked_while_a_thread_is_in_a_call(self) -> None:
        engine, blocks = served(), Blocks()
        blocks.manager = engine.manager
        logging.getLogger("kvcanary").addHandler(blocks)
        flip(engine)
        thread = threading.Thread(target=engine.step, args=((0, 6, 1),))
        try:
            thread.start()
            assert blocks.is_in.wait(20)
            logging.getLogger("kvcanary").removeHandler(blocks)
            text = in_child(engine.manager.pause)
        finally:
            logging.getLogger("kvcanary").removeHandler(blocks)
            blocks.may_go.set()
            thread.join(20)
        assert "forked" in text


# ---- threads ---------------------------------------------------------------------------------------------------------
def test_a_call_that_lasts_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_WAIT_S", 0.05)
    engine, blocks = served(), Blocks()
    blocks.manager = engine.manager
    logging.getLogger("kvcanary").addHandler(blocks)
    flip(engine)
    thread = threading.Thread(target=engine.step, args=((0, 6, 1),), name="worker")
    try:
        thread.start()
        assert blocks.is_in.wait(20)
        with pytest.raises(
            PhaseError, match=r"reset\(\) came in thread 'MainThread' while thread 'worker' has been in"
        ):
            engine.manager.reset()
    finally:
        logging.getLogger("kvcanary").removeHandler(blocks)
        blocks.may_go.set()
        thread.join(20)
    engine.step((0, 7, 1))


def test_a_second_thread_in_a_step_or_forward_is_refused() -> None:
    engine, errors = served(), []
    batch = engine.batch((0, 6, 1))

    def intrude() -> None:
        for call in (lambda: engine.step((1, 0, 2)), lambda: engine.manager.head(batch), engine.manager.end_step):
            try:
                call()
            except PhaseError as error:
                errors.append(str(error))

    with engine.manager.step(), engine.manager.forward(batch):
        thread = threading.Thread(target=intrude, name="intruder")
        thread.start()
        thread.join()
        with pytest.raises(PhaseError) as own:
            engine.manager.begin_step()
        engine.write(batch)
    assert [text.split()[0] for text in errors] == ["begin_step()", "head()", "end_step()"]
    assert all("FORWARD_IN_STEP" in text for text in errors)
    assert all("thread 'MainThread' that began this phase, and the call came in thread 'intruder'" in e for e in errors)
    assert "FORWARD_IN_STEP" in str(own.value) and "thread" not in str(own.value), "the wrong call, of the right thread"
    engine.step((0, 7, 1))
    assert engine.manager.violations() == () and engine.manager.step_number == 3


def test_threads_that_all_want_to_step_corrupt_nothing() -> None:
    """Whoever comes at the wrong moment gets a PhaseError; forwards, steps and counters are those of the others."""
    engine = served(lifecycle=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    n_steps, n_refused, others, stop = [0] * 3, [0] * 3, [], threading.Event()

    def serve(i: int) -> None:
        batch = engine.batch((0, 5, 1))
        for _ in range(60):
            try:
                with engine.manager.step(), engine.manager.forward(batch):
                    pass
                n_steps[i] += 1
            except PhaseError:
                n_refused[i] += 1

    def look() -> None:
        while not stop.is_set():
            try:
                engine.manager.poll(), engine.manager.violations(), engine.manager.stats(), engine.manager.describe()
            except Exception as error:  # noqa: BLE001  any at all is too much
                others.append(error)

    watcher = threading.Thread(target=look)
    workers = [threading.Thread(target=serve, args=(i,)) for i in range(3)]
    try:
        for thread in (watcher, *workers):
            thread.start()
        for thread in workers:
            thread.join()
    finally:
        stop.set()
        watcher.join()
        sys.setswitchinterval(interval)
    assert others == [] and sum(n_steps) + sum(n_refused) == 180
    engine.manager.abandon_step()
    words = engine.manager.backend.snapshot_words()
    assert engine.manager.step_number >= 1 + sum(n_steps)
    assert int(words[abi.STATE_FORWARD]) <= 181
    runs = engine.manager.state.kernel_run_counters[0]
    assert len({int(runs[t]) for t in engine.manager.active_tags[0] if t.stage == 0}) == 1, "K and V alike"
    engine.step((0, 6, 1))


def test_calls_about_blocks_from_a_scheduler_thread_take_turns() -> None:
    engine, errors = served(lifecycle=True), []

    def schedule() -> None:
        for _ in range(100):
            try:
                engine.manager.lifecycle.apply([("allocate", [12, 13], 7), ("free", [12, 13], 7)])
            except PhaseError:
                pass  # between HEAD and TAIL of the other thread
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    thread = threading.Thread(target=schedule)
    thread.start()
    for p in range(6, 12):
        with engine.manager.step():
            batch = engine.batch((0, p, 1))
            with engine.manager.forward(batch):
                engine.write(batch)
    thread.join()
    assert errors == [] and engine.manager.lifecycle.owners(12) == ()
    assert engine.manager.lifecycle.epoch(12) == engine.manager.lifecycle.epoch(13)


# ---- after all of it -------------------------------------------------------------------------------------------------
def test_the_reasons_of_a_run_are_those_of_an_undisturbed_one() -> None:
    """The last word: after all of the above, in one process, the guard still knows damage from health."""
    engine = served()
    engine.step((0, 6, 1))
    assert engine.manager.violations() == ()
    flip(engine)
    engine.step((0, 7, 1))
    (v,) = engine.manager.violations()
    assert v.reasons == Reason.DATA and np.count_nonzero(engine.manager.taint) == 1
