"""`kvcanary explain`: what the black box of a guarded engine tells, in words, as JSON, or as a picture."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kvcanary.box_reader import Box, BoxRun, read_box
from kvcanary.cli.outputs import check_output, let_go_of_stdout, writing
from kvcanary.config import CanaryConfig
from kvcanary.errors import BlackBoxError, ConfigError
from kvcanary.story import Episode, Moment, as_json, episodes_of, stall_advice
from kvcanary.violations import fold_runs, line_of

MAX_LINES = 8  # of one kind
MAX_CAUSES = 3
WIDTH = 120
PLOT_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".webp")
_ENDS = {
    "close": "the guard was closed in good order",
    "exit": "the process came to its end without closing the guard",
    "dropped": "the manager was dropped without close()",
}
_NO_END = "no end was written: the process was killed, crashed hard, or is still running"


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("explain", help="tell the story of a black box", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="what black_box_path named")
    parser.add_argument("--run", dest="run_id", metavar="ID", help="only this run, or the runs of this process (pid)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of words")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="OUT.png",
        help="draw the pools of the last run with findings (or .svg, .pdf, .jpg, .webp)",
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave lines out also that are JSON, but of something else"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tell it, and return 0 if nothing was found, 1 if something was."""
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    try:
        box = read_box(arguments.file, skip_damaged=arguments.skip_damaged)
    except OSError as error:
        raise BlackBoxError(
            f"{arguments.file} cannot be read ({error.strerror or error}): give the file that black_box_path "
            "(KVCANARY_BLACK_BOX_PATH) named in the guarded process; it is written once a manager was made"
        ) from error
    chosen = _choose(box, arguments.run_id)
    code = int(any(one.has_findings for one in chosen))
    try:
        _tell(arguments, box, chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, and may still ask for the exit code
        let_go_of_stdout()
    return code


def _tell(arguments: argparse.Namespace, box: Box, chosen: Sequence[BoxRun]) -> None:
    if arguments.json:
        told = {"file": str(box.path), "is_cut": box.is_cut, "damaged_lines": box.damaged}
        print(json.dumps({**told, "runs": [as_json(one) for one in chosen]}, indent=1))
    else:
        _print("\n".join(tell(box, chosen)))
    if arguments.plot is not None:
        from kvcanary.cli.explain_plot import draw

        shown = [one for one in chosen if one.violations] or chosen
        with writing("--plot", arguments.plot):
            draw(shown[-1], arguments.plot)
        if not arguments.json:
            _print(f"\ndrawn: run {shown[-1].run} in {arguments.plot}")


def _print(text: str) -> None:
    """Print whatever a name holds: a path that is no UTF-8, letters that the terminal does not know."""
    coding = sys.stdout.encoding or "utf-8"
    print(text.encode(coding, "backslashreplace").decode(coding))


def _check_plot(path: Path) -> None:
    check_output("--plot", path)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot {path}: the kind of picture is not known; end it in {', '.join(PLOT_SUFFIXES)}")


def _choose(box: Box, wanted: str | None) -> list[BoxRun]:
    chosen = [one for one in box.runs if wanted in (None, one.run, str(one.pid))]
    if not chosen:
        known = ", ".join(f"{one.run} (pid {one.pid})" for one in box.runs)
        raise ConfigError(f"--run {wanted}: there is no such run; the file has {known}")
    return chosen


# ---- words -----------------------------------------------------------------------------------------------------------
def tell(box: Box, chosen: Sequence[BoxRun]) -> Iterator[str]:
    """The story of some runs of a file, line by line."""
    n_found = sum(one.has_findings for one in box.runs)
    yield f"{box.path}: {_count(len(box.runs), 'run')} of the guard, {n_found} with findings"
    if box.is_cut:
        yield "the last line breaks off, as of a process that died while it wrote; all before it is told here"
    if box.damaged:
        yield f"left out, as they cannot be read: lines {', '.join(map(str, _limited(box.damaged)))}"
    for one in chosen:
        yield ""
        yield from _tell_run(one)


def _tell_run(run: BoxRun) -> Iterator[str]:
    start = run.start or {}
    versions: Mapping[str, str] = start.get("versions") or {}
    host = f" on {start['host']}" if start.get("host") else ""
    yield f"== run {run.run}, pid {run.pid}{host}, {_when(run.first_time)} to {_when(run.last_time)}"
    if run.start is None:
        yield "   its first line is not in this file (it may be in FILE.old): what it guarded is not known"
    else:
        known = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield from _entry("versions", known)
        yield from _entry("guarded", "; ".join(map(_pool, run.pools)) + f"; backend {start.get('backend')}")
        yield from _entry("settings", _settings(run.config))
    if run.config.get("perturb"):
        yield from _entry("DRILL", f"perturb={run.config['perturb']!r} was armed: what follows may be done on purpose")
    end = run.end or {}
    yield from _entry("ended", _ENDS.get(str(end.get("how")), _NO_END))
    for key, words in (("left_out", "lines found no room any more"), ("errors", "events could not be written")):
        if end.get(key):
            yield from _entry("missing", f"{end[key]} {words}")
    if run.counters:
        yield from _entry("counters", _counters(run.counters))
    episodes = episodes_of(run)
    if not run.has_findings:
        yield from _entry("found", "nothing")
    for i, episode in enumerate(episodes, start=1):
        yield ""
        yield from _tell_episode(episode, f"story {i} of {len(episodes)}" if len(episodes) > 1 else "the story")
    yield from _tell_stalls(run)


def _tell_episode(episode: Episode, title: str) -> Iterator[str]:
    n, first, last = len(episode.violations), episode.moments[0], episode.moments[-1]
    steps = f"step {first.step}" if first is last else f"steps {first.step} to {last.step}"
    yield f"-- {title}: {_count(n, 'finding')}, {steps}, from {_when(first.time)} on"
    yield from _entry("first", line_of(*fold_runs([v for v in episode.violations if v.step == first.step])[0]))
    for moment in _limited(episode.moments):
        yield from _entry("", f"step {moment.step}: {_moment(moment)}" if isinstance(moment, Moment) else moment)
    requests = [f"{r} ({_count(n, 'finding')})" for r, n in sorted(episode.requests.items(), key=lambda item: -item[1])]
    yield from _entry("requests", ", ".join(map(str, _limited(requests))) or "none is named")
    for pool, slots in episode.slots.items():
        yield from _entry("places", f"pool '{pool}': {_ranges(slots)}")
    if episode.planes:
        yield from _entry(
            "bytes of", ", ".join(f"{name} ({n})" for name, n in list(episode.planes.items())[:MAX_LINES])
        )
    for cause in episode.causes[:MAX_CAUSES]:
        yield from _entry("likely", f"{cause.class_id} {cause.name} (confidence {cause.confidence:.1f})".strip())
        for sentence in cause.evidence:
            yield from _entry("", f"- {sentence}")
    for text in episode.advice:
        yield from _entry("do", text)


def _tell_stalls(run: BoxRun) -> Iterator[str]:
    if not run.stalls:
        return
    yield ""
    n, first = len(run.stalls), run.stalls[0]
    of_what = "the ranks" if first.get("error") == "RankStalledError" else "the health check"
    yield f"-- the guard itself: {_count(n, 'report')} of {of_what}, from step {first.get('step')} on"
    yield from _entry("said", str(first.get("text")))
    for text in stall_advice(run):
        yield from _entry("do", text)


def _entry(key: str, text: str) -> Iterator[str]:
    indent = " " * 13
    yield from textwrap.wrap(
        text, WIDTH, initial_indent=f"   {key:<10}", subsequent_indent=indent, break_long_words=False
    ) or [f"   {key}"]


def _limited(items: Sequence[Any]) -> Iterator[Any]:
    yield from items[:MAX_LINES]
    if len(items) > MAX_LINES:
        yield f"and {len(items) - MAX_LINES} more"


def _moment(moment: Moment) -> str:
    found = ", ".join(f"{n} x {reasons}" for reasons, n in sorted(moment.reasons.items(), key=lambda item: -item[1]))
    requests = [str(request) for request in moment.requests if request]
    whose = f" of request{'s' * (len(requests) > 1)} {', '.join(_limited(requests))}" if requests else ""
    return f"{found}{whose}"


def _ranges(slots: Sequence[int]) -> str:
    """Slots as ranges: 4 to 7, 12."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and slot == runs[-1][-1] + 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"{_count(len(slots), 'slot')}: {', '.join(map(str, _limited(words)))}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _pool(pool: Mapping[str, Any]) -> str:
    window = f", window {pool['window']}" if pool.get("window") else ""
    planes = pool.get("planes", ())
    layers = len({plane.get("layer") for plane in planes})
    return (
        f"pool '{pool.get('name')}' ({pool.get('kind')}{window}) of {pool.get('n_blocks')} blocks x "
        f"{pool.get('page_size')} slots, {len(planes)} planes in {layers} layers on {pool.get('device')}"
    )


def _settings(config: Mapping[str, Any]) -> str:
    defaults = {f.name: f.default for f in fields(CanaryConfig)}
    changed = [f"{name}={value}" for name, value in config.items() if name not in defaults or value != defaults[name]]
    return ", ".join(changed) or "the defaults"


def _counters(counters: Mapping[str, Any]) -> str:
    of_host = ("step", "violations_total", "observations_total")
    names = ("step", "forwards", "protected_tokens", "data_slots", "violations_total", "observations_total", "dropped")
    has_snapshot = bool(counters.get("snapshot_step") or counters.get("forwards"))
    told = [f"{name}={counters[name]}" for name in (names if has_snapshot else of_host) if name in counters]
    snapshot = f"of the device: as of step {counters.get('snapshot_step')}"
    return f"{', '.join(told)} ({snapshot if has_snapshot else 'of the device: none, as no snapshot was taken'})"


def _when(time: float) -> str:
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
