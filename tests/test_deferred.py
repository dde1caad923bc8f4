"""Snapshots arrive late, in order, unchanged, and nobody waits for them."""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary.deferred import DelayedDeviceHostHandler, HostStaging, Words
from kvcanary.errors import CaptureError, ConfigError, PhaseError


class Bench:
    """A handler over one device word, the number of the step; notes each delivery with the step that asked for it."""

    def __init__(self, depth: int = 4, staging: HostStaging | None = None) -> None:
        self.staging = staging or HostStaging(1, depth)
        self.handler = DelayedDeviceHostHandler(self.staging, "bench", depth)
        self.source = np.zeros(1, np.uint64)
        self.delivered: list[tuple[int, int]] = []  # (label, value)
        self.fail_on: set[int] = set()

    def step(self, is_due: bool = True, stream: Any = None) -> None:
        self.source[0] += np.uint64(1)
        label = int(self.source[0])

        def receive(words: Words) -> None:
            self.delivered.append((label, int(words[0])))
            if label in self.fail_on:
                raise ValueError(f"snapshot {label} is bad")

        self.handler.step(lambda: self.source if is_due else None, receive, stream)


def same(labels: list[int]) -> list[tuple[int, int]]:
    return [(label, label) for label in labels]


def test_delivers_at_the_next_step_with_the_receiver_and_the_value_of_its_own_step() -> None:
    bench = Bench()
    bench.step()
    assert bench.delivered == []
    bench.step(is_due=False)
    assert bench.delivered == same([1])
    bench.step()
    bench.step()
    assert bench.delivered == same([1, 3])


def test_nothing_due_stages_nothing() -> None:
    bench = Bench()
    bench.step(is_due=False)
    bench.step(is_due=False)
    assert (bench.delivered, bench.handler.n_in_flight, bench.handler.n_not_taken) == ([], 0, 0)


def test_held_event_delays_without_blocking() -> None:
    bench = Bench()
    bench.staging.hold()
    for _ in range(3):
        bench.step()
    assert bench.delivered == []
    bench.staging.release()
    bench.step(is_due=False)
    assert bench.delivered == same([1, 2, 3])


def test_order_holds_when_a_later_copy_arrives_first() -> None:
    bench = Bench()
    bench.staging.events[0].hold()
    bench.step()
    bench.step()
    bench.step(is_due=False)
    assert bench.delivered == []
    bench.staging.events[0].release()
    bench.step(is_due=False)
    assert bench.delivered == same([1, 2])


def test_newest_is_not_taken_when_all_buffers_are_in_flight(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(depth=2)
    bench.staging.hold()
    with caplog.at_level(logging.WARNING, "kvcanary"):
        for _ in range(7):
            bench.step()
        bench.step(is_due=False)
    assert bench.handler.n_in_flight == 2
    assert bench.handler.n_not_taken == 5  # a step that wants nothing loses nothing
    assert [re.findall(r"\((\d+) so far\)", record.getMessage()) for record in caplog.records] == [["1"], ["2"], ["4"]]
    bench.staging.release()
    bench.step()
    bench.step()
    assert bench.delivered == same([1, 2, 9])


def test_receiver_that_raises_loses_no_other_delivery(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.fail_on = {1, 2}
    bench.staging.hold()
    for _ in range(3):
        bench.step()
    bench.staging.release()
    with pytest.raises(ValueError, match="snapshot 1 is bad"):
        bench.step()
    assert bench.delivered == same([1, 2, 3])
    assert "snapshot 2 is bad" in caplog.text
    assert bench.handler.n_in_flight == 1  # staged although an earlier one was bad
    bench.step()
    assert bench.delivered == same([1, 2, 3, 4])


def test_error_while_staging_loses_no_delivery() -> None:
    bench = Bench()
    bench.step()

    def broken() -> Any:
        raise OSError("no device")

    with pytest.raises(OSError, match="no device"):
        bench.handler.step(broken, lambda _: None)
    assert bench.delivered == same([1])
    bench.step()
    bench.step()
    assert bench.delivered == same([1, 2])


def test_receivers_get_the_buffers_themselves() -> None:
    staging = HostStaging(1, 2)
    handler = DelayedDeviceHostHandler(staging, "buffers", 2)
    source = np.zeros(1, np.uint64)
    seen: list[Words] = []
    for _ in range(9):
        handler.step(lambda: source, seen.append)
    buffers = [staging.host(0), staging.host(1)]
    assert len(seen) == 8
    assert all(words is buffers[i % 2] for i, words in enumerate(seen))


class CapturingStaging(HostStaging):
    def is_capturing(self, stream: Any) -> bool:
        return bool(stream == "captured")


def test_refuses_under_capture_and_stays_usable() -> None:
    bench = Bench(staging=CapturingStaging(1, 4))
    bench.step()
    for is_due in (True, False):
        with pytest.raises(CaptureError, match="'captured' is being captured"):
            bench.step(is_due, stream="captured")
    assert bench.delivered == []
    assert bench.handler.is_capturing("captured")
    assert not bench.handler.is_capturing("free")
    bench.step()
    assert bench.delivered == same([1])


def test_drain_waits_and_delivers_all() -> None:
    bench = Bench()
    bench.fail_on = {2}
    bench.staging.hold()
    for _ in range(3):
        bench.step()
    errors: list[str] = []

    def drain() -> None:
        try:
            bench.handler.drain()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=drain)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert bench.delivered == []
    bench.staging.release()
    thread.join(10)
    assert not thread.is_alive()
    assert bench.delivered == same([1, 2, 3])
    assert errors == ["snapshot 2 is bad"]
    bench.handler.drain()  # nothing left


def test_close_forgets_and_refuses() -> None:
    bench = Bench()
    bench.step()
    bench.handler.close()
    bench.handler.close()
    bench.handler.drain()
    assert bench.delivered == []
    with pytest.raises(PhaseError, match="closed"):
        bench.step()


def test_depth_is_checked() -> None:
    with pytest.raises(ConfigError, match="depth=0"):
        DelayedDeviceHostHandler(HostStaging(1, 1), "none", 0)


@given(st.integers(1, 3), st.lists(st.tuples(st.booleans(), st.sampled_from(["hold", "release", ""])), max_size=60))
def test_whatever_is_taken_arrives_in_order(depth: int, steps: list[tuple[bool, str]]) -> None:
    bench = Bench(depth)
    taken: list[int] = []
    n_wanted = 0
    for number, (is_due, gate) in enumerate(steps, start=1):
        if gate:
            getattr(bench.staging, gate)()
        before = bench.handler.n_not_taken
        bench.step(is_due)
        n_wanted += is_due
        if is_due and bench.handler.n_not_taken == before:
            taken.append(number)
        assert bench.handler.n_in_flight <= depth
        assert bench.delivered == same(taken[: len(bench.delivered)])
    bench.staging.release()
    bench.handler.drain()
    assert bench.delivered == same(taken)
    assert len(taken) + bench.handler.n_not_taken == n_wanted
