"""Device state: the counters lie where the layout says, and a snapshot reads the same words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvcanary import abi
from kvcanary.state import CanaryDeviceState, CounterLayout, StateSnapshot
from kvcanary.tags import N_STAGES, N_TAGS


def state_of(n_pools: int) -> CanaryDeviceState:
    layout = CounterLayout(n_pools)
    words = np.arange(layout.n_words, dtype=np.uint64)
    ring, control = np.zeros(5, abi.VIOLATION), np.zeros(abi.N_CONTROL_WORDS, np.uint64)
    return CanaryDeviceState(layout, words, np.zeros(8, np.uint32), ring, control)


@given(st.integers(1, 9))
def test_header_and_counters_share_the_words_without_gap_or_overlap(n_pools: int) -> None:
    state = state_of(n_pools)
    counters = (
        *(state.kernel_run_counters, state.slot_run_counters),
        *(state.data_run_counters, state.scrub_run_counters),
    )
    assert [c.shape for c in counters] == [(n_pools, N_TAGS), (n_pools, N_TAGS), (n_pools, N_STAGES), (n_pools,)]
    parts = [state.words[: abi.N_STATE_WORDS], *(c.ravel() for c in counters)]
    assert np.concatenate(parts).tolist() == list(range(state.layout.n_words))


def test_counters_are_views_of_the_words() -> None:
    state = state_of(2)
    state.words[:] = 0
    state.kernel_run_counters[1, 3] += np.uint64(5)
    state.data_run_counters[1, 2] = 7
    state.scrub_run_counters[1] = 9
    assert state.words[abi.N_STATE_WORDS + N_TAGS + 3] == 5
    assert state.words[-3] == 7 and state.words[-1] == 9 and state.words.sum() == 21


@pytest.fixture
def snapshot() -> StateSnapshot:
    state = state_of(3)
    words: NDArray[np.uint64] = state.words.copy()
    return StateSnapshot(41, state.layout, words)


def test_a_snapshot_reads_what_the_state_reads(snapshot: StateSnapshot) -> None:
    state = state_of(3)
    assert np.array_equal(snapshot.kernel_run_counters, state.kernel_run_counters)
    assert np.array_equal(snapshot.slot_run_counters, state.slot_run_counters)
    assert np.array_equal(snapshot.data_run_counters, state.data_run_counters)
    assert (snapshot.step, snapshot.word(abi.STATE_OBSERVATIONS)) == (41, abi.STATE_OBSERVATIONS)


def test_protected_tokens_is_the_sum_of_the_slot_runs(snapshot: StateSnapshot) -> None:
    first = abi.N_STATE_WORDS + 3 * N_TAGS
    assert snapshot.protected_tokens == sum(range(first, first + 3 * N_TAGS))
    snapshot.words[:] = 0
    snapshot.slot_run_counters[0, 0] = 1 << 40
    assert snapshot.protected_tokens == 1 << 40


def test_header_words_are_distinct_and_fit() -> None:
    words = {n: v for n, v in vars(abi).items() if n.startswith("STATE_")}
    assert len(set(words.values())) == len(words) and max(words.values()) < abi.N_STATE_WORDS
    assert abs(abi.CONTROL_ALARM - abi.CONTROL_READ) * 8 >= 64, "host and device write to different cache lines"
