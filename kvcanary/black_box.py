"""The black box: what was found, written down where it outlives the process.

A file of JSON lines, one object each. Every line has ``black_box`` (the version of this schema), ``kind``, ``pid``,
``run`` (of one manager) and ``time`` (seconds since the epoch). The kinds:

start       versions, config, and the layout of the pools; when the manager is made
violation   one first sighting, as `kvcanary.records.as_dict` writes it
stall       what the health check reported
counters    `CanaryManager.stats`, behind the violations of a step and behind a stall
end         how it ended ("close", "exit" of the process, "dropped" without a close), with the last counters

Written only when something happens, by a thread of its own (`kvcanary.box_file`). The violations come from pinned host
memory, so that those recorded before the CUDA context died are read and written all the same: when the engine's step
raises, at `close`, or when the process exits. Token ids and raw chains are in it only with ``log_tokens``.
"""

from __future__ import annotations

import atexit
import os
import platform
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from kvcanary.box_file import BoxFile
from kvcanary.errors import CanaryStalledError
from kvcanary.layout import KvPool
from kvcanary.records import as_dict
from kvcanary.stats import CanaryStats
from kvcanary.violations import Violation

SCHEMA = 1
END_WAIT_S = 2.0  # for the disk, at the end of the process
_LIBRARIES = ("cupy", "cuda.core", "cuda.bindings", "torch", "jax")  # whose versions are told, where they are loaded


def open_black_box(manager: Any) -> BlackBox | None:
    """The black box of a manager that is being made; None if its config asks for none."""
    config = manager.config
    if config.black_box_path is None:
        return None
    start = {
        "versions": _versions(),
        "host": platform.node(),
        "backend": manager.backend.name,
        "max_requests": manager.max_requests,
        "max_new_tokens": manager.max_new_tokens,
        "config": asdict(config),
        "pools": [describe_pool(pool, config.real_data) for pool in manager.pools],
    }
    box = BlackBox(config.black_box_path, start, weakref.WeakMethod(manager.stats), weakref.WeakMethod(manager.poll))
    weakref.finalize(manager, box.end, "dropped").atexit = False
    return box


class BlackBox:
    """Takes events on the engine's threads and hands them to the file; nothing here waits, but `end`.

    Args:
        path: of the file.
        start: what the first line tells of the manager.
        stats: a weak reference to `CanaryManager.stats`; ``poll`` one to `CanaryManager.poll`.
    """

    def __init__(
        self,
        path: str,
        start: Mapping[str, Any],
        stats: Callable[[], Callable[[], CanaryStats] | None],
        poll: Callable[[], Callable[[], Any] | None],
    ) -> None:
        self._file = BoxFile(path)
        self._run = secrets.token_hex(4)
        self._pid = os.getpid()
        self._stats, self._poll = stats, poll
        self._last: dict[str, Any] | None = None  # counters
        self._has_ended = False
        first = self._line("start", **start)
        self._file.put(lambda: [first])
        atexit.register(self._at_exit)

    @property
    def n_errors(self) -> int:
        """Events that could not be written, or were not on the disk when the end no longer waited for it."""
        return self._file.n_errors + self._file.n_late

    def violations(self, new: Sequence[Violation]) -> None:
        """First sightings of a step."""
        head, counters = self._line("violation"), self._counters()
        found = tuple(new)
        self._file.put(lambda: [*({**head, "violation": as_dict(v)} for v in found), counters])

    def stall(self, error: CanaryStalledError) -> None:
        """The health check found something."""
        tags = [tag.name for tag in error.tags]
        line = self._line("stall", error=type(error).__name__, step=error.step, tags=tags, text=str(error))
        counters = self._counters()
        self._file.put(lambda: [line, counters])

    def end(self, how: str) -> None:
        """The last line, once; waits for the disk, but not for ever."""
        if self._has_ended or os.getpid() != self._pid:
            return
        self._has_ended = True
        atexit.unregister(self._at_exit)
        self._counters()
        line = self._line("end", how=how, counters=self._last)
        self._file.put(
            lambda: [{**line, "left_out": self._file.n_left_out, "errors": self._file.n_errors}], is_last=True
        )
        self._file.finish(END_WAIT_S)

    def flush(self, timeout_s: float = END_WAIT_S) -> bool:
        """Wait for the disk; returns whether all is written."""
        return self._file.flush(timeout_s)

    def _at_exit(self) -> None:
        poll = self._poll()
        if poll is not None and os.getpid() == self._pid:
            with suppress(Exception):  # a callback, a log handler that is gone already
                poll()
        self.end("exit")

    def _line(self, kind: str, **fields: Any) -> dict[str, Any]:
        head = {"black_box": SCHEMA, "kind": kind, "pid": self._pid, "run": self._run, "time": round(time.time(), 3)}
        return {**head, **fields}

    def _counters(self) -> dict[str, Any]:
        stats = self._stats()
        if stats is not None:
            with suppress(Exception):  # a manager that is only half made
                self._last = counters_of(stats())
        return self._line("counters", counters=self._last)


def counters_of(stats: CanaryStats) -> dict[str, Any]:
    """`CanaryStats` as JSON has it; of the numbers by pool those that are not 0."""
    found = {f.name: getattr(stats, f.name) for f in fields(CanaryStats) if f.name != "pools"}
    pools = {}
    for pool in stats.pools:
        mappings = {name: getattr(pool, name) for name in ("launches", "entries", "data_launches", "violations")}
        pools[pool.name] = {name: {key.name: n for key, n in m.items() if n} for name, m in mappings.items()}
    return {**found, "pools": pools}


def describe_pool(pool: KvPool, real_data: str) -> dict[str, Any]:
    """A pool as the black box tells it."""
    planes = [
        {
            "name": p.name,
            "layer": p.layer,
            "half": p.half.name,
            "bytes": p.n_bytes,
            "dtype": p.element and p.element.name,
        }
        for p in pool.ordered_planes
    ]
    return {
        "name": pool.name,
        "kind": pool.kind.name,
        "window": pool.window,
        "page_size": pool.page_size,
        "n_blocks": pool.n_blocks,
        "reserved_blocks": list(pool.reserved_blocks),
        "token_offset": pool.token_offset,
        "device": pool.device,
        "planes": planes,
        "digests": [{"name": unit.name, "layer": unit.layer} for unit in pool.digest_units(real_data)],
    }


def _versions() -> dict[str, str]:
    import kvcanary

    known = {"kvcanary": kvcanary.__version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            known[name] = str(version)
    return known
