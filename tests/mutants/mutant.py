"""What a mutant is, and a copy of the tree to plant it in."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kvcanary

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = "tests --ignore=tests/test_mutants.py"  # which sees every change, whatever it is
TIMEOUT = 900.0  # seconds, of a run that a mutant has made hang
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)  # not SIGKILL: memory ran out


class MutantError(Exception):
    """A mutant that cannot be planted, does not compile, or names tests that are not there."""


@dataclass(frozen=True)
class Mutant:
    """A small bug: one place in one file.

    Attributes:
        name: what is wrong.
        file: path from the root; ``old`` must be in it exactly once, and becomes ``new``.
        tests: what pytest is given, the narrowest that is enough to kill it.
        twin: the broken protocol of `tests/interleavings.py` that this is, where no CPU can show the difference.
        equivalent: why it is no bug, if it is none.
        is_quick: whether the suite itself plants it (`tests/test_mutants.py`).
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    twin: str = ""
    equivalent: str = ""
    is_quick: bool = False

    def planted_in(self, text: str) -> str:
        """The text of the file with the bug in it. Raises MutantError."""
        n = text.count(self.old)
        if n != 1 or self.old == self.new:
            raise MutantError(f"{self.name}: what is to be changed is {n} times in {self.file}:\n{self.old}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: ``killer`` is the first test that failed, or "timeout"; "" if it survived."""

    mutant: Mutant
    killer: str
    seconds: float

    @property
    def is_killed(self) -> bool:
        return bool(self.killer)


class Tree:
    """A copy of package, kernels and tests, and the kernels that were built from it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "tree"
        self._built = directory / "built"
        ignore = shutil.ignore_patterns("__pycache__", "_kernels", ".hypothesis")
        shutil.copytree(Path(kvcanary.__file__).parent, self.root / "kvcanary", ignore=ignore)
        shutil.copytree((ROOT / "kernels").resolve(), self.root / "kernels")
        shutil.copytree(ROOT / "tests", self.root / "tests", ignore=ignore)
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "bench"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.root / name, ignore=ignore)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, self.root / name)
        command = [sys.executable, "-c", "import kvcanary; print(kvcanary.__file__)"]
        found = subprocess.run(
            command, cwd=self.root, env=self._environment, capture_output=True, text=True, check=True
        )
        if not found.stdout.startswith(str(self.root)):
            raise MutantError(f"the copy in {self.root} is not what is tested, but {found.stdout.strip()}")

    @property
    def _environment(self) -> dict[str, str]:
        given = {k: v for k, v in os.environ.items() if not k.startswith("KVCANARY_")}
        mine = {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "KVC_SIMT_BUILD": str(self._built)}
        return {**given, **mine}

    @contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """With the bug in it."""
        path = self.root / mutant.file
        text = path.read_text()
        path.write_text(mutant.planted_in(text))
        try:
            yield
        finally:
            path.write_text(text)

    def test(self, tests: str) -> str:
        """Run some tests; the first that failed, or "timeout", or "a crash", or "" if all passed. Raises MutantError."""
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=1", "-m", "not gpu"]
        command = [sys.executable, "-m", "pytest", *options, *tests.split()]
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        if -done.returncode in CRASHES:
            return f"a crash (signal {-done.returncode})"
        if "BuildError" in done.stdout or done.returncode not in (0, 1, 2):
            raise MutantError(
                f"pytest {tests} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return (failed[1] if failed else "something") if done.returncode else ""

    def judge(self, mutant: Mutant, *, asks_everything: bool = True) -> Verdict:
        """Plant a mutant and run its tests, and all of them if those let it live."""
        start = time.perf_counter()
        with self.planted(mutant):
            killer = self.test(mutant.tests)
            if not killer and asks_everything and not mutant.equivalent:
                killer = self.test(EVERYTHING)
        return Verdict(mutant, killer, time.perf_counter() - start)
