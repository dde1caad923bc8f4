"""Options of `kvcanary drill` that do not go together, or with which nothing would be played: refused at the start."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvcanary.cli import fleet
from kvcanary.cli.drill_readme import check_markers
from kvcanary.cli.outputs import check_output
from kvcanary.errors import ConfigError
from kvcanary.sim import soak_options
from kvcanary.sim.soak_options import option

_OF_DRILL = ("scenario", "lifecycle", "sdc", "render_readme")
_OF_SOAK = (*soak_options.NAMES, "workers", "scheduler")
_CHOOSING = ("scenario", "lifecycle")  # that leave a part of the drill out


def check_options(arguments: argparse.Namespace) -> None:
    """See that every option that was given has its effect.

    Raises:
        ConfigError: one that has not, or a file that could not be written at the end.
    """
    if arguments.soak:
        _refuse(arguments, _OF_DRILL, "of the drill, and --soak plays none: leave out {options}, or --soak")
        if arguments.json is not None and not fleet.is_asked(arguments):
            raise ConfigError(
                f"--json {arguments.json} with --soak: a soak writes a report only over a fleet; add --workers N, or "
                "leave out --json"
            )
        soak_options.settle(arguments)
    else:
        _refuse(arguments, _OF_SOAK, "for a soak: add --soak")
    if arguments.render_readme is not None:
        choosing = _CHOOSING if arguments.lifecycle != "both" else _CHOOSING[:1]
        _refuse(arguments, choosing, "no whole drill, of which --render-readme tells: leave out {options}")
    for name in ("json", "render_readme"):
        if getattr(arguments, name) is not None:
            check_output(option(name), getattr(arguments, name))
    if arguments.render_readme is not None:
        _check_readme(arguments.render_readme)


def _refuse(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    given = [option(name) for name in names if getattr(arguments, name) not in (None, [])]
    if given:
        words = ", ".join(given)
        raise ConfigError(f"{words} {'is' if len(given) == 1 else 'are'} {why.format(options=words)}")


def _check_readme(path: Path) -> None:
    try:
        check_markers(path.read_text(encoding="utf-8"))
    except (ConfigError, OSError, ValueError) as error:
        raise ConfigError(f"--render-readme {path}: {error}") from error
