"""What an engine does to the guard when things go wrong: each behaviour is told in the README, "What it survives"."""

from __future__ import annotations

import ast
import copy
import gc
import logging
import os
import pickle
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine

import kvcanary
from kvcanary import CanaryManager, ConfigError, KvCanaryViolation, PhaseError, Reason, abi, turns

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")


def flip(engine: ToyEngine, slot: int = 5) -> None:
    engine.k[0][slot // PAGE, slot % PAGE, 0, 0] ^= 1


def served(**config: Any) -> ToyEngine:
    """An engine that has prefilled six tokens."""
    engine = ToyEngine(**{"verify_data_every": 1, **config})
    engine.step((0, 0, 6))
    return engine


@pytest.fixture
def handler() -> Iterator[Callable[[logging.Handler], None]]:
    """Adds log handlers to the guard's logger, for the time of a test."""
    added: list[logging.Handler] = []

    def add(handler: logging.Handler) -> None:
        added.append(handler)
        logging.getLogger("kvcanary").addHandler(handler)

    yield add
    for each in added:
        logging.getLogger("kvcanary").removeHandler(each)


class Raises(logging.Handler):
    """What a handler over a full disk or a broken socket does."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("disk full")


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


def test_a_log_handler_that_raises_does_not_stand_before_the_engines_error(
    handler: Callable[[logging.Handler], None],
) -> None:
    engine = served()
    handler(Raises())
    flip(engine)

    def step() -> None:
        with engine.manager.step():
            batch = engine.batch((0, 6, 1))
            with engine.manager.forward(batch):
                engine.write(batch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert [v.slot for v in engine.manager.violations()] == [5], "and what was found is not lost"
    assert engine.manager.n_observer_errors > 0


def test_a_ring_that_was_overwritten_does_not_stand_before_the_engines_error() -> None:
    engine = served()
    flip(engine)

    def step() -> None:
        with engine.manager.step():
            batch = engine.batch((0, 6, 1))
            with engine.manager.forward(batch):
                engine.write(batch)
            engine.manager.state.violation_log["tag"] = 99  # a stray write: there is no such tag
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
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


# ---- callbacks and log handlers --------------------------------------------------------------------------------------
def test_a_callback_that_raises_is_logged_and_the_next_one_is_called(caplog: pytest.LogCaptureFixture) -> None:
    engine, seen = served(), []

    def bad(_violation: object) -> None:
        raise ValueError("callback")

    engine.manager.on_violation(bad)
    engine.manager.on_violation(lambda v: seen.append(v.slot))
    flip(engine)
    for p in (6, 7):
        engine.step((0, p, 1))
    assert seen == [5] and engine.manager.step_number == 3
    assert "a violation callback raised" in caplog.text and "ValueError: callback" in caplog.text


def test_a_callback_and_a_log_handler_that_raise_lose_nothing(handler: Callable[[logging.Handler], None]) -> None:
    engine, seen = served(), []
    handler(Raises())

    def bad(_violation: object) -> None:
        raise ValueError("callback")

    engine.manager.on_violation(bad)
    engine.manager.on_violation(lambda v: seen.append(v.slot))
    flip(engine)
    engine.manager.begin_step()
    batch = engine.batch((0, 6, 1))
    with engine.manager.forward(batch):
        engine.write(batch)
    assert [v.slot for v in engine.manager.poll()] == [5], "poll() tells, whatever becomes of the line"
    engine.manager.end_step()
    engine.manager.synchronize()
    engine.manager.close()
    assert seen == [5] and engine.manager.n_observer_errors >= 2


def told(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if text in r.getMessage()]


def test_a_callback_that_always_raises_is_counted_and_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    engine = served(stats_print_every_n_steps=0, ring_capacity=64)

    def bad(_violation: object) -> None:
        raise ValueError("callback")

    engine.manager.on_violation(bad)
    for layer in (*engine.k, *engine.v):
        layer[...] ^= 1
    engine.step((0, 6, 1))
    n = len(engine.manager.violations())
    assert n == 6 * 4 and engine.manager.n_observer_errors == engine.manager.stats().observer_errors == n
    lines = told(caplog, "a violation callback raised")
    assert len(lines) == 5 and "(16 times so far" in lines[-1], "the 1st, 2nd, 4th, 8th and 16th"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: 5, "a int: give"),
        (lambda: ([4], [0]), "2 arrays: give"),
        (lambda: ([4, 5], [0], [-1]), "positions has 1 entries, slots has 2"),
        (lambda: ([1 << 40], [0], [-1]), "OverflowError"),
        (lambda: ("a", "b", "c"), "str"),
    ],
)
def test_a_resident_set_that_cannot_be_read_is_counted_and_does_not_flood_the_log(
    answer: Callable[[], Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = served(sweep_interval=1, stats_print_every_n_steps=0, health_check_every_n_steps=0)
    engine.manager.attach_resident_set(answer)
    for p in range(6, 11):
        engine.step((0, p, 1))
    assert engine.manager.step_number == 6 and engine.manager.stats().sweep_passes == 0
    assert engine.manager.n_observer_errors == engine.manager.stats().observer_errors == 5
    lines = told(caplog, "the resident set of pool 0 could not be read")
    assert len(lines) == 3 and "detach it: attach_resident_set(None, pool) (4 times so far" in lines[-1]
    assert why in caplog.text
    engine.manager.attach_resident_set(None)
    flip(engine)
    engine.step((0, 11, 1))
    assert engine.manager.n_observer_errors == 5 and [v.slot for v in engine.manager.violations()] == [5]


def test_a_callback_may_call_the_manager() -> None:
    engine, seen = served(), []

    def pause(_violation: object) -> None:
        seen.append(engine.manager.stats().violations_total)
        engine.manager.poll()
        engine.manager.pause()

    engine.manager.on_violation(pause)
    flip(engine)
    engine.step((0, 6, 1))
    flip(engine, 6)
    engine.step((0, 7, 1))
    assert seen == [1]


class Blocks(logging.Handler):
    """A handler whose receiver does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.is_in, self.may_go = threading.Event(), threading.Event()
        self.open_forwards: list[object] = []
        self.manager: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        self.open_forwards.append(self.manager._open_forward)
        self.is_in.set()
        assert self.may_go.wait(20)


def test_a_log_handler_that_blocks_holds_the_end_of_the_step_alone(handler: Callable[[logging.Handler], None]) -> None:
    engine, blocks = served(stats_print_every_n_steps=0), Blocks()
    blocks.manager = engine.manager
    handler(blocks)
    flip(engine)
    thread = threading.Thread(target=engine.step, args=((0, 6, 1),))
    thread.start()
    assert blocks.is_in.wait(20)
    try:
        # Another thread is answered at once: no lock is held.
        start = time.perf_counter()
        assert [v.slot for v in engine.manager.violations()] == [5]
        assert engine.manager.poll() == () and engine.manager.stats().violations_total == 1
        assert time.perf_counter() - start < 5
    finally:
        blocks.may_go.set()
        thread.join(20)
    assert set(blocks.open_forwards) == {None}, "never between HEAD and TAIL"
    engine.step((0, 7, 1))


def test_behind_a_queue_a_log_handler_may_block_as_it_likes(handler: Callable[[logging.Handler], None]) -> None:
    engine, lines = served(), SimpleQueue[Any]()
    handler(QueueHandler(lines))
    flip(engine)
    engine.step((0, 6, 1))
    assert "violation reasons=DATA" in lines.get(timeout=5).getMessage()


def test_nothing_is_logged_within_a_forward(handler: Callable[[logging.Handler], None]) -> None:
    engine = served(stats_print_every_n_steps=1, mode="log")
    handler(Raises())
    flip(engine)
    with engine.manager.step():
        batch = engine.batch((0, 6, 1))
        before = engine.manager.n_observer_errors
        with engine.manager.forward(batch):
            engine.write(batch)
        assert engine.manager.n_observer_errors == before
    assert engine.manager.n_observer_errors > before


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


# ---- time ------------------------------------------------------------------------------------------------------------
def test_no_module_of_the_guard_asks_for_the_time() -> None:
    """The simulator and the command line measure; `turns` and `reducers` wait by clocks that do not jump."""
    root, found = Path(kvcanary.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & {"time", "datetime", "calendar", "sched"}:
                found.add(path.relative_to(root).parts[0])
    found.discard("reducers.py")
    assert "time.time" not in (root / "reducers.py").read_text()
    written = {"sim", "cli", "black_box.py", "box_file.py", "box_reader.py", "explain.py", "log_lines.py"}
    assert found <= written, "only what is written down has its time"


def test_a_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Any, ...]:
        engine = served(stats_print_every_n_steps=2, health_check_every_n_steps=2, health_check_warmup_steps=0)
        flip(engine)
        for p in range(6, 11):
            engine.step((0, p, 1))
        engine.manager.synchronize()
        return engine.manager.stats(), [v.slot for v in engine.manager.violations()]

    expected = run()
    now = [1e9]

    def jumping() -> float:
        now[0] = -now[0] * 2 if abs(now[0]) < 1e15 else 1.0
        return now[0]

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, jumping)
    assert run() == expected


# ---- construction ----------------------------------------------------------------------------------------------------
def test_what_fails_after_the_backend_was_made_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, closed = ToyEngine(), []
    backend = type(engine.manager.backend)
    monkeypatch.setattr(backend, "staging", lambda *_a: 1 / 0)
    monkeypatch.setattr(backend, "close", lambda self: (closed.append(self), None)[1])
    with pytest.raises(ZeroDivisionError):
        CanaryManager(engine.config, [engine.pool], 4, 64)
    assert len(closed) == 1


def test_the_reasons_of_a_run_are_those_of_an_undisturbed_one() -> None:
    """The last word: after all of the above, in one process, the guard still knows damage from health."""
    engine = served()
    engine.step((0, 6, 1))
    assert engine.manager.violations() == ()
    flip(engine)
    engine.step((0, 7, 1))
    (v,) = engine.manager.violations()
    assert v.reasons == Reason.DATA and np.count_nonzero(engine.manager.taint) == 1
