"""Device time of launches: CUDA events around replays of a graph that holds many copies of them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Launch = Callable[[Any], None]  # of a stream; may run inside a capture

MIN_REPLAY_US = 2000.0
MAX_COPIES = 200
N_REPLAYS = 15
N_QUICK_REPLAYS = 5
N_TRIAL_COPIES = 4
FLUSH_BYTES = 256 << 20
COLD_FACTOR = 4  # an L2 holds nothing worth of what is this many times as large


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch: median over replays, and max - min; ``n_copies`` launches in a replay."""

    us: float
    spread_us: float
    n_copies: int = 1
    n_replays: int = 1


class Timer(Protocol):
    """What measures; a test has one that only launches."""

    def time(self, launch: Launch) -> Timing:
        """Launches back to back in a graph, as L2 finds them."""

    def cold(self, launch: Launch) -> Timing:
        """The same with L2 flushed before each, the time of the flush taken off."""

    def eager(self, run: Callable[[], None]) -> Timing:
        """Few runs, launched one by one on the timer's stream: for what is slow or allocates."""


def copies_for(trial_us: float) -> int:
    """Copies of a launch of ``trial_us`` microseconds that make a replay long enough to be timed well."""
    return max(1, min(MAX_COPIES, math.ceil(MIN_REPLAY_US / max(trial_us, 1e-3))))


def timing_of(replays_us: Sequence[float], n_copies: int) -> Timing:
    """From the microseconds of whole replays."""
    spread = (max(replays_us) - min(replays_us)) / n_copies
    return Timing(statistics.median(replays_us) / n_copies, spread, n_copies, len(replays_us))


def difference(with_flush: Timing, flush_alone: Timing) -> Timing:
    """What is left of a launch when the flush is taken off; the spreads add up."""
    us = max(0.0, with_flush.us - flush_alone.us)
    return Timing(us, with_flush.spread_us + flush_alone.spread_us, with_flush.n_copies, with_flush.n_replays)


class GraphTimer:
    """`Timer` on the GPU.

    Args:
        stream: a CuPy stream that can be captured.
        flush: launches the flush on a stream.
    """

    def __init__(self, cupy: Any, stream: Any, flush: Launch, n_replays: int = N_REPLAYS) -> None:
        self._cupy, self._stream, self._flush, self._n_replays = cupy, stream, flush, n_replays
        self._flush_alone: dict[int, Timing] = {}

    def time(self, launch: Launch) -> Timing:
        trial = self._replay(launch, N_TRIAL_COPIES, 3)
        if trial.us > 20 * MIN_REPLAY_US:  # tens of milliseconds: the trial is the measurement
            return trial
        return self._replay(launch, copies_for(trial.us), self._n_replays)

    def cold(self, launch: Launch) -> Timing:
        def both(stream: Any) -> None:
            self._flush(stream)
            launch(stream)

        n = copies_for(self._replay(both, N_TRIAL_COPIES, 3).us)
        if n not in self._flush_alone:
            self._flush_alone[n] = self._replay(self._flush, n, self._n_replays)
        return difference(self._replay(both, n, self._n_replays), self._flush_alone[n])

    def eager(self, run: Callable[[], None]) -> Timing:
        with self._stream:
            run()
            return timing_of(self._between_events(run, N_QUICK_REPLAYS), 1)

    def _replay(self, launch: Launch, n_copies: int, n_replays: int) -> Timing:
        graph = self._capture(launch, n_copies)
        replays = self._between_events(lambda: graph.launch(stream=self._stream), n_replays)
        return timing_of(replays, n_copies)

    def _capture(self, launch: Launch, n_copies: int) -> Any:
        # Under `with`, because CuPy asks the current stream whether it is being captured.
        with self._stream:
            self._stream.begin_capture()
            try:
                for _ in range(n_copies):
                    launch(self._stream)
            finally:
                graph = self._stream.end_capture()
        return graph

    def _between_events(self, run: Callable[[], None], n: int) -> list[float]:
        """Microseconds of each of ``n`` runs. One run goes before, and the host runs ahead of the device: no gaps."""
        events = [self._cupy.cuda.Event() for _ in range(n + 1)]
        run()
        events[0].record(self._stream)
        for event in events[1:]:
            run()
            event.record(self._stream)
        events[-1].synchronize()
        return [self._cupy.cuda.get_elapsed_time(begin, end) * 1e3 for begin, end in itertools.pairwise(events)]
