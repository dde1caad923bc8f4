"""Moves: what travels and what is made new, which slots are fresh then, and what changes in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from agree import Sides
from agree_script import N_BLOCKS, N_LAYERS, PAGE, A, B, C, Row, Script, kinds, stamps

from kvcanary import Reason, abi
from kvcanary.backends.moves import MoveOp

SUBSTITUTED = Reason.CHAIN | Reason.TOKEN


def n_fresh(s: Script) -> int:
    return int(s.twins.sides[0].pool_state(0)["n_fresh"][0])


def copy(s: Script, source: Any, target: Any) -> None:
    """The engine's copy, and the guard's."""
    s.copy(source, target, stamps_too=False)
    s.twins.call("copy_slots", source, target)


# ---- what travels ----------------------------------------------------------------------------------------------------
def test_the_portable_part_travels_and_the_local_part_is_made_new(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    s.forward(Row(1, A, 0, 6, [1, 2]))
    s.forward(Row(1, A, 6, 7, [1, 2]))
    digests = s.twins.sides[0].read_guard(0, "digests")[:, 4:7]
    copy(s, [4, 5, 6, 9], [24, 25, 26, 28])
    for name in ("head0", "head1", "tail0", "tail1"):
        old, new = stamps(s, name, [4, 5, 6, 9]), stamps(s, name, [24, 25, 26, 28])
        for field in ("chain", "token", "position"):
            assert np.array_equal(old[field], new[field])
        assert new["prev_slot"].tolist() == [-1, 24, 25, -1], "relocated where the predecessor came along"
        assert new["step"].tolist() == [2] * 4, "the forward last begun"
        assert not new["owner"].any() and not new["epoch"].any()
    assert np.array_equal(s.twins.sides[0].read_guard(0, "digests")[:, 24:27], digests)


def test_a_source_that_was_never_written_leaves_the_destination_so(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]), Row(2, B, 0, 4, [3]))
    s.twins.call("copy_slots", [24, 25, 26, 27], [12, 13, 14, 15])
    assert not stamps(s, "head0", range(12, 16))["step"].any()
    assert not s.twins.sides[0].read_guard(0, "digests")[:, 12:16].any()
    assert kinds(s.forward(Row(2, B, 4, 5, [3, 4]))) == dict.fromkeys(range(12, 16), Reason.UNWRITTEN)


def test_what_a_raised_forward_left_stays_unfinished(sides: Sides) -> None:
    """It is counted and not reported, as it is where it was left; its bytes are nobody's promise."""
    s = Script(sides())
    s.forward(Row(1, A, 0, 4, [1]))
    s.forward(Row(1, A, 4, 8, [1, 2]), has_tail=False)
    copy(s, range(4, 12), range(12, 20))
    s.damage(0, 17)
    assert s.forward(Row(4, A, 8, 9, [3, 4, 5])) == []
    assert s.twins.words[abi.STATE_UNJUDGED_SLOTS] == 4
    bundle = s.twins.call("export_slots", range(12, 20))
    assert bundle.states.tolist() == [2] * 4 + [1] * 4
    s.twins.call("import_slots", bundle, range(20, 28))
    assert not stamps(s, "head0", range(24, 28))["step"].any(), "no import takes what nobody vouches for"


def test_overlapping_lists_are_read_before_they_are_written(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 12, [1, 2, 3]))
    forth, back = [*range(4, 16)], [*range(8, 20)]
    copy(s, forth, back)  # by one block
    assert s.forward(Row(4, A, 12, 13, [2, 3, 4, 5])) == []
    copy(s, [8, 9, 10, 11, 12, 13, 14, 15], [12, 13, 14, 15, 8, 9, 10, 11])  # two blocks change places
    assert s.forward(Row(5, A, 12, 13, [3, 2, 4, 6])) == []


def test_a_relative_chain_stays_relative(sides: Sides) -> None:
    s = Script(sides(), leave_out=["token_history"])
    text = B[:12]
    s.forward(Row(5, C, 0, 4, [1]))
    assert s.forward(Row(1, text, 0, 4, [1]), Row(2, text, 4, 12, [1, 2, 3])) == []
    assert stamps(s, "head0", [9])["prev_slot"][0] == abi.PREV_RELATIVE_BASE - 8
    copy(s, range(8, 16), range(20, 28))
    assert stamps(s, "head0", [20, 21])["prev_slot"].tolist() == [abi.PREV_RELATIVE, abi.PREV_RELATIVE_BASE - 20]
    assert s.forward(Row(3, text, 0, 4, [4])) == []
    assert s.forward(Row(4, [*text, 7], 12, 13, [4, 5, 6, 7])) == []
    for name in ("head0", "tail0"):
        s.twins.edit_guard(0, name, lambda array: array["chain"].__setitem__(23, 5))
    assert kinds(s.forward(Row(4, [*text, 7, 8], 13, 14, [4, 5, 6, 7])))[23] == Reason.CHAIN, "within, it is judged"


def test_a_predecessor_that_was_rewritten_is_not_linked_by_a_copy(sides: Sides) -> None:
    s = Script(sides(), leave_out=["token_history"])
    text = B[:12]
    s.forward(Row(5, C, 0, 4, [1]))
    assert s.forward(Row(1, text, 0, 4, [1]), Row(2, text, 4, 12, [1, 2, 3])) == []
    assert s.forward(Row(6, text, 0, 8, [1, 2])) == [], "evicted, then written again with the same text"
    copy(s, range(4, 16), range(16, 28))
    assert s.forward(Row(7, [*text, 7], 12, 13, [4, 5, 6, 7])) == []


@pytest.mark.parametrize("is_moved", [True, False])
def test_before_a_window_stands_what_may_be_anothers(sides: Sides, is_moved: bool) -> None:
    """Its table still names a block that was given away before the copy: nobody can tell by the copy's step."""
    s = Script(sides(), window=5)
    assert s.forward(Row(1, A, 0, 12, [1, 2, 3])) == []
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    table = [1, 2, 6, 4] if is_moved else [1, 2, 3, 4]
    if is_moved:
        copy(s, range(12, 16), range(24, 28))
    assert s.forward(Row(1, A, 12, 13, table)) == [], "the window begins with block 3, behind block 2"


@pytest.mark.parametrize("is_relative", [True, False])
def test_a_predecessor_that_a_move_replaced_right_after_is_not_linked(sides: Sides, is_relative: bool) -> None:
    """A move has the number of the forward before it: so had, in this one, the stamp that continued what lay there."""
    s = Script(sides(), window=None if is_relative else 4, leave_out=["token_history"] if is_relative else [])
    text = B[:12]
    assert s.forward(Row(2, C, 0, 4, [5])) == []
    if is_relative:
        assert s.forward(Row(3, text, 0, 4, [3])) == []
        s.twins.call("adopt_slots", range(4, 8), range(4), tokens=[-1, -1, -1, text[3]])
        assert s.forward(Row(1, text, 4, 8, [1, 2])) == []
        copy(s, range(12, 16), range(4, 8))  # the same text, from its start
        assert s.forward(Row(1, text, 8, 9, [1, 2, 4])) == []
        return
    assert s.forward(Row(1, text, 0, 8, [1, 2])) == []
    copy(s, range(20, 24), range(4, 8))  # block 1 has left the window and is another's by now
    assert s.forward(Row(1, text, 7, 8, [1, 2])) == []


# ---- fresh slots -----------------------------------------------------------------------------------------------------
def running(s: Script) -> None:
    """Request 1 is past its first forward, so that only a 127th of its prefix falls due at a time."""
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    assert s.forward(Row(1, A, 8, 9, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3])) == []


@pytest.mark.parametrize("every", [127, 5])  # the slots that fall due are listed, or not
def test_the_next_forward_that_reads_a_moved_slot_verifies_its_bytes(sides: Sides, every: int) -> None:
    s = Script(sides(), verify_data_every=every, full_verify_min_tokens=100)
    running(s)
    copy(s, range(8, 12), range(24, 28))
    assert n_fresh(s) == 4
    s.damage(1, 26)
    assert s.forward(Row(2, B, 0, 4, [7])) == [], "a forward that does not read them"
    assert n_fresh(s) == 4
    before = int(s.twins.words[abi.STATE_DATA_SLOTS])
    assert kinds(s.forward(Row(1, A, 10, 11, [1, 6, 3]))) == {26: Reason.DATA}
    assert int(s.twins.words[abi.STATE_DATA_SLOTS]) - before >= 4 * N_LAYERS
    assert n_fresh(s) == 0
    if every == 127:
        assert s.forward(Row(1, A, 11, 12, [1, 6, 3])) == [], "verified once"


def test_a_written_slot_is_not_fresh_any_more(sides: Sides) -> None:
    s = Script(sides(), verify_data_every=127)
    running(s)
    copy(s, range(4, 12), range(20, 28))
    copy(s, range(4, 8), range(20, 24))  # again: counted once
    assert n_fresh(s) == 8
    assert s.forward(Row(2, B, 0, 6, [5, 6])) == []
    assert n_fresh(s) == 2
    s.twins.call("copy_slots", [16, 17], [26, 27])  # never written
    assert n_fresh(s) == 0


def test_a_paused_guard_and_a_raised_forward_leave_slots_fresh(sides: Sides) -> None:
    s = Script(sides(), verify_data_every=127)
    running(s)
    copy(s, range(8, 12), range(24, 28))
    s.twins.set_paused(True)
    assert s.forward(Row(1, A, 10, 11, [1, 6, 3])) == []
    s.twins.set_paused(False)
    assert s.forward(Row(1, A, 11, 12, [1, 6, 3]), has_tail=False) == []
    assert n_fresh(s) == 4
    assert s.forward(Row(1, A, 11, 12, [1, 6, 3])) == []
    assert n_fresh(s) == 0


def test_nothing_is_fresh_where_no_bytes_are_digested(sides: Sides) -> None:
    s = Script(sides(), real_data="none")
    s.forward(Row(1, A, 0, 8, [1, 2]))
    copy(s, range(4, 12), range(20, 28))
    assert n_fresh(s) == 0
    assert s.forward(Row(4, A, 8, 9, [5, 6, 7])) == []


# ---- in place --------------------------------------------------------------------------------------------------------
def test_refreshed_digests_accept_a_change_and_guard_what_is_there(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    s.forward(Row(1, A, 0, 8, [1, 2]))
    for layer in range(N_LAYERS):
        s.kv(layer)[4:12] ^= 0x55
    s.twins.call("refresh_digests", [1, 2], blocks=True)
    assert s.forward(Row(1, A, 8, 9, [1, 2, 3])) == []
    s.damage(1, 7, half="v")
    assert kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3]))) == {7: Reason.DATA}


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("leave_out", [[], ["token_history"]], ids=str)
def test_adopted_slots_are_guarded_from_there_on(sides: Sides, has_tokens: bool, leave_out: list[str]) -> None:
    s = Script(sides(), leave_out=leave_out)
    s.forward(Row(3, C, 0, 8, [1, 2]))
    s.copy(range(16, 24), range(4, 12), stamps_too=False)  # bytes from elsewhere, over C's
    s.twins.call("adopt_slots", range(4, 12), range(8), tokens=A[:8] if has_tokens else None, salt=7)
    assert s.forward(Row(1, A, 8, 9, [1, 2, 3], salt=7)) == []
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3], salt=7)) == []
    if has_tokens:
        assert stamps(s, "head0", [11])["chain"][0] == s.twins.sides[0].manager.chain(A[:8], 7)
        other = kinds(s.forward(Row(2, [*A[:7], 5, 6], 8, 9, [1, 2, 4], salt=8)))
        assert other == {4: Reason.CHAIN, **({} if leave_out else {11: SUBSTITUTED})}
    s.damage(0, 6)
    assert kinds(s.forward(Row(1, A, 10, 11, [1, 2, 3], salt=7))) == {6: Reason.DATA}
    found = s.forward(Row(1, A, 11, 12, [2, 1, 3], salt=7))
    assert Reason.POSITION in kinds(found)[4]


def test_adopted_tokens_whose_start_nobody_knows_are_judged_alone(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(3, C, 0, 4, [1]))
    tokens = [A[0], -1, A[2], A[3], A[4], 5, A[6], A[7]]
    s.twins.call("adopt_slots", range(4, 12), [0, 1, 2, 3, 4, 5, 6, 7], tokens=tokens)
    assert kinds(s.forward(Row(1, A, 8, 9, [1, 2, 3]))) == {9: Reason.TOKEN}
    s.twins.move(  # lists on the device: even position 0 has no chain there
        MoveOp.ADOPT, 0, np.arange(4, 8), positions=np.arange(4), tokens=np.array(A[:4])
    )
    assert kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3]))) == {9: Reason.TOKEN}


def test_localize_without_the_digests_forgets_them(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]), Row(3, C, 0, 8, [3, 4]))
    s.copy(range(4, 12), range(12, 20), stamps_too=False)
    for side in s.twins.sides:
        for name in ("HEAD_K", "TAIL_K"):
            array = side.manager.shadow_arrays()[name]
            values = side.to_host(array)
            assert values.shape == (PAGE * N_BLOCKS, 32) and values.dtype == np.uint8
            values[12:20] = values[4:12]
            values.reshape(-1, 32)[12:20, 16:24] = 0xFF  # prev_slot and step of another guard
            side.write(array, values)
    s.twins.call("localize_slots", [3, 4], blocks=True, has_digests=False)
    assert s.forward(Row(4, A, 8, 9, [3, 4, 5])) == []
    s.damage(0, 13)
    assert s.forward(Row(4, A, 9, 10, [3, 4, 5])) == [], "nothing is known of the bytes"


def test_shadow_arrays_are_the_guards_own(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    s.forward(Row(1, A, 0, 8, [1, 2]))
    for side in s.twins.sides:
        shadow = side.manager.shadow_arrays()
        names = ["HEAD_K", "TAIL_K", "HEAD_V", "TAIL_V", *(f"DIGEST_{d}" for d in range(2 * N_LAYERS))]
        assert list(shadow) == names
        assert [tuple(shadow[n].shape) for n in names] == [(32, 32)] * 4 + [(32,)] * 2 * N_LAYERS
        values = side.to_host(shadow["HEAD_V"])
        values[5, 8] ^= 1  # the lowest byte of a token
        side.write(shadow["HEAD_V"], values)
    assert kinds(s.forward(Row(1, A, 8, 9, [1, 2, 3]))) == {5: SUBSTITUTED}
