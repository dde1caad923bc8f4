"""Each reason in the least scenario that has it: exactly the records that follow by hand, on reference and kernels.

Chains and digests are worked out here from the formulas, by plain integers: a third opinion beside those two.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from agree import Sides
from agree_script import N_LAYERS, A, B, Row, Script, Seen

from kvcanary import CanaryLaunchTag, Reason, abi
from kvcanary.tags import Detail

MASK = (1 << 64) - 1
HEAD = ("HEAD_K_FULL", "HEAD_V_FULL")
TAIL = ("TAIL_K_FULL", "TAIL_V_FULL")


# ---- the formulas ----------------------------------------------------------------------------------------------------
def mix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def chain(tokens: list[int], salt: int = 0) -> int:
    c = mix64(0xC0FFEE ^ salt)
    for position, token in enumerate(tokens):
        c = (c * 0xD1342543DE82EF95 + mix64(token << 32 | position)) & MASK
    return c


def digest(data: bytes, index: int, position: int) -> int:
    """Of up to 128 words: there the constants are mix64(seed + i) | 1."""
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    total = sum(w * (mix64((0x9E3779B97F4A7C15 + i) & MASK) | 1) for i, w in enumerate(words))
    total += len(words) * 0xA0761D6478BD642F + index * 0xE7037ED1A0B428DB + position * 0x8EBC6AF09C88C6E3
    return mix64(total & MASK) or 1


def the(s: Script, tag: str, reasons: Reason) -> dict[str, int]:
    """The only record of this tag and these reasons."""
    found = [v for v in s.records if v["tag"] == CanaryLaunchTag[tag] and v["reasons"] == reasons]
    assert len(found) == 1
    return {name: int(found[0][name]) for name in abi.VIOLATION.names or ()}


# ---- CHAIN -----------------------------------------------------------------------------------------------------------
def test_chain_of_another_request(sides: Sides) -> None:
    """The table row of A shows B's block: only the register knows better, at the last prefix slot."""
    s = Script(sides(), leave_out=["token_history"], has_v=True)
    assert s.forward(Row(1, A, 0, 2, [1]), Row(2, B, 0, 2, [2])) == []
    found = s.forward(Row(1, A, 2, 3, [2]))
    assert found == [Seen(tag, Reason.CHAIN, slot=9, position=1, request=1) for tag in (*HEAD, *TAIL)]
    record = the(s, "HEAD_K_FULL", Reason.CHAIN)
    assert record["stored_chain"] == chain(B[:2])
    assert record["expected_chain"] == chain(A[:2])
    assert (record["stamp_owner"], record["stamp_step"], record["prev_slot"], record["stored_token"]) == (2, 1, 8, 201)


def test_chain_of_another_salt_is_broken_at_both_ends(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [3], salt=7)) == []
    found = s.forward(Row(2, A, 4, 5, [3, 4], salt=8))
    ends = [(12, 0), (15, 3)]
    wanted = [Seen(tag, Reason.CHAIN, slot, p, request=2) for tag in (HEAD[0], TAIL[0]) for slot, p in ends]
    assert found == wanted
    assert sorted(int(v["expected_chain"]) for v in s.records) == sorted([chain(A[:1], 8), chain(A[:4], 8)] * 2)


def test_chain_of_a_seam_inside_the_prefix(sides: Sides) -> None:
    """The second half of a prefix is another text's: nobody knows the whole, but the link across the seam is broken."""
    s = Script(sides(), leave_out=["request_slots", "request_ids", "token_history", "salts"])
    assert s.forward(Row(1, A, 0, 8, [1, 2]), Row(2, B, 0, 8, [3, 4])) == []
    found = s.forward(Row(1, A, 8, 9, [1, 4, 5]))
    assert found == [Seen(tag, Reason.CHAIN, slot=16, position=4) for tag in (HEAD[0], TAIL[0])]


def test_chain_that_the_engine_hands_in(sides: Sides) -> None:
    s = Script(sides(), leave_out=["request_slots", "request_ids", "token_history"])
    given = [np.array([chain(text)], np.uint64) for text in (A[:4], [*A[:3], 999])]
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    assert s.forward(Row(2, A, 4, 5, [1, 2]), prefix_chain=given[0]) == []
    found = s.forward(Row(2, A, 4, 5, [1, 2]), prefix_chain=given[1])
    assert found == [Seen(tag, Reason.CHAIN, slot=7, position=3) for tag in (HEAD[0], TAIL[0])]


# ---- POSITION --------------------------------------------------------------------------------------------------------
def test_position_of_a_shifted_table_row(sides: Sides) -> None:
    """A window of 2 sees one slot of the prefix, whose link is sound: it is merely the wrong place of the text."""
    s = Script(sides(), leave_out=["request_slots", "request_ids", "token_history", "salts"], window=2, has_v=True)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    found = s.forward(Row(1, A, 8, 9, [2, 1, 3]))
    tags = [tag.replace("FULL", "SWA") for tag in (*HEAD, *TAIL)]
    assert found == [Seen(tag, Reason.POSITION, slot=7, position=7) for tag in tags]
    assert set(s.records["stored_position"]) == {3}


# ---- DATA ------------------------------------------------------------------------------------------------------------
def test_data_of_one_plane(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    whole = s.kv(2, "v")[6].tobytes()
    s.damage(2, 6, mask=0x10, half="v")
    plane = 2 * N_LAYERS - 1  # K and V of a layer side by side
    found = s.forward(Row(1, A, 4, 5, [1, 2]))
    assert found == [Seen("HEAD_V_FULL", Reason.DATA, slot=6, position=2, request=1, plane=plane)]
    record = the(s, "HEAD_V_FULL", Reason.DATA)
    assert record["stored_digest"] == digest(whole, plane, 2)
    assert record["found_digest"] == digest(s.kv(2, "v")[6].tobytes(), plane, 2)


def test_data_of_a_slot_that_was_exchanged(sides: Sides) -> None:
    """Two slots whose bytes changed places: both are named, in every plane, though no byte is new."""
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    for layer in range(N_LAYERS):
        s.kv(layer)[[4, 7]] = s.kv(layer)[[7, 4]]
    found = s.forward(Row(1, A, 4, 5, [1, 2]))
    wanted = [
        Seen("HEAD_K_FULL", Reason.DATA, slot, p, request=1, plane=plane)
        for slot, p in ((4, 0), (7, 3))
        for plane in range(N_LAYERS)
    ]
    assert found == wanted


# ---- at the write ----------------------------------------------------------------------------------------------------
def test_write_token(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    expected = np.array([100, 999, -1], np.int32)
    found = s.forward(Row(1, A, 0, 3, [1]), expected_tokens=expected)
    assert found == [Seen("HEAD_K_FULL", Reason.WRITE_TOKEN, slot=5, position=1, request=1)]
    record = the(s, "HEAD_K_FULL", Reason.WRITE_TOKEN)
    assert (record["stored_token"], record["expected_token"]) == (101, 999)


def test_write_position_and_the_hole_it_leaves(sides: Sides) -> None:
    """Token 2 goes to slot 21; the table wants it in slot 6, which TAIL then finds unwritten, in the same step."""
    s = Script(sides(), has_v=True)
    found = s.forward(Row(1, A, 0, 3, [1], slots=[4, 5, 21]))
    assert found == [
        Seen("HEAD_K_FULL", Reason.WRITE_POSITION, slot=21, position=2, request=1),
        *(Seen(tag, Reason.UNWRITTEN, slot=6, position=2, request=1) for tag in TAIL),
    ]
    assert the(s, "HEAD_K_FULL", Reason.WRITE_POSITION)["prev_slot"] == 6


def test_write_position_can_be_switched_off(sides: Sides) -> None:
    s = Script(sides(), check_write_position=False)
    found = s.forward(Row(1, A, 0, 3, [1], slots=[4, 5, 21]))
    assert found == [Seen("TAIL_K_FULL", Reason.UNWRITTEN, slot=6, position=2, request=1)]


def test_duplicate_write(sides: Sides) -> None:
    """Two requests got block 3: the higher token index has the slot, the loser is named, the stamp is the winner's."""
    s = Script(sides(), has_v=True)
    found = s.forward(Row(1, A, 0, 2, [3]), Row(2, B, 0, 2, [3]))
    wanted = [Seen("TAIL_K_FULL", Reason.DUPLICATE_WRITE, slot, p, request=1) for slot, p in ((12, 0), (13, 1))]
    assert found == wanted
    tokens = {(int(v["expected_token"]), int(v["stored_token"])) for v in s.records}
    assert tokens == {(100, 200), (101, 201)}, "its own, and the winner's"
    for name in ("head0", "head1", "tail0", "tail1"):
        stamps = s.twins.sides[-1].read_guard(0, name)[12:14]
        assert stamps["token"].tolist() == [200, 201]
        assert stamps["chain"].tolist() == [chain(B[:1]), chain(B[:2])]


# ---- TOKEN -----------------------------------------------------------------------------------------------------------
def test_token_that_the_history_does_not_have(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    other = [*A[:2], 777, *A[3:]]
    found = s.forward(Row(1, other, 4, 5, [1, 2]))
    assert found == [Seen(tag, Reason.TOKEN, slot=6, position=2, request=1) for tag in (*HEAD, *TAIL)]
    assert set(s.records["stored_token"]) == {102}
    assert set(s.records["expected_token"]) == {777}


# ---- UNWRITTEN -------------------------------------------------------------------------------------------------------
def test_unwritten_prefix(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    found = s.forward(Row(1, A, 2, 3, [1]))
    assert found == [Seen(tag, Reason.UNWRITTEN, slot, p, request=1) for tag in HEAD for slot, p in ((4, 0), (5, 1))]
    assert set(s.records["detail"]) == {Detail.SLOT}


@pytest.mark.parametrize(("entry", "name"), [(-1, "negative"), (0, "reserved")])
def test_unwritten_table_entry(sides: Sides, entry: int, name: str) -> None:
    s = Script(sides(), has_v=True)
    assert s.forward(Row(1, A, 0, 5, [1, 2])) == []
    found = s.forward(Row(1, A, 5, 6, [1, entry], slots=[9]))
    tail = "TAIL_K_FULL"
    assert found == [
        Seen("HEAD_K_FULL", Reason.UNWRITTEN, entry, 4, request=1),
        Seen("HEAD_K_FULL", Reason.WRITE_POSITION, 9, 5, request=1),
        Seen(tail, Reason.UNWRITTEN, entry, 4, request=1),
        Seen(tail, Reason.UNWRITTEN, entry, 5, request=1),
    ], name


def test_unwritten_half_of_a_move(sides: Sides) -> None:
    """The HEAD stamp of a slot was moved, its TAIL stamp was not: TAIL says so, of that half alone."""
    s = Script(sides(), has_v=True)
    assert s.forward(Row(1, A, 0, 2, [1]), Row(2, A, 0, 2, [2])) == []

    def stale(stamps: Any) -> None:
        stamps["step"][4] -= 1

    assert s.forward(Row(1, A, 0, 2, [1])) == []
    s.twins.edit_guard(0, "tail1", stale)
    found = s.forward(Row(1, A, 2, 3, [1]))
    assert found == [Seen("TAIL_V_FULL", Reason.UNWRITTEN, slot=4, position=0, request=1)]
    assert set(s.records["detail"]) == {Detail.UNFINISHED}


def test_what_a_raised_forward_left_is_counted_not_reported(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 2, [1]), has_tail=False) == []
    s.damage(0, 4)
    assert s.forward(Row(2, A, 2, 3, [1, 2], slots=[6])) == []
    assert s.twins.words[abi.STATE_UNJUDGED_SLOTS] == 2


# ---- OUT_OF_RANGE ----------------------------------------------------------------------------------------------------
def test_out_of_range_table_entry(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    assert s.forward(Row(1, A, 0, 5, [1, 2])) == []
    found = s.forward(Row(1, A, 5, 6, [1, 99], slots=[9]))
    assert found == [
        Seen("HEAD_K_FULL", Reason.OUT_OF_RANGE, 99, 4, request=1),
        Seen("HEAD_K_FULL", Reason.WRITE_POSITION, 9, 5, request=1),
        Seen("TAIL_K_FULL", Reason.OUT_OF_RANGE, 99, 4, request=1),
        Seen("TAIL_K_FULL", Reason.OUT_OF_RANGE, 99, 5, request=1),
    ]
    assert Detail.TABLE_ENTRY in s.records["detail"]


def test_out_of_range_write(sides: Sides) -> None:
    s = Script(sides())
    found = s.forward(Row(1, A, 0, 2, [1], slots=[4, 32]))
    assert found == [
        Seen("HEAD_K_FULL", Reason.OUT_OF_RANGE, slot=32, position=1, request=1),
        Seen("TAIL_K_FULL", Reason.UNWRITTEN, slot=5, position=1, request=1),
    ]
    assert the(s, "HEAD_K_FULL", Reason.OUT_OF_RANGE)["detail"] == Detail.SLOT_MAPPING


def test_out_of_range_length(sides: Sides) -> None:
    """24 positions fit into a table row; what lies inside is judged as ever."""
    s = Script(sides(), leave_out=["token_history"])
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    found = s.forward(Row(1, A, 4, 5, [1, 2]), seq_lens=np.array([26], np.int32))
    lengths = [v for v in s.records if v["detail"] == Detail.SEQ_LEN]
    assert [(int(v["slot"]), int(v["position"]), int(v["reasons"])) for v in lengths] == [(26, 25, Reason.OUT_OF_RANGE)]
    assert {v.position for v in found if v.tag == "HEAD_K_FULL"} == {*range(4, 24), 25}


def test_out_of_range_query_start(sides: Sides) -> None:
    """The second row claims tokens beyond the batch, the third ends before it begins; the first is unharmed."""
    s = Script(sides())
    rows = [Row(1, A, 0, 2, [1]), Row(2, B, 0, 2, [2]), Row(3, B, 0, 2, [3])]
    found = s.forward(*rows, query_start_loc=np.array([0, 2, 7, 6], np.int32))
    assert found == [
        Seen("HEAD_K_FULL", Reason.OUT_OF_RANGE, slot=7, position=0, row=1, request=2),
        Seen("HEAD_K_FULL", Reason.OUT_OF_RANGE, slot=6, position=0, row=2, request=3),
    ]
    assert set(s.records["detail"]) == {Detail.QUERY_START_LOC}


def test_out_of_range_tokens_of_an_earlier_row(sides: Sides) -> None:
    """query_start_loc goes back: the third row's tokens are also the first one's, which alone may stamp them."""
    s = Script(sides())
    rows = [Row(1, A, 0, 4, [1]), Row(2, B, 0, 1, [2]), Row(3, B, 0, 1, [3])]
    query = np.array([0, 4, 2, 5], np.int32)
    found = s.forward(*rows, query_start_loc=query, seq_lens=np.array([4, 1, 3], np.int32))
    assert found == [
        Seen("HEAD_K_FULL", Reason.OUT_OF_RANGE, slot=2, position=0, row=1, request=2),
        Seen("HEAD_K_FULL", Reason.OUT_OF_RANGE, slot=5, position=0, row=2, request=3),
    ]
    assert s.twins.sides[0].read_guard(0, "head0")["owner"][4:8].tolist() == [1] * 4


@pytest.mark.parametrize("indptr", [(0, 1, 99), (0, 1, 0), (0, -5, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("is_padding", [False, True])
def test_out_of_range_part_of_a_csr_table(sides: Sides, indptr: tuple[int, ...], is_padding: bool) -> None:
    """A row's length comes from kv_indptr: where that cannot be, nothing is judged, and a row that writes is told."""
    s = Script(sides())
    found = s.twins.forward(
        {
            "kv_indptr": np.array(indptr, np.int32),
            "kv_indices": np.array([1, 2], np.int32),
            "kv_last_page_len": np.array([1, 1], np.int32),
            "query_start_loc": np.array([0, 1, 2], np.int32),
            "input_ids": np.array([100, 200], np.int32),
            "slot_mapping": np.array([-1, 0] if is_padding else [4, 8], np.int64),
            "request_slots": np.array([1, 2], np.int32),
            "request_ids": np.array([1, 2], np.uint32),
        }
    )
    inside = [0 <= a <= b <= 2 for a, b in pairwise(indptr)]
    broken = [] if is_padding else [r for r in (0, 1) if not inside[r]]
    told = found[found["detail"] == Detail.KV_INDPTR]
    assert sorted((int(v["row"]), int(v["slot"])) for v in told) == [(r, indptr[r + 1]) for r in broken]
    assert set(told["reasons"].tolist()) <= {int(Reason.OUT_OF_RANGE)}
    assert set(found["row"].tolist()) == set(broken)
    assert bool(broken) != is_padding


def test_out_of_range_request_slot(sides: Sides) -> None:
    s = Script(sides(), leave_out=["token_history"])
    found = s.forward(Row(1, A, 0, 2, [1]), request_slots=np.array([8], np.int32))
    assert found == [Seen("HEAD_K_FULL", Reason.OUT_OF_RANGE, slot=8, position=0, request=1)]
    assert set(s.records["detail"]) == {Detail.REQUEST_SLOT}


# ---- the sweep -------------------------------------------------------------------------------------------------------
def test_each_reason_of_a_sweep(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [1]), Row(2, B, 0, 4, [2])) == []
    s.damage(1, 11)
    lists = [(4, 0, -1, 100), (5, 2, 4, 101), (6, 2, 5, 9), (10, 2, 5, -1), (11, 3, 10, 203), (20, 0, -1, 1)]
    lists += [(99, 0, -1, 1), (1, 0, -1, 1)]
    columns = [np.array(column, np.int32) for column in zip(*lists, strict=True)]
    s.twins.sweep(0, *columns)
    found = {(int(v["slot"]), int(v["plane"])): Reason(int(v["reasons"])) for v in s.twins.records}
    assert found == {
        (5, -1): Reason.POSITION,
        (6, -1): Reason.TOKEN,
        (10, -1): Reason.CHAIN,
        (11, 1): Reason.DATA,
        (20, -1): Reason.UNWRITTEN,
        (99, -1): Reason.OUT_OF_RANGE,
        (1, -1): Reason.UNWRITTEN,
    }
