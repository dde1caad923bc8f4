"""Forward numbers are moved down before they run out: no false alarm, nothing less is seen, and all sides agree."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from agree import Sides
from agree_drive import drive, random_scenario
from agree_faults import Faults
from agree_script import A, B, Row, Script, batch_of, kinds
from agree_twins import Twins
from engine import ToyEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcanary import Reason, abi

JUMPS = (1 << 29, abi.RENUMBER_KEEP + 1, abi.RENUMBER_AT - 5, abi.LAST_FORWARD - 1000)


def jump(twins: Twins, number: int) -> None:
    """As if ``number`` forwards had gone by that had nothing to do."""
    for side in twins.sides:
        words = side.manager.state.words
        assert words[abi.STATE_FORWARD] < number
        words[abi.STATE_FORWARD] = words[abi.STATE_FORWARD_DONE] = number
    twins._words["forward"] = number


def renumber(twins: Twins) -> bool:
    """On every side, compared; whether it did anything."""
    before = int(twins.words[abi.STATE_FORWARD]) + int(twins.words[abi.STATE_FORWARD_BASE])
    was = int(twins.words[abi.STATE_FORWARD])
    for side in twins.sides:
        side.manager.backend.renumber(None)
    words = twins.words
    twins._words["forward"] = int(words[abi.STATE_FORWARD])
    twins._check("renumber")
    assert before == int(words[abi.STATE_FORWARD]) + int(words[abi.STATE_FORWARD_BASE]), "the count goes on"
    assert all(side.manager.state.control[abi.CONTROL_RENUMBER] == 0 for side in twins.sides)
    return int(words[abi.STATE_FORWARD]) != was


# ---- random engines --------------------------------------------------------------------------------------------------
@settings(max_examples=max(10, settings.default.max_examples // 4), suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, (1 << 32) - 1), st.sampled_from(JUMPS), st.integers(0, 99))
def test_an_honest_engine_is_not_reported(sides: Sides, seed: int, number: int, when: int) -> None:
    """Between any two calls, with whatever was moved, adopted, rolled back or left by forwards that failed."""
    rng = random.Random(seed)
    twins, engine = random_scenario(rng, sides(), max_len=100)
    n_calls = 0

    def after(_call: str) -> None:
        nonlocal n_calls
        n_calls += 1
        assert len(twins.records) == 0, twins.records

    honest = Faults(rng, ())
    drive(twins, engine, rng, 1 + when % 10, after, honest)
    jump(twins, number + when)
    if when % 3 == 0:
        drive(twins, engine, rng, 1 + when % 2, after, honest)
    is_due = twins.words[abi.STATE_FORWARD] > abi.RENUMBER_KEEP + 2
    assert renumber(twins) == is_due
    assert not renumber(twins), "the second time there is nothing to do"
    drive(twins, engine, rng, 6, after, honest)
    assert n_calls > 0


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, (1 << 32) - 1), st.sampled_from(JUMPS))
def test_with_faults_all_sides_agree(sides: Sides, seed: int, number: int) -> None:
    rng = random.Random(seed)
    twins, engine = random_scenario(rng, sides(), is_odd=True)
    faults = Faults(rng, ("bytes", "table", "guard"), 0.3)
    drive(twins, engine, rng, 4, lambda _call: None, faults)
    jump(twins, number)
    drive(twins, engine, rng, 2, lambda _call: None, faults)
    renumber(twins)
    drive(twins, engine, rng, 4, lambda _call: None, faults)


# ---- written out -----------------------------------------------------------------------------------------------------
def served(sides: Sides, **config: Any) -> Script:
    """Request 1 with 8 positions in blocks 1 and 2, request 2 with 6 in 3 and 4, all of them old by now."""
    s = Script(sides(), **config)
    assert s.forward(Row(1, A, 0, 8, [1, 2]), Row(2, B, 0, 6, [3, 4])) == []
    jump(s.twins, abi.RENUMBER_AT)
    assert renumber(s.twins)
    return s


def test_numbers_after_it(sides: Sides) -> None:
    s = served(sides)
    assert s.twins.words[abi.STATE_FORWARD] == abi.RENUMBER_KEEP + 2
    stamps = s.twins.sides[0].read_guard(0, "head0")
    assert set(stamps["step"][4:12].tolist()) == {2} and set(stamps["prev_slot"][4:12].tolist()) == {abi.PREV_NONE}
    s.forward(Row(1, A, 8, 9, [1, 2, 5]))
    stamps = s.twins.sides[0].read_guard(0, "head0")
    assert stamps[20][["step", "prev_slot"]].tolist() == (abi.RENUMBER_KEEP + 3, 11)


@pytest.mark.parametrize("leave_out", [[], ["token_history"], ["token_history", "request_slots", "request_ids"]])
def test_what_was_seen_before_is_seen_after(sides: Sides, leave_out: list[str]) -> None:
    s = served(sides, leave_out=leave_out)
    s.damage(1, 6)
    assert kinds(s.forward(Row(1, A, 8, 9, [1, 2, 5]), Row(2, B, 6, 7, [3, 4]))) == {6: Reason.DATA}
    found = kinds(s.forward(Row(1, A, 9, 10, [1, 4, 5]), Row(2, B, 7, 8, [3, 4])))
    others = {slot for slot in found if slot // 4 == 4}  # another's block in the row's table; without history, its seam
    assert others == ({16} if leave_out else {16, 17, 18, 19})


def test_a_forward_that_failed_long_ago_is_still_known_to_have(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 4, [1]))
    s.forward(Row(1, A, 4, 8, [1, 2]), has_tail=False)
    jump(s.twins, abi.RENUMBER_AT)
    assert renumber(s.twins), "the pool's last forward is the one that failed"
    assert s.forward(Row(1, A, 8, 9, [1, 2, 3])) == []
    assert s.twins.words[abi.STATE_UNJUDGED_SLOTS] == 4
    jump(s.twins, abi.RENUMBER_AT)
    assert renumber(s.twins), "now it is in the list"
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3])) == []
    assert s.twins.words[abi.STATE_UNJUDGED_SLOTS] == 8


def test_a_half_finished_move_of_long_ago_is_still_reported(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]))
    s.forward(Row(2, B, 0, 4, [3]))
    s.twins.edit_guard(0, "tail0", lambda tail: tail.__setitem__(5, tail[12]))  # of another forward, completed too
    jump(s.twins, abi.RENUMBER_AT)
    renumber(s.twins)
    assert kinds(s.forward(Row(1, A, 8, 9, [1, 2, 4])), "TAIL") == {5: Reason.UNWRITTEN}


def test_a_link_into_a_window_is_left_alone_where_nobody_can_tell(sides: Sides) -> None:
    """Its predecessor was rewritten by somebody else: known before, no longer known after; never an alarm."""
    s = Script(sides(), window=4)
    s.forward(Row(1, A, 0, 8, [1, 2]))
    s.forward(Row(2, B, 0, 4, [1]))  # block 1 lies before the window of request 1, and is another's now
    jump(s.twins, abi.RENUMBER_AT)
    renumber(s.twins)
    assert s.forward(Row(1, A, 8, 9, [1, 2, 5])) == []


@pytest.mark.parametrize("number", [abi.LAST_FORWARD - 2, abi.LAST_FORWARD])
def test_if_nobody_answers_the_guard_falls_silent_and_does_not_wrap(sides: Sides, number: int) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]))
    for side in s.twins.sides:
        side.manager.state.words[abi.STATE_FORWARD] = side.manager.state.words[abi.STATE_FORWARD_DONE] = number
    s.damage(0, 5)
    for p in range(8, 12):
        for side, batch in zip(s.twins.sides, s.twins.bind(batch_of([Row(1, A, p, p + 1, [1, 2, 3])])), strict=True):
            with side.manager.forward(batch):
                pass
    first, *others = [side.manager.backend.snapshot_words() for side in s.twins.sides]
    assert first[abi.STATE_FORWARD] == abi.LAST_FORWARD and first[abi.STATE_JUDGING] == 0
    assert all(np.array_equal(first, words) for words in others)
    for side in s.twins.sides:
        side.manager.backend.renumber(None)
        assert side.manager.state.words[abi.STATE_FORWARD] == abi.LAST_FORWARD, "too late for that"


# ---- the manager -----------------------------------------------------------------------------------------------------
def test_the_manager_does_it_when_the_device_asks(caplog: pytest.LogCaptureFixture) -> None:
    engine = ToyEngine(verify_data_every=1)
    engine.step((0, 0, 6))
    words = engine.manager.state.words
    words[abi.STATE_FORWARD] = words[abi.STATE_FORWARD_DONE] = abi.RENUMBER_AT - 2
    with caplog.at_level("INFO", "kvcanary"):
        for p in range(6, 9):
            engine.step((0, p, 1))
    assert "numbers of forwards were moved down" in caplog.text
    assert words[abi.STATE_FORWARD] == abi.RENUMBER_KEEP + 3
    engine.manager.synchronize()
    assert engine.manager.stats().forwards == abi.RENUMBER_AT + 1 and engine.manager.violations() == ()
    engine.k[0][1, 1, 0, 0] ^= 1
    engine.step((0, 9, 1))
    assert [v.slot for v in engine.manager.violations()] == [5]


def test_a_guard_that_is_out_of_numbers_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = ToyEngine()
    words = engine.manager.state.words
    words[abi.STATE_FORWARD] = words[abi.STATE_FORWARD_DONE] = abi.LAST_FORWARD
    for p in range(3):
        engine.step((0, p, 1))
    assert caplog.text.count("nothing is judged any more") == 1 and engine.manager.violations() == ()


def test_the_numbers_leave_room() -> None:
    assert abi.RENUMBER_KEEP < abi.RENUMBER_AT < abi.LAST_FORWARD == 2**32 - 2
    assert abi.LAST_FORWARD - abi.RENUMBER_AT >= 1 << 30, "a step may be late by so many forwards"
