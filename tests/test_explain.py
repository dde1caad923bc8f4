"""`kvcanary explain`: the story of a black box in words and as JSON, and the advice in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import ToyEngine
from explain_boxes import three_runs, violation  # noqa: F401  a fixture

from kvcanary import Reason
from kvcanary.advice import ADVICE, CONTAIN, CONTAIN_RESERVED, CONTAIN_UNREAD, FALLEN, ON_HOST, advice_on
from kvcanary.box_reader import BoxRun, read_box
from kvcanary.causes import NAMES
from kvcanary.cli import main
from kvcanary.story import contain, episodes_of, stall_advice
from kvcanary.tags import CanaryLaunchTag, Detail
from kvcanary.violations import Violation


def run_with(*violations: Violation, config: dict[str, Any] | None = None) -> BoxRun:
    start = {"config": config or {}}
    return BoxRun("ab", 1, 0.0, 1.0, start=start, violations=[(float(v.step), v) for v in violations])


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


NOBODY = {"row": -1, "request_id": 0}


@pytest.mark.parametrize(
    ("of_one", "said"),
    [
        ({"row": 0, "request_id": 7}, CONTAIN),
        ({"row": 0, "request_id": 0}, CONTAIN),
        ({**NOBODY, "tag": CanaryLaunchTag.SWEEP_K_FULL}, CONTAIN_UNREAD),
        ({**NOBODY, "detail": Detail.SCRUB}, CONTAIN_UNREAD),
        ({**NOBODY, "detail": Detail.RESERVED, "reasons": Reason.NONFINITE_RESERVED}, CONTAIN_RESERVED),
    ],
)
def test_requests_are_to_be_aborted_only_where_one_has_read_it(of_one: dict[str, Any], said: str) -> None:
    assert contain([violation(**of_one)]) == said
    both = contain([violation(row=1, request_id=3), violation(**of_one)])
    assert both == CONTAIN


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
