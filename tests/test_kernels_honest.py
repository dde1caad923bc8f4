"""Legal habits that were reported once; and, beside each, the fault that looks like it and still is."""

from __future__ import annotations

import numpy as np
import pytest
from agree import Sides
from agree_script import A, B, Row, Script, batch_of, kinds

from kvcanary import Reason, abi

RNG = np.random.default_rng(0)


def sweep(s: Script, slots: list[int], positions: list[int], before: list[int]) -> dict[int, Reason]:
    """What a sweep over resident slots reports, by slot."""
    records = s.twins.sweep(0, *(np.array(column, np.int32) for column in (slots, positions, before)), None)
    return {int(v["slot"]): Reason(int(v["reasons"])) for v in records}


# ---- before a window -------------------------------------------------------------------------------------------------
def test_a_stamp_of_a_failed_forward_is_moved_behind_a_window(sides: Sides) -> None:
    """It keeps its old number: still it is younger than what was there before."""
    s = Script(sides(), window=2)
    assert s.forward(Row(1, A, 0, 8, [1, 2, 3]), Row(2, B, 0, 7, [5, 6])) == []
    assert s.forward(Row(2, B, 7, 8, [5, 6]), has_tail=False) == []
    assert s.forward(Row(1, A, 8, 9, [1, 2, 3])) == []
    s.twins.call("copy_slots", [24, 25, 26, 27], [8, 9, 10, 11])  # request 1 has left block 2
    s.copy([24, 25, 26, 27], [8, 9, 10, 11], stamps_too=False)
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3])) == []


def test_a_table_names_anything_before_a_window(sides: Sides) -> None:
    """A hit of the window alone, in a table row that was another request's."""
    s = Script(sides(), window=5)
    assert s.forward(Row(1, B, 0, 12, [1, 2, 3])) == []
    assert s.forward(Row(2, A, 0, 12, [4, 5, 6])) == []
    assert s.forward(Row(3, A, 12, 13, [1, 2, 6, 7])) == []
    wrong = s.forward(Row(3, A, 13, 14, [1, 2, 3, 7]))  # and inside the window it is the wrong block
    assert wrong and {v.request for v in wrong} == {3}


def test_new_tokens_that_no_later_query_sees_need_no_slot(sides: Sides) -> None:
    """Of a long prefill an engine keeps the last window, and sends the rest to the reserved block."""
    s = Script(sides(), window=4)
    assert s.forward(Row(1, A, 0, 12, [0, 0, 3, 4], slots=[0] * 8 + [12, 13, 14, 15])) == []
    assert s.forward(Row(1, A, 12, 13, [0, 0, 3, 4])) == []
    lost = kinds(s.forward(Row(2, B, 0, 12, [0, 0, 5, 6], slots=[0] * 9 + [21, 22, 23])))
    assert lost == {}, "position 8 is behind the window of position 12"
    lost = kinds(s.forward(Row(3, B, 0, 12, [0, 0, 5, 6], slots=[0] * 10 + [22, 23])))
    assert lost == {21: Reason.UNWRITTEN}


# ---- registers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("leave_out", [(), ("token_history",)])
def test_a_text_goes_on_elsewhere_after_drafts(sides: Sides, leave_out: tuple[str, ...]) -> None:
    """Back in its request slot, at a length that only drafts had: the register has those, the cache has not."""
    s = Script(sides(), leave_out=leave_out)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    assert s.forward(Row(1, [*A[:7], 7, 8, 9], 6, 10, [1, 2, 3])) == [], "none of the drafts is accepted"
    assert s.forward(Row(2, A, 0, 9, [4, 5, 6])) == []
    assert s.forward(Row(1, A, 9, 10, [4, 5, 6])) == []
    assert s.forward(Row(1, A, 10, 11, [4, 5, 6])) == []


@pytest.mark.parametrize("leave_out", [(), ("token_history",)])
def test_drafts_of_a_further_forward_of_the_step(sides: Sides, leave_out: tuple[str, ...]) -> None:
    """As a draft pool has them, one token a forward."""
    s = Script(sides(), leave_out=leave_out)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    drafted = [*A[:8], 777, 778]
    for n in (8, 9):
        row = batch_of([Row(1, drafted, n, n + 1, [1, 2, 3])], leave_out)
        assert (
            len(s.twins.forward(row, index=n - 7, model=lambda n=n: s.twins.write_kv(0, np.array([4 + n]), RNG))) == 0
        )
    assert s.forward(Row(2, A, 0, 12, [4, 5, 6])) == []
    assert s.forward(Row(1, A, 10, 11, [4, 5, 6])) == []


def test_what_no_draft_had_is_still_held_against_the_cache(sides: Sides) -> None:
    """A whole row of another text, and nobody who tells the tokens: after a prefill, and after a token."""
    s = Script(sides(), leave_out=["token_history"])
    assert s.forward(Row(1, A, 0, 8, [1, 2]), Row(2, B, 0, 8, [3, 4])) == []
    assert kinds(s.forward(Row(1, A, 8, 9, [3, 4, 5])), "HEAD") == {19: Reason.CHAIN}
    assert s.forward(Row(2, B, 8, 9, [3, 4, 6])) == []
    assert kinds(s.forward(Row(2, B, 9, 10, [1, 2, 5])), "HEAD")[20] & Reason.CHAIN


def test_drafts_that_are_kept(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    assert s.forward(Row(1, [*A[:7], 7, 8, 9], 6, 10, [1, 2, 3])) == []
    kept = kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3])))
    assert set(kept) == {11, 12} and all(reasons & Reason.TOKEN for reasons in kept.values())


# ---- the sweep -------------------------------------------------------------------------------------------------------
def test_a_sweep_in_the_step_of_a_failed_forward(sides: Sides) -> None:
    """An index may list blocks when they are scheduled; the engine catches what its forward raises."""
    s = Script(sides())
    lists = ([4, 5, 6, 7], [0, 1, 2, 3], [-1, 4, 5, 6])
    assert s.forward(Row(1, A, 0, 6, [1, 2]), has_tail=False) == []
    assert sweep(s, *lists) == {}
    assert s.forward(Row(2, B, 0, 4, [3])) == []
    assert sweep(s, *lists) == {}, "a failed forward, as ever"
    s.twins.edit_guard(0, "tail0", lambda tail: tail["step"].__setitem__(12, 0))  # of a forward that was completed
    assert sweep(s, [12, 13, 14, 15], *lists[1:2], [-1, 12, 13, 14]) == {12: Reason.UNWRITTEN}


def test_a_sweep_over_slots_whose_bytes_are_on_their_way(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    s.twins.call("copy_slots", [4, 5, 6, 7], [20, 21, 22, 23])  # the bytes come later
    before = int(s.twins.words[abi.STATE_DATA_SLOTS])
    assert sweep(s, [20, 21, 22, 23], [0, 1, 2, 3], [-1, 20, 21, 22]) == {}
    assert int(s.twins.words[abi.STATE_DATA_SLOTS]) == before
    late = kinds(s.forward(Row(2, A, 4, 5, [5, 6])))  # too late for this one
    assert late == dict.fromkeys(range(20, 24), Reason.DATA)
