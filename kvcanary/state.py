"""The guard's device state: one flat array of words and counters, the taint, and the mapped violation ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.tags import N_STAGES, N_TAGS


@dataclass(frozen=True)
class CounterLayout:
    """Where the counters of ``n_pools`` pools lie in the flat u64 state array."""

    n_pools: int

    @property
    def n_words(self) -> int:
        return abi.N_STATE_WORDS + self.n_pools * (2 * N_TAGS + N_STAGES + 1)

    def kernel_runs(self, words: Any) -> Any:
        """u64[pools, 12] view: launches that covered a tag."""
        start = abi.N_STATE_WORDS
        return words[start : start + self.n_pools * N_TAGS].reshape(self.n_pools, N_TAGS)

    def slot_runs(self, words: Any) -> Any:
        """u64[pools, 12] view: entries handled under a tag."""
        start = abi.N_STATE_WORDS + self.n_pools * N_TAGS
        return words[start : start + self.n_pools * N_TAGS].reshape(self.n_pools, N_TAGS)

    def data_runs(self, words: Any) -> Any:
        """u64[pools, 3] view: data launches per stage."""
        start = abi.N_STATE_WORDS + 2 * self.n_pools * N_TAGS
        return words[start : start + self.n_pools * N_STAGES].reshape(self.n_pools, N_STAGES)

    def scrub_runs(self, words: Any) -> Any:
        """u64[pools] view: turns of the patrol."""
        start = abi.N_STATE_WORDS + self.n_pools * (2 * N_TAGS + N_STAGES)
        return words[start : start + self.n_pools]


@dataclass(frozen=True)
class CanaryDeviceState:
    """The guard's device-side state; arrays are CuPy arrays on a GPU and NumPy arrays on the host backend.

    Attributes:
        layout: where the counters lie in ``words``.
        words: u64[layout.n_words]: state words (``abi.STATE_*``), then the counters; one copy takes a snapshot.
        taint: u32[max_requests]: reason bits per batch row, valid from one step's first forward to the next.
        violation_log: VIOLATION[ring_capacity + 1]: pinned host memory mapped into the device; record 0 has place 0.
        control: u64[N_CONTROL_WORDS]: pinned and mapped: the alarm word, and how far the host has read.
    """

    layout: CounterLayout
    words: Any
    taint: Any
    violation_log: npt.NDArray[Any]
    control: npt.NDArray[np.uint64]

    @property
    def kernel_run_counters(self) -> Any:
        """u64[pools, 12]: launches that covered a tag, also when they had nothing to do."""
        return self.layout.kernel_runs(self.words)

    @property
    def slot_run_counters(self) -> Any:
        """u64[pools, 12]: entries handled under a tag; a slot counts once per tag and launch."""
        return self.layout.slot_runs(self.words)

    @property
    def data_run_counters(self) -> Any:
        """u64[pools, 3]: data launches per stage."""
        return self.layout.data_runs(self.words)

    @property
    def scrub_run_counters(self) -> Any:
        """u64[pools]: turns of the patrol."""
        return self.layout.scrub_runs(self.words)


@dataclass(frozen=True)
class StateSnapshot:
    """A host copy of the state words, labelled with the step after which it was taken."""

    step: int
    layout: CounterLayout
    words: npt.NDArray[np.uint64]

    @property
    def kernel_run_counters(self) -> npt.NDArray[np.uint64]:
        counters: npt.NDArray[np.uint64] = self.layout.kernel_runs(self.words)
        return counters

    @property
    def slot_run_counters(self) -> npt.NDArray[np.uint64]:
        counters: npt.NDArray[np.uint64] = self.layout.slot_runs(self.words)
        return counters

    @property
    def data_run_counters(self) -> npt.NDArray[np.uint64]:
        counters: npt.NDArray[np.uint64] = self.layout.data_runs(self.words)
        return counters

    @property
    def scrub_run_counters(self) -> npt.NDArray[np.uint64]:
        counters: npt.NDArray[np.uint64] = self.layout.scrub_runs(self.words)
        return counters

    def word(self, index: int) -> int:
        """One of the ``abi.STATE_*`` words."""
        return int(self.words[index])

    @property
    def protected_tokens(self) -> int:
        """Sum of all slot_run_counters: a slot counts once per tag and launch, so a token several times a step."""
        return sum(self.slot_run_counters.ravel().tolist())  # in Python's integers: u64 would wrap
