"""The file of the black box: append-only, bounded, and never in the way of the engine.

An event is written by a thread that lives as long as there is something to write, in one write() and one fsync(). The
caller neither waits nor fails: what cannot be written, or not in time, is counted and warned of once. Each event opens
the file anew, so that several processes may share it, and log rotation may take it away.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

logger = logging.getLogger("kvcanary")

MAX_FILE_BYTES = 16 << 20  # a larger one is put aside (as PATH.old) when a process begins with it
MAX_PROCESS_BYTES = 4 << 20  # of one process; then only the last event is still written
MAX_PENDING = 64  # events that wait for the disk
_RESERVE_BYTES = 64 << 10  # of MAX_PROCESS_BYTES, for the last event
# O_NONBLOCK: a path that is a pipe without a reader must not hold the thread for ever.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_MODE = 0o600  # request ids, and tokens where they were asked for

Lines: TypeAlias = Callable[[], Sequence[dict[str, Any]]]


class BoxFile:
    """Appends events, each of one or more lines of JSON.

    Args:
        path: of the file; made if it is not there, its folder is not. A relative one is of the folder where the process
            is now, wherever it goes later.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with suppress(OSError):  # the folder where the process is was taken away
            self.path = str(Path(path).absolute())  # and not resolve(): a link may point elsewhere tomorrow
        self._reset()

    def _reset(self) -> None:
        self.n_errors = 0  #: events that could not be written, or found too many waiting
        self.n_late = 0  #: events that were not on the disk when nobody waited for them any longer
        self.n_left_out = 0  #: lines that were too many for this process
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._pending: deque[tuple[Lines, bool]] = deque()
        self._n_waiting = 0  # in _pending, or being written
        self._has_warned = False
        self._worker: threading.Thread | None = None
        self._n_bytes = 0
        self._has_begun = False

    def put(self, lines: Lines, *, is_last: bool = False) -> None:
        """Append what ``lines()`` gives, soon, from another thread; never blocks, never raises.

        Args:
            is_last: small, and written also when this process has used up its share, and behind whatever waits.
        """
        if os.getpid() != self._pid:  # a forked child has neither the thread nor its parent's events
            self._reset()
        with self._lock:
            if len(self._pending) >= MAX_PENDING and not is_last:
                self.n_errors += 1
                return
            self._pending.append((lines, is_last))
            self._n_waiting += 1
            if self._worker is not None:
                return
            self._is_idle.clear()
            self._worker = threading.Thread(target=self._work, name="kvcanary black box", daemon=True)
        try:
            self._worker.start()
        except RuntimeError:  # at the end of the interpreter there are no new threads
            self._work()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written, or until the time is over; returns whether it is."""
        return self._is_idle.wait(timeout_s)

    def finish(self, timeout_s: float) -> None:
        """`flush`, and count what is not written by then; it still is, if the disk is back before the process ends."""
        self.flush(timeout_s)
        with self._lock:
            self.n_late = self._n_waiting
            n_lost = self.n_errors + self.n_late
        if n_lost:
            self._warn(f"{n_lost} events were not on the disk {timeout_s:g} s after the end")

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._worker = None
                    self._is_idle.set()
                    return
                lines, is_last = self._pending.popleft()
            error: Exception | None = None
            try:
                self._append(_within(self._room(is_last), lines(), self))
            except Exception as raised:  # noqa: BLE001  whatever a disk or a network file system raises
                error = raised
            self._note_done(error)

    def _room(self, is_last: bool) -> int:
        return max(0, MAX_PROCESS_BYTES - self._n_bytes - (0 if is_last else _RESERVE_BYTES))

    def _append(self, data: bytes) -> None:
        if not data:
            return
        if not self._has_begun:
            _put_aside(self.path)
        fd = os.open(self.path, _FLAGS, _MODE)
        try:
            check_kind(fd)
            if _is_cut(fd):  # somebody died while writing: begin a line of one's own
                data = b"\n" + data
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            self._n_bytes += len(data)
            _sync(fd)
        finally:
            os.close(fd)
        self._has_begun = True

    def _note_done(self, error: Exception | None) -> None:
        """An event was written, or was not."""
        with self._lock:
            self._n_waiting -= 1
            if error is not None:
                self.n_late = max(0, self.n_late - 1)  # one that was late is not counted twice
                self.n_errors += 1
            n_errors = self.n_errors
        if n_errors:
            self._warn(error or f"more than {MAX_PENDING} events waited for the disk")

    def _warn(self, why: object) -> None:
        """Once, and never in `put`: a log handler may block."""
        with self._lock:
            if self._has_warned:
                return
            self._has_warned = True
        with suppress(Exception):
            logger.warning(
                "[canary] the black box %s cannot be written (%s): violations are still reported, but nothing is "
                "kept of them; give black_box_path a file in a folder that this process may write to, with some "
                "%d MB free. Further failures are only counted (stats().black_box_errors)",
                self.path,
                why,
                2 * MAX_FILE_BYTES >> 20,
            )


def _within(room: int, lines: Sequence[dict[str, Any]], file: BoxFile) -> bytes:
    """The first of the lines, as many as there is room for."""
    data = bytearray()
    for i, line in enumerate(lines):
        text = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if len(data) + len(text) > room:
            file.n_left_out += len(lines) - i
            break
        data += text
    return bytes(data)


def check_kind(fd: int) -> None:
    """OSError for what is not a regular file: it keeps nothing (/dev/null), is not to be written to (a disk), waits."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFBLK: "a block device", stat.S_IFCHR: "a character device"}
        raise OSError(errno.EINVAL, f"it is {kinds.get(stat.S_IFMT(mode), 'of another kind')}, not a regular file")


def _is_cut(fd: int) -> bool:
    try:
        size = os.fstat(fd).st_size
        return size > 0 and os.pread(fd, 1, size - 1) != b"\n"
    except OSError:  # what was written may still be read
        return False


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that has no sync
            raise


def _put_aside(path: str) -> None:
    """Rename a file that has grown large; of several processes that begin at once, one does it."""
    if not _is_large(path):
        return
    try:
        import fcntl
    except ImportError:  # no way to agree with the others: the file goes on growing
        return
    with Path(path).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == Path(path).stat().st_ino and _is_large(path):
            Path(path).replace(path + ".old")


def _is_large(path: str) -> bool:
    return Path(path).is_file() and Path(path).stat().st_size > MAX_FILE_BYTES
