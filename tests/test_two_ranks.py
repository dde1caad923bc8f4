"""The example of two ranks, over MPI: two processes on this host, or two GPUs with NCCL."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "two_ranks.py"
if not EXAMPLE.is_file():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)
FAULT_AT, EVERY, WITHIN = map(
    int, re.findall(r"FAULT_AT, EVERY, WITHIN = .*, (\d+), (\d+), (\d+)$", EXAMPLE.read_text(), re.MULTILINE)[0]
)


def mpiexec() -> str:
    """The one of this environment, else of the machine."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if found is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip('mpi4py or mpiexec is missing: pip install "kvcanary[mpi]"')
    return found


def run(*options: str) -> tuple[int, str, str]:
    """Exit code, what rank 0 said, and rank 1; each rank says one line at its end."""
    command = [mpiexec(), "-n", "2"]
    if "hydra" in subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout.lower():
        command.insert(1, "-disable-auto-cleanup")  # of MPICH: else one rank's end is the end of the other
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Of Open MPI: else one rank's end is the end of the other.
    environment |= {f"{name}_abort_on_non_zero_status": "0" for name in ("OMPI_MCA_orte", "PRTE_MCA_prte")}
    if os.geteuid() == 0:  # as in a container; Open MPI would refuse it
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ended = subprocess.run(
        [*command, sys.executable, str(EXAMPLE), *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    lines = {rank: re.findall(rf"^rank {rank}\b.*", ended.stdout, re.MULTILINE) for rank in (0, 1)}
    assert all(len(of_rank) <= 1 for of_rank in lines.values()), ended.stdout
    assert lines[0], ended.stdout + ended.stderr
    return ended.returncode, lines[0][0], "".join(lines[1])


def step_of(line: str) -> int:
    found = re.search(r"raises at step (\d+)", line)
    assert found, line
    return int(found[1])


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_two_honest_ranks_are_silent() -> None:
    code, *lines = run("--steps", "40")
    assert code == 0
    assert [line for line in lines if "40 steps, 4 agreements, all silent" in line] == lines


def test_a_fault_on_rank_1_is_raised_on_both_at_the_same_step() -> None:
    code, *lines = run("--fault", "flip")
    assert code == 0
    first, second = map(step_of, lines)
    assert first == second
    assert all("worst and first is rank 1: DATA" in line for line in lines)
    assert "no new violations on this rank" in lines[0] and "1 new violations on this rank" in lines[1]


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_rank_that_does_not_come_is_reported_by_the_other_within_the_stated_steps(fault: str) -> None:
    code, line, _other = run("--fault", fault)
    assert code != 0
    assert "rank 1 did not come to the agreement" in line
    assert step_of(line) <= FAULT_AT + 1 + EVERY + WITHIN


@pytest.mark.gpu
@pytest.mark.parametrize("nccl", ["cupy", "nccl4py"])
@pytest.mark.parametrize("fault", ["flip", "die"])
def test_the_same_over_nccl_on_two_gpus(nccl: str, fault: str) -> None:
    import cupy

    from kvcanary.backends.nccl import available

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    if not available(nccl):
        pytest.skip(f'no NCCL for {nccl}: pip install "kvcanary[nccl]"')
    _code, line, other = run("--nccl", nccl, "--fault", fault)
    if fault == "flip":
        assert step_of(line) == step_of(other) and "rank 1: DATA" in line and "rank 1: DATA" in other
    else:
        assert "rank 1 did not come" in line and step_of(line) <= FAULT_AT + 1 + EVERY + WITHIN
