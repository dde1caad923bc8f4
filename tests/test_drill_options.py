"""Options of `kvcanary drill` that have no effect, or with which nothing would be played, are refused at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcanary.cli import drill, main
from kvcanary.cli.drill_readme import BEGIN, END
from kvcanary.sim import soak

SOAK = ("--soak", "--backend", "host")


@pytest.fixture(autouse=True)
def nothing_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(*_: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(drill, "play_all", play)
    monkeypatch.setattr(drill.soak, "run", play)
    monkeypatch.setattr(drill.fleet, "run", play)


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What is said where it ends with 2."""
    assert main(["drill", *options]) == 2
    out = capsys.readouterr()
    assert not out.out and out.err.startswith("kvcanary drill: ") and out.err.count("\n") == 1
    return out.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps 0: give at least 1"),
        (("--steps", "-5"), "--steps -5: give at least 1"),
        (("--minutes", "0"), "--minutes 0: give a number above 0, such as 10 or 0.5"),
        (("--minutes", "-1"), "--minutes -1: give a number above 0"),
        (("--minutes", "nan"), "--minutes nan: give a number above 0"),
        (("--minutes", "inf"), "--minutes inf: give a number above 0"),
        (("--processes", "0"), "--processes 0: give at least 1"),
        (("--first-seed", "-1"), "--first-seed -1: give at least 0"),
        (("--steps", "5", "--minutes", "2"), "--steps 5 with --minutes 2: give one of them"),
        (("--workers", "2", "--steps", "0"), "--steps 0: give at least 1"),
        (("--workers", "2", "--minutes", "nan"), "--minutes nan: give a number above 0"),
        (("--workers", "2", "--first-seed", "-1"), "--first-seed -1: give at least 0"),
        (("--scenario", "C01"), "--scenario is of the drill, and --soak plays none: leave out --scenario, or --soak"),
        (("--sdc", "0"), "--sdc is of the drill"),
        (("--lifecycle", "both", "--sdc", "9"), "--lifecycle, --sdc are of the drill"),
        (("--render-readme", "README.md"), "--render-readme is of the drill"),
        (("--workers", "2", "--sdc", "9"), "--sdc is of the drill"),
        (("--json", "x.json"), "--json x.json with --soak: a soak writes a report only over a fleet; add --workers N"),
    ],
)
def test_a_soak_of_nothing_or_with_what_it_does_not_take(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *SOAK, *options)


@pytest.mark.parametrize(
    "options",
    [
        ("--steps", "5"),
        ("--minutes", "1"),
        ("--processes", "1"),
        ("--first-seed", "0"),
        ("--workers", "2"),
        ("--scheduler", "tcp://h:1"),
    ],
)
def test_what_is_for_a_soak_without_one(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{options[0]} is for a soak: add --soak" in refusal(capsys, *options)


def readme(tmp_path: Path, text: str = f"{BEGIN}\n{END}\n") -> Path:
    path = tmp_path / "README.md"
    path.write_text(text)
    return path


@pytest.mark.parametrize("options", [("--scenario", "C01"), ("--lifecycle", "off")])
def test_a_part_of_the_drill_renews_no_readme(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = readme(tmp_path)
    told = refusal(capsys, "--render-readme", str(path), *options)
    assert f"{options[0]} is no whole drill, of which --render-readme tells: leave out {options[0]}" in told
    assert path.read_text() == f"{BEGIN}\n{END}\n"


def test_a_file_that_could_not_be_renewed_is_refused_before_the_drill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "No such file" in refusal(capsys, "--render-readme", str(tmp_path / "none.md"))
    assert f"{tmp_path} is a directory" in refusal(capsys, "--render-readme", str(tmp_path))
    for text in ("nothing", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        path = readme(tmp_path, text)
        told = refusal(capsys, "--render-readme", str(path))
        assert f"--render-readme {path}: the file must hold {BEGIN} and {END}, once each" in told
    path.write_bytes(b"\xff\xfe")
    assert "codec can't decode" in refusal(capsys, "--render-readme", str(path))


def test_a_report_that_could_not_be_written_is_refused_before_the_drill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"{tmp_path} is a directory: give the path of a file" in refusal(capsys, "--json", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)
    assert "x.json may not be written by this process" in refusal(capsys, "--json", str(tmp_path / "x.json"))


def test_what_goes_together_begins(tmp_path: Path) -> None:
    path = str(readme(tmp_path))
    for options in (
        (),
        ("--render-readme", path, "--json", str(tmp_path / "x.json"), "--sdc", "0", "--lifecycle", "both"),
        ("--scenario", "C01", "--sdc", "5"),
        (*SOAK, "--steps", "1", "--processes", "2", "--first-seed", "0"),
        (*SOAK, "--minutes", "0.5"),
        (*SOAK, "--workers", "2", "--json", str(tmp_path / "x.json")),
    ):
        with pytest.raises(AssertionError, match="it began"):
            main(["drill", "--backend", "host", *options])


def test_a_soak_has_its_defaults_and_one_of_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.undo()
    monkeypatch.setattr(soak, "soak_all", lambda *given: asked.append(given) or [])
    assert main(["drill", *SOAK]) == 1 and soak.main(["--first-seed", "3"]) == 1
    assert capsys.readouterr().out.count("FAILED: nothing was played") == 2
    assert asked == [(2000, 1, 0, "host"), (2000, 1, 3, "host")]


def test_the_soak_as_a_module_of_its_own_refuses_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--minutes", "nan"])
    assert "--minutes nan: give a number above 0" in capsys.readouterr().err
