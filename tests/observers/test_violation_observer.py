"""Each finding is reported once, every observation is counted, and no reader gets in another's way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from base import POOL_NAMES, SECRET, RingWriter, full_config, make_facts, make_state
from engine import ToyEngine
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import abi
from kvcanary.errors import KvCanaryViolation
from kvcanary.observers import ViolationObserver, violations
from kvcanary.tags import CanaryLaunchTag, Detail, Reason
from kvcanary.violation_ring import RingReader
from kvcanary.violations import Violation

T = CanaryLaunchTag


class Rig:
    """An observer and the device's end of its ring."""

    def __init__(self, ring_capacity: int = 64, **config: Any) -> None:
        self.state = make_state(ring_capacity=ring_capacity)
        self.writer = RingWriter(self.state)
        self.reader = RingReader(self.state.violation_log, self.state.control, ring_capacity)
        settings = full_config(ring_capacity=ring_capacity, **config)
        self.observer = ViolationObserver(settings, self.reader, POOL_NAMES, SECRET)
        self.n_steps = 0

    def put(self, **fields: Any) -> None:
        self.writer.put(**{"reasons": Reason.CHAIN, "tag": T.HEAD_K_FULL, "slot": 5, "stamp_step": 1, **fields})

    def step(self) -> None:
        self.n_steps += 1
        self.observer.step(make_facts(self.state, self.n_steps))

    def totals(self) -> tuple[int, int]:
        return self.observer.violations_total, self.observer.observations_total


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level and record.name == "kvcanary"]


class TestFindings:
    def test_checks_that_see_the_same_thing_are_one_finding(self) -> None:
        rig = Rig()
        for tag in (T.HEAD_K_FULL, T.HEAD_V_FULL, T.TAIL_K_FULL, T.SWEEP_V_FULL):
            rig.put(tag=tag)
        rig.step()
        rig.put(step=9, row=3)
        rig.step()
        assert rig.totals() == (1, 5)
        assert [v.tag for v in rig.observer.violations()] == [T.HEAD_K_FULL]

    @pytest.mark.parametrize(
        "other",
        [{"pool": 1}, {"slot": 6}, {"plane": 1}, {"reasons": Reason.CHAIN | Reason.TOKEN}],
        ids=["pool", "slot", "plane", "reasons"],
    )
    def test_another_place_or_reason_is_another_finding(self, other: dict[str, Any]) -> None:
        rig = Rig()
        rig.put()
        rig.put(**other)
        rig.put()
        rig.step()
        assert rig.totals() == (2, 3)

    def test_rewritten_slot_is_reported_again(self) -> None:
        rig = Rig()
        for stamp_step in (1, 1, 4, 4):
            rig.put(stamp_step=stamp_step)
            rig.step()
        assert rig.totals() == (2, 4)

    def test_head_and_tail_stamps_of_two_forwards_do_not_take_turns(self) -> None:
        rig = Rig()
        for _ in range(5):
            rig.put(tag=T.HEAD_K_FULL, stamp_step=4)
            rig.put(tag=T.TAIL_K_FULL, stamp_step=3)
            rig.step()
        assert rig.totals() == (2, 10)

    def test_raw_values_are_a_finding_per_request(self) -> None:
        rig = Rig()
        for request_id, row in ((7, 0), (7, 1), (8, 0), (0, 0), (0, 0), (0, 1)):
            rig.put(detail=Detail.TABLE_ENTRY, slot=-1, stamp_step=0, request_id=request_id, row=row)
        rig.put(detail=Detail.SLOT_MAPPING, slot=-1, stamp_step=0, request_id=7)
        rig.step()
        assert rig.totals() == (5, 7)

    def test_each_request_that_meets_damage_is_named_once(self) -> None:
        rig = Rig()
        for request_id in (7, 8, 7, 0, 8, 9):  # 0: sweep or patrol, of whom nobody is to be stopped
            rig.put(request_id=request_id, tag=T.HEAD_K_FULL if request_id else T.SWEEP_K_FULL)
            rig.step()
        assert [v.request_id for v in rig.observer.history] == [7, 8, 9]
        rig.put(slot=6, tag=T.SWEEP_K_FULL)
        rig.step()
        for request_id in (7, 8, 7):  # of one batch
            rig.put(slot=6, request_id=request_id)
        rig.step()
        assert [v.request_id for v in rig.observer.history] == [7, 8, 9, 0, 7, 8]

    def test_bytes_that_were_digested_anew_are_reported_again(self) -> None:
        rig = Rig()
        for digest in (11, 11, 12, 11):  # the last: read of a forward before the slot was digested anew
            rig.put(reasons=Reason.DATA, plane=0, stored_digest=digest, found_digest=99)
            rig.step()
        rig.put(reasons=Reason.CHAIN, stored_digest=1)
        rig.put(reasons=Reason.CHAIN, stored_digest=2)
        rig.step()
        assert rig.totals() == (3, 6)

    def test_memory_is_bounded_and_forgets_the_least_recently_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(violations, "MAX_SEEN", 2)
        rig = Rig()
        for forward, slot in enumerate((1, 2, 1, 3, 1, 2)):  # 2 is the least recently seen when 3 comes
            rig.put(slot=slot, forward=forward, step=forward)
        rig.step()
        assert [v.slot for v in rig.observer.history] == [1, 2, 3, 2]

    def test_forget_reports_again(self) -> None:
        rig = Rig()
        rig.put()
        rig.step()
        rig.observer.forget()
        rig.put()
        rig.step()
        assert rig.totals() == (2, 2)
        assert len(rig.observer.history) == 2

    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 1), st.integers(1, 3), st.integers(1, 2))),
        st.integers(1, 7),
    )
    def test_counts_are_those_of_a_set(self, records: list[tuple[int, int, int, int]], batch: int) -> None:
        rig = Rig(log_tokens=True)
        seen: list[tuple[int, ...]] = []
        rig.observer.on_violation(
            lambda v: seen.append((v.slot, -1 if v.plane is None else v.plane, int(v.reasons), v.stamp_step))
        )
        for i, (slot, plane, reasons, stamp_step) in enumerate(records):
            rig.put(slot=slot, plane=plane, reasons=reasons, stamp_step=stamp_step, forward=i, step=i)
            if i % batch == 0:
                rig.step()
        while rig.reader.has_new:
            rig.step()
        assert seen == list(dict.fromkeys(records))
        assert rig.totals() == (len(set(records)), len(records))


class TestCounts:
    def test_dropped_violations_are_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig(ring_capacity=2)
        for slot in range(5):
            rig.put(slot=slot)
        rig.step()
        assert rig.totals() == (2, 2)
        for _ in range(2):
            rig.observer.note_dropped(int(rig.state.words[abi.STATE_DROPPED]))
        assert rig.totals() == (2, 5)
        assert rig.totals()[1] == rig.state.words[abi.STATE_OBSERVATIONS]
        (line,) = [message for message in messages(caplog) if "ring_capacity" in message]
        assert "3 violations more found the ring full" in line

    def test_storm_is_read_over_several_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(violations, "MAX_NEW", 5)
        monkeypatch.setattr(violations, "MAX_RECORDS", 12)
        rig = Rig()
        for slot in (*range(13), *[0] * 20, 13):
            rig.put(slot=slot)
        totals = []
        for _ in range(6):
            rig.step()
            totals.append(rig.totals())
        # Two steps end after 5 first sightings, the next ones after 12 records.
        assert totals == [(5, 5), (10, 10), (13, 22), (14, 34), (14, 34), (14, 34)]

    def test_poll_reads_all_there_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(violations, "MAX_NEW", 5)
        monkeypatch.setattr(violations, "MAX_RECORDS", 12)
        rig = Rig()
        slots = (*range(13), *[0] * 20, 13)
        for slot in slots:
            rig.put(slot=slot)
        assert [v.slot for v in rig.observer.poll()] == list(range(14))
        assert rig.totals() == (14, len(slots))
        assert rig.observer.poll() == ()

    def test_history_is_bounded(self) -> None:
        rig = Rig(ring_capacity=2048)
        for slot in range(1500):
            rig.put(slot=slot)
        while rig.reader.has_new:
            rig.step()
        assert rig.observer.violations_total == 1500
        assert [v.slot for v in rig.observer.violations()] == list(range(1500 - violations.MAX_HISTORY, 1500))


class TestLogMode:
    def test_quiet_step_says_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        Rig().step()
        assert caplog.records == []

    def test_one_line_per_finding_and_details_at_debug(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "kvcanary")
        rig = Rig()
        rig.put(slot=5)
        rig.put(slot=21)
        rig.step()
        lines = [f"[canary] violation {v.summary()}" for v in rig.observer.violations()]
        assert messages(caplog) == lines
        assert " slot=21 block=1:5: " in lines[1]
        assert messages(caplog, logging.DEBUG) == [f"[canary] {v.details()}" for v in rig.observer.violations()]

    def test_lines_are_limited(self, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig()
        for slot in range(50):
            rig.put(slot=slot)
        rig.step()
        assert len(messages(caplog)) == violations.MAX_LINES + 1
        assert (
            messages(caplog)[-1] == "[canary] and 30 more findings in this step (violations_total=50): see violations()"
        )

    def test_a_kind_that_goes_on_gets_few_lines_and_is_never_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig()
        n = 10 * violations.LINE_EVERY
        for step in range(n):
            rig.put(slot=step % 64, stamp_step=1 + step, step=step, request_id=1 + step)
            rig.step()
        of_a_power = {128, 256, 512}
        told = [v.step for v in rig.observer.history if f"request={v.request_id} " in "".join(messages(caplog))]
        assert len(messages(caplog)) == len(told) <= violations.MAX_LINES_OF_A_KIND + len(of_a_power) + 9
        assert max(b - a for a, b in pairwise(told)) <= violations.LINE_EVERY
        assert n - told[-1] <= violations.LINE_EVERY

    def test_a_substituted_row_is_two_lines_and_not_forty(self, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig()
        order = [*range(38, -1, -2), *range(37, 0, -2)]  # warps finish in any order
        for p in order:
            rig.put(slot=100 + p, position=p, row=2, request_id=7, stamp_owner=9)
        rig.put(slot=139, position=39, row=2, request_id=7, stamp_owner=9, reasons=int(Reason.CHAIN | Reason.TOKEN))
        rig.put(slot=300, position=3, row=3, request_id=8)
        rig.put(slot=301, position=4, row=3, request_id=8)
        rig.step()
        lines = messages(caplog)
        assert len(lines) == 4 and rig.observer.violations_total == 42
        assert "position=0 slot=100 " in lines[0]
        assert lines[0].endswith("; THE SAME AT 39 POSITIONS, 0 to 38 (to slot 138)")
        assert "reasons=CHAIN|TOKEN" in lines[1] and "THE SAME" not in lines[1] + lines[2] + lines[3]


class TestRaiseMode:
    def test_raises_once_per_batch_of_first_sightings(self) -> None:
        rig = Rig(mode="raise")
        rig.put(slot=5)
        rig.put(slot=6)
        rig.put(slot=5)
        with pytest.raises(KvCanaryViolation, match="2 new violations of the KV cache at step 1, 2 so far") as caught:
            rig.step()
        assert [v.slot for v in caught.value.violations] == [5, 6]
        for violation in caught.value.violations:
            assert violation.summary() in str(caught.value)
        rig.put(slot=5)
        rig.step()  # known
        rig.put(slot=7)
        with pytest.raises(KvCanaryViolation, match="1 new violations"):
            rig.step()

    def test_where_two_step_numbers_differ_both_are_explained(self) -> None:
        engine = ToyEngine(mode="raise", verify_data_every=1)
        engine.step((0, 0, 6))
        engine.k[1][1, 1, 0, 0] ^= 1
        with pytest.raises(KvCanaryViolation) as caught:
            engine.step((0, 6, 1))
        assert "at step 2, 1 so far" in str(caught.value) and "step=2" in str(caught.value)
        assert "idle" not in str(caught.value)
        for _ in range(3):
            with engine.manager.step(idle=True):
                pass
        engine.k[0][1, 1, 0, 0] ^= 1
        with pytest.raises(KvCanaryViolation, match=r"(?s)at step 6, 2 so far.* step=3 ") as caught:
            engine.step((0, 7, 1))
        assert (
            "(step 6 counts all that end_step() ended, idle ones too; step= of a finding counts those with a "
            in str(caught.value)
        )

    def test_callbacks_and_log_come_first(self, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig(mode="raise")
        seen: list[Violation] = []
        n_lines: list[int] = []
        rig.observer.on_violation(seen.append)
        rig.observer.on_violation(lambda _v: n_lines.append(len(messages(caplog))))
        rig.put()
        with pytest.raises(KvCanaryViolation) as caught:
            rig.step()
        assert tuple(seen) == caught.value.violations
        assert n_lines == [1], "a callback may end the process: the line is there before"

    def test_what_poll_found_is_raised_by_the_next_step(self) -> None:
        rig = Rig(mode="raise")
        rig.put()
        assert len(rig.observer.poll()) == 1
        with pytest.raises(KvCanaryViolation):
            rig.step()
        rig.step()

    def test_text_is_limited_but_the_violations_are_not(self) -> None:
        rig = Rig(mode="raise")
        for slot in range(50):
            rig.put(slot=slot, step=1)
        with pytest.raises(KvCanaryViolation, match="and 30 more") as caught:
            rig.step()
        assert len(caught.value.violations) == 50
        assert len(str(caught.value).splitlines()) == violations.MAX_LINES + 3


class TestCallbacks:
    def test_raising_callback_does_not_disturb_the_others(self, caplog: pytest.LogCaptureFixture) -> None:
        rig = Rig()
        seen: list[int] = []

        def bad(violation: Violation) -> None:
            raise ValueError(f"cannot take slot {violation.slot}")

        rig.observer.on_violation(bad)
        rig.observer.on_violation(lambda violation: seen.append(violation.slot))
        rig.put(slot=5)
        rig.put(slot=6)
        rig.step()
        assert seen == [5, 6]
        assert "cannot take slot 6" in caplog.text

    def test_callback_may_ask_the_observer(self) -> None:
        rig = Rig()
        seen: list[int] = []
        rig.observer.on_violation(lambda _: seen.append(len(rig.observer.violations())))
        rig.observer.on_violation(lambda _: seen.extend(v.slot for v in rig.observer.poll()))
        rig.put()
        rig.step()
        assert seen == [1]


def test_token_ids_leave_only_with_log_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kvcanary")
    for log_tokens in (False, True):
        caplog.clear()
        rig = Rig(log_tokens=log_tokens)
        rig.put(reasons=Reason.TOKEN, stored_token=90210, expected_token=60606)
        rig.step()
        assert ("90210" in caplog.text) == log_tokens


def test_poll_from_many_threads_reports_each_finding_once() -> None:
    rig = Rig(ring_capacity=4096)
    seen: list[int] = []
    rig.observer.on_violation(lambda violation: seen.append(violation.slot))
    is_over = threading.Event()

    def in_a_thread(work: Callable[[], Any]) -> threading.Thread:
        def loop() -> None:
            while not is_over.is_set():
                work()

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    threads = [in_a_thread(work) for work in (rig.observer.poll, rig.observer.poll, rig.observer.violations)]
    for slot in range(3000):
        rig.put(slot=slot)
        if slot % 100 == 0:
            rig.step()
    is_over.set()
    for thread in threads:
        thread.join(30)
    while rig.reader.has_new:
        rig.step()
    assert sorted(seen) == list(range(3000))
    assert rig.totals() == (3000, 3000)
