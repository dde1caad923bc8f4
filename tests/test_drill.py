"""`kvcanary drill`: all holds, it is told in tables and in JSON, and a guard that does not hold is found out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import why_no_gpu

from kvcanary import Reason
from kvcanary.causes import NAMES, classify
from kvcanary.cli import main
from kvcanary.cli.drill import choose, play_all, verdict
from kvcanary.cli.drill_readme import BEGIN, END, render
from kvcanary.cli.drill_report import causes_ok, print_sdc, print_table
from kvcanary.errors import ConfigError, LifecycleError
from kvcanary.sim.museum import SCENARIOS, Outcome, Scenario, play
from kvcanary.sim.museum.places import HostPlace, make_place
from kvcanary.sim.museum.rows import A, B, Row, padding
from kvcanary.sim.museum.scenario import NEGATIVE, POSITIVE
from kvcanary.sim.museum.shapes import GENERAL, SHAPES
from kvcanary.sim.museum.stage import MissingError, Stage
from kvcanary.sim.sdc_run import SdcCount

README = Path(__file__).resolve().parents[1] / "README.md"
KEYS = {"id", "kind", "title", "expected", "reported", "ok"}
REPORTED_KEYS = {"reasons", "slot", "position", "request", "layer", "latency_steps"}
MAY_LACK: set[str] = set()  # parts of the guard that scenarios need and this version does not have
CLASSES = {f"C{n:02}" for n in (*range(1, 11), *range(12, 23), 24)}  # C11, C23, C25 and C26 are blind spots
TWINS = {f"N{n:02}" for n in (1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 15, 17, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29)}


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """The whole drill on the host."""
    return play_all(HostPlace(), choose([]), (False, True))


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The command's exit code and report."""
    path = tmp_path / "drill.json"
    code = main(["drill", "--backend", "host", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


# ---- it holds --------------------------------------------------------------------------------------------------------
def test_every_scenario_holds_or_says_what_is_missing(outcomes: list[Outcome]) -> None:
    wrong = {(o.scenario.id, o.shape, o.lifecycle): o.problems for o in outcomes if o.problems}
    assert wrong == {}
    assert {o.missing for o in outcomes if o.ok is None} <= MAY_LACK


def test_every_class_and_every_twin_has_its_scenario() -> None:
    assert {s.class_id for s in SCENARIOS.values() if s.kind == POSITIVE} == CLASSES
    assert {s.class_id for s in SCENARIOS.values() if s.kind == NEGATIVE} >= TWINS
    assert set(NAMES) == CLASSES


def test_scenarios_without_needs_are_played_on_every_general_shape(outcomes: list[Outcome]) -> None:
    played = {o.shape for o in outcomes if o.scenario.id == "C24-bit" and o.ok}
    assert played == set(GENERAL)
    assert {shape for s in SCENARIOS.values() for shape in s.shapes} == set(SHAPES)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda s: s.id)
def test_a_scenario_tells_its_story(scenario: Scenario) -> None:
    assert scenario.story
    if scenario.kind != NEGATIVE:
        assert scenario.sources, "a fault cites the threads that it stands for"


def test_the_root_cause_is_named_first_in_nine_of_ten_scenarios(outcomes: list[Outcome]) -> None:
    assert causes_ok(outcomes)


def test_a_positive_run_always_names_some_cause(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.reported and outcome.scenario.kind == POSITIVE:
            assert all(cause.evidence for cause in outcome.causes)
            assert outcome.causes


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_report_has_what_was_expected_and_reported(tmp_path: Path) -> None:
    code, report = run(tmp_path, "--lifecycle", "off", "--sdc", "70")
    assert code == 0
    for entry in report:
        assert entry.keys() >= KEYS
        assert entry["kind"] in ("positive", "negative", "blind")
        assert entry["ok"] is True or (entry["ok"] is None and entry["skipped"].startswith("needs "))
        for violation in entry["reported"]:
            assert set(violation) == REPORTED_KEYS
            assert set(violation["reasons"]) <= set(Reason.__members__)
            assert violation["latency_steps"] >= 0
    by_kind = {kind: [e for e in report if e["kind"] == kind] for kind in ("positive", "negative", "blind")}
    assert all(not e["reported"] for kind in ("negative", "blind") for e in by_kind[kind])
    assert all(e["reported"] for e in by_kind["positive"] if e["ok"] and e["id"] != "SDC")
    assert sum(e["injected"] for e in report if e["id"] == "SDC") == 70


@pytest.mark.parametrize(
    ("asked", "found"),
    [(["C05"], {"C05-adapter", "C05-collision", "C05-image"}), (["C24-bit", "N01"], {"C24-bit", "N01"})],
)
def test_some_scenarios_only(asked: list[str], found: set[str], tmp_path: Path) -> None:
    code, report = run(tmp_path, "--lifecycle", "off", "--scenario", *asked)
    assert code == 0
    assert {e["id"] for e in report} == found


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--backend", "host", "--scenario", "C99"]) == 2
    assert "C99" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    assert main(["drill", "--backend", "host", "--json", str(tmp_path / "nowhere" / "x.json")]) == 2


def test_the_tables_tell_class_expectation_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--backend", "host", "--lifecycle", "off", "--scenario", "C09-slot", "N08", "C11"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("C09-slot "))
    assert "WRITE_POSITION" in row
    assert row.endswith(f"ok ({len(GENERAL)} shapes)")
    assert out.index("C09-slot") < out.index("N08") < out.index("C11-tail"), "faults, twins, blind spots"
    assert "named first and right: 1 of 1" in out


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--backend", "cuda", "--scenario", "C24"]) == 2
    assert capsys.readouterr().err.startswith("kvcanary drill: ")


def test_settings_of_the_environment_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCANARY_OVERLAP_HEAD", "1")
    assert main(["drill", "--backend", "host", "--scenario", "C06"]) == 0
    assert "with settings of the environment: KVCANARY_OVERLAP_HEAD=1 (unset" in capsys.readouterr().out
    assert main(["drill", "--backend", "host", "--soak", "--steps", "1"]) == 0
    assert "without the settings of the environment (KVCANARY_OVERLAP_HEAD=1): a soak" in capsys.readouterr().out


# ---- sabotage: a guard that does not do its work must not pass -------------------------------------------------------
def test_a_guard_that_is_off_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCANARY_MODE", "off")
    code, report = run(tmp_path, "--lifecycle", "off", "--scenario", "C24", "C01")
    assert code == 1
    assert not any(e["ok"] for e in report)


@pytest.mark.parametrize(
    ("setting", "value", "failing"),
    [
        ("REAL_DATA", "none", "C24-bit"),
        ("REAL_DATA", "partial", "C24-sign"),
        ("CHECK_WRITE_POSITION", "no", "C09-slot"),
    ],
)
def test_a_guard_with_a_check_left_out_fails(
    setting: str, value: str, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"KVCANARY_{setting}", value)
    code, report = run(tmp_path, "--lifecycle", "off", "--scenario", failing, "C05-collision")
    assert code == 1
    assert not any(e["ok"] for e in report if e["id"] == failing and e["shape"] == "latent8")
    assert all(e["ok"] for e in report if e["id"] == "C05-collision"), "which needs none of these"


@pytest.mark.parametrize("reason", [Reason.CHAIN, Reason.TOKEN, Reason.POSITION, Reason.UNWRITTEN, Reason.DATA])
def test_a_guard_that_never_says_a_reason_fails(reason: Reason, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records lose one bit on their way to the host; a record without any is not written."""
    from kvcanary.backends.host_recorder import Recorder

    report = Recorder.report

    def mute(self: Recorder, records: Any) -> None:
        records["reasons"] &= ~int(reason) & 0xFFFFFFFF
        report(self, records[records["reasons"] != 0])

    monkeypatch.setattr(Recorder, "report", mute)
    outcomes = [play(s, HostPlace(), s.shapes[0], False) for s in SCENARIOS.values() if False in s.lifecycle]
    ok, words = verdict(outcomes, [], is_whole=False)
    assert not ok
    assert words.startswith("FAILED")


def scenario(kind: str, story: Callable[[Stage], None]) -> Outcome:
    return play(Scenario("C24-made-up", kind, "made up", story), HostPlace(), "nhd4", False)


def test_a_report_over_a_twin_fails() -> None:
    def story(s: Stage) -> None:
        SCENARIOS["C24-bit"].play(s)

    assert scenario(NEGATIVE, story).ok is False
    assert scenario(POSITIVE, story).ok is True


def _flip(s: Stage, wish: Callable[[], None], before: bool = False) -> None:
    s.forward(Row(A, 0, 4, [1, 2]), Row(B, 0, 4, [3, 4]))
    if not before:
        s.fault()
    s.memory.edit([6], lambda data: data ^ 1, s.memory.planes([1], "k"))
    s.forward(Row(A, 4, 5, [1, 2]), Row(B, 4, 5, [3, 4]))
    if before:
        s.fault()
    wish()


@pytest.mark.parametrize(
    ("problem", "wish"),
    [
        ("nothing reported", {"slots": [7]}),
        ("nothing reported", {"request": B}),
        ("nothing reported", {"latency": 1}),
        ("nothing reported", {"latency": 1, "within": 3}),
        ("CHAIN", {"reasons": Reason.CHAIN}),
        ("layers", {"layers": [0, 1]}),
        ("planes", {"names": "v"}),
        ("not tainted", {"tainted": [A, B]}),
        ("", {"layers": [1], "names": "k", "tainted": [A], "within": 2}),
    ],
)
def test_a_report_that_differs_from_what_is_expected_fails(problem: str, wish: dict[str, Any]) -> None:
    def story(s: Stage) -> None:
        asked = {"request": A, "slots": [6], "reasons": Reason.DATA, **wish}
        _flip(s, lambda: s.expect(asked.pop("request"), asked.pop("slots"), asked.pop("reasons"), **asked))

    problems = scenario(POSITIVE, story).problems
    assert problems is not None
    assert bool(problems) == bool(problem)
    assert all(problem in text for text in problems)


def test_a_report_before_the_fault_fails() -> None:
    def story(s: Stage) -> None:
        _flip(s, lambda: s.expect(A, [6], Reason.DATA, latency=-1), before=True)

    assert any("before the fault" in text for text in scenario(POSITIVE, story).problems or ())


def test_a_report_about_a_request_that_is_right_fails() -> None:
    def story(s: Stage) -> None:
        _flip(s, lambda: (s.expect(A, [6], Reason.DATA), s.expect_silence(A)))  # type: ignore[func-returns-value]

    assert any("that is right" in text for text in scenario(POSITIVE, story).problems or ())


def test_a_scenario_that_expects_nothing_fails() -> None:
    assert scenario(POSITIVE, lambda s: s.forward(padding())).ok is False


def test_a_guard_that_refuses_what_is_legal_fails() -> None:
    def story(s: Stage) -> None:
        raise LifecycleError("block 3 is held")

    outcome = scenario(NEGATIVE, story)
    assert outcome.problems == ("LifecycleError: block 3 is held",)


def test_misuse_that_is_not_refused_fails() -> None:
    stage = Stage(HostPlace(), SHAPES["nhd4"])
    stage.lifecycle = True
    with stage.misuse("something"):
        pass
    assert stage.problems == ["something was not refused"]


def test_what_is_missing_is_skipped_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def story(s: Stage) -> None:
        raise MissingError("teleport_slots")

    outcome = scenario(POSITIVE, story)
    assert outcome.ok is None
    print_table([outcome])
    assert "skipped: needs teleport_slots" in capsys.readouterr().out
    assert not verdict([outcome], [], is_whole=False)[0], "nothing was played"


def test_a_missed_corruption_fails(capsys: pytest.CaptureFixture[str]) -> None:
    played = [play(SCENARIOS["C24-bit"], HostPlace(), "nhd4", False)]
    assert verdict(played, [SdcCount("some", 3, 3)], is_whole=False)[0]
    missed = SdcCount("some", 3, 2, missed=1, first_missed="slot 5")
    assert not verdict(played, [missed], is_whole=False)[0]
    print_sdc([missed])
    assert "first missed: slot 5" in capsys.readouterr().out


# ---- the README ------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not README.is_file(), reason="README.md is not beside the tests")
def test_the_readme_is_up_to_date(outcomes: list[Outcome]) -> None:
    text = README.read_text(encoding="utf-8")
    assert render(text, outcomes) == text, "run `kvcanary drill --backend host --render-readme README.md`"


def test_rendering_touches_only_what_is_between_the_markers(outcomes: list[Outcome]) -> None:
    text = render(f"before\n{BEGIN}\nOUTDATED\n{END}\nafter\n", outcomes)
    assert text.startswith(f"before\n{BEGIN}\n| class ")
    assert text.endswith(f"{END}\nafter\n")
    assert "OUTDATED" not in text
    assert render(text, outcomes) == text
    assert re.search(r"^\| C24 \| .* \| `DATA` \| 0", text, re.MULTILINE)


@pytest.mark.parametrize("text", ["nothing", f"{END}", f"{BEGIN}{BEGIN}{END}"])
def test_a_file_without_the_markers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="once each"):
        render(text, [])


# ---- the kernels -----------------------------------------------------------------------------------------------------
def summary(outcome: Outcome) -> tuple[Any, ...]:
    """What was said, in any order, by whichever half or sharer came first: a finding is reported once."""
    found = sorted((v.step, v.reasons, v.slot, v.position, str(v.plane)) for v in outcome.reported)
    return outcome.problems, found


@pytest.fixture
def on_kernels(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drill's guards run the real kernels, on the CPU."""
    from simt.driver import simt_backend

    from kvcanary.sim.museum import stage

    backend = partial(simt_backend, library=library)
    monkeypatch.setattr(stage, "CanaryManager", partial(stage.CanaryManager, backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("is_beside", [False, True])
def test_the_kernels_hold_too(
    is_beside: bool, on_kernels: None, outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the model HEAD comes as late as it may, once TAIL waits for it."""
    monkeypatch.setenv("KVCANARY_OVERLAP_HEAD", str(int(is_beside)))
    shapes = {s.id: s.shapes if "check_reserved_every" in s.config else s.shapes[:1] for s in SCENARIOS.values()}
    found = [play(s, HostPlace(), at, lc) for s in SCENARIOS.values() for lc in s.lifecycle for at in shapes[s.id]]
    assert {o.scenario.id: o.problems for o in found if o.problems} == {}
    assert sum(o.ok is True for o in found) >= 80
    here = {(o.scenario.id, o.shape, o.lifecycle): o.causes for o in outcomes}
    others = {o.scenario.id for o in found if o.causes != here[o.scenario.id, o.shape, o.lifecycle]}
    assert others == ({"C08-torn"} if is_beside else set()), "whose table changes before the model reads it"


def test_causes_do_not_depend_on_the_order_of_the_records(outcomes: list[Outcome]) -> None:
    """Which of one forward's records comes first is not the same on every GPU."""
    rng, n_moved = random.Random(0), 0
    for outcome in outcomes:
        if outcome.causes:
            moved = rng.sample(outcome.reported, len(outcome.reported))
            n_moved += moved != list(outcome.reported)
            assert tuple(classify(moved)) == outcome.causes, outcome.scenario.id
    assert n_moved > 100


@pytest.mark.gpu
def test_a_gpu_reports_what_the_host_reports() -> None:
    place = make_place("cuda")
    for scenario_ in SCENARIOS.values():
        for lifecycle in scenario_.lifecycle:
            for shape in scenario_.shapes:
                here, there = (play(scenario_, p, shape, lifecycle) for p in (HostPlace(), place))
                assert summary(here) == summary(there), (scenario_.id, shape, lifecycle)
                assert here.causes == there.causes, (scenario_.id, shape, lifecycle)
