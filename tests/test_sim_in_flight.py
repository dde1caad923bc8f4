"""Steps that are launched before the tokens of the one before are seen."""

from __future__ import annotations

import pytest
from sim_moves import TEXTS, Guarded, plain

from kvcanary.sim.habits import Habits
from kvcanary.sim.in_flight import InFlight
from kvcanary.sim.model import NumpyModel
from kvcanary.tags import Reason

AHEAD = Habits(in_flight=True)


@pytest.mark.parametrize("lifecycle", [False, True])
@pytest.mark.parametrize("leave_out", [(), ("token_history",), ("token_history", "request_slots", "request_ids")])
def test_the_same_is_said_a_step_ahead(leave_out: tuple[str, ...], lifecycle: bool) -> None:
    run = Guarded(AHEAD, model=NumpyModel, leave_out=leave_out, lifecycle=lifecycle, chunk=20)
    requests = [run.add(text) for text in TEXTS]
    run.finish()
    assert run.manager.violations() == ()
    assert [request.output for request in requests] == [plain(text, 12) for text in TEXTS]
    assert run.engine.in_flight.n_placeholders > 30 and run.engine.in_flight.n_late_writes == 0


def test_history_has_a_placeholder_while_a_token_is_unseen() -> None:
    run = Guarded(AHEAD)
    request = run.add(TEXTS[0])
    seen: list[tuple[int, int]] = []
    n = len(TEXTS[0])
    run.engine.before_forward.append(lambda arrays: seen.append((arrays.token_history[0, n], arrays.input_ids[0])))
    run.step(3)
    assert seen[1] == (-1, -1), "nobody has seen it when the second step is filled"
    assert seen[2][0] == request.tokens[n] >= 32


def test_requests_that_had_ended_write_once_more() -> None:
    ends = [plain(text, 12)[4] for text in TEXTS]
    run = Guarded(AHEAD, model=NumpyModel)
    requests = [run.add(text, end_byte=end) for text, end in zip(TEXTS, ends, strict=True)]
    run.assert_silent()
    for text, end, request in zip(TEXTS, ends, requests, strict=True):
        whole = plain(text, 12)
        assert request.output == whole[: whole.index(end) + 1]
    assert run.engine.in_flight.n_late_writes == len(TEXTS)


def test_preempted_and_aborted_while_a_step_is_under_way() -> None:
    habits = Habits(in_flight=True, overcommit=True, cache_owns=True, n_offload=20)
    run = Guarded(habits, n_blocks=26)
    requests = [run.add(text, 20) for text in TEXTS]
    run.step(8)
    run.engine.scheduler.abort(requests[1])
    run.assert_silent()
    assert run.engine.scheduler.n_preemptions > 0
    assert all(len(request.output) == 20 for request in requests if request is not requests[1])


def test_blocks_that_are_freed_before_the_last_write_are_reported() -> None:
    """The end is seen after the step was planned with the request in it, and before it is launched."""
    ends = plain(TEXTS[0], 12)[4]
    run = Guarded(AHEAD, model=NumpyModel, log=True)
    request = run.add(TEXTS[0], end_byte=ends)
    engine = run.engine

    def see_too_early(arrays: object) -> None:
        request_was = [s.token for s in engine.in_flight._sampled if s.request is request]
        if request_was == [ends]:
            engine.scheduler.abort(request)

    engine.before_forward.append(see_too_early)
    run.finish()
    assert run.reasons() & Reason.STALE_EPOCH
    assert {v.request_id for v in run.manager.violations()} == {request.id}


def test_a_placeholder_that_is_fed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InFlight, "fill_in", lambda self, *args: args[0].clip(0, None, out=args[0]))
    run = Guarded(AHEAD, log=True)
    run.add(TEXTS[0])
    run.step(4)
    assert run.reasons() & Reason.TOKEN


def test_drafts_cannot_be_ahead() -> None:
    with pytest.raises(ValueError, match="in_flight with n_draft 3"):
        Habits(in_flight=True, n_draft=3)
    with pytest.raises(ValueError, match="draft_trees with n_draft 1"):
        Habits(draft_trees=True, n_draft=1)
    with pytest.raises(ValueError, match="draft_trees: NumpyModel"):
        Guarded(Habits(draft_trees=True, n_draft=2), model=NumpyModel)
