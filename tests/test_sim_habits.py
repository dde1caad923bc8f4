"""Preemption, drafts, windows and early sharing: the same bytes, books that balance, and a guard that is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kvcanary import CanaryConfig, CanaryManager
from kvcanary.sim.engine import SimEngine, StepInfo
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.habits import Habits, ngram_drafts
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.scheduler import Request
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.sim.texts import load_texts
from kvcanary.violations import Violation

SMALL = ModelConfig(n_layers=2, n_heads=2, head_dim=16)
PAGE, N_TOKENS = 4, 24
TEXTS = [text[:n] for text, n in zip(load_texts().values(), (50, 33, 61, 18, 45, 29), strict=False)]
PROMPTS = [*TEXTS, TEXTS[0][:37] + b"another end", TEXTS[0]]  # shared in part, and in whole


def serve_plainly(window: int | None) -> list[bytes]:
    """Each prompt alone, whole at once, nothing shared."""
    model = NumpyModel(replace(SMALL, window=window), 40, PAGE)
    return [SimEngine(model, prefix_sharing=False, max_len=128).run([p], N_TOKENS)[0] for p in PROMPTS]


PLAIN = {window: serve_plainly(window) for window in (None, 1, 7, 16)}


def mostly_right(known: NDArray[np.int32], n: int, window: int | None = None) -> list[int]:
    """A draft rule that knows the answers, and spoils a draft in two cases of three."""
    text = bytes(known.astype(np.uint8))
    wholes = [prompt + output for prompt, output in zip(PROMPTS, PLAIN[window], strict=True)]
    drafts = list(next((whole for whole in wholes if whole.startswith(text)), b"")[len(text) :][:n])
    if drafts and len(text) % 3:
        drafts[-1 if len(text) % 3 == 1 else 0] ^= 1
    return drafts


class GuardedRun:
    """Serves the prompts under a guard that judges every byte at every step, and notes what the engine did."""

    def __init__(
        self, habits: Habits, *, window: int | None = None, n_blocks: int = 150, mode: str = "raise", **options: int
    ) -> None:
        model = NumpyModel(replace(SMALL, window=window), n_blocks, PAGE)
        self.engine = SimEngine(model, max_new_tokens=128, max_len=128, habits=habits, **options)
        config = CanaryConfig(mode=mode, verify_data_every=1)
        self.manager = CanaryManager(config, [pool_of(model)], self.engine.max_requests, 128)
        self.engine.before_forward.append(self._note_tables)
        self.engine.after_step.append(self._note_drafts)
        self.requests: list[Request] = []
        self.n_accepted = self.n_rejected = self.n_passed = self.n_early = 0
        self._n_known: dict[int, int] = {}

    @property
    def n_preemptions(self) -> int:
        return sum(request.n_preemptions for request in self.requests)

    def run(self, max_steps: int = 1000) -> list[bytes]:
        self.requests = [self.engine.add_request(prompt, N_TOKENS) for prompt in PROMPTS]
        guard = CanaryGuard(self.manager)
        while self.engine.has_work and self.engine.n_steps < max_steps:
            self.engine.step(guard)
        self.manager.synchronize()
        return [request.output for request in self.requests]

    def violations(self) -> tuple[Violation, ...]:
        return self.manager.violations()

    def _note_tables(self, arrays: StepArrays) -> None:
        written = set((arrays.slot_mapping[: arrays.n_tokens] // PAGE).tolist())
        n_new = np.diff(arrays.query_start_loc)
        for row in range(arrays.n_rows):
            n_prefix = int(arrays.seq_lens[row] - n_new[row])
            read = arrays.block_table[row, : n_prefix // PAGE].tolist()
            self.n_early += bool(written & set(read[-1:]))
            self.n_passed += sum(self.engine.allocator.ref_counts[block] == 0 or block in written for block in read)

    def _note_drafts(self, info: StepInfo) -> None:
        for share in info.shares:
            gained = share.request.n_known - self._n_known.get(share.request.id, share.request.n_prompt)
            self._n_known[share.request.id] = share.request.n_known
            if share.drafts:
                self.n_accepted += gained - 1
                self.n_rejected += len(share.drafts) + 1 - gained


def assert_is_honest(run: GuardedRun, expected: Sequence[bytes]) -> None:
    """The plain engine's bytes, no blocks left behind, and nothing to report."""
    assert run.run() == list(expected)
    assert not run.engine.allocator.ref_counts.any()
    run.manager.synchronize()
    assert run.violations() == ()
    stats = run.manager.stats()
    assert stats.observations_total == stats.unanchored_rows == 0
    run.manager.close()


@pytest.mark.parametrize("chunk", [5, 128])
@pytest.mark.parametrize("n_blocks", [24, 40])
def test_preempted_requests_are_recomputed(n_blocks: int, chunk: int) -> None:
    run = GuardedRun(Habits(overcommit=True), n_blocks=n_blocks, chunk=chunk)
    assert_is_honest(run, PLAIN[None])
    assert run.n_preemptions >= 3


def test_preempted_request_waits_first_and_hits_its_own_blocks() -> None:
    engine = SimEngine(NumpyModel(SMALL, 13, PAGE), max_len=64, habits=Habits(overcommit=True))
    old, young = engine.add_request(b"0123456789abcdefghij", 12), engine.add_request(b"ABCDEFGHIJKLMNOPQRST", 12)
    last = engine.add_request(b"xyz", 2)
    old_blocks: list[int] = []
    while not young.n_preemptions:
        old_blocks = list(young.blocks)
        engine.step()
    assert engine.scheduler.waiting[0] is young
    assert young.blocks == [] and old.n_preemptions == 0
    while not young.blocks:
        engine.step()
    assert young.n_shared_tokens > 0 and young.blocks[0] == old_blocks[0]
    while engine.has_work:
        engine.step()
    assert [len(r.output) for r in (old, young, last)] == [12, 12, 2]


@pytest.mark.parametrize("n_draft", [1, 3, 15])
@pytest.mark.parametrize("history_drafts", [True, False])
def test_drafts_change_nothing_but_the_number_of_steps(n_draft: int, history_drafts: bool) -> None:
    run = GuardedRun(Habits(n_draft=n_draft, draft_rule=mostly_right, history_drafts=history_drafts))
    assert_is_honest(run, PLAIN[None])
    assert run.n_accepted > 20 and run.n_rejected > 20


def test_drafts_from_the_request_itself() -> None:
    run = GuardedRun(Habits(n_draft=4))
    assert_is_honest(run, PLAIN[None])
    assert run.n_accepted > 0 and run.n_rejected > 20


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        (b"abcab", 2, b"ca"),
        (b"abcab", 9, b"cab"),
        (b"abxb", 2, b"xb"),
        (b"aaa", 2, b"a"),
        (b"abc", 2, b""),
        (b"a", 2, b""),
    ],
)
def test_ngram_drafts_by_hand(text: bytes, n: int, expected: bytes) -> None:
    assert bytes(ngram_drafts(np.frombuffer(text, np.uint8).astype(np.int32), n)) == expected


@pytest.mark.parametrize("history_drafts", [True, False])
def test_history_of_drafts(history_drafts: bool) -> None:
    habits = Habits(n_draft=3, draft_rule=lambda known, n: [1] * n, history_drafts=history_drafts)  # always wrong
    engine = SimEngine(NumpyModel(SMALL, 40, PAGE), max_len=64, habits=habits)
    engine.add_request(b"abcdef", 6)
    seen: list[list[int]] = []
    engine.before_forward.append(lambda arrays: seen.append(engine.token_history[0, 7:11].tolist()))
    engine.step()
    engine.step()
    assert seen[1] == ([1, 1, 1, -1] if history_drafts else [-1] * 4)
    assert engine.token_history[0, 8:].tolist() == [-1] * 56


def test_end_byte_among_accepted_drafts_ends_the_request() -> None:
    whole = PLAIN[None][0]
    end = whole[4]
    habits = Habits(n_draft=7, draft_rule=lambda known, n: list(whole[len(known) - len(PROMPTS[0]) :][:n]))
    engine = SimEngine(NumpyModel(SMALL, 40, PAGE), max_len=128, habits=habits)
    assert engine.run([PROMPTS[0]], N_TOKENS, end_byte=end) == [whole[: whole.index(end) + 1]]
    assert engine.n_steps <= 2
    assert not engine.allocator.ref_counts.any()


@pytest.mark.parametrize("window", [1, 7, 16])
@pytest.mark.parametrize("keeps_stale_ids", [True, False])
def test_blocks_behind_the_window_are_used_again(window: int, keeps_stale_ids: bool) -> None:
    habits = Habits(frees_window=True, keeps_stale_ids=keeps_stale_ids, overcommit=True)
    run = GuardedRun(habits, window=window, n_blocks=40, chunk=9)
    assert_is_honest(run, PLAIN[window])
    assert run.n_passed > 20


def test_window_frees_what_no_later_query_sees() -> None:
    engine = SimEngine(
        NumpyModel(replace(SMALL, window=6), 40, PAGE),
        max_len=64,
        prefix_sharing=False,
        habits=Habits(frees_window=True),
    )
    request = engine.add_request(b"0123456789abc", 8)  # 13 positions in the first step, nothing is free before it
    live = []
    for _ in range(5):
        engine.step()
        live.append([i for i, block in enumerate(request.blocks) if block])
    # queries at 12 + n; their windows begin at 7 + n
    assert live == [[0, 1, 2, 3], [2, 3], [2, 3], [2, 3], [2, 3, 4]]
    assert engine.allocator.n_available == 39 - 3


@pytest.mark.parametrize(("window", "n_null"), [(1, 12), (7, 10), (16, 8)])
def test_prefix_hit_of_the_window_alone(window: int, n_null: int) -> None:
    run = GuardedRun(Habits(frees_window=True, hits_window=True), window=window, max_requests=1)
    tables: list[list[int]] = []
    run.engine.before_forward.append(lambda arrays: tables.append(arrays.block_table[0, :12].tolist()))
    assert_is_honest(run, PLAIN[window])
    assert run.requests[-1].n_shared_tokens == 48
    first_of_last = tables[-N_TOKENS]
    assert [index for index, block in enumerate(first_of_last) if block] == list(range(n_null, 12))


@pytest.mark.parametrize("chunk", [9, 128])
def test_blocks_are_shared_in_the_forward_that_writes_them(chunk: int) -> None:
    run = GuardedRun(Habits(shares_early=True), chunk=chunk, max_requests=8)
    assert_is_honest(run, PLAIN[None])
    assert run.n_early > 0
    # in chunks of 9, those before it with the same beginning have each put a chunk behind the one before
    assert run.requests[-1].n_shared_tokens == (48 if chunk == 128 else 24)


def test_plan_that_was_not_run_is_taken_back() -> None:
    engine = SimEngine(NumpyModel(SMALL, 60, PAGE), max_len=128, habits=Habits(shares_early=True))

    def fail(arrays: StepArrays) -> None:
        raise RuntimeError("broken hook")

    requests = [engine.add_request(prompt, N_TOKENS) for prompt in (PROMPTS[0], PROMPTS[0])]
    engine.before_forward.append(fail)
    with pytest.raises(RuntimeError, match="broken hook"):
        engine.step()
    assert requests[1].n_shared_tokens == 48
    engine.before_forward.clear()
    engine.scheduler.chunk = 3  # the writer is slower than it was about to be
    engine.step()
    assert requests[1].n_shared_tokens == 0
    while engine.has_work:
        engine.step()
    assert [request.output for request in requests] == [PLAIN[None][0]] * 2


def test_plan_of_a_request_that_was_aborted_is_taken_back_too() -> None:
    engine = SimEngine(NumpyModel(SMALL, 60, PAGE), max_len=128, habits=Habits(shares_early=True))

    def fail(arrays: StepArrays) -> None:
        raise RuntimeError("broken hook")

    writer, reader = (engine.add_request(PROMPTS[0], N_TOKENS) for _ in range(2))
    engine.before_forward.append(fail)
    with pytest.raises(RuntimeError, match="broken hook"):
        engine.step()
    engine.before_forward.clear()
    engine.scheduler.abort(writer)
    late = engine.add_request(PROMPTS[0], N_TOKENS)
    while engine.has_work:
        engine.step()
    assert reader.output == late.output == PLAIN[None][0]


def test_all_at_once() -> None:
    habits = Habits(
        overcommit=True,
        n_draft=3,
        draft_rule=lambda known, n: mostly_right(known, n, 16),
        frees_window=True,
        keeps_stale_ids=True,
        hits_window=True,
        shares_early=True,
    )
    run = GuardedRun(habits, window=16, n_blocks=30, chunk=20, pad_slot=0)
    assert_is_honest(run, PLAIN[16])
    assert min(run.n_preemptions, run.n_accepted, run.n_rejected, run.n_passed) > 0


@pytest.mark.parametrize(
    ("habits", "message"),
    [
        ({"n_draft": 16}, "n_draft is 16"),
        ({"n_draft": 15, "max_new_tokens": 64}, "must be >= 128"),
        ({"frees_window": True}, "needs a model with a window"),
        ({"hits_window": True}, "without frees_window"),
    ],
)
def test_sizes_are_checked(habits: dict[str, int], message: str) -> None:
    options = {"max_new_tokens": habits.pop("max_new_tokens", 256)}
    with pytest.raises(ValueError, match=message):
        SimEngine(NumpyModel(SMALL, 8, PAGE), habits=Habits(**habits), **options)
