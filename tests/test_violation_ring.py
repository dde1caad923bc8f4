"""The ring is read in order, each complete record once, and those of a forward have an order of their own."""

from __future__ import annotations

from collections import deque

import numpy as np
from base import RingWriter, make_record, make_state
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import abi
from kvcanary.violation_ring import RingReader, in_order


class TestRingReader:
    def test_quiet_ring_gives_nothing_and_stores_nothing(self) -> None:
        state = make_state()
        state.control.setflags(write=False)
        reader = RingReader(state.violation_log, state.control, 8)
        assert not reader.has_new
        assert len(reader.read()) == 0

    def test_order_holds_over_many_laps_and_record_0_stays(self) -> None:
        state = make_state(ring_capacity=3)
        reader, writer = RingReader(state.violation_log, state.control, 3), RingWriter(state)
        seen: list[int] = []
        for slot in range(20):
            writer.put(slot=slot)
            if slot % 3 == 2:
                seen += reader.read()["slot"].tolist()
        seen += reader.read()["slot"].tolist()
        assert seen == list(range(20))
        assert state.violation_log[0]["slot"] == 0
        assert state.words[abi.STATE_DROPPED] == 0

    def test_read_publishes_room_only_after_the_copy(self) -> None:
        state = make_state(ring_capacity=2)
        reader, writer = RingReader(state.violation_log, state.control, 2), RingWriter(state)
        for slot in range(5):
            writer.put(slot=slot)
        assert state.words[abi.STATE_DROPPED] == 3
        records = reader.read()
        assert state.control[abi.CONTROL_READ] == reader.n_read == 2
        writer.put(slot=7)
        assert records["slot"].tolist() == [0, 1]
        assert reader.read()["slot"].tolist() == [7]

    def test_claimed_but_incomplete_record_stops_the_reader(self) -> None:
        state = make_state()
        reader, writer = RingReader(state.violation_log, state.control, 8), RingWriter(state)
        first, second = writer.claim(), writer.claim()
        assert first is not None
        assert second is not None
        writer.commit(second, make_record(slot=2))
        assert len(reader.read()) == 0
        writer.commit(first, make_record(slot=1))
        assert reader.read()["slot"].tolist() == [1, 2]

    def test_alarm_is_only_a_hint(self) -> None:
        state = make_state()
        reader, writer = RingReader(state.violation_log, state.control, 8), RingWriter(state)
        writer.put(slot=1)
        state.control[abi.CONTROL_ALARM] = 0
        assert reader.read()["slot"].tolist() == [1]
        state.control[abi.CONTROL_ALARM] = 99
        assert len(reader.read()) == 0

    def test_limit(self) -> None:
        state = make_state()
        reader, writer = RingReader(state.violation_log, state.control, 8), RingWriter(state)
        for slot in range(5):
            writer.put(slot=slot)
        assert reader.read(limit=2)["slot"].tolist() == [0, 1]
        assert reader.read(limit=0)["slot"].tolist() == []
        assert reader.read()["slot"].tolist() == [2, 3, 4]

    def test_second_reader_continues(self) -> None:
        state = make_state()
        writer = RingWriter(state)
        writer.put(slot=1)
        RingReader(state.violation_log, state.control, 8).read()
        writer.put(slot=2)
        assert RingReader(state.violation_log, state.control, 8).read()["slot"].tolist() == [2]

    @given(
        st.integers(1, 5),
        st.lists(st.sampled_from(["claim", "commit first", "commit last", "read", "read 1"]), max_size=80),
    )
    def test_each_complete_record_once_and_in_order(self, capacity: int, actions: list[str]) -> None:
        state = make_state(ring_capacity=capacity)
        reader, writer = RingReader(state.violation_log, state.control, capacity), RingWriter(state)
        open_claims: deque[int] = deque()
        n_claimed = n_read = 0
        for action in actions:
            if action == "claim":
                claim = writer.claim()
                assert (claim is None) == (n_claimed - n_read >= capacity)
                if claim is not None:
                    open_claims.append(claim)
                    n_claimed += 1
            elif action.startswith("commit") and open_claims:
                claim = open_claims.popleft() if action == "commit first" else open_claims.pop()
                writer.commit(claim, make_record(slot=claim))
            elif action.startswith("read"):
                complete = min(open_claims, default=n_claimed)
                expected = list(range(n_read, complete))[: 1 if action == "read 1" else None]
                assert reader.read(1 if action == "read 1" else None)["slot"].tolist() == expected
                n_read += len(expected)
                assert state.control[abi.CONTROL_READ] == n_read


def test_the_records_of_a_forward_have_an_order_of_their_own() -> None:
    """On a GPU they stand in the ring as its threads came."""
    rng = np.random.default_rng(0)
    records = np.zeros(60, abi.VIOLATION)
    for name, high in (("tag", 20), ("row", 4), ("position", 9), ("slot", 40), ("reasons", 3), ("plane", 2)):
        records[name] = rng.integers(0, high, 60)
    records["forward"] = records["step"] = np.repeat([1, 2], 30)
    wanted = in_order(records)
    assert wanted["forward"].tolist() == [1] * 30 + [2] * 30
    stages = wanted["tag"][:30] // 4
    assert stages.tolist() == sorted(stages)
    for _ in range(20):
        assert in_order(rng.permutation(records)).tobytes() == wanted.tobytes()
