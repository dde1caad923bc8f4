"""One bug per habit, as engines have had them, and what the guard says of it."""

from __future__ import annotations

import pytest
from test_sim_habits import PAGE, GuardedRun, mostly_right

from kvcanary.sim.engine import SimEngine, StepInfo
from kvcanary.sim.habits import Habits
from kvcanary.sim.scheduler import Request, Scheduler, Share
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.tags import Reason

WRONG_KV = Reason.CHAIN | Reason.TOKEN | Reason.POSITION


class LengthKept:
    """After a rejection the next row is one token longer than it should be: a rejected draft's slot is part of it."""

    def __init__(self, engine: SimEngine) -> None:
        self.page = engine.model.page_size
        self.struck: tuple[int, int] | None = None  # request, position of the rejected draft
        self._n_known: dict[int, int] = {}
        self._rejected: set[int] = set()
        engine.after_step.append(self._after_step)
        engine.before_forward.append(self._before_forward)

    def _after_step(self, info: StepInfo) -> None:
        self._rejected.clear()
        for request, _, drafts, _ in info.shares:
            gained = request.n_known - self._n_known.get(request.id, request.n_prompt)
            self._n_known[request.id] = request.n_known
            if drafts and len(drafts) >= gained:
                self._rejected.add(request.id)

    def _before_forward(self, arrays: StepArrays) -> None:
        for row in range(arrays.n_rows):
            start, end = arrays.query_start_loc[row : row + 2].tolist()
            length, request = int(arrays.seq_lens[row]), int(arrays.request_ids[row])
            if self.struck or request not in self._rejected or length % self.page == 0:
                continue
            self.struck = request, length - (end - start)
            arrays.seq_lens[row] += 1
            for token in range(start, end):
                position = length + 1 - (end - token)
                block = int(arrays.block_table[row, position // self.page])
                arrays.slot_mapping[token] = block * self.page + position % self.page


@pytest.mark.parametrize("history_drafts", [True, False])
def test_rejected_drafts_that_stay_in_the_length_are_reported(history_drafts: bool) -> None:
    habits = Habits(n_draft=3, draft_rule=mostly_right, history_drafts=history_drafts)
    run = GuardedRun(habits, mode="log")
    bug = LengthKept(run.engine)
    run.run()
    assert bug.struck is not None
    first = run.violations()[0]
    assert (first.request_id, first.position) == bug.struck
    assert first.reasons & Reason.TOKEN


@pytest.mark.parametrize(
    ("keeps_stale_ids", "reasons"), [(False, Reason.UNWRITTEN), (True, WRONG_KV)], ids=["null-block", "stale-ids"]
)
def test_window_block_freed_one_too_early_is_reported(
    keeps_stale_ids: bool, reasons: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Scheduler._n_outside

    def too_many(self: Scheduler, request: Request) -> int:
        return min(right(self, request) + 1, request.n_computed // PAGE)

    monkeypatch.setattr(Scheduler, "_n_outside", too_many)
    run = GuardedRun(Habits(frees_window=True, keeps_stale_ids=keeps_stale_ids), window=16, n_blocks=50, mode="log")
    run.run()
    assert any(violation.reasons & reasons for violation in run.violations())


def test_preempted_request_with_its_old_table_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    old: dict[int, list[int]] = {}
    right = Scheduler._preempt

    def noting(self: Scheduler, request: Request) -> None:
        old[request.id] = list(request.blocks)
        right(self, request)

    monkeypatch.setattr(Scheduler, "_preempt", noting)
    run = GuardedRun(Habits(overcommit=True), n_blocks=24, mode="log")
    struck: set[int] = set()

    def old_table(arrays: StepArrays) -> None:
        for row in range(arrays.n_rows):
            request = int(arrays.request_ids[row])
            n_prefix_blocks = int(arrays.seq_lens[row] - 1) // PAGE
            blocks = old.get(request, [])[:n_prefix_blocks]
            if (arrays.block_table[row, : len(blocks)] != blocks).any():
                arrays.block_table[row, : len(blocks)] = blocks
                struck.add(request)

    run.engine.before_forward.append(old_table)
    run.run()
    reported = {violation.request_id for violation in run.violations() if violation.reasons & WRONG_KV}
    assert struck and reported == struck


def test_early_share_of_blocks_whose_writer_was_put_off_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scheduler.plan
    struck: list[Request] = []

    def plan(self: Scheduler) -> list[Share]:
        shares = right(self)
        by_block = {block: share for share in reversed(shares) for block in share.request.blocks}
        for share in shares:
            for block in share.request.blocks[: share.request.n_shared_tokens // PAGE]:
                writer = by_block[block]
                if not struck and writer.request is not share.request and writer.request.n_computed == 0:
                    struck.append(share.request)
                    return [other for other in shares if other is not writer]
        return shares

    monkeypatch.setattr(Scheduler, "plan", plan)
    run = GuardedRun(Habits(shares_early=True), mode="log")
    run.run()
    assert {violation.request_id for violation in run.violations()} >= {struck[0].id}
    assert run.violations()[0].reasons & Reason.UNWRITTEN
