"""What the commands print while they work: a bar on a terminal (if rich is installed), plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """How far a piece of work is."""

    def advance(self, n: int, step: int) -> None:
        """`n` more of the total are done, after engine step `step`."""

    def line(self, text: str) -> None:
        """Print a line without disturbing the display."""


class PlainProgress:
    """A line at every quarter of the work."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0

    def advance(self, n: int, step: int) -> None:
        before, self._done = self._done, self._done + n
        if self._done * 4 // self._total > before * 4 // self._total:
            self.line(f"{self._title}: {self._done} of {self._total} bytes, step {step}")

    def line(self, text: str) -> None:
        print(text, flush=True)


class RichProgress:
    """A bar of a rich display."""

    def __init__(self, display: Any, title: str, total: int) -> None:
        self._display, self._title = display, title
        self._task = display.add_task(title, total=total)

    def advance(self, n: int, step: int) -> None:
        self._display.update(self._task, advance=n, description=f"{self._title}, step {step}")

    def line(self, text: str) -> None:
        self._display.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """Show how much of `total` is done, in the way that fits the output."""
    display = _rich_display() if sys.stdout.isatty() else None
    if display is None:
        yield PlainProgress(title, total)
        return
    with display:
        yield RichProgress(display, title, total)


def _rich_display() -> Any:
    try:
        from rich.progress import Progress as Display
    except ImportError:
        return None
    return Display(redirect_stdout=False, redirect_stderr=False)


class _Lines(logging.Handler):
    """Log records as lines of a progress display."""

    def __init__(self, shown: Progress) -> None:
        super().__init__(logging.INFO)
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        self._shown.line(self.format(record))


@contextmanager
def guard_log(shown: Progress) -> Iterator[None]:
    """Show what the guard logs meanwhile (stats, health); not its violations, of which the command itself tells."""
    logger, handler = logging.getLogger("kvcanary"), _Lines(shown)
    handler.addFilter(lambda record: record.module != "violations")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
