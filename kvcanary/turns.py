"""Who may use a manager: one thread at a time, and only in the process that made it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

from kvcanary.errors import ConfigError, PhaseError

MAX_WAIT_S = 1.0  # for another thread's call to end; most take microseconds

P = ParamSpec("P")
R = TypeVar("R")


class Turns:
    """A lock that threads take for the time of a call, and which call that is."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a callback may call the manager that calls it
        self.thread = 0
        self.call = ""

    def renew(self) -> None:
        """In a forked child: the thread that holds the lock may not be in this process."""
        self.lock = threading.RLock()

    def begin(self, call: str) -> threading.RLock:
        """Take the lock, which may take its time; the caller gives it back. Raises PhaseError."""
        lock = self.lock  # the same one is given back, also where a callback has forked and this is the child
        if not lock.acquire(False):
            self._wait(call)
        self.call, self.thread = call, get_ident()
        return lock

    def _wait(self, call: str) -> None:
        if self.lock.acquire(timeout=MAX_WAIT_S):
            return
        mine = threading.current_thread().name
        other = next((t.name for t in threading.enumerate() if t.ident == self.thread), "that ended")
        raise PhaseError(
            f"{call} came in thread {mine!r} while thread {other!r} has been in {self.call} for {MAX_WAIT_S} s: "
            "use a manager from one thread at a time (poll(), violations() and stats() may come from any)"
        )


class TakesTurns(Protocol):
    """What `one_at_a_time` needs of an object."""

    _turns: Turns


S = TypeVar("S", bound=TakesTurns)


def one_at_a_time(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that waits for its turn: it never runs beside another one of its object, in another thread."""
    call = f"{method.__name__}()"

    @wraps(method)
    def in_turn(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        lock = self._turns.begin(call)
        try:
            return method(self, *args, **kwargs)
        finally:
            lock.release()

    return in_turn


class OfThisProcess:
    """What cannot be copied or sent: its memory and its locks are those of this process."""

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            f"a {type(self).__name__} was to be pickled or copied: it belongs to its process and its device. Send the "
            "CanaryConfig and the sizes instead, and make a manager there, over the KV arrays of that process"
        )


# ---- forks -----------------------------------------------------------------------------------------------------------
class Forkable(Protocol):
    """What `watch_forks` needs of an object."""

    def after_fork(self) -> None:
        """In a forked child: refuse everything from now on; touch nothing of the device."""


_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_kept: list[Any] = []  # in a child: what must not be freed there, as it is the parent's


def watch_forks(owner: Forkable) -> None:
    """Call ``owner.after_fork()`` in every child that is forked from here on, as long as it lives."""
    _watched.add(owner)


def _in_child() -> None:
    for owner in list(_watched):
        _kept.append(owner)
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
