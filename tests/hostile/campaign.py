"""Many worlds in child processes: findings are what these say, their deaths, and their silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from simt.build import sanitizer_environment

from .worker import Journal

TESTS = Path(__file__).resolve().parents[1]
_KEPT = 3000  # characters of what a dead child has said: a sanitizer's report, less its map of the memory


@dataclass
class Outcome:
    """What came of it: how many runs ended how, and the findings as (seed of the world, text)."""

    n_runs: int = 0
    seconds: float = 0
    did: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)

    def add(self, said: dict[str, Any]) -> None:
        self.n_runs += said["n_runs"]
        self.did += Counter(said["did"])
        self.findings += [(int(seed), text) for seed, text in said["findings"]]


@dataclass
class _Child:
    """A worker, and what is left for it to do."""

    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]
    journal: Journal
    n_left: int
    beaten: int = 0
    beaten_at: float = field(default_factory=time.monotonic)


class Campaign:
    """Plays worlds of a library until enough runs were made or the time is over.

    Args:
        processes: child processes at once; child i plays seeds first_seed + i, first_seed + i + processes, ...
        max_silence: seconds that one run may take before it counts as a hang.
        is_sanitized: whether the library is, so that the children need the sanitizer's runtime.
    """

    def __init__(self, library: Path, processes: int, max_silence: float, is_sanitized: bool) -> None:
        self._library, self._processes, self._max_silence = library, processes, max_silence
        self._max_findings = 0
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
        self._environment.setdefault("OPENBLAS_NUM_THREADS", "1")
        if is_sanitized:
            found = sanitizer_environment()
            if found is None:
                raise SystemExit("no address sanitizer: install libasan for the C++ compiler, or leave --sanitize out")
            self._environment |= found

    def run(self, first_seed: int, n_runs: int, seconds: float, max_findings: int = 10) -> Outcome:
        """What came of it; SystemExit where not even the first run could be made.

        Args:
            max_findings: after so many, a process that died has no successor.
        """
        self._max_findings = max_findings
        outcome, start = Outcome(), time.monotonic()
        end = start + seconds
        with tempfile.TemporaryDirectory() as name:
            each = -(-n_runs // self._processes)
            children = [self._start(Path(name), first_seed + i, each, end) for i in range(self._processes)]
            while children:
                time.sleep(0.2)
                children = [c for child in children if (c := self._look_at(child, outcome, Path(name), end))]
        outcome.seconds = time.monotonic() - start
        return outcome

    def _start(self, folder: Path, seed: int, n_runs: int, end: float) -> _Child:
        number = len(list(folder.iterdir()))
        path = folder / f"{number}.journal"
        journal = Journal.create(path)
        left = max(1.0, end - time.monotonic())
        command = [sys.executable, "-m", "hostile.worker", str(self._library), str(path)]
        command += [str(n) for n in (seed, self._processes, n_runs, left)]
        out, err = (folder / f"{number}.out").open("w+b"), (folder / f"{number}.err").open("w+b")
        process = subprocess.Popen(command, env=self._environment, stdout=out, stderr=err)
        return _Child(process, out, err, journal, n_runs)

    def _look_at(self, child: _Child, outcome: Outcome, folder: Path, end: float) -> _Child | None:
        """The child, its successor, or None where there is nothing left to do."""
        code, place, now = child.process.poll(), child.journal.read(), time.monotonic()
        if code is None and place.n_runs != child.beaten:
            child.beaten, child.beaten_at = place.n_runs, now
        is_hanging = code is None and now - child.beaten_at > self._max_silence
        if code is None and not is_hanging:
            return child
        if is_hanging:
            child.process.kill()
            child.process.wait()
        child.out.seek(0)
        child.err.seek(0)
        said, complaint = child.out.read(), child.err.read().decode(errors="replace")
        child.out.close()
        child.err.close()
        if code == 0:
            outcome.add(json.loads(said))
            return None
        what = f"the process ended with {code}"
        if is_hanging:
            what = f"hangs: no end of a run in {self._max_silence:.0f} s"
        if not place.n_runs:
            raise SystemExit(f"the worker did not come to its first run ({what}):\n{complaint[-_KEPT:]}")
        outcome.n_runs += place.n_runs
        outcome.findings.append((place.seed, f"{what}\n{complaint[:_KEPT]}"))
        n_left = child.n_left - place.n_runs
        if n_left <= 0 or now >= end or len(outcome.findings) >= self._max_findings:
            return None
        return self._start(folder, place.seed + self._processes, n_left, end)
