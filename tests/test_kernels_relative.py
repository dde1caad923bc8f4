"""Chains whose start nobody knew: never a false alarm, and still what they can tell."""

from __future__ import annotations

import numpy as np
import pytest
from agree import Sides
from agree_script import A, B, C, Row, Script, kinds

from kvcanary import Reason

NO_HISTORY = ("token_history",)
NO_IDS = ("token_history", "request_ids", "request_slots")
T = B[:12]  # the text that several requests have in common


def same_forward_hit(s: Script) -> None:
    """Request 2 continues block 1 in the forward in which request 1 writes it, where 5 wrote before."""
    assert s.forward(Row(5, C, 0, 4, [1])) == []
    assert s.forward(Row(1, T, 0, 4, [1]), Row(2, T, 4, 12, [1, 2, 3])) == []


@pytest.mark.parametrize("leave_out", [NO_HISTORY, NO_IDS])
def test_the_same_text_computed_elsewhere_may_stand_before_a_relative_block(
    sides: Sides, leave_out: tuple[str, ...]
) -> None:
    s = Script(sides(), leave_out=leave_out)
    same_forward_hit(s)
    assert s.forward(Row(3, T, 0, 8, [4, 5])) == []
    assert s.forward(Row(4, [*T, 7], 12, 13, [4, 5, 3, 6])) == [], "block 3 is relative, blocks 4 and 5 are not"


def test_a_relative_block_may_stand_before_one_that_is_not(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    same_forward_hit(s)
    assert s.forward(Row(3, T, 0, 12, [4, 5, 6])) == []
    assert s.forward(Row(4, [*T, 7], 12, 13, [1, 2, 6, 7])) == []


def test_who_continues_a_relative_block_is_relative(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    same_forward_hit(s)
    assert s.forward(Row(3, T, 0, 12, [4, 5, 6])) == []
    assert s.forward(Row(4, [*T, 7, 8], 12, 14, [1, 2, 3, 7])) == []
    assert s.forward(Row(4, [*T, 7, 8, 9], 14, 15, [4, 5, 6, 7])) == [], "the same text in other blocks"


def test_an_adopted_prefix_gives_a_relative_chain(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY, on_unwritten="adopt")
    assert s.forward(Row(1, T, 4, 8, [1, 2])) == [], "block 1 was there before the guard"
    assert s.forward(Row(3, T, 0, 12, [4, 5, 6])) == []
    assert s.forward(Row(4, [*T, 7], 12, 13, [1, 2, 6, 7])) == []
    assert s.forward(Row(2, [*T, 7], 12, 13, [4, 2, 6, 3])) == []


def test_a_block_rewritten_before_a_relative_one_is_no_broken_link(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    same_forward_hit(s)
    assert s.forward(Row(6, T, 0, 8, [1, 2])) == [], "evicted, then written again with the same text"
    assert s.forward(Row(7, [*T, 7], 12, 13, [1, 2, 3, 4])) == []


def test_a_resume_in_other_blocks_at_a_known_length(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    same_forward_hit(s)
    assert s.forward(Row(3, T, 0, 8, [4, 5])) == []
    assert s.forward(Row(2, T, 8, 12, [4, 5, 6])) == [], "preempted, then a hit where its register still reaches"
    assert s.forward(Row(2, [*T, 7], 12, 13, [4, 5, 6, 7])) == []
    assert s.forward(Row(6, [*T, 9], 12, 13, [4, 5, 6, 1])) == []


def test_links_inside_a_relative_run_are_still_judged(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    same_forward_hit(s)

    def damage(array: np.ndarray) -> None:
        array["chain"][9] ^= np.uint64(4)

    s.twins.edit_guard(0, "head0", damage)
    found = kinds(s.forward(Row(2, [*T, 7], 12, 13, [1, 2, 3, 4])), "HEAD")
    assert found == {9: Reason.CHAIN, 10: Reason.CHAIN}


def test_another_requests_row_is_seen_by_the_last_token(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    same_forward_hit(s)
    assert s.forward(Row(3, C, 0, 12, [4, 5, 6])) == []
    found = s.forward(Row(2, [*T, 7], 12, 13, [4, 5, 6, 7]))
    assert kinds(found, "HEAD") == {27: Reason.CHAIN}, "position 11 of request 3 where request 2 wrote another token"


def test_a_register_that_is_not_relative_still_holds_the_whole_chain(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    other = [999, *A[1:8]]
    assert s.forward(Row(2, other, 0, 8, [3, 4])) == []
    found = s.forward(Row(1, A, 8, 9, [3, 4, 5]))
    assert kinds(found, "HEAD") == {19: Reason.CHAIN}, "the last token is the same, the chain before it is not"


def test_the_sweep_judges_what_a_relative_stamp_continued(sides: Sides) -> None:
    s = Script(sides(), leave_out=NO_HISTORY)
    same_forward_hit(s)
    assert s.forward(Row(3, T, 0, 8, [4, 5])) == []
    slots = np.array([4, 5, 6, 7, 8, 9, 10, 11, 12], np.int32)
    before = np.array([-1, 4, 5, 6, 7, 8, 9, 10, 23], np.int32)  # the last one after the copy of its text in block 5
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8], np.int32)
    assert len(s.twins.sweep(0, slots, positions, before, None)) == 0

    def damage(array: np.ndarray) -> None:
        array["chain"][9] ^= np.uint64(4)

    s.twins.edit_guard(0, "head0", damage)
    found = s.twins.sweep(0, slots, positions, before, None)
    assert sorted(found["slot"]) == [9, 10] and set(found["reasons"]) == {int(Reason.CHAIN)}
