"""The command line: `kvcanary demo`, `kvcanary drill`, `kvcanary doctor` and `kvcanary explain`.

An exit code of 0 says that all is as it should be, 1 that it is not, 2 that the command could not do its work.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kvcanary
from kvcanary.cli import demo, doctor, drill, explain
from kvcanary.cli.outputs import let_go_of_stdout
from kvcanary.errors import KvCanaryError

_UNHEARD = logging.NullHandler()  # the commands tell of violations themselves


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; wrong arguments, --help and --version exit as argparse does."""
    parser = argparse.ArgumentParser(prog="kvcanary", description=kvcanary.__doc__)
    parser.add_argument("--version", action="version", version=f"kvcanary {kvcanary.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (demo, drill, doctor, explain):
        module.add_parser(commands)
    _open_closed_streams()
    logging.getLogger("kvcanary").addHandler(_UNHEARD)  # which does nothing where it is there
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, say) has seen enough
        let_go_of_stdout()
        return 0
    except (KvCanaryError, OSError) as error:
        print(f"kvcanary {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kvcanary {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return code


def _open_closed_streams() -> None:
    """What is printed goes nowhere where the caller has closed stdout or stderr (``>&-``); Python has None there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  for the whole process
