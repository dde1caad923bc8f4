"""`kvcanary explain`: the story of a black box in words, as JSON and as a picture; damaged and foreign files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from base import POOL_NAMES, SECRET, make_record
from engine import PAGE, ToyEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcanary import BlackBoxError, Reason
from kvcanary.advice import ADVICE, CONTAIN, CONTAIN_RESERVED, CONTAIN_UNREAD, FALLEN, ON_HOST, advice_on
from kvcanary.box_reader import MAX_BYTES, BoxRun, read_box
from kvcanary.causes import NAMES
from kvcanary.cli import main
from kvcanary.cli.explain import PLOT_SUFFIXES
from kvcanary.cli.explain_plot import MAX_CELLS, OTHERS, RESERVED, UNKNOWN, map_pool, owners_of
from kvcanary.story import contain, episodes_of, stall_advice
from kvcanary.tags import CanaryLaunchTag, Detail
from kvcanary.violations import Violation, decode


def violation(**fields: Any) -> Violation:
    return decode(make_record(**{"reasons": Reason.DATA, "detail": Detail.SLOT, **fields}), POOL_NAMES, SECRET, False)[
        0
    ]


def run_with(*violations: Violation, config: dict[str, Any] | None = None) -> BoxRun:
    start = {"config": config or {}}
    return BoxRun("ab", 1, 0.0, 1.0, start=start, violations=[(float(v.step), v) for v in violations])


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """Three runs: an honest one, a flipped bit, and a request that read another one's row."""
    path = tmp_path / "box.jsonl"

    def engine(seed: int) -> ToyEngine:
        return ToyEngine(verify_data_every=1, black_box_path=str(path), ring_capacity=64, seed=seed)

    honest = engine(0)
    honest.step((0, 0, 6))
    honest.manager.close()
    flipped = engine(1)
    flipped.step((0, 0, 6), (1, 0, 3))
    flipped.k[1][1, 1, 0, 0] ^= np.uint8(1)
    for p in (6, 7):
        flipped.step((0, p, 1), (1, p - 3, 1))
    flipped.manager.close()
    crossed = engine(2)
    crossed.step((0, 0, 8), (1, 0, 8))
    batch = crossed.batch((0, 8, 1), (1, 8, 1))
    batch.block_table[0] = batch.block_table[1]
    with crossed.manager.step(), crossed.manager.forward(batch):
        crossed.write(batch)
    crossed.manager.close()
    return path


class TestWords:
    def test_the_story_names_what_came_first_whom_it_hit_why_and_what_to_do(
        self, box: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(box)]) == 1
        text = " ".join(capsys.readouterr().out.split())
        assert f"{box}: 3 runs of the guard, 2 with findings" in text
        honest, flipped, crossed = text.split("== run ")[1:]
        assert "found nothing" in honest and "closed in good order" in honest
        assert "the story: 1 finding, step 2, from" in flipped
        assert "request 1 at position 1, slot 5 (block 1, offset 1), k of layer 1" in flipped
        assert "requests 1 (1 finding)" in flipped and "bytes of k of layer 1 (1)" in flipped
        assert "likely C24 bits changed in memory (confidence 0." in flipped
        assert f"do {ON_HOST['C24']}" in flipped and f"do {CONTAIN}" in flipped
        assert "GPU" not in text, "it is a cache in host memory"
        assert "step=1, forwards=1, " in honest and "step=3, forwards=3, " in flipped and "(as of" not in text
        assert "(of the device: as of step 3)" in flipped
        assert "settings verify_data_every=1" in flipped and "pool 'full' (FULL) of 16 blocks x 4 slots" in flipped
        assert "of request 1 hold request 2's tokens from position 0 on" in crossed
        assert "places pool 'full': 9 slots: 12, 16 to 23" in crossed

    def test_a_run_may_be_chosen_by_its_id_or_its_process(self, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
        honest, *_ = read_box(box).runs
        assert main(["explain", str(box), "--run", honest.run]) == 0
        assert capsys.readouterr().out.count("== run") == 1
        assert main(["explain", str(box), "--run", str(honest.pid)]) == 1
        assert capsys.readouterr().out.count("== run") == 3
        assert main(["explain", str(box), "--run", "nobody"]) == 2
        assert f"{honest.run} (pid {honest.pid})" in capsys.readouterr().err

    def test_stalls_drills_and_missing_ends_are_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "box"
        engine = ToyEngine(
            black_box_path=str(path),
            health_check_every_n_steps=2,
            health_check_warmup_steps=2,
            perturb="flip_used:warmup=1000",
            perturb_armed=True,
        )
        for _ in range(5):
            with engine.manager.step():
                pass
        assert engine.manager._box is not None and engine.manager._box.flush(10)
        assert main(["explain", str(path)]) == 1
        text = " ".join(capsys.readouterr().out.split())
        assert "DRILL perturb='flip_used:warmup=1000' was armed" in text
        assert "no end was written" in text
        assert "the guard itself: 2 reports of the health check, from step 2 on" in text
        assert "capture the graphs again inside forward()" in text

    def test_counters_that_nobody_has_read_are_not_told_as_0(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "box"
        engine = ToyEngine(black_box_path=str(path), verify_data_every=1)
        engine.step((0, 0, 6))
        engine.k[1][1, 1, 0, 0] ^= np.uint8(1)
        engine.step((0, 6, 1))
        assert engine.manager._box is not None and engine.manager._box.flush(10)
        assert main(["explain", str(path)]) == 1
        text = " ".join(capsys.readouterr().out.split())
        assert "violations_total=1, observations_total=1 (of the device: none, as no snapshot was taken)" in text
        assert "forwards=" not in text and "protected_tokens=" not in text

    def test_as_json_it_is_the_same_story(self, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", str(box), "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        honest, flipped, crossed = told["runs"]
        assert (told["is_cut"], told["damaged_lines"], honest["episodes"]) == (False, [], [])
        (episode,) = flipped["episodes"]
        assert (episode["first_step"], episode["n_violations"], episode["requests"]) == (2, 1, {"1": 1})
        assert episode["slots"] == {"full": [5]} and episode["planes"] == {"k of layer 1": 1}
        assert episode["causes"][0]["class_id"] == "C24" and episode["causes"][0]["advice"] == ON_HOST["C24"]
        assert flipped["counters"]["snapshot_step"] == 3 and episode["advice"] == [CONTAIN, ON_HOST["C24"]]
        assert set(crossed["episodes"][0]["requests"]) == {"1"} and crossed["ended"] == "close"


class TestStory:
    def test_every_cause_has_advice(self) -> None:
        assert set(ADVICE) == {*NAMES, ""}
        assert all(text.endswith(".") and len(text) > 30 for text in ADVICE.values())

    def test_lifecycle_is_no_advice_where_it_is_on(self) -> None:
        twice = [
            violation(reasons=Reason.DUPLICATE_WRITE, slot=64 + i, position=i, request_id=1, stamp_owner=2)
            for i in (0, 1)
        ]
        (off,), (on,) = (episodes_of(run_with(*twice, config={"lifecycle": told})) for told in (False, True))
        assert off.causes[0].class_id == on.causes[0].class_id == "C03"
        assert "lifecycle=True" in off.advice[1] and "lifecycle" not in on.advice[1]
        assert not any("lifecycle=True" in advice_on(id_, False, has_lifecycle=True) for id_ in ADVICE)

    def test_where_there_is_no_gpu_nobody_is_sent_to_look_at_one(self) -> None:
        assert set(ON_HOST) <= set(ADVICE)
        for class_id in ADVICE:
            told = advice_on(class_id, is_on_host=True)
            assert not re.search("GPU|nvidia|compute-sanitizer", told), class_id
            assert advice_on(class_id, is_on_host=False) == ADVICE[class_id]
        run = run_with()
        run.stalls = [{"error": "CanaryCounterError"}]
        assert stall_advice(run) == [FALLEN]
        assert run.start is not None
        run.start["backend"] = "host"
        (told,) = stall_advice(run)
        assert "AddressSanitizer" in told and "compute-sanitizer" not in told

    def test_findings_far_apart_are_stories_of_their_own(self) -> None:
        steps = [10, 11, 200, 900, 901]
        found = episodes_of(run_with(*(violation(step=s, slot=s) for s in steps)))
        assert [[v.step for v in e.violations] for e in found] == [[10, 11, 200], [900, 901]]
        config = {"verify_data_every": 1000}
        assert len(episodes_of(run_with(*(violation(step=s, slot=s) for s in steps), config=config))) == 1

    def test_a_moment_counts_by_reasons_and_names_the_requests(self) -> None:
        a = [violation(step=3, request_id=r, slot=r, reasons=Reason.TOKEN | Reason.CHAIN) for r in (5, 6, 6)]
        (episode,) = episodes_of(run_with(*a, violation(step=3, request_id=0), violation(step=4, request_id=6)))
        first, second = episode.moments
        assert (first.step, first.reasons, first.requests) == (3, {"CHAIN|TOKEN": 3, "DATA": 1}, (0, 5, 6))
        assert (second.step, second.requests) == (4, (6,)) and episode.requests == {5: 1, 6: 3}

    def test_a_counter_that_fell_is_more_urgent_than_a_stall(self) -> None:
        run = run_with()
        run.stalls = [{"error": "CanaryStalledError"}, {"error": "CanaryCounterError"}]
        assert len(stall_advice(run)) == 2 and "overwrote" not in stall_advice(run)[1]
        assert "device memory" in stall_advice(run)[0]


@pytest.mark.parametrize(
    ("of_one", "said"),
    [
        ({"row": 0, "request_id": 7}, CONTAIN),
        ({"row": 0, "request_id": 0}, CONTAIN),
        ({"row": -1, "request_id": 0, "tag": CanaryLaunchTag.SWEEP_K_FULL}, CONTAIN_UNREAD),
        ({"row": -1, "request_id": 0, "detail": Detail.SCRUB}, CONTAIN_UNREAD),
        (
            {"row": -1, "request_id": 0, "detail": Detail.RESERVED, "reasons": Reason.NONFINITE_RESERVED},
            CONTAIN_RESERVED,
        ),
    ],
)
def test_requests_are_to_be_aborted_only_where_one_has_read_it(of_one: dict[str, Any], said: str) -> None:
    assert contain([violation(**of_one)]) == said
    both = contain([violation(row=1, request_id=3), violation(**of_one)])
    assert both == CONTAIN


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

    def test_it_says_so(self, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", str(tmp_path / "none")]) == 2
        assert "none" in capsys.readouterr().err


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


def test_the_commands_of_the_readme_work(
    box: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason='pip install "kvcanary[plot]"')
    readme = Path(__file__).resolve().parents[1] / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not beside the tests")
    monkeypatch.chdir(box.parent)
    box.rename("kv.jsonl")
    commands = re.findall(r"^kvcanary (explain [^#\n]*)", readme.read_text(), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main(command.split()) == 1
        assert "C24" in capsys.readouterr().out
    assert Path("pool.png").stat().st_size > 1000


POOL = {"name": "full", "kind": "FULL", "page_size": 16, "n_blocks": 40, "reserved_blocks": [0]}


class TestPlot:
    def test_a_picture_is_drawn(self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        image = pytest.importorskip("matplotlib.image", reason='pip install "kvcanary[plot]"')
        assert main(["explain", str(box), "--plot", str(tmp_path / "out.png")]) == 1
        pixels = image.imread(tmp_path / "out.png")
        assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
        red = (pixels[..., 0] > 0.95) & (pixels[..., 1] < 0.2) & (pixels[..., 2] < 0.2)
        assert red.sum() > 100, "the bad slots are marked"
        assert f"drawn: run {read_box(box).runs[2].run}" in capsys.readouterr().out

    def test_any_name_of_a_pool_is_drawn(self, box: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='pip install "kvcanary[plot]"')
        box.write_text(box.read_text().replace('"name":"full"', json.dumps({"name": "$x^$ \udcff\0"})[1:-1]))
        assert main(["explain", str(box), "--plot", str(tmp_path / "out.svg")]) == 1
        assert (tmp_path / "out.svg").stat().st_size > 1000

    def test_the_map_knows_owners_reserved_and_bad_slots(self) -> None:
        own = [violation(slot=s, stamp_owner=7, stamp_step=1, request_id=9) for s in (32, 33, 34)]
        block = violation(slot=50, block_owner=8, block_epoch=1)
        shown = map_pool(POOL, [*own, block])
        flat = shown.cells.reshape(-1)
        assert shown.per_cell == 1 and flat.size >= 640 and shown.owners == (7, 8)
        assert (flat[:16] == RESERVED).all() and (flat[16:32] == UNKNOWN).all()
        assert (
            (flat[32:35] == OTHERS + 1).all() and (flat[48:64] == OTHERS + 2).all() and (flat[64:640] == UNKNOWN).all()
        )
        columns = shown.cells.shape[1]
        assert columns % 16 == 0 and [r * columns + c for r, c in shown.bad] == [32, 33, 34, 50]

    def test_a_stamp_knows_better_than_a_block_and_late_better_than_early(self) -> None:
        found = owners_of(
            [
                violation(slot=4, block_owner=1, block_epoch=1),
                violation(slot=5, stamp_owner=2, stamp_step=1),
                violation(slot=5, stamp_owner=3, stamp_step=2),
                violation(slot=-3, stamp_owner=9, detail=Detail.TABLE_ENTRY),
            ],
            PAGE,
        )
        assert found == ({1: 1}, {5: 3})
        shown = map_pool(
            {**POOL, "page_size": PAGE}, [violation(slot=4, block_owner=1), violation(slot=5, stamp_owner=3)]
        )
        assert shown.cells.reshape(-1)[3:9].tolist() == [
            RESERVED,
            OTHERS + 1,
            OTHERS + 2,
            OTHERS + 1,
            OTHERS + 1,
            UNKNOWN,
        ]

    @pytest.mark.parametrize(
        ("page", "n_blocks"), [(16, 100_000), (1, 1_000_000), (4096, 64), (48, 5000), (1, 7), (100_003, 2)]
    )
    def test_a_map_of_any_pool_is_small_and_finds_its_slots(self, page: int, n_blocks: int) -> None:
        n_slots = page * n_blocks
        bad = sorted({0, n_slots // 3, n_slots - 1})
        pool = {**POOL, "page_size": page, "n_blocks": n_blocks}
        shown = map_pool(pool, [violation(slot=s, stamp_owner=5, stamp_step=1, reasons=1) for s in bad])
        rows, columns = shown.cells.shape
        assert rows * columns < 1.1 * MAX_CELLS + columns
        assert [(r * columns + c) * shown.per_cell for r, c in shown.bad] == [
            s // shown.per_cell * shown.per_cell for s in bad
        ]
        assert page % shown.per_cell == 0 or shown.per_cell % page == 0 or page == 100_003  # a prime
        assert (shown.cells >= 0).sum() == -(-n_slots // shown.per_cell)

    def test_many_owners_share_a_colour(self) -> None:
        owners = [violation(slot=16 + s, stamp_owner=100 + s, stamp_step=1) for s in range(30)]
        shown = map_pool(POOL, owners)
        assert len(shown.owners) == 18 and (shown.cells == OTHERS).sum() == 12

    def test_without_matplotlib_the_command_is_told(
        self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["explain", str(box), "--plot", str(tmp_path / "out.png")]) == 2
        assert 'pip install "kvcanary[plot]"' in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["p.xyz", "p", "png", ".png", "p.pgf", "p.png.gz"])
    def test_a_kind_of_picture_that_is_not_known_is_refused_before_anything_is_read(
        self, box: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(box), "--plot", str(tmp_path / name)]) == 2
        out = capsys.readouterr()
        assert f"{name}: the kind of picture is not known; end it in .png, .svg, .pdf, .jpg, .webp" in out.err
        assert not out.out and not (tmp_path / name).exists()

    @pytest.mark.parametrize("suffix", PLOT_SUFFIXES)
    def test_every_kind_that_is_named_is_drawn(self, box: Path, tmp_path: Path, suffix: str) -> None:
        pytest.importorskip("matplotlib", reason='pip install "kvcanary[plot]"')
        out = tmp_path / f"out{suffix.upper()}"
        assert main(["explain", str(box), "--plot", str(out)]) == 1
        assert out.stat().st_size > 1000

    def test_a_folder_that_is_not_there_is_named_before_anything_is_read(
        self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(box), "--plot", str(tmp_path / "no" / "out.png")]) == 2
        assert "there is no directory" in capsys.readouterr().err
