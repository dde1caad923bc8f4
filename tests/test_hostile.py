"""Hostile input in small: worlds that were findings once, fresh ones under the sanitizers, and bugs that are found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from agree import KERNELS_DIR
from hostile.campaign import Campaign, Outcome
from hostile.world import play
from simt.build import build, find_compiler, sanitizer_environment
from simt.runner import SimtLibrary

HERE = Path(__file__).resolve().parent
KEPT = (HERE / "hostile" / "seeds.txt").read_text().splitlines()
SEEDS = [int(line.split("#")[0]) for line in KEPT if not line.startswith("#")]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_found_once(library: SimtLibrary, seed: int) -> None:
    assert play(seed, library).total()


def test_the_worlds_do_all_that_they_claim(library: SimtLibrary) -> None:
    """Silence proves nothing of what never happens."""
    did = sum((play(seed, library) for seed in range(400, 425)), Counter())
    wanted = {"reported", "silent", "sweep", "move", "racy", "bundle", "ownership", "proof"}
    refused = {"refused ownership", "refused move", "refused planes", "refused bundle", "refused proof"}
    assert wanted | refused <= set(did), did


def campaign(library: Path, n_runs: int, *, is_sanitized: bool = False, max_silence: float = 120) -> Outcome:
    return Campaign(library, 1, max_silence, is_sanitized).run(0, n_runs, 600, max_findings=1)


def test_fresh_worlds_under_the_sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    if find_compiler() is None or sanitizer_environment() is None:
        pytest.skip("no address sanitizer: install g++ and libasan")
    path = build(KERNELS_DIR, tmp_path_factory.getbasetemp() / "kvcanary-kernels", sanitize=True)
    outcome = campaign(path, 200, is_sanitized=True)
    assert not outcome.findings, outcome.findings[0][1]
    assert outcome.n_runs >= 200


BUGS = {
    "an access outside the pool": (
        "slots.cuh",
        "if (slot >= pool.n_slots) return {-1, raw, KVC_SLOT_OUT};",
        "",
        ("the process ended with -11", "differs at"),  # a fault, or a claim word that is not the slot's
    ),
    "a wrong counter": ("verify.cu", "KVC_STAGE_TAIL, n);", "KVC_STAGE_TAIL, n + 1);", ("differs at",)),
    "no end": (
        "moves.cu",
        "uint64_t n_skipped = 0;",
        'uint64_t n_skipped = 0; while (kvc_state(p.guard)[KVC_STATE_FORWARD] > 3) { asm volatile(""); }',
        ("hangs: no end of a run in 5 s",),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_findings_are_found(tmp_path: Path, bug: str) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    name, right, wrong, signs = BUGS[bug]
    shutil.copytree(KERNELS_DIR, tmp_path / "kernels")
    source = (tmp_path / "kernels" / name).read_text()
    assert right in source
    (tmp_path / "kernels" / name).write_text(source.replace(right, wrong))
    outcome = campaign(build(tmp_path / "kernels", tmp_path / "out"), 200, max_silence=5)
    assert outcome.findings
    assert any(sign in text for _, text in outcome.findings for sign in signs), outcome.findings[0][1]


def test_the_command_line(library: SimtLibrary, tmp_path_factory: pytest.TempPathFactory) -> None:
    built = tmp_path_factory.getbasetemp() / "kvcanary-kernels"
    command = [sys.executable, "-m", "tests.hostile", "--runs", "40", "--build-dir", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    assert "runs in" in done.stdout and done.stdout.endswith("0 findings\n")
