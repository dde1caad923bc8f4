"""One line of the log, as text or as a JSON object."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from kvcanary.records import as_dict
from kvcanary.violations import Violation


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
