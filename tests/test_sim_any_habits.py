"""Any schedule with any habits over a model of integers, whose output shows one wrong token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvcanary.sim.engine import SimEngine, StepInfo
from kvcanary.sim.habits import Habits
from kvcanary.sim.model import ModelConfig
from kvcanary.sim.requests import Request
from kvcanary.sim.step_arrays import StepArrays


class EchoModel:
    """A cache of one token per slot; the next token is a hash of what the window shows, position included."""

    def __init__(self, n_blocks: int, page_size: int, window: int | None) -> None:
        self.n_blocks, self.page_size = n_blocks, page_size
        self.config = ModelConfig(window=window)
        self.cache = np.full(n_blocks * page_size, -1, np.int32)
        self.k_cache = self.v_cache = [self.cache.reshape(n_blocks, page_size, 1, 1)]  # moved as one

    def forward(self, arrays: StepArrays) -> NDArray[np.int32]:
        return self.forward_all(arrays)[np.maximum(arrays.query_start_loc[1:] - 1, 0)]

    def forward_all(self, arrays: StepArrays) -> NDArray[np.int32]:
        n_tokens, page = arrays.n_tokens, self.page_size
        self.cache[arrays.slot_mapping[:n_tokens]] = arrays.input_ids[:n_tokens]
        sampled = np.zeros(arrays.max_tokens, np.int32)
        for row in range(arrays.n_rows):
            positions = np.arange(arrays.seq_lens[row])
            seen = self.cache[arrays.block_table[row, positions // page] * page + positions % page]
            first, end = arrays.query_start_loc[row : row + 2]
            for token in range(first, end):
                sampled[token] = echo(seen[: len(seen) - (end - 1 - token)].tolist(), self.config.window)
        return sampled


def echo(tokens: Sequence[int], window: int | None) -> int:
    start = 0 if window is None else max(0, len(tokens) - window)
    return 97 + sum((i + 1) * tokens[i] for i in range(start, len(tokens))) * 2654435761 % 2**32 % 3  # a, b or c


def echo_output(prompt: bytes, n: int, window: int | None) -> bytes:
    text = prompt
    for _ in range(n):
        text += bytes([echo(text, window)])
    return text[len(prompt) :]


prompts = st.lists(st.tuples(st.text("ab", min_size=1, max_size=20), st.integers(1, 8)), min_size=1, max_size=8)
some_habits = st.fixed_dictionaries(
    {
        "overcommit": st.booleans(),
        "n_draft": st.integers(0, 3),
        "history_drafts": st.booleans(),
        "frees_window": st.booleans(),
        "keeps_stale_ids": st.booleans(),
        "hits_window": st.booleans(),
        "shares_early": st.booleans(),
        "cache_owns": st.booleans(),
        "zeroes": st.booleans(),
        "n_offload": st.sampled_from([0, 3, 20]),
        "in_flight": st.booleans(),
    }
)


def check_books(engine: SimEngine, arrays: StepArrays) -> None:
    """No slot is written twice; what a row reads and writes is its own; every reference has its owner."""
    scheduler, page = engine.scheduler, engine.model.page_size
    written = arrays.slot_mapping[: arrays.n_tokens]
    assert len(set(written.tolist())) == arrays.n_tokens, "two tokens in one slot"
    owned = [block for request in scheduler.running for block in request.blocks[request.n_passed :]]
    counts = np.bincount(np.array(owned, int), minlength=engine.model.n_blocks)
    assert engine.allocator.ref_counts.tolist() == counts.tolist() and counts[0] == 0
    by_id = {request.id: request for request in scheduler.running}
    for row in range(arrays.n_rows):
        request, known = by_id[int(arrays.request_ids[row])], int(arrays.seq_lens[row])
        assert len(request.blocks) * page >= known
        history = engine.token_history[request.slot, : request.n_known]
        assert history.tolist() == request.known.tolist()
    assert all(not request.blocks for request in scheduler.waiting)


@settings(max_examples=150, deadline=None)
@given(
    work=prompts,
    page_size=st.sampled_from([1, 2, 4]),
    max_requests=st.integers(1, 4),
    extra_budget=st.integers(0, 12),
    chunk=st.one_of(st.none(), st.integers(1, 6)),
    spare_blocks=st.integers(0, 12),
    window=st.one_of(st.none(), st.integers(1, 9)),
    habits=some_habits,
)
def test_any_schedule_with_any_habits(
    work: list[tuple[str, int]],
    page_size: int,
    max_requests: int,
    extra_budget: int,
    chunk: int | None,
    spare_blocks: int,
    window: int | None,
    habits: dict[str, Any],
) -> None:
    if window is None:
        habits |= {"frees_window": False}
    if habits["in_flight"]:
        habits |= {"n_draft": 0}
    if not habits["frees_window"]:
        habits |= {"hits_window": False}
    engine = SimEngine(
        EchoModel(28 // page_size + 2 + spare_blocks, page_size, window),
        max_requests=max_requests,
        max_new_tokens=max_requests * (1 + habits["n_draft"]) + extra_budget,
        max_len=28,
        chunk=chunk,
        habits=Habits(**habits),
    )
    engine.before_forward.append(lambda arrays: check_books(engine, arrays))
    expected = [echo_output(text.encode(), limit, window) for text, limit in work]
    forks: list[tuple[Request, bytes]] = []

    def fork_one(info: StepInfo) -> None:
        """After every third step the oldest request goes on in a second way."""
        parent = engine.scheduler.running[0] if engine.scheduler.running and info.step % 3 == 0 else None
        if parent is not None and (fork := engine.fork(parent, ord("d"))) is not None:
            forks.append((fork, bytes(fork.known.astype(np.uint8))))

    def drop_one(info: StepInfo) -> None:
        """After every tenth the youngest fork is dropped."""
        if info.step % 10 == 0 and forks and not forks[-1][0].is_finished:
            engine.scheduler.abort(forks.pop()[0])

    engine.after_step += [fork_one, drop_one]
    assert engine.run([text.encode() for text, _ in work], [limit for _, limit in work]) == expected
    engine.after_step.clear()
    while engine.has_work:
        engine.step()
    engine.in_flight.resolve()
    for fork, start in forks:
        text = bytes(fork.known.astype(np.uint8))
        assert text == start + echo_output(start, len(fork.tokens) - len(start), window)
    assert not engine.allocator.ref_counts.any()
