"""What the commands write: files are refused at the start where they cannot be, and a reader may go away."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvcanary.errors import ConfigError


def check_output(option: str, path: Path) -> None:
    """See that a file can be written, before the work that it shall tell of is done; nothing is made or changed.

    Args:
        option: that names it, ``--json`` say.

    Raises:
        ConfigError: it has no directory, is one, or may not be written.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}; make it first")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a directory: give the path of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} may not be written by this process: give another path")


def write_output(option: str, path: Path, text: str) -> None:
    """Write a file as UTF-8.

    Raises:
        ConfigError: it cannot be written.
    """
    with writing(option, path):
        path.write_text(text, encoding="utf-8")


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Around what writes a file.

    Raises:
        ConfigError: it cannot be written: a full disk, say.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(
            f"{option} {path} cannot be written ({why}): give another path; what was said holds"
        ) from error


def let_go_of_stdout() -> None:
    """Nobody reads what is printed any more: the rest goes nowhere, also what Python still has when it ends."""
    with suppress(OSError, ValueError):  # an stdout of no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
