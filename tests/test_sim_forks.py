"""Forks that copy their tail on write, and draft trees: silent when they do, reported when they do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sim_moves import PAGE, TEXTS, Guarded, other_byte, plain

from kvcanary.sim.habits import Habits
from kvcanary.sim.memory import CacheMemory, Mover
from kvcanary.sim.model import NumpyModel
from kvcanary.sim.requests import Request, Share
from kvcanary.sim.trees import Path, draft_tree
from kvcanary.tags import Reason

WRONG_KV = Reason.CHAIN | Reason.TOKEN | Reason.POSITION
FORKS, TREES = Habits(overcommit=True), Habits(n_draft=6, draft_trees=True, draft_rule=lambda known, n: [101] * n)


def forked(run: Guarded, n_steps: int, n_forks: int = 2) -> list[Request]:
    """A request that has decoded for some steps, and forks of it."""
    parent = run.add(TEXTS[0], 20)
    run.step(n_steps)
    forks = []
    for _ in range(n_forks):
        fork = run.engine.fork(parent, other_byte(forks[-1] if forks else parent))
        assert fork is not None
        forks.append(fork)
    return [parent, *forks]


@pytest.mark.parametrize("lifecycle", [False, True])
@pytest.mark.parametrize("n_steps", range(3, 3 + PAGE))  # the fork stands at each place of a block
def test_forks_say_what_they_would_have_said_alone(n_steps: int, lifecycle: bool) -> None:
    run = Guarded(FORKS, model=NumpyModel, lifecycle=lifecycle)
    requests = forked(run, n_steps)
    starts = [len(request.output) for request in requests]
    run.assert_silent()
    for request, start in zip(requests, starts, strict=True):
        text = TEXTS[0] + request.output[:start]
        assert text + plain(text, 20 - start) == TEXTS[0] + request.output
    assert len({request.output for request in requests}) == 3
    assert run.engine.scheduler.forks.n_tail_copies == (2 if (len(TEXTS[0]) + n_steps - 1) % PAGE else 0)


def test_forks_of_forks_and_beams_that_are_dropped() -> None:
    run = Guarded(FORKS)
    parent, first, second = forked(run, 4)
    third = run.engine.fork(first, other_byte(first))
    assert third is not None and third.tail_of_parent is not None
    run.engine.scheduler.abort(parent)  # whose tail is now nobody's to write
    run.step(2)
    run.engine.scheduler.abort(second)
    run.assert_silent()
    assert len(third.output) == len(first.output) == 20


@pytest.mark.parametrize("claims", [False, True])
def test_the_last_of_two_forks_writes_the_tail_where_it_is(claims: bool) -> None:
    run = Guarded(replace(FORKS, claims_tails=claims), model=NumpyModel)
    parent, fork = forked(run, 4, n_forks=1)
    start = len(fork.output)
    run.engine.scheduler.abort(parent)
    run.assert_silent()
    assert fork.output[start:] == plain(TEXTS[0] + fork.output[:start], 20 - start)
    forks = run.engine.scheduler.forks
    assert (forks.n_tails_claimed, forks.n_tail_copies) == (int(claims), int(not claims))


def test_a_tail_that_is_written_without_being_claimed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Guarded(replace(FORKS, claims_tails=True), log=True)
    note = run.engine.scheduler.note
    monkeypatch.setattr(run.engine.scheduler, "note", lambda kind, *a: None if kind == "claim" else note(kind, *a))
    parent, _fork = forked(run, 4, n_forks=1)
    run.engine.scheduler.abort(parent)
    run.step(2)
    assert run.reasons() & Reason.FOREIGN_WRITE


def test_a_preempted_fork_is_computed_anew() -> None:
    run = Guarded(FORKS, n_blocks=24)
    forks = forked(run, 3, n_forks=4)
    run.assert_silent()
    assert sum(request.n_preemptions for request in forks) > 0


def test_a_fork_without_the_copy_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mover, "_copy", lambda self, move, guard: None)
    run = Guarded(FORKS, log=True)
    forks = forked(run, 4)[1:]
    run.step(2)
    assert {v.request_id for v in run.manager.violations()} == {fork.id for fork in forks}
    assert run.reasons() & Reason.UNWRITTEN


def test_a_fork_whose_bytes_were_not_copied_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheMemory, "copy", lambda self, src, dst: None)
    run = Guarded(FORKS, log=True)
    forks = forked(run, 4)[1:]
    run.step(2)
    assert {v.request_id for v in run.manager.violations()} == {fork.id for fork in forks}
    assert run.reasons() == Reason.DATA


@pytest.mark.parametrize("lifecycle", [False, True])
def test_two_that_write_one_tail_are_reported(lifecycle: bool) -> None:
    run = Guarded(FORKS, log=True, lifecycle=lifecycle)
    for fork in forked(run, 4)[1:]:
        fork.tail_of_parent = None
    run.step(3)
    assert run.reasons() & WRONG_KV and run.reasons() & Reason.DUPLICATE_WRITE
    assert bool(run.reasons() & Reason.FOREIGN_WRITE) == lifecycle


# ---- trees -----------------------------------------------------------------------------------------------------------
def test_draft_tree_by_hand() -> None:
    nodes, parents = draft_tree([10, 20, 30])
    assert nodes == (11, 10, 21, 20, 31, 30)
    assert parents == (0, 0, 2, 2, 4, 4)
    share = Share(Request.create(1, b"abc", 9, None), 7, nodes, parents)
    path = Path.of(share, [10, 0, 21, 77, 0, 0, 0])  # says 10, then the rival of 20, then 77
    assert (path.nodes, path.choices) == ([0, 2, 3], [10, 21, 77])
    assert path.as_line == (share.request, 3, (10, 21), ())


def knows_the_answers(habits: Habits) -> Habits:
    """The same with a draft rule that is right about `ScribeModel` two times in three."""
    from dataclasses import replace

    from kvcanary.sim.scribe import next_tokens

    def rule(known: np.ndarray, n: int) -> list[int]:
        drafts = [int(known[-1])]
        for i in range(n):
            at = np.array([len(known) - 1 + i])
            drafts.append(int(next_tokens(np.array(drafts[-1:], np.int32), at)[0]))
        if len(known) % 3 == 0:
            drafts[-1] ^= 3
        return drafts[1:]

    return replace(habits, draft_rule=rule)


@pytest.mark.parametrize("leave_out", [(), ("token_history",), ("token_history", "request_slots", "request_ids")])
def test_trees_change_nothing_but_the_number_of_steps(leave_out: tuple[str, ...]) -> None:
    outputs, n_steps = [], []
    for habits in (Habits(), knows_the_answers(TREES)):
        run = Guarded(habits, leave_out=leave_out)
        requests = [run.add(text) for text in TEXTS]
        run.finish()
        assert run.manager.violations() == ()
        outputs.append([request.output for request in requests])
        n_steps.append(run.engine.n_steps)
    assert outputs[0] == outputs[1] and n_steps[1] < n_steps[0]
    assert run.engine.mover.n_committed > 10


def test_an_accepted_path_that_stays_where_it_was_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mover, "_commit", lambda self, move, guard: None)
    run = Guarded(knows_the_answers(TREES), log=True)
    run.add(TEXTS[0])
    run.step(4)
    assert run.reasons() & WRONG_KV


def test_an_accepted_path_whose_bytes_stay_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheMemory, "copy", lambda self, src, dst: None)
    run = Guarded(knows_the_answers(TREES), log=True)
    run.add(TEXTS[0])
    run.step(4)
    assert run.reasons() == Reason.DATA
