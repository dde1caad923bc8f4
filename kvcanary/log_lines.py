"""One line of the log, as text or as a JSON object; and errors that may come at every step."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvcanary.records import as_dict
from kvcanary.violations import Violation

logger = logging.getLogger("kvcanary")


def line(log_format: str, level: int, event: str, text: str, fields: Mapping[str, Any]) -> str:
    """The message of a log record.

    Args:
        log_format: "text": ``text`` as it is; "json": an object of event, level, time (seconds since the epoch), the
            fields, and ``text`` as "message".
        level: of `logging`.
        event: "violation", "more_violations", "dropped", "stall" or "stats"; with several ranks also "agreement",
            "rank_stall" and "rank_steps".
    """
    if log_format == "text":
        return text
    head = {"event": event, "level": logging.getLevelName(level), "time": round(time.time(), 3)}
    return json.dumps({**head, **fields, "message": text})


def run_fields(first: Violation, last: Violation) -> dict[str, Any]:
    """What a line of `kvcanary.violations.fold_runs` holds: the first violation, and where the run ends."""
    run = {} if first is last else {"last_position": last.position, "last_slot": last.slot}
    return {**as_dict(first), **run}


class ErrorLog:
    """Counts what others raise (a callback, a provider, a driver), and logs ever fewer of it.

    What is broken mostly stays so, and is met again at every step: the 1st, 2nd, 4th, 8th, ... of a kind (the text, its
    arguments, the type of the exception) are worth a traceback.
    """

    def __init__(self) -> None:
        self.n = 0  #: errors, and log handlers that raised while they were told
        self._n_of: Counter[tuple[object, ...]] = Counter()

    def note(self, text: str, *args: object) -> None:
        """Count the exception that is being handled, and perhaps log it; never raises.

        Args:
            text: what happened and how it goes on, with a place for each of the arguments.
        """
        self.n += 1
        error = sys.exc_info()[1]
        kind = (type(error), text, *(arg if isinstance(arg, str) else id(arg) for arg in args))  # some have no hash
        self._n_of[kind] += 1
        n = self._n_of[kind]
        if n & (n - 1):
            return
        text += " (%d times so far; the 1st, 2nd, 4th, 8th, ... are logged)" if n > 1 else ""
        try:
            logger.error(text, *args, *([n] if n > 1 else []), exc_info=error)
        except Exception:  # noqa: BLE001  a log handler: there is nobody left to tell
            self.n += 1
