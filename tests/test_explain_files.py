"""`kvcanary explain` and the files that it is given: damaged, foreign, changed by chance, or none at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from engine import ToyEngine
from explain_boxes import three_runs  # noqa: F401  a fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcanary import BlackBoxError
from kvcanary.box_reader import MAX_BYTES, read_box
from kvcanary.cli import main
from kvcanary.cli.explain_plot import map_pool


class TestFiles:
    def read(self, path: Path, data: bytes, **options: Any) -> Any:
        path.write_bytes(data)
        return read_box(path, **options)

    def test_a_last_line_that_breaks_off_is_tolerated_wherever_it_does(self, box: Path, tmp_path: Path) -> None:
        data = box.read_bytes()
        last = data.rstrip(b"\n").rindex(b"\n") + 1
        for cut in range(last, len(data), 7):
            read = self.read(tmp_path / "cut", data[:cut])
            assert read.is_cut == (last < cut < len(data) - 1), cut
            assert [len(run.violations) for run in read.runs[:2]] == [0, 1]
        assert not self.read(tmp_path / "cut", data[:-1]).is_cut

    @pytest.mark.parametrize(("name", "why"), [("nobody.jsonl", "No such file"), (".", "Is a directory")])
    def test_a_file_that_cannot_be_read_says_which_to_give(
        self, tmp_path: Path, name: str, why: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert why in told and "give the file that black_box_path (KVCANARY_BLACK_BOX_PATH) named" in told
        assert str(tmp_path) in told and "Errno" not in told

    def test_a_last_line_that_breaks_off_is_told(self, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
        box.write_bytes(box.read_bytes()[:-30])
        assert main(["explain", str(box)]) == 1
        assert "the last line breaks off" in capsys.readouterr().out

    @pytest.mark.parametrize("torn", [b'{"black_box":1,"kind":"viol', b"\x00\x00\xff", b"[" * 100_000])
    def test_a_line_that_broke_off_is_left_out_and_told_wherever_it_is(
        self, box: Path, tmp_path: Path, torn: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = box.read_bytes().split(b"\n")
        whole = read_box(box).runs
        for number in range(1, len(lines)):
            read = self.read(tmp_path / "torn", b"\n".join([*lines[: number - 1], torn, *lines[number - 1 :]]))
            assert (read.damaged, read.is_cut, read.runs) == ([number], False, whole)
        (tmp_path / "torn").write_bytes(b"\n".join([*lines[:3], torn, *lines[3:6], torn, *lines[6:]]))
        assert main(["explain", str(tmp_path / "torn")]) == 1
        out = capsys.readouterr().out
        assert "3 runs of the guard, 2 with findings" in out
        assert "left out, as they cannot be read: lines 4, 8\n" in out
        assert main(["explain", str(tmp_path / "torn"), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["damaged_lines"] == [4, 8]

    def test_a_run_that_broke_off_before_another_began_is_told(
        self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        box.write_bytes(box.read_bytes()[:-40])
        engine = ToyEngine(black_box_path=str(box))
        engine.manager.close()
        assert main(["explain", str(box)]) == 1
        out = capsys.readouterr().out
        assert "4 runs of the guard, 2 with findings" in out and "left out, as they cannot be read: lines " in out
        assert out.count("closed in good order") == 3 and out.count("no end was written") == 1

    def test_only_broken_lines_are_no_black_box(self, tmp_path: Path) -> None:
        for skip in (False, True):
            with pytest.raises(BlackBoxError, match=r"no black box of kvcanary: line 2 is not JSON \('\{\"a'\)"):
                self.read(tmp_path / "torn", b'\n{"a\nb\nc', skip_damaged=skip)

    def test_a_line_of_another_version_is_refused_however_broken_the_others_are(self, box: Path) -> None:
        data = box.read_bytes()
        with pytest.raises(BlackBoxError, match="line 2: schema 7, this version of kvcanary reads schema 1"):
            self.read(box, b'{"bla\n{"black_box": 7}\n' + data, skip_damaged=True)

    def test_a_file_that_no_black_box_can_be_is_not_read_into_memory(self, tmp_path: Path) -> None:
        with (tmp_path / "log").open("wb") as file:
            file.truncate(MAX_BYTES + 1)
        with pytest.raises(BlackBoxError, match=f"has {MAX_BYTES + 1} bytes, at most {MAX_BYTES} are read"):
            read_box(tmp_path / "log")

    @pytest.mark.parametrize("how", [[], ["--json"]])
    def test_the_exit_code_holds_for_a_reader_that_has_seen_enough(self, box: Path, how: list[str]) -> None:
        command = [sys.executable, "-m", "kvcanary", "explain", str(box), *how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as told:
            told.stdout.close()
            said = told.stderr.read()
        assert (told.returncode, said) == (1, b"")

    def test_a_pipe_is_refused_at_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/null"), "a character device")):
            command = [sys.executable, "-m", "kvcanary", "explain", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 2
            assert f"kvcanary explain: {path} cannot be read (it is {kind}, not a regular file): give" in done.stderr

    def test_a_name_that_the_terminal_does_not_know_is_told(self, box: Path) -> None:
        lines = box.read_bytes().splitlines()
        start = json.loads(lines[0])
        start["config"]["black_box_path"] = "/data/\udcff/\u00fc"  # as Python reads a path that is no UTF-8
        box.write_bytes(b"\n".join([json.dumps(start).encode(), *lines[1:]]))
        command = [sys.executable, "-m", "kvcanary", "explain", str(box)]
        for coding, shown in (("utf-8", "/data/\\udcff/\u00fc"), ("ascii", "/data/\\udcff/\\xfc")):
            environ = {**os.environ, "PYTHONIOENCODING": f"{coding}:strict"}
            done = subprocess.run(command, capture_output=True, check=False, env=environ, timeout=60)
            assert (done.returncode, done.stderr) == (1, b"")
            assert shown.encode(coding) in done.stdout

    @pytest.mark.parametrize(
        ("kind", "place", "value"),
        [
            ("start", ("pools", 0, "planes", 0, "layer"), {"a": 1}),
            ("start", ("pools", 0, "planes", 1, "layer"), [0]),
            ("start", ("pools", 0, "planes", 0), 5),
            ("stall", ("error",), {"a": 1}),
            ("stall", ("step",), 1 << 63),
            ("stall", ("step",), -1),
            ("violation", ("violation", "step"), -5),
        ],
    )
    def test_what_the_story_and_the_picture_rely_on_is_seen_to(
        self,
        kind: str,
        place: tuple[Any, ...],
        value: Any,
        box: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        lines = [json.loads(line) for line in box.read_bytes().splitlines()]
        of_run = {name: lines[-1][name] for name in ("black_box", "pid", "run", "time")}
        lines.append({**of_run, "kind": "stall", "error": "CanaryStalledError", "step": 3, "tags": [], "text": "text"})
        box.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["explain", str(box)]) == 1
        number, found = next((i, line) for i, line in enumerate(lines, start=1) if line["kind"] == kind)
        for key in place[:-1]:
            found = found[key]
        found[place[-1]] = value
        box.write_text("".join(json.dumps(line) + "\n" for line in lines))
        capsys.readouterr()
        assert main(["explain", str(box)]) == 2
        assert f"{'line 1 is' if number == 1 else f'line {number} of'} " in capsys.readouterr().err
        assert main(["explain", str(box), "--skip-damaged"]) == 1
        assert f"left out, as they cannot be read: lines {number}\n" in capsys.readouterr().out

    def test_a_line_of_something_else_is_refused_with_its_number_or_left_out(
        self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = box.read_bytes().split(b"\n")
        lines[3] = b'{"black_box": 1, "kind": "song"}'
        with pytest.raises(BlackBoxError, match=r"line 4 of \d+, is damaged: of kind 'song'.* --skip-damaged leaves"):
            self.read(tmp_path / "bad", b"\n".join(lines))
        assert main(["explain", str(tmp_path / "bad")]) == 2
        assert "line 4" in capsys.readouterr().err
        assert main(["explain", str(tmp_path / "bad"), "--skip-damaged"]) == 1
        assert "left out, as they cannot be read: lines 4" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "holds no line of a black box"),
            (b"\n\n", "holds no line of a black box"),
            (b"hello\nworld\n", "is no black box of kvcanary: line 1 is not JSON ('hello')"),
            (b'{"event": "violation"}\n', "is no black box of kvcanary: line 1 is JSON of something else"),
            (b"[1, 2]\n", "is no black box of kvcanary"),
            (b"\x89PNG\r\n\x1a\n\x00\x00", "is no black box of kvcanary"),
            (b'{"black_box": 2, "kind": "start"}\n', "line 1: schema 2, this version of kvcanary reads schema 1"),
            (b'{"black_box": 1, "kind": "song", "run": "a", "pid": 1, "time": 1}\n', "of kind 'song'"),
            (b'{"black_box": 1, "kind": "start", "run": 5, "pid": 1, "time": 1}\n', "without a valid run"),
            (
                b'{"black_box": 1, "kind": "violation", "run": "a", "pid": 1, "time": 1}\n',
                "violation is None, not a value",
            ),
            (b'{"black_box": 1, "kind": "violation", "run": "a", "pid": 1, "time": 1, "violation": {}}\n', "without '"),
        ],
    )
    def test_a_file_of_something_else_is_refused(
        self, data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_bytes(data)
        assert main(["explain", str(tmp_path / "file")]) == 2
        error = capsys.readouterr().err
        assert message in error and str(tmp_path / "file") in error and "Traceback" not in error


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts replaced by something else."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {k: v for k, v in value.items() if k != name}
        return {**value, name: draw(changed(value[name]))}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(changed(value[i])), *value[i + 1 :]]
    numbers = st.integers(-(1 << 70), 1 << 70) | st.floats() | st.sampled_from([0, 1, -1, 1 << 31, 1 << 32])
    return draw(st.none() | st.booleans() | numbers | st.text(max_size=5) | st.just([]) | st.just({}) | st.just([{}]))


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_line_it_is_told_or_refused(data: st.DataObject, box: Path, tmp_path: Path) -> None:
    lines = box.read_bytes().splitlines()
    i = data.draw(st.integers(0, len(lines) - 1), label="line")
    lines[i] = json.dumps(data.draw(changed(json.loads(lines[i])))).encode()
    path = tmp_path / "changed"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        codes = [main(["explain", str(path), *options]) for options in ([], ["--json"], ["--skip-damaged"])]
    assert set(codes) <= {1, 2} and ("line" in err.getvalue() or out.getvalue())
    try:
        runs = read_box(path, skip_damaged=True).runs
    except BlackBoxError:
        return
    for run in runs:
        for pool in run.pools:
            map_pool(pool, [v for _, v in run.violations if v.pool_name == pool["name"]])


@given(st.binary(max_size=200), st.integers(0, 5000), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_bytes_stand_in_it_it_is_told_or_refused(
    box: Path, tmp_path: Path, junk: bytes, at: int, skip: bool
) -> None:
    whole = box.read_bytes()
    (tmp_path / "junk").write_bytes(whole[:at] + junk + whole[at + len(junk) :])
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert main(["explain", str(tmp_path / "junk"), *(["--skip-damaged"] if skip else [])]) in (1, 2)
