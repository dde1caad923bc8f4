"""`kvcanary demo`: each fault is found as promised, told in words and in JSON, and whatever cannot work says so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import why_no_gpu

import kvcanary
from kvcanary.cli import demo, main
from kvcanary.cli.report import MAX_LINES
from kvcanary.sim.engine import SimEngine
from kvcanary.sim.faults import FAULTS, BitFlip, Fault
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.serve import divergences, serve
from kvcanary.sim.texts import load_texts

KEYS = {
    *("backend", "steps", "requests", "protected_tokens", "fault", "violations", "detected_after_steps"),
    *("output_diverged_at", "expected", "ok", "verify_data_every", "injected", "diverged", "decode_steps"),
    "graph_launches",
}
VIOLATION_KEYS = {"reasons", "launch_tag", "slot", "position", "request", "layer", "step"}
DEFAULT = ["demo", "--backend", "host"]
SHORT = [text[:70] for text in load_texts().values()]

Demo = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a demo over short prompts."""
    files = [tmp_path / f"{i}.txt" for i in range(len(SHORT))]
    for file, text in zip(files, SHORT, strict=True):
        file.write_bytes(text)
    return [*DEFAULT, "--max-tokens", "16", "--prompt", *map(str, files)]


@pytest.fixture
def run_demo(small: list[str], tmp_path: Path) -> Demo:
    """Runs the demo with more arguments, and returns its exit code and its report."""

    def run(*arguments: str, base: list[str] = small) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "demo.json"
        code = main([*base, "--json", str(path), *arguments])
        return code, json.loads(path.read_text())

    return run


def reasons(report: dict[str, Any]) -> set[str]:
    return {reason for violation in report["violations"] for reason in violation["reasons"]}


# ---- what is found ---------------------------------------------------------------------------------------------------
def test_bit_flip_is_data_at_that_slot_and_layer(run_demo: Demo) -> None:
    code, report = run_demo("--fault", "bit-flip", base=DEFAULT)
    assert code == 0
    assert report["ok"]
    assert reasons(report) == {"DATA"}
    injected = report["injected"]
    for violation in report["violations"]:
        assert {k: violation[k] for k in ("slot", "layer", "request")} == {
            k: injected[k] for k in ("slot", "layer", "request")
        }
        assert violation["launch_tag"] in ("HEAD_K_FULL", "HEAD_V_FULL")
    assert 0 <= report["detected_after_steps"] < report["verify_data_every"] == 4
    assert report["violations"][0]["step"] == injected["step"] + report["detected_after_steps"]
    assert report["output_diverged_at"] >= injected["step"]


def test_stale_table_is_named_in_the_same_step(run_demo: Demo) -> None:
    code, report = run_demo("--fault", "stale-table")
    assert code == 0
    assert reasons(report) & {"CHAIN", "TOKEN", "POSITION"}
    assert report["detected_after_steps"] == 0
    assert {v["request"] for v in report["violations"]} == {report["injected"]["request"]}
    assert {v["step"] for v in report["violations"]} == {report["injected"]["step"]}


def test_lost_write_is_unwritten_by_the_next_step(run_demo: Demo) -> None:
    code, report = run_demo("--fault", "lost-write")
    assert code == 0
    assert reasons(report) == {"UNWRITTEN"}
    assert {v["slot"] for v in report["violations"]} == {report["injected"]["slot"]}
    assert report["detected_after_steps"] <= 1


def test_none_reports_nothing_and_leaves_the_output_alone(run_demo: Demo) -> None:
    code, report = run_demo("--fault", "none")
    assert code == 0
    assert report["ok"]
    assert report["violations"] == report["diverged"] == []
    assert report["injected"] is report["detected_after_steps"] is report["output_diverged_at"] is None


def test_report_has_every_key(run_demo: Demo) -> None:
    report = run_demo("--fault", "bit-flip")[1]
    assert set(report) == KEYS
    assert set(report["violations"][0]) == VIOLATION_KEYS
    assert set(report["injected"]) == {"words", "step", "request", "slot", "position", "layer"}
    assert report["backend"] == "host"
    assert report["requests"] == len(SHORT)
    assert report["steps"] > report["decode_steps"] > 0
    assert report["protected_tokens"] > 0
    assert report["graph_launches"] is None


def test_at_step_is_the_first_step_over_the_damage(run_demo: Demo) -> None:
    report = run_demo("--fault", "stale-table", "--at-step", "7")[1]
    assert report["injected"]["step"] == 7


def test_prompts_are_served_from_files(
    run_demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MAX_PROMPT_BYTES", 200)
    files = [tmp_path / "first.txt", tmp_path / "second.txt"]
    files[0].write_text("A slot knows who is in it. " * 3)
    files[1].write_bytes(bytes(range(1, 255)))
    code, report = run_demo("--fault", "stale-table", "--prompt", *map(str, files))
    assert code == 0
    assert report["requests"] == 2
    out = capsys.readouterr().out
    assert "only the first 200 of 254 bytes are served" in out
    assert "first.txt (80 bytes)" in out


# ---- what is said ----------------------------------------------------------------------------------------------------
def test_text_tells_the_whole_story(run_demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_demo("--fault", "stale-table")[1]
    out = capsys.readouterr().out
    assert "backend host: as asked" in out
    assert "verify_data_every=4" in out
    assert "[canary] step=" in out
    assert report["injected"]["words"] in out
    assert report["expected"] in out
    kinds = {(v["step"], v["request"], *v["reasons"]) for v in report["violations"]}
    assert out.count(f"  step {report['injected']['step']}, ") == min(len(kinds), MAX_LINES)
    assert f"{len(report['violations'])} violations" in out
    assert "in full:  reasons=" in out
    assert "as expected" in out


def test_an_unexpected_outcome_is_exit_code_1(
    run_demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "CanaryConfig", partial(demo.CanaryConfig, real_data="none"))
    code, report = run_demo("--fault", "bit-flip")
    assert code == 1
    assert not report["ok"]
    assert report["detected_after_steps"] is None
    assert "NOT as expected: it was not detected" in capsys.readouterr().out


def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--json", "."]) == 2
    assert "clean run" not in capsys.readouterr().out


def test_closed_output_is_no_reason_to_fail(small: list[str]) -> None:
    command = [sys.executable, "-m", "kvcanary", *small, "--fault", "none"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "no/such/file.txt"], "no/such/file.txt cannot be read"),
        (["--at-step", "5000"], "found no target from step 5000"),
        (["--json", "no/such/directory/x.json"], "there is no directory"),
        (["--json", "."], "--json . is a directory: give the path of a file"),
        # The last one is written to, and fails at the end.
        (["--json", "/dev/full"], "--json /dev/full cannot be written (No space left on device)"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
    small: list[str], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert err.startswith("kvcanary demo: ")


def test_an_empty_prompt_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert main([*DEFAULT, "--prompt", str(empty)]) == 2
    assert "holds no text" in capsys.readouterr().err


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_backend_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--backend", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("kvcanary demo: ")


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_backend_auto_without_a_gpu_says_why(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--backend", "auto", "--fault", "none"]) == 0
    assert "backend host: no GPU can be used: " in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("fault", [*FAULTS, "none"])
def test_on_a_gpu_a_decode_step_is_one_graph_launch(run_demo: Demo, fault: str) -> None:
    code, report = run_demo("--fault", fault, base=["demo", "--backend", "cuda"])
    assert code == 0
    assert report["backend"] == "cuda"
    assert report["graph_launches"] == report["decode_steps"] > 0


# ---- the faults ------------------------------------------------------------------------------------------------------
def served_with(kind: type[Fault] | None, texts: list[bytes], **options: Any) -> tuple[Any, Fault | None]:
    engine = SimEngine(NumpyModel(ModelConfig(n_layers=2), n_blocks=80), chunk=64)
    fault = None if kind is None else kind(engine, 8, **options)
    return serve(engine, texts, 12), fault


@pytest.mark.parametrize("kind", FAULTS.values(), ids=list(FAULTS))
def test_a_fault_strikes_once_and_the_same_target_again(kind: type[Fault]) -> None:
    (first, fault), (second, again) = (served_with(kind, SHORT, seed=3) for _ in range(2))
    assert fault is not None
    assert again is not None
    assert fault.injected == again.injected is not None
    assert first == second


def test_a_bit_flip_changes_one_bit_of_one_plane() -> None:
    engine = SimEngine(NumpyModel(ModelConfig(n_layers=2), n_blocks=80), chunk=64)
    model: Any = engine.model
    taken: list[np.ndarray[Any, Any]] = []

    def take(_arrays: Any) -> None:
        taken.append(np.array([*model.k_cache, *model.v_cache]).view(np.uint32).reshape(4, 80 * 16, -1))

    engine.before_forward.append(take)
    fault = BitFlip(engine, 4)
    engine.before_forward.append(take)
    engine.run([b"Every shelf in the warehouse has a number."], 5)
    assert fault.injected is not None
    for step, (before, after) in enumerate(zip(taken[::2], taken[1::2], strict=True), start=1):
        flipped = before ^ after
        planes, slots, _elements = np.nonzero(flipped)
        is_struck = step == fault.injected.step == 4
        assert list(zip(planes % 2, slots, strict=True)) == [(fault.injected.layer, fault.injected.slot)] * is_struck
        assert sum(bits.bit_count() for bits in flipped[flipped != 0].tolist()) == is_struck


def test_a_stale_table_needs_another_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    same = tmp_path / "same.txt"
    same.write_text("one text, twice")
    assert main([*DEFAULT, "--max-tokens", "16", "--fault", "stale-table", "--prompt", str(same), str(same)]) == 2
    assert "one of another text" in capsys.readouterr().err


def test_divergence_names_the_step_that_sampled_the_byte() -> None:
    clean, _ = served_with(None, SHORT)
    assert divergences(clean, clean) == []
    outputs = list(clean.outputs)
    outputs[1] = outputs[1][:5] + bytes([outputs[1][5] ^ 1]) + outputs[1][6:]
    damaged = type(clean)(tuple(outputs), clean.byte_steps, clean.n_steps, clean.n_decode_steps)
    assert divergences(clean, damaged) == [(clean.byte_steps[1][5], 2, 5)]


# ---- the command itself ----------------------------------------------------------------------------------------------
def test_python_m_kvcanary() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvcanary", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(kvcanary.__file__).parents[1],
    )
    assert done.stdout == f"kvcanary {kvcanary.__version__}\n"


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["demo", "--fault", "fire"], ["demo", "--max-tokens", "0"], ["demo", "--at-step", "-1"]):
        with pytest.raises(SystemExit) as exit_code:
            main(arguments)
        assert exit_code.value.code == 2
    assert "fire" in capsys.readouterr().err
