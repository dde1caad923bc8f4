"""`kvcanary doctor`: it ends, tells what is missing and how to get it, and fails only for what does not work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import why_no_gpu

from kvcanary.backends.launches import KERNELS
from kvcanary.cli import child, doctor, main
from kvcanary.errors import BackendError

NAMES = [kernel for names in KERNELS.values() for kernel in names]
H200 = {"name": "NVIDIA H200", "capability": [9, 0], "bytes": 150 << 30}
Doctor = Callable[[], tuple[int, dict[str, dict[str, str]]]]


@pytest.fixture
def run_doctor(tmp_path: Path) -> Doctor:
    """Runs it and returns its exit code, and its checks by name."""

    def run() -> tuple[int, dict[str, dict[str, str]]]:
        path = tmp_path / "doctor.json"
        code = main(["doctor", "--json", str(path)])
        report = json.loads(path.read_text())
        assert report["ok"] == (code == 0)
        return code, {check["name"]: check for check in report["checks"]}

    return run


def driver_of(**facts: Any) -> dict[str, Any]:
    return {"status": 0, "text": "no error", "version": 13000, "gpus": [H200], **facts}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine on which all is there; what its parts answer can be changed."""
    answers: dict[str, Any] = {"driver": driver_of(), "kernels": [[name, 1000, ""] for name in NAMES]}

    def ask(part: str, timeout_s: float) -> Any:
        if isinstance(answers[part], Exception):
            raise answers[part]
        return answers[part]

    ok = doctor.Check("NVRTC", doctor.Status.OK, "13.0")
    monkeypatch.setattr(child, "ask", ask)
    monkeypatch.setattr(doctor, "import_module", lambda name: type(name, (), {"__version__": "1.0"}))
    monkeypatch.setattr(doctor, "check_nvrtc", lambda install: ok)
    monkeypatch.setattr(doctor, "check_compile", lambda arch, nvrtc: iter([doctor.Check("compile", ok.status, arch)]))
    return answers


def no_module(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}")


# ---- without a GPU ---------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_this_machine_without_a_gpu_is_fine(run_doctor: Doctor, capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = run_doctor()
    out = capsys.readouterr().out
    assert code == 0
    assert checks["host backend"]["status"] == checks["kernel sources"]["status"] == "ok"
    assert checks["GPU"]["status"] == "missing"
    assert checks["kernel self-test"]["status"] == "skipped"
    assert "needs a GPU" in checks["kernel self-test"]["detail"]
    assert "The guard works on the host" in out
    assert all(check["fix"] in out for check in checks.values())


def test_missing_packages_name_their_install_command(
    run_doctor: Doctor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "import_module", no_module)
    monkeypatch.setattr(child, "ask", lambda part, timeout_s: driver_of(status=None, text="no such file", gpus=[]))
    code, checks = run_doctor()
    assert code == 0
    for name in ("CuPy", "cuda.core", "cuda.bindings", "NVRTC"):
        assert checks[name]["status"] == "missing"
        assert 'pip install "kvcanary[cuda' in checks[name]["fix"]
    assert checks["kernel compilation"]["status"] == "skipped"
    assert 'pip install "kvcanary[cuda' in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("fake_gpu")
def test_a_host_backend_that_does_not_work_fails(
    run_doctor: Doctor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "host_self_test", lambda: "it does not report DATA")
    code, checks = run_doctor()
    assert code == 1
    assert checks["host backend"]["status"] == "failed"
    assert "Something does not work: host backend" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_gpu")
def test_no_check_raises(run_doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> str:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(doctor, "host_self_test", crash)
    code, checks = run_doctor()
    assert code == 1
    assert checks["host backend"]["detail"] == "ZeroDivisionError: division by zero"


# ---- with a GPU that is played ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("fake_gpu")
def test_all_is_green_with_every_kernel_listed(run_doctor: Doctor, capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = run_doctor()
    assert code == 0
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert set(NAMES) <= set(checks)
    assert checks["GPU"]["detail"] == "NVIDIA H200, compute capability 9.0, 150 GiB"
    assert checks["compile"]["detail"] == "sm_90"
    assert "Everything works" in capsys.readouterr().out


def test_a_kernel_that_differs_fails(run_doctor: Doctor, fake_gpu: dict[str, Any]) -> None:
    fake_gpu["kernels"][1][2] = "HEAD stamps: 3 of 90 values differ"
    code, checks = run_doctor()
    assert code == 1
    assert checks[NAMES[1]]["status"] == "failed"
    assert checks[NAMES[0]]["status"] == "ok"


def test_a_self_test_that_dies_fails(run_doctor: Doctor, fake_gpu: dict[str, Any]) -> None:
    fake_gpu["kernels"] = BackendError("the process ended with code -11: it wrote nothing")
    code, checks = run_doctor()
    assert code == 1
    assert "-11" in checks["kernel self-test"]["detail"]


@pytest.mark.parametrize(
    ("facts", "status", "said"),
    [
        (driver_of(status=100, text="no CUDA-capable device is detected", gpus=[]), "ok", "CUDA 13.0"),
        (driver_of(status=34, text="stub library", gpus=[]), "missing", "stub library"),
        (driver_of(status=803, text="unsupported display driver", gpus=[]), "failed", "CUDA error 803"),
        (driver_of(version=11040), "failed", "CUDA 11.4, needed is 12.0"),
        (BackendError("no answer within 60 s"), "failed", "no answer within 60 s"),
    ],
)
def test_drivers(run_doctor: Doctor, fake_gpu: dict[str, Any], facts: Any, status: str, said: str) -> None:
    fake_gpu["driver"] = facts
    code, checks = run_doctor()
    assert checks["NVIDIA driver"]["status"] == status
    assert said in checks["NVIDIA driver"]["detail"]
    assert code == (status == "failed")


def test_the_extra_fits_the_driver() -> None:
    assert "cuda13" in doctor.install_command(13010)
    assert "cuda12" in doctor.install_command(12080)
    assert "cuda13" in doctor.install_command(0)
    assert "cuda12" in doctor.install_command(0)


# ---- child processes -------------------------------------------------------------------------------------------------
def test_a_child_that_hangs_is_given_up() -> None:
    with pytest.raises(BackendError, match="no answer within 0 s"):
        child.ask("driver", 0.001)


def test_a_child_that_raises_says_what() -> None:
    with pytest.raises(BackendError, match="KeyError: 'no such part'"):
        child.ask("no such part", 60)


def test_a_child_that_dies_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho cannot go on >&2\nkill -SEGV $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(BackendError, match="ended with code -11: cannot go on"):
        child.ask("driver", 60)


def test_the_driver_part_answers_on_any_machine() -> None:
    facts = child.ask("driver", 60)
    assert set(facts) == {"status", "text", "version", "gpus"}


@pytest.mark.gpu
def test_this_gpu_is_all_green(run_doctor: Doctor) -> None:
    code, checks = run_doctor()
    assert code == 0
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert set(NAMES) <= set(checks)


def test_a_report_that_cannot_be_written_is_refused_before_the_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"kvcanary doctor: --json {tmp_path} is a directory: give the path of a file\n")
