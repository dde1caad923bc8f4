"""NVTX ranges, as a tool sees them: a small one of our own, which NVTX loads like Nsight Systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import ToyEngine

from kvcanary import CanaryManager, ConfigError

TESTS = Path(__file__).resolve().parent
WORKER = """
import sys
from engine import ToyEngine

engine = ToyEngine(verify_data_every=1, nvtx=sys.argv[1] == "on", stats_print_every_n_steps=2,
                   health_check_every_n_steps=2, health_check_warmup_steps=0, health_policy="raise", sweep_interval=1)
engine.manager.attach_resident_set(lambda: None)  # a sweep that is due at each step, and finds nothing
engine.step((0, 0, 4))
engine.k[0][1, 1, 0, 0] ^= 1
engine.step((0, 4, 1))
try:
    for _ in range(4):  # a guard that does not run: the observer raises, and its range ends all the same
        with engine.manager.step():
            pass
except RuntimeError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool, built."""
    pytest.importorskip("nvtx", reason='pip install "kvcanary[nvtx]"')
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: install gcc or clang")
    library = tmp_path_factory.mktemp("nvtx") / "tool.so"
    source = str(TESTS / "nvtx_tool.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), source], check=True)
    return library


def trace(tool: Path, log: Path, switch: str) -> list[str]:
    paths = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    told = {"NVTX_INJECTION64_PATH": str(tool), "NVTX_TOOL_LOG": str(log), "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", WORKER, switch],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout == "CanaryStalledError\n"
    return log.read_text().splitlines() if log.exists() else []


def test_a_tool_sees_the_host_phases_nested_in_one_domain(tool: Path, tmp_path: Path) -> None:
    lines = trace(tool, tmp_path / "log", "on")
    open_ranges: list[str] = []
    seen: list[tuple[str, ...]] = []
    for line in lines:
        what, _, message = line.partition(": ")
        assert what in ("push kvcanary", "pop kvcanary")
        if what == "push kvcanary":
            open_ranges.append(message)
            seen.append(tuple(open_ranges))
        else:
            open_ranges.pop()
    assert not open_ranges, "every range ends, also those that an exception left"
    step = [("begin_step",), ("end_step",), ("end_step", "sweep")]
    assert seen[:3] == step and seen[3:6] == step
    # The second step finds the flipped bit, and stages what its snapshots shall tell.
    observers = ["ViolationObserver", "KernelRunCounterHealthChecker", "PeriodicCanaryStatsLogger"]
    assert seen[6:9] == [("end_step", f"observer {name}") for name in observers]
    assert set(seen) == {*step, *(("end_step", f"observer {name}") for name in observers)}


def test_without_the_switch_a_tool_sees_nothing(tool: Path, tmp_path: Path) -> None:
    assert trace(tool, tmp_path / "log", "off") == []


def test_without_the_switch_the_methods_are_the_plain_ones() -> None:
    manager = ToyEngine().manager
    assert "end_step" not in vars(manager) and manager.end_step.__func__ is CanaryManager.end_step  # type: ignore[attr-defined]
    assert not any("step" in vars(part) for part in (manager._sweep, *manager._observers))


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "nvtx", None)
    with pytest.raises(ConfigError, match=r'pip install "kvcanary\[nvtx\]"'):
        ToyEngine(nvtx=True)
