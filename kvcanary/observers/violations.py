"""The violation observer: from the ring to people and callbacks, each finding once."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary.config import CanaryConfig
from kvcanary.errors import KvCanaryViolation
from kvcanary.log_lines import ErrorLog, line, run_fields
from kvcanary.observers.facts import StepFacts
from kvcanary.tags import Detail, Reason
from kvcanary.violation_ring import RingReader, in_order
from kvcanary.violations import PoolNames, Violation, decode, fold_runs, line_of

logger = logging.getLogger("kvcanary")

Callback: TypeAlias = Callable[[Violation], None]

MAX_SEEN = 65536  # findings remembered; the least recently seen is forgotten first
MAX_HISTORY = 1024  # violations kept for `violations()`
MAX_LINES_OF_A_KIND = 100  # then only the 128th, 256th, ... finding with the same reasons, and one in LINE_EVERY steps
LINE_EVERY = 100  # steps: some 40,000 lines a day at 50 steps a second
MAX_LINES = 20  # violations of one step that are written out
MAX_NEW = 256  # first sightings after which a step reads no further (some 4 ms); the rest waits in the ring
MAX_RECORDS = 4096  # records of any kind, likewise
STOP = "Stop serving the requests named here and keep .violations; mode='log' reports without raising"
STOP_ELSEWHERE = "Stop serving the requests that the log of that rank names; mode='log' reports without raising"

OF_FINDINGS = "step= of a finding counts those with a forward, as the device does"


class ViolationObserver:
    """Reads new records, reports each finding once, keeps the counts of all.

    A finding is (pool, slot, plane, reasons) under one stamp and digest, for each request that meets it: checks of K
    and V, at HEAD, TAIL and SWEEP, at every forward, see the same one until the slot is rewritten or digested anew.
    What names no request (sweep, patrol) is nothing new where a request has met it. A value that is no slot of the pool
    has no stamp. Of a reserved block each plane is one finding until another of its slots is the first that is not
    finite.

    `step` belongs to the host thread, everything else may be called from any thread: the lock is held while records are
    read and decoded, never while a callback or a log handler runs.

    Args:
        config: mode and log_tokens.
        reader: the ring; this observer is its only user.
        pool_names: by pool index.
        secret: what masks the chains (`kvcanary.violations.new_secret`).
        on_new: gets the first sightings of a step together, before anybody else does; must not raise.
    """

    def __init__(
        self,
        config: CanaryConfig,
        reader: RingReader,
        pool_names: Sequence[PoolNames],
        secret: int,
        on_new: Callable[[tuple[Violation, ...]], None] | None = None,
    ) -> None:
        self.violations_total = 0  #: first sightings
        self.history: deque[Violation] = deque(maxlen=MAX_HISTORY)  #: the newest first sightings
        self.raises_when_agreed = False  #: leave raising to `take_agreed`, for all ranks to raise at one step
        self._raises = config.mode == "raise"
        self._log_tokens = config.log_tokens
        self._log_format = config.log_format
        self._on_new = on_new
        self._reader = reader
        self._pool_names = pool_names
        self._secret = secret
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._unraised: deque[Violation] = deque(maxlen=MAX_HISTORY)
        self._callbacks: tuple[Callback, ...] = ()
        self._n_dropped = 0
        self._n_lines: dict[int, int] = {}
        self._last_lines: dict[int, int] = {}  # the step of the last line of a kind
        self._n_lost_lines = 0  # log handlers that raised
        self._errors = ErrorLog()  # callbacks that raised
        self._counts: Counter[tuple[int, Reason]] = Counter()

    @property
    def n_errors(self) -> int:
        """Callbacks and log handlers that raised."""
        return self._n_lost_lines + self._errors.n

    @property
    def observations_total(self) -> int:
        """All violations: records read, repeated ones too, and those known to have found the ring full."""
        return self._reader.n_read + self._n_dropped

    def is_due(self, step: int) -> bool:
        """Whether `step` has anything to do: one NumPy read."""
        return self._reader.has_new or (self._raises and bool(self._unraised) and not self.raises_when_agreed)

    def step(self, facts: StepFacts) -> None:
        """Report what is new; one NumPy read when nothing is. Touches no stream, so it may run beside a capture.

        Only ``facts.step`` is used: the totals in the facts are this observer's own.

        Raises:
            KvCanaryViolation: in mode "raise", once for all first sightings since it raised last.
        """
        if self._reader.has_new:
            self._report_some()
        if self._raises and self._unraised and not self.raises_when_agreed:
            text = f"{len(self._unraised)} new violations of the KV cache at step {facts.step}"
            raise self._error(text, STOP, facts.step)

    def take_agreed(self, text: str, step: int) -> KvCanaryViolation:
        """What to raise at ``step`` when the ranks have agreed on ``text``: with this rank's own findings, if any."""
        n = len(self._unraised)
        text = f"{text}; {n or 'no'} new violations on this rank until here"
        return self._error(text, STOP if n else STOP_ELSEWHERE, step)

    def poll(self) -> tuple[Violation, ...]:
        """Report all that is new without raising (the next `step` will): the first sightings, oldest first."""
        new: list[Violation] = []
        while self._reader.has_new:
            new.extend(self._report_some())
        return tuple(new)

    def violations(self) -> tuple[Violation, ...]:
        """The newest first sightings, oldest first (at most MAX_HISTORY)."""
        with self._lock:
            return tuple(self.history)

    def counts(self) -> dict[tuple[int, Reason], int]:
        """First sightings by (pool, reasons)."""
        with self._lock:
            return dict(self._counts)

    def on_violation(self, callback: Callback) -> None:
        """Call ``callback(violation)`` for every first sighting, on the thread that reads it; what it raises counts."""
        with self._lock:
            self._callbacks += (callback,)

    def note_dropped(self, n_dropped: int) -> None:
        """Tell how many violations found the ring full so far (``abi.STATE_DROPPED`` of a snapshot)."""
        with self._lock:
            n_new = n_dropped - self._n_dropped
            self._n_dropped = max(self._n_dropped, n_dropped)
        if n_new > 0:
            text = (
                f"[canary] {n_new} violations more found the ring full: counted, but without a record ({n_dropped} so "
                "far); raise ring_capacity, or look at the records before them. A request that they do not name may be "
                "damaged too: the taint of its row tells"
            )
            fields = {"dropped": n_new, "dropped_total": n_dropped}
            told = line(self._log_format, logging.WARNING, "dropped", text, fields)
            self._quietly(partial(logger.warning, "%s", told))

    def forget(self) -> None:
        """Forget which findings were reported (the cache was flushed); the counts and the history stay."""
        with self._lock:
            self._seen.clear()

    def _report_some(self) -> tuple[Violation, ...]:
        with self._lock:
            new = self._take()
            self.violations_total += len(new)
            self.history.extend(new)
            self._counts.update((v.pool, v.reasons) for v in new)
            if self._raises:
                self._unraised.extend(new)
        if new and self._on_new is not None:
            self._on_new(new)
        self._quietly(lambda: self._log(new))
        for violation in new:  # last: one may end the process
            self._call(violation)
        return new

    def _take(self) -> tuple[Violation, ...]:
        new: list[Violation] = []
        end = self._reader.n_read + MAX_RECORDS
        while len(new) < MAX_NEW and (n_left := end - self._reader.n_read) > 0:
            records = self._reader.read(min(MAX_NEW, n_left))
            if len(records) == 0:
                break
            records = in_order(records)
            is_new = np.fromiter((self._is_new(key) for key in _findings(records)), bool, len(records))
            new.extend(decode(records[is_new], self._pool_names, self._secret, self._log_tokens))
        return tuple(new)

    def _is_new(self, finding: _Finding) -> bool:
        place, reader = finding
        is_new = self._note(place)
        return self._note((*place, *reader)) if any(reader) else is_new

    def _note(self, key: tuple[int, ...]) -> bool:
        if key in self._seen:
            self._seen.move_to_end(key)
            return False
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return True

    def _call(self, violation: Violation) -> None:
        for callback in self._callbacks:
            try:
                callback(violation)
            except Exception:  # noqa: BLE001  whatever an engine's function raises
                self._errors.note("[canary] a violation callback raised: %r", callback)

    def _quietly(self, log: Callable[[], None]) -> None:
        """A log handler that raises costs a line, never a violation or the caller's own error."""
        try:
            log()
        except Exception:  # noqa: BLE001  there is nobody left to tell
            self._n_lost_lines += 1

    def _log(self, new: tuple[Violation, ...]) -> None:
        lines = [run for run in fold_runs(new) if self._is_worth_a_line(run[0])]
        for first, last in lines[:MAX_LINES]:
            text = f"[canary] violation {line_of(first, last)}{self._so_far(first)}"
            logger.warning("%s", line(self._log_format, logging.WARNING, "violation", text, run_fields(first, last)))
            if self._log_format == "text" and logger.isEnabledFor(logging.DEBUG):
                logger.debug("[canary] %s", first.details())
        if len(lines) > MAX_LINES:
            n, total = len(lines) - MAX_LINES, self.violations_total
            text = f"[canary] and {n} more findings in this step (violations_total={total}): see violations()"
            fields = {"more": n, "violations_total": total}
            logger.warning("%s", line(self._log_format, logging.WARNING, "more_violations", text, fields))

    def _is_worth_a_line(self, violation: Violation) -> bool:
        """The first lines of each kind, then few: a fault that goes on neither fills the disk nor hides others."""
        kind, step = int(violation.reasons), violation.step
        n = self._n_lines[kind] = self._n_lines.get(kind, 0) + 1
        is_worth = n <= MAX_LINES_OF_A_KIND or n & (n - 1) == 0 or step - self._last_lines.get(kind, step) >= LINE_EVERY
        if is_worth:
            self._last_lines[kind] = step
        return is_worth

    def _so_far(self, violation: Violation) -> str:
        n = self._n_lines[violation.reasons]
        return f" ({n} findings of this kind so far; most are no longer written)" if n > MAX_LINES_OF_A_KIND else ""

    def _error(self, text: str, what_to_do: str, step: int) -> KvCanaryViolation:
        with self._lock:
            new = tuple(self._unraised)
            self._unraised.clear()
        runs = fold_runs(new)
        lines = [f"{text}, {self.violations_total} so far{':' if runs else ''}"]
        lines.extend(f"  {line_of(first, last)}" for first, last in runs[:MAX_LINES])
        if len(runs) > MAX_LINES:
            lines.append(f"  and {len(runs) - MAX_LINES} more")
        if any(violation.step != step for violation in new):
            lines.append(f"(step {step} counts all that end_step() ended, idle ones too; {OF_FINDINGS})")
        lines.append(what_to_do)
        return KvCanaryViolation("\n".join(lines), new)


_Finding: TypeAlias = tuple[tuple[int, ...], tuple[int, int]]  # what, and who met it: request id and row, or zeros


def _findings(records: npt.NDArray[Any]) -> list[_Finding]:
    """What makes each record the same finding as another."""
    names = ["detail", "pool", "slot", "plane", "reasons", "stamp_step", "stored_digest", "request_id", "row"]
    in_pool = {int(d): int(Detail.SLOT if d == Detail.SCRUB else d) for d in Detail if d.is_slot}
    return [
        # An unnamed request (id 0) is told apart by its row where there is no slot that would do it.
        (
            (in_pool.get(detail, detail), pool, slot, plane, reasons, step, digest if reasons & Reason.DATA else 0),
            (request, 0 if request or detail in in_pool else row + 1),
        )
        for detail, pool, slot, plane, reasons, step, digest, request, row in records[names].tolist()
    ]
