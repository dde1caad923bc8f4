"""Ranks agree: what one has seen, all log or raise at the same step; who does not come is reported, not waited for."""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path

import pytest
from engine import PAGE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rank_group import EVERY, WITHIN, Group, Rank, pair, run

from kvcanary import ConfigError, KvCanaryViolation, PhaseError, RankAgreement, RankStalledError, Reason, Severity
from kvcanary.cli import main


def test_ranks_that_see_nothing_stay_silent() -> None:
    ranks = pair()
    run(ranks, 3 * EVERY)
    assert [rank.agreement.n_agreements for rank in ranks] == [2, 2]  # the third is under way
    for rank in ranks:
        assert not rank.raised and rank.agreement.latest.severity is Severity.NONE
        rank.manager.close()


@pytest.mark.parametrize("n_steps_before", range(1, 2 * EVERY, 3))
def test_what_one_rank_sees_all_raise_at_the_same_step(n_steps_before: int) -> None:
    healthy, faulty = ranks = pair()
    run(ranks, n_steps_before)
    faulty.flip()
    run(ranks, EVERY + WITHIN)  # seen in the first of these
    (step,) = healthy.raised
    assert set(faulty.raised) == {step}
    assert step % EVERY == WITHIN
    error, other = faulty.raised[step], healthy.raised[step]
    assert isinstance(error, KvCanaryViolation) and isinstance(other, KvCanaryViolation)
    assert other.violations == () and {v.reasons for v in error.violations} == {Reason.DATA}
    for text in (str(error), str(other)):
        assert f"2 ranks agree at step {step}" in text and "rank 1: DATA at step" in text
    assert healthy.agreement.latest == faulty.agreement.latest
    assert healthy.agreement.latest[2:] == (1, Reason.DATA)
    assert healthy.agreement.latest.step == error.violations[0].step


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(st.data(), st.integers(0, 1), st.integers(1, 20))
def test_a_host_may_be_ahead_of_the_other_by_as_much_as_within(data: st.DataObject, faulty: int, flip_at: int) -> None:
    """Steps of the two ranks in any order: no stall, and what is raised is raised at the same steps."""
    ranks, n_steps = pair(), 2 * EVERY + WITHIN
    n_done = [0, 0]
    while min(n_done) < n_steps:
        may = [r for r in (0, 1) if n_done[r] < n_steps and n_done[r] - n_done[1 - r] < WITHIN]
        rank = data.draw(st.sampled_from(may))
        if rank == faulty and n_done[rank] == flip_at:
            ranks[rank].flip()
        run([ranks[rank]], 1)
        n_done[rank] += 1
    assert not any(isinstance(e, RankStalledError) for rank in ranks for e in rank.raised.values())
    assert set(ranks[0].raised) == set(ranks[1].raised)
    is_seen = flip_at % (3 * PAGE) != 0  # there the toy begins anew, and writes over it
    is_in_time = flip_at + 1 <= 2 * EVERY  # the last agreement that is delivered begins there
    assert bool(ranks[0].raised) == (is_seen and is_in_time)


def test_a_sighting_while_an_agreement_is_under_way_comes_with_the_next() -> None:
    healthy, faulty = ranks = pair()
    run(ranks, EVERY)
    faulty.flip()
    run(ranks, WITHIN)
    assert not faulty.raised and faulty.manager.violations()
    run(ranks, EVERY)
    assert set(healthy.raised) == set(faulty.raised) == {2 * EVERY + WITHIN}


def test_in_mode_log_all_write_the_same_line(caplog: pytest.LogCaptureFixture) -> None:
    ranks = pair(mode="log")
    run(ranks, 3)
    ranks[1].flip()
    with caplog.at_level(logging.WARNING, "kvcanary"):
        run(ranks, EVERY + WITHIN)
    lines = [r.message for r in caplog.records if "ranks agree" in r.message]
    assert len(lines) == 2 and lines[0] == lines[1] and f"at step {EVERY + WITHIN}" in lines[0]
    assert not ranks[0].raised and not ranks[1].raised


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_a_rank_that_does_not_come_is_reported_within_the_stated_steps(n_ranks: int) -> None:
    *alive, _dead = ranks = [Rank(agreement) for agreement in Group(n_ranks).make()]
    run(ranks, EVERY + 1)
    run(alive, EVERY + WITHIN)
    for rank in alive:
        (step,) = rank.raised
        error = rank.raised[step]
        assert isinstance(error, RankStalledError) and error.step == step == 2 * EVERY + WITHIN
        assert ("rank 1 did not come" if n_ranks == 2 else "at least one of the 2 other ranks") in str(error)
        assert rank.agreement.is_broken


def test_after_a_stall_a_rank_raises_what_it_sees_at_once_and_begins_no_agreement() -> None:
    group = Group()
    first, _second = (Rank(agreement) for agreement in group.make())
    run([first], EVERY + WITHIN)
    assert isinstance(first.raised.pop(EVERY + WITHIN), RankStalledError)
    first.flip()
    run([first], 1)
    assert set(first.raised) == {EVERY + WITHIN + 1}
    run([first], 2 * EVERY)
    assert group.n_begun[0] == 2 and set(first.raised) == {EVERY + WITHIN + 1}  # one of them checked the settings
    first.manager.close()


def test_a_stall_is_only_logged_where_the_health_policy_says_so(caplog: pytest.LogCaptureFixture) -> None:
    first, _second = pair(health_policy="log")
    with caplog.at_level(logging.ERROR, "kvcanary"):
        run([first], 3 * EVERY)
    assert not first.raised
    assert [r.levelname for r in caplog.records if "did not come to the agreement" in r.message] == ["ERROR"]


def test_lines_are_objects_where_the_log_is_json(caplog: pytest.LogCaptureFixture) -> None:
    first, second = ranks = pair(mode="log", log_format="json")
    run(ranks, 3)
    second.flip()
    with caplog.at_level(logging.WARNING, "kvcanary"):
        run(ranks, EVERY + WITHIN - 3)
        run([first], 2 * EVERY)
    told = [json.loads(r.message) for r in caplog.records]
    agreed = [object_ for object_ in told if object_["event"] == "agreement"]
    assert len(agreed) == 2 and {(a["rank"], a["severity"], *a["reasons"]) for a in agreed} == {(1, "READ", "DATA")}
    (stall,) = (object_ for object_ in told if object_["event"] == "rank_stall")
    assert (stall["rank"], stall["level"], stall["step"]) == (0, "ERROR", 2 * EVERY + WITHIN)


def test_a_rank_that_does_not_come_is_in_the_black_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = tmp_path / "box.jsonl"
    first, _second = (Rank(agreement, black_box_path=str(box)) for agreement in Group().make())
    run([first], EVERY + WITHIN)
    first.manager.close()
    assert main(["explain", str(box)]) in (0, 1)
    told = " ".join(capsys.readouterr().out.split())
    assert f"1 report of the ranks, from step {EVERY + WITHIN} on" in told
    assert "rank 1 did not come to the agreement" in told and "look at its process and its log" in told


def test_a_communicator_that_fails_is_told_when_the_agreement_is_required() -> None:
    group = Group()
    first, _second = ranks = [Rank(agreement) for agreement in group.make()]
    group.failing = {0, 1}
    run(ranks, EVERY + WITHIN)
    assert {step for rank in ranks for step in rank.raised} == {EVERY + WITHIN}
    assert "ConnectionResetError: peer is gone" in str(first.raised[EVERY + WITHIN])


def test_a_rank_with_other_steps_is_reported_once_by_all(caplog: pytest.LogCaptureFixture) -> None:
    agreements = Group().make()
    ranks = [Rank(agreements[0]), Rank(agreements[1], n_before=2)]
    with caplog.at_level(logging.ERROR, "kvcanary"):
        run(ranks, 3 * EVERY)
    lines = [r.message for r in caplog.records if "the ranks count other steps" in r.message]
    assert len(lines) == 2 and all(f"rank 1 is at {EVERY + 2} with a forward, rank 0 at {EVERY}" in x for x in lines)


def test_idle_steps_do_not_count() -> None:
    healthy, faulty = ranks = pair()
    for _ in range(EVERY // 2):
        with faulty.manager.step(idle=True):
            pass
    run(ranks, 3)
    faulty.flip()
    run(ranks, EVERY)
    (step,) = healthy.raised
    assert step == EVERY + WITHIN and set(faulty.raised) == {step + EVERY // 2}


def test_a_step_that_the_engine_abandons_counts_and_its_error_waits_for_the_next() -> None:
    healthy, faulty = ranks = pair()
    run(ranks, 2)
    faulty.flip()
    run(ranks, EVERY + WITHIN - 3)
    with pytest.raises(OSError, match="the engine's own"):
        healthy.step(fails=True)
    run([faulty], 2)
    assert set(faulty.raised) == {EVERY + WITHIN}
    healthy.try_step()
    (error,) = healthy.raised.values()
    assert isinstance(error, KvCanaryViolation)


def test_ranks_with_other_settings_refuse_to_be_made() -> None:
    group = Group()
    with pytest.raises(ConfigError, match=r"rank 1 has every=9, within=3 and rank 0 has every=8, within=3"):
        group.make([{}, {"every": 9}])


def test_it_is_attached_once_and_closed_by_its_manager() -> None:
    ranks = pair()
    with pytest.raises(PhaseError, match="attached already"):
        Rank().manager.attach_agreement(ranks[0].agreement)
    run(ranks, EVERY + 1)  # one is under way
    for rank in ranks:
        rank.manager.close()
        rank.agreement.close()
        assert not rank.agreement.is_broken


def test_steps_leave_nothing_behind_in_memory() -> None:
    agreement = RankAgreement(lambda words, stream: lambda: True, rank=0, n_ranks=1, every=4, within=2)
    manager = Rank(agreement).manager
    facts = manager._facts(manager.backend)

    def held_after(n_steps: int) -> int:
        for _ in range(n_steps):
            agreement.tick(is_idle=False)
            if agreement.is_due(1):
                agreement.step(facts)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = held_after(200)
        assert held_after(4000) - before < 1000
    finally:
        tracemalloc.stop()
    assert agreement.n_agreements > 1000


def test_a_closed_agreement_begins_nothing_and_leaves_raising_to_each_rank() -> None:
    group = Group()
    first, second = ranks = [Rank(agreement) for agreement in group.make()]
    run(ranks, 3)
    first.agreement.close()
    first.flip()
    run([first], 2 * EVERY)
    assert set(first.raised) == {4} and group.n_begun == [1, 1]  # the one that compared the settings
    second.agreement.close()


def test_closing_does_not_wait_for_ever() -> None:
    first, _second = pair()
    run([first], EVERY)
    first.agreement.close(timeout_s=0.01)
    assert first.agreement.is_broken


def test_a_guard_that_is_off_needs_no_agreement() -> None:
    agreements = Group().make()
    rank = Rank(agreements[0], mode="off")
    run([rank], 3 * EVERY)
    assert not rank.raised
    agreements[0].close()
