"""Callbacks, resident sets and log handlers that raise, block or never stop, and clocks that jump."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from abuse import Blocks, flip, served, step_that_fails

import kvcanary


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


# ---- callbacks and resident sets -------------------------------------------------------------------------------------
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


# ---- log handlers ----------------------------------------------------------------------------------------------------
def test_a_log_handler_that_raises_does_not_stand_before_the_engines_error(
    handler: Callable[[logging.Handler], None],
) -> None:
    engine = served()
    handler(Raises())
    flip(engine)

    with pytest.raises(ZeroDivisionError):
        step_that_fails(engine)
    assert [v.slot for v in engine.manager.violations()] == [5], "and what was found is not lost"
    assert engine.manager.n_observer_errors > 0


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


_UNHEARD = """
from abuse import flip, served
engine = served()
flip(engine)
engine.step((0, 6, 1))
"""


def test_without_logging_set_up_a_violation_stands_on_stderr() -> None:
    """Mode "log" is the default: an engine that has not set up logging must hear of it all the same."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", _UNHEARD],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[canary] violation reasons=DATA" in done.stderr
