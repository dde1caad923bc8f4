"""A captured graph holds addresses of the guard's memory: that must outlive it, whatever becomes of the manager."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from kvcanary.backends import Backend

logger = logging.getLogger("kvcanary")

_orphans: list[Backend] = []  # of managers that were collected without close(): graphs may still write there


class CaptureWatch:
    """Knows whether a forward was ever captured; if so, the backend is kept when its manager is collected unclosed.

    Args:
        owner: the manager.
        backend: its backend, which must not refer to it.
    """

    def __init__(self, owner: Any, backend: Backend) -> None:
        self.was_captured = False
        self._finalizer = weakref.finalize(owner, self._keep, backend)
        self._finalizer.atexit = False

    def note(self, is_capturing: bool) -> None:
        """A forward is about to be launched, perhaps into a graph."""
        self.was_captured |= is_capturing

    def end(self) -> None:
        """The manager is closed: whoever does that has no graphs any more."""
        self._finalizer.detach()

    def _keep(self, backend: Backend) -> None:
        if not self.was_captured:
            return
        _orphans.append(backend)
        logger.warning(
            "[canary] a manager was collected without close(), and forwards of it were captured: its %d bytes are kept "
            "for graphs that may still be replayed. Call close() when the graphs are gone",
            backend.memory_bytes,
        )


def orphans() -> tuple[Backend, ...]:
    """Backends that are kept for graphs of managers that are gone."""
    return tuple(_orphans)
