"""What the tests of abuse share: an engine that has begun to serve, damage to it, a log handler that hangs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from engine import PAGE, ToyEngine


def flip(engine: ToyEngine, slot: int = 5) -> None:
    engine.k[0][slot // PAGE, slot % PAGE, 0, 0] ^= 1


def served(**config: Any) -> ToyEngine:
    """An engine that has prefilled six tokens."""
    engine = ToyEngine(**{"verify_data_every": 1, **config})
    engine.step((0, 0, 6))
    return engine


def step_that_fails(engine: ToyEngine, before: Callable[[], None] = lambda: None) -> None:
    """A step whose forward reads the first row, and which the engine ends with an error of its own."""
    with engine.manager.step():
        batch = engine.batch((0, 6, 1))
        with engine.manager.forward(batch):
            engine.write(batch)
        before()
        raise ZeroDivisionError


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
