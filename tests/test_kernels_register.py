"""Registers of request slots: what a request left behind in a slot that it was served in before is no evidence."""

from __future__ import annotations

import numpy as np
import pytest
from agree import PoolSpec, Sides
from agree_script import PAGE, A, Row, Script, Seen, kinds

from kvcanary import Reason, layouts

SAID, DRAFTED = [*A[:6], 7, 8, 9, 10, 11, 12], [*A[:6], 17, 18]
LEAVE_OUT = [("token_history",), ()]


def slots(*numbers: int) -> dict[str, np.ndarray]:
    return {"request_slots": np.array(numbers, np.int32)}


def history(s: Script, *slot_of_row: int) -> dict[str, np.ndarray]:
    """The text that was said, for the slots of the rows; {} where the engine hands in none."""
    if "token_history" in s.leave_out:
        return {}
    found = np.full((8, 32), -1, np.int32)
    for slot in slot_of_row:
        found[slot, : len(SAID)] = SAID
    return {"token_history": found}


@pytest.mark.parametrize("leave_out", LEAVE_OUT, ids=["no history", "history"])
def test_back_in_a_slot_after_others_have_said_more(sides: Sides, leave_out: tuple[str, ...]) -> None:
    s = Script(sides(), leave_out=leave_out)
    assert s.forward(Row(1, DRAFTED, 0, 8, [1, 2]), **slots(1)) == [], "two drafts, both rejected"
    assert s.forward(Row(1, SAID, 6, 8, [1, 2]), **slots(2), **history(s, 2)) == [], "preempted, resumed in slot 2"
    assert s.forward(Row(1, SAID, 8, 9, [1, 2, 3]), **slots(1), **history(s, 1)) == [], "and once more, in slot 1"
    assert s.forward(Row(1, SAID, 9, 10, [1, 2, 3]), **slots(1), **history(s, 1)) == []


def test_a_long_chunk_in_the_other_slot(sides: Sides) -> None:
    """More new tokens than a warp takes."""

    def build(given):  # type: ignore[no-untyped-def]
        return layouts.nhd(k=[given["k0"]])

    spec = PoolSpec({"k0": np.zeros((16, PAGE, 1, 2), "u2")}, build)
    s = Script(sides(), leave_out=("token_history",), spec=spec)
    said = [int(t) for t in 1000 + np.arange(60)]
    drafted = [*said[:6], *range(2000, 2034)]
    table = np.arange(1, 16, dtype=np.int32)[None]

    def forward(text: list[int], start: int, end: int, slot: int) -> list[Seen]:
        row = Row(1, text, start, end, [], range(PAGE + start, PAGE + end), kv_slots=[])
        return s.forward(row, block_table=table, **slots(slot))

    assert forward(drafted, 0, 40, 1) == []
    assert forward(said, 6, 40, 2) == []
    assert forward(said, 40, 41, 1) == []


def test_a_request_that_stays_in_its_slot_is_still_held_to_what_it_said(sides: Sides) -> None:
    s = Script(sides(), leave_out=("token_history",))
    assert s.forward(Row(1, SAID, 0, 8, [1, 2]), Row(2, DRAFTED, 0, 8, [3, 4]), **slots(1, 2)) == []
    assert s.forward(Row(2, [*DRAFTED, 5], 8, 9, [3, 4, 5]), **slots(2)) == []
    found = kinds(s.forward(Row(1, SAID, 8, 9, [1, 4, 6]), **slots(1)), "HEAD")
    assert set(found.values()) == {Reason.CHAIN}


def test_one_id_in_two_rows_of_a_forward_leaves_both_registers(sides: Sides) -> None:
    """Nonsense, on which all sides agree, whichever row comes first."""
    s = Script(sides(), leave_out=("token_history",))
    s.forward(Row(1, SAID, 0, 4, [1]), Row(1, DRAFTED, 0, 4, [2]), **slots(1, 2))
    assert s.forward(Row(1, SAID, 4, 5, [1, 3]), Row(1, DRAFTED, 4, 5, [2, 4]), **slots(1, 2)) == []
