"""Reads a black box: the lines of one file, sorted by the manager that wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcanary.black_box import SCHEMA
from kvcanary.box_file import MAX_PROCESS_BYTES, check_kind
from kvcanary.errors import BlackBoxError
from kvcanary.layout import MAX_SLOTS
from kvcanary.records import from_dict
from kvcanary.violations import Violation

KINDS = ("start", "violation", "stall", "counters", "end")
_END_OF_TIME = 250_000_000_000  # in the year 9892: what can be shown as a date
_END_OF_STEPS = 1 << 63  # what an axis of a picture can show
MAX_BYTES = 1 << 30  # of a file: it is read into memory, and a log that was given by mistake must not fill that
_SHOWN = 40  # bytes of a bad line that an error shows


@dataclass
class BoxRun:
    """What one manager wrote.

    Attributes:
        run: its id; ``pid`` its process.
        start: the first line, None where it was lost.
        violations: (time, violation) in the order of their sighting; times are seconds since the epoch.
        stalls: lines of the health check.
        counters: the last ones, None if there are none.
        end: the last line, None where the process did not come to it.
        first_time: of its lines; ``last_time`` likewise.
    """

    run: str
    pid: int
    first_time: float
    last_time: float
    start: dict[str, Any] | None = None
    violations: list[tuple[float, Violation]] = field(default_factory=list)
    stalls: list[dict[str, Any]] = field(default_factory=list)
    counters: dict[str, Any] | None = None
    end: dict[str, Any] | None = None

    @property
    def has_findings(self) -> bool:
        return bool(self.violations or self.stalls)

    @property
    def is_on_host(self) -> bool:
        """Whether it guarded KV in host memory; False where the first line was lost."""
        return (self.start or {}).get("backend") == "host"

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = (self.start or {}).get("config") or {}
        return found

    @property
    def pools(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (self.start or {}).get("pools") or []
        return found


@dataclass
class Box:
    """A file: its runs in the order in which they began, and what could not be read.

    Attributes:
        is_cut: the last line breaks off: the process died while it wrote.
        damaged: numbers of the other lines that were left out.
    """

    path: Path
    runs: list[BoxRun]
    is_cut: bool
    damaged: list[int]


def read_box(path: Path, *, skip_damaged: bool = False) -> Box:
    """Read a black box.

    A line that is no JSON broke off (a disk that was full, a process that died and was started again on the same file):
    it is left out, and the lines around it are read.

    Args:
        skip_damaged: leave lines out also that are JSON, but of something else, instead of refusing the file.

    Raises:
        BlackBoxError: no black box, or one of another version, or a line that is JSON of something else.
        OSError: the file cannot be read, or is not a regular one.
    """
    lines = _content(path).split(b"\n")
    runs: dict[str, BoxRun] = {}
    damaged: list[int] = []
    is_cut, first = False, ""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _add(runs, _parse(line))
            continue
        except _OtherVersionError as error:
            raise BlackBoxError(f"{path}, line {number}: {error}") from None
        except BlackBoxError as error:
            problem, is_torn = str(error), isinstance(error, _TornError)
        first = first or f"line {number} is {problem}"
        if number == len(lines) and (runs or damaged):
            is_cut = True
        elif skip_damaged or is_torn:
            damaged.append(number)
        elif not runs:
            raise BlackBoxError(
                f"{path} is no black box of kvcanary: {first}. Give the file that black_box_path named; if this is one "
                "and only begins badly, --skip-damaged reads what is behind it"
            )
        else:
            raise BlackBoxError(
                f"{path}, line {number} of {len(lines)}, is damaged: {problem}. --skip-damaged leaves such lines out"
            )
    if not runs and first:
        raise BlackBoxError(
            f"{path} is no black box of kvcanary: {first}, and no other line is one of a black box. Give the file that "
            "black_box_path named"
        )
    if not runs:
        raise BlackBoxError(f"{path} holds no line of a black box of kvcanary: give the file that black_box_path named")
    return Box(path, list(runs.values()), is_cut, damaged)


def _content(path: Path) -> bytes:
    """All of a regular file; a pipe that nobody writes to would be waited for without end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        check_kind(file.fileno())
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes > MAX_BYTES:
            raise BlackBoxError(
                f"{path} has {n_bytes} bytes, at most {MAX_BYTES} are read: a process writes no more than "
                f"{MAX_PROCESS_BYTES} to a black box: it is something else. Give the file that black_box_path named"
            )
        return file.read()


class _TornError(BlackBoxError):
    pass


class _OtherVersionError(BlackBoxError):
    pass


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # of JSON or of UTF-8; brackets without end
        raise _TornError(f"not JSON ({_start_of(line)})") from None
    if not isinstance(found, dict) or "black_box" not in found:
        raise BlackBoxError(f"JSON of something else ({_start_of(line)})")
    if found["black_box"] != SCHEMA:
        raise _OtherVersionError(
            f"schema {found['black_box']!r}, this version of kvcanary reads schema {SCHEMA}: use the one that wrote it"
        )
    if found.get("kind") not in KINDS:
        raise BlackBoxError(f"of kind {found.get('kind')!r}; the kinds are {', '.join(KINDS)}")
    if not isinstance(found.get("run"), str) or not isinstance(found.get("pid"), int) or not _is_time(found):
        raise BlackBoxError(f"without a valid run, pid or time ({_start_of(line)})")
    return found


def _need(line: Mapping[str, Any], name: str, kind: type) -> Any:
    value = line.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BlackBoxError(f"{name} is {_short(value)}, not a value of type {kind.__name__}")
    return value


def _check_start(line: Mapping[str, Any]) -> None:
    """What the story and the picture rely on."""
    _need(_need(line, "config", dict), "verify_data_every", int)
    _need(line, "versions", dict)
    for pool in _need(line, "pools", list):
        if not isinstance(pool, dict):
            raise BlackBoxError(f"a pool is {_short(pool)}")
        _need(pool, "name", str)
        if _need(pool, "page_size", int) < 1 or _need(pool, "n_blocks", int) < 1:
            raise BlackBoxError(f"pool {_short(pool['name'])} has no slots")
        if not 1 <= pool["page_size"] * pool["n_blocks"] <= MAX_SLOTS:
            raise BlackBoxError(f"pool {_short(pool['name'])} has more slots than can be")
        if not all(type(block) is int for block in _need(pool, "reserved_blocks", list)):
            raise BlackBoxError(f"reserved_blocks is {_short(pool['reserved_blocks'])}")
        for plane in _need(pool, "planes", list):
            if not isinstance(plane, dict):
                raise BlackBoxError(f"a plane is {_short(plane)}")
            _need(plane, "layer", int)


def _check_step(step: int) -> None:
    if not 0 <= step < _END_OF_STEPS:
        raise BlackBoxError(f"step is {_short(step)}, not 0 to {_END_OF_STEPS - 1}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _start_of(line: bytes) -> str:
    return repr(line[:_SHOWN].decode(errors="replace"))


def _is_time(found: dict[str, Any]) -> bool:
    return isinstance(found.get("time"), (int, float)) and 0 <= found["time"] < _END_OF_TIME


def _add(runs: dict[str, BoxRun], line: dict[str, Any]) -> None:
    kind, time = line["kind"], float(line["time"])
    violation = None
    if kind == "violation":
        violation = from_dict(_need(line, "violation", dict))
        if violation.page_size < 1:
            raise BlackBoxError(f"a violation with page_size={violation.page_size}")
        _check_step(violation.step)
    elif kind == "start":
        _check_start(line)
    elif kind == "stall":
        _check_step(_need(line, "step", int))
        _need(line, "error", str)
        _need(line, "text", str)
    elif line.get("counters") is not None:
        _need(line, "counters", dict)
    run = runs.setdefault(line["run"], BoxRun(line["run"], line["pid"], time, time))
    run.first_time, run.last_time = min(run.first_time, time), max(run.last_time, time)
    if violation is not None:
        run.violations.append((time, violation))
    elif kind == "start":
        run.start = line
    elif kind == "stall":
        run.stalls.append(line)
    elif kind == "counters":
        run.counters = line.get("counters") or run.counters
    else:
        run.end = line
        run.counters = line.get("counters") or run.counters
