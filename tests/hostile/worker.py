"""The process in which the worlds are played; it may die, so it keeps a journal of where it is."""

from __future__ import annotations

import argparse
import json
import mmap
import struct
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from simt.runner import SimtLibrary

from .world import play

_JOURNAL = struct.Struct("<QQ")  # runs begun, seed of the world at hand


class Place(NamedTuple):
    """Where a worker is."""

    n_runs: int
    seed: int


class Journal:
    """A file of two numbers, kept in memory that outlives the process."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _JOURNAL.size)

    @staticmethod
    def create(path: Path) -> Journal:
        path.write_bytes(bytes(_JOURNAL.size))
        return Journal(path)

    def write(self, place: Place) -> None:
        _JOURNAL.pack_into(self._memory, 0, *place)

    def read(self) -> Place:
        return Place(*_JOURNAL.unpack_from(self._memory))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    parser.add_argument("journal", type=Path)
    for name in ("seed", "stride", "runs"):
        parser.add_argument(name, type=int)
    parser.add_argument("seconds", type=float)
    args = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)  # as in the tests: NumPy reports an overflow that is none of ours
    library, journal = SimtLibrary(args.library), Journal(args.journal)
    did: Counter[str] = Counter()
    findings: list[tuple[int, str]] = []
    n_runs, seed, end = 0, args.seed, time.monotonic() + args.seconds

    def beat() -> None:
        nonlocal n_runs
        n_runs += 1
        journal.write(Place(n_runs, seed))

    while n_runs < args.runs and time.monotonic() < end:
        try:
            did += play(seed, library, beat)
        except Exception:  # noqa: BLE001  whatever is no outcome of a run is a finding
            findings.append((seed, traceback.format_exc(limit=-6)))
        seed += args.stride
    print(json.dumps({"did": did, "findings": findings, "n_runs": n_runs}))


if __name__ == "__main__":
    main()
