"""Moves: what travels and what is made new, lists that overlap or name nothing, fresh slots, draft trees, misuse."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from agree import Sides, Twins
from agree_pools import random_pool
from agree_script import N_BLOCKS, N_LAYERS, PAGE, A, B, C, Row, Script, kinds, pool_spec
from engine import ToyEngine

from kvcanary import BatchError, BundleError, ConfigError, PhaseError, Reason, SlotBundle, abi
from kvcanary.backends.moves import MoveOp

SUBSTITUTED = Reason.CHAIN | Reason.TOKEN


def stamps(s: Script | Twins, name: str, slots: Any) -> np.ndarray[Any, Any]:
    twins = s.twins if isinstance(s, Script) else s
    found: np.ndarray[Any, Any] = twins.sides[0].read_guard(0, name)[list(slots)]
    return found


def n_fresh(s: Script) -> int:
    return int(s.twins.sides[0].pool_state(0)["n_fresh"][0])


def skipped(s: Script) -> int:
    return int(s.twins.words[abi.STATE_SKIPPED_MOVES])


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


# ---- lists on the device ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_wide", [False, True])
def test_entries_on_the_device_that_name_no_slot_are_skipped_and_counted(sides: Sides, is_wide: bool) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]), Row(2, B, 0, 4, [6]))
    far = [1 << 40, -(1 << 40)] if is_wide else [(1 << 31) - 1, -(1 << 31)]
    #         fine   bad source, good destination     bad destination            both (padding)
    source = [4, 5, 3, -1, 32, *far, 0, 6, 6, 7, 7, 6, 6, 0, -1, 32, *far]
    target = [12, 13, 20, 21, 22, 23, 24, 25, 0, 3, -1, 32, *far, 0, -1, 32, *far]
    s.copy([4, 5], [12, 13], stamps_too=False)
    s.twins.move(MoveOp.COPY, 0, np.array(target), sources=np.array(source), is_wide=is_wide)
    assert skipped(s) == 6 + 6 + 2 * 5
    assert stamps(s, "head0", [12, 13])["token"].tolist() == A[:2]
    assert not stamps(s, "head0", range(20, 24))["step"].any() and not stamps(s, "head0", [25])["step"].any()
    assert kinds(s.forward(Row(2, B, 4, 5, [6, 7])))[24] == Reason.UNWRITTEN
    assert not stamps(s, "head0", range(4))["step"].any(), "the reserved block"


def test_blocks_on_the_device(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]))
    s.copy(range(4, 12), range(12, 20), stamps_too=False)
    blocks = np.array([3, -1, 8, 4, 0]), np.array([1, 1, 1, 2, 1])
    s.twins.move(MoveOp.COPY, 0, blocks[0], sources=blocks[1], per_entry=PAGE)
    assert skipped(s) == 3 * PAGE
    assert s.forward(Row(4, A, 8, 9, [3, 4, 5])) == []


@pytest.mark.parametrize("op", [MoveOp.REFRESH, MoveOp.LOCALIZE, MoveOp.ADOPT, MoveOp.IMPORT])
def test_every_move_leaves_out_what_is_no_slot(sides: Sides, op: MoveOp) -> None:
    s = Script(sides(), has_v=True)
    s.forward(Row(1, A, 0, 8, [1, 2]))
    bundle = s.twins.call("export_slots", range(4, 12))
    slots = np.array([4, 0, 3, -1, 32, (1 << 31) - 1, 30, 5])
    more: dict[str, Any] = {}
    if op is MoveOp.ADOPT:
        more = {"positions": np.array([0, 1, 2, 3, 4, 5, -1, 1]), "tokens": np.array([-1, 1, 1, 1, 1, 1, 1, 7])}
    if op is MoveOp.IMPORT:
        more = {"image": bundle.to_image()}
    s.twins.move(op, 0, slots, **more)
    assert skipped(s) == 5 + (op in (MoveOp.REFRESH, MoveOp.ADOPT)), "slot 30 was never written, or has no position"


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


# ---- draft trees -----------------------------------------------------------------------------------------------------
# Six tokens, then a tree: the root, two children, a child of each, and a grandchild. The path is nodes 0, 2, 4.
TREE = [A[6], 777, A[7], 778, A[8], 779]
HOME = [10, 11, 12]  # positions 6, 7, 8 in blocks 1, 2, 3
NODES = [10, 12, 14]


def tree_step(s: Script, tree: list[int], nodes: list[int], table: list[int], *, moves_bytes: bool = True) -> None:
    """The forward of a tree, and the copy of the accepted nodes' KV."""
    text = [*A[:6], *tree]
    history = np.full((8, 32), -1, np.int32)
    history[1, :6] = A[:6]
    given = {} if "token_history" in s.leave_out else {"token_history": history}
    assert s.forward(Row(1, text, 6, len(text), table), **given) == []
    if moves_bytes:
        s.copy(nodes, HOME, stamps_too=False)


@pytest.mark.parametrize("leave_out", [[], ["token_history"]], ids=str)
@pytest.mark.parametrize("has_v", [True, False])
def test_an_accepted_path_is_as_if_it_had_been_written_there(sides: Sides, leave_out: list[str], has_v: bool) -> None:
    s = Script(sides(), leave_out=leave_out, has_v=has_v)
    assert s.forward(Row(1, A, 0, 6, [1, 2, 3])) == []
    tree_step(s, TREE, NODES, [1, 2, 3])
    s.twins.call("commit_slots", NODES, HOME, [0, 3], [6], request_slots=[1])
    straight = Script(sides())
    straight.forward(Row(1, A, 0, 9, [1, 2, 3]))
    for field in ("chain", "token", "position"):
        assert np.array_equal(stamps(s, "head0", HOME)[field], stamps(straight, "head0", HOME)[field])
    for n in (9, 10, 11):
        assert s.forward(Row(1, A, n, n + 1, [1, 2, 3])) == []
    register = s.twins.sides[0].read_guard(0, "registers")[1]
    assert register["chain"][12 % 16] == s.twins.sides[0].manager.chain(A[:12])
    s.damage(1, 11)
    assert kinds(s.forward(Row(1, A, 12, 13, [1, 2, 3, 4]))) == {11: Reason.DATA}


def test_without_the_commit_it_is_reported(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 6, [1, 2, 3]))
    tree_step(s, TREE, NODES, [1, 2, 3])
    s.twins.call("copy_slots", NODES, HOME)
    found = kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3])))
    assert Reason.POSITION in found[11] and Reason.CHAIN in found[12]


def test_a_path_that_was_not_accepted_is_reported(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 6, [1, 2, 3]))
    wrong = [10, 11, 13]  # 777 and 778
    tree_step(s, TREE, wrong, [1, 2, 3])
    s.twins.call("commit_slots", wrong, HOME, [0, 3], [6], request_slots=[1])
    assert kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3]))) == {11: Reason.TOKEN, 12: Reason.TOKEN}


def test_bytes_that_did_not_follow_the_path_are_reported_in_the_next_forward(sides: Sides) -> None:
    s = Script(sides(), verify_data_every=127)
    s.forward(Row(1, A, 0, 6, [1, 2, 3]))
    tree_step(s, TREE, NODES, [1, 2, 3], moves_bytes=False)
    s.twins.call("commit_slots", NODES, HOME, [0, 3], [6], request_slots=[1])
    assert kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3]))) == {11: Reason.DATA, 12: Reason.DATA}


def test_a_stamp_that_was_damaged_in_the_tree_is_not_mended_by_the_commit(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    s.forward(Row(1, A, 0, 6, [1, 2, 3]))
    tree_step(s, TREE, NODES, [1, 2, 3])
    s.twins.edit_guard(0, "tail1", lambda array: array["position"].__setitem__(12, 3))
    s.twins.edit_guard(0, "tail0", lambda array: array["token"].__setitem__(14, 3))
    s.twins.call("commit_slots", NODES, HOME, [0, 3], [6], request_slots=[1])
    found = kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3])), "TAIL")
    assert Reason.POSITION in found[11] and Reason.TOKEN in found[12]


@pytest.mark.parametrize("n_nodes", [15, 16, 18])
@pytest.mark.parametrize("leave_out", [[], ["token_history"]], ids=str)
def test_a_large_tree_goes_on_from_its_root(sides: Sides, n_nodes: int, leave_out: list[str]) -> None:
    """From 16 nodes on, the register no longer has the prefix."""
    s = Script(sides(), leave_out=leave_out)
    table = [1, 2, 3, 4, 5, 6]
    assert s.forward(Row(1, A, 0, 6, table)) == []
    tree = [A[6], *range(700, 700 + n_nodes - 3), A[7], A[8]]
    nodes = [10, 10 + n_nodes - 2, 10 + n_nodes - 1]
    tree_step(s, tree, nodes, table)
    s.twins.call("commit_slots", nodes, HOME, [0, 3], [6], request_slots=[1])
    assert s.twins.sides[0].read_guard(0, "registers")[1]["first_length"] == (
        7 if n_nodes > 15 else max(0, n_nodes - 9)
    )
    for n in (9, 10):
        assert s.forward(Row(1, A, n, n + 1, table)) == []
    assert stamps(s, "head0", [12])["chain"][0] == s.twins.sides[0].manager.chain(A[:9])


def test_rows_on_the_device_that_cannot_be_are_skipped(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 6, [1, 2, 3]))
    tree_step(s, TREE, NODES, [1, 2, 3])
    s.twins.move(
        MoveOp.COMMIT, 0, np.array([*HOME, 28]), sources=np.array([*NODES, 29]),
        row_starts=np.array([0, 3, 3, 2, 9, 4]), prefix_lens=np.array([6, 6, 0, 0, -1]),
        request_slots=np.array([1, 77, -1, -5, 1]),
    )  # fmt: skip
    assert skipped(s) == 3, "descending, beyond the list, before the first position"
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3])) == []


def test_a_prefix_on_the_device_that_no_sum_can_hold_is_skipped(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 6, [1, 2, 3]))
    paths = {"row_starts": np.array([0, 1, 2]), "prefix_lens": np.array([(1 << 63) - 1, (1 << 31) - 1])}
    s.twins.move(MoveOp.COMMIT, 0, np.array([12, 13]), is_wide=True, sources=np.array([8, 9]), **paths)
    assert skipped(s) == 2


# ---- layouts, random moves -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_random_moves_in_random_layouts_agree(sides: Sides, seed: int) -> None:
    """Whatever is in the lists, and whatever the stamps: reference and kernels do the same."""
    rng = random.Random(seed)
    bytes_of = np.random.default_rng(seed)
    page = rng.choice((1, 4, 5, 16))
    reserved = rng.choice(((), (0,), (0, 3)))
    spec = random_pool(rng, n_blocks=320 // page, page_size=page, reserved_blocks=reserved)
    twins = Twins([spec], sides(), 4, 256, real_data=rng.choice(("all", "all", "partial", "none")))
    n_slots = twins.pools[0].n_slots
    for _ in range(6):
        change_stamps(twins, bytes_of)
        n = rng.choice((0, 1, 31, 300, n_slots))
        slots = bytes_of.permutation(np.arange(-8, n_slots + 8))[:n]
        op = rng.choice(list(MoveOp))
        lists: dict[str, Any] = {"per_entry": 1}
        if op in (MoveOp.COPY, MoveOp.COMMIT):
            lists["sources"] = bytes_of.integers(-2, n_slots + 2, n)
        if op is MoveOp.COMMIT:
            starts = np.sort(bytes_of.integers(0, n + 1, 5))
            lists |= {"row_starts": starts, "prefix_lens": bytes_of.integers(-1, 40, 4)}
            lists["request_slots"] = bytes_of.permutation(np.arange(-1, 6))[:4]
        if op is MoveOp.ADOPT:
            lists |= {"positions": bytes_of.integers(-1, 1 << 20, n), "tokens": bytes_of.integers(-2, 9, n)}
            lists["chains"] = bytes_of.integers(0, 3, n).astype(np.uint64)
        if op is MoveOp.LOCALIZE:
            lists["drops_digests"] = rng.random() < 0.5
        if op is MoveOp.IMPORT:
            taken = [slot for slot in bytes_of.permutation(n_slots).tolist() if slot // page not in reserved]
            bundle = twins.call("export_slots", taken[:n])
            slots, lists["image"] = slots[: len(bundle)], bundle[: len(slots)].to_image()
        twins.move(op, 0, slots, rng.random() < 0.5, **lists)


def change_stamps(twins: Twins, bytes_of: np.random.Generator) -> None:
    """Stamps, digests and registers of all kinds, as forwards and damage may leave them."""
    for half in range(len(twins.pools[0].halves)):
        head = twins.sides[0].read_guard(0, f"head{half}").copy()
        n = len(head)
        at = bytes_of.random(n) < 0.5
        for name, low, high in (("chain", 0, 1 << 62), ("token", -1, 99), ("position", -1, 99), ("prev_slot", -n, n)):
            head[name][at] = bytes_of.integers(low, high, n)[at]
        in_order = bytes_of.random(n) < 0.3
        head["prev_slot"][in_order] = np.arange(-1, n - 1)[in_order]
        head["step"][at] = bytes_of.integers(0, 3, n)[at]
        tail = head.copy()
        differs = bytes_of.random(n) < 0.1
        tail["step"][differs], tail["token"][differs] = bytes_of.integers(0, 3, n)[differs], 7
        for name, values in ((f"head{half}", head), (f"tail{half}", tail)):
            set_alike(twins, name, values)
    registers = twins.sides[0].read_guard(0, "registers").copy()
    for name, low, high in (("request_id", 0, 3), ("length", 0, 60), ("first_length", 0, 50), ("is_relative", 0, 2)):
        registers[name] = bytes_of.integers(low, high, 4)
    registers["chain"] = bytes_of.integers(0, 1 << 62, registers["chain"].shape)
    set_alike(twins, "registers", registers)
    if twins.config.real_data != "none":
        digests = twins.sides[0].read_guard(0, "digests")
        shape = digests.shape
        values = bytes_of.integers(0, 1 << 62, shape).astype(np.uint64) * bytes_of.integers(0, 2, shape).astype(
            np.uint64
        )
        values[bytes_of.random(shape) < 0.1] = 1
        set_alike(twins, "digests", values)


def set_alike(twins: Twins, name: str, values: np.ndarray[Any, Any]) -> None:
    twins.edit_guard(0, name, lambda array: array.__setitem__(..., values))


# ---- misuse ----------------------------------------------------------------------------------------------------------
N_SLOTS = 64  # of the toy engine: 16 blocks of 4, of which block 0 is reserved
MISUSE = [
    (
        lambda m: m.copy_slots([4, 5], [8]),
        BatchError,
        r"copy_slots\(\): src has 2, dst has 1 entries: give lists of one",
    ),
    (lambda m: m.copy_slots([4, 64], [8, 9]), BatchError, r"src\[1\]=64: the slots of pool 'full' are 0 to 63"),
    (lambda m: m.copy_slots([4, 5], [8, -1]), BatchError, r"dst\[1\]=-1: the slots of pool 'full' are 0 to 63"),
    (lambda m: m.copy_slots([4, 5], [3, 8]), BatchError, r"dst\[0\]=3 is in block 0, which pool 'full' reserves"),
    (lambda m: m.copy_slots([1], [8]), BatchError, r"src\[0\]=1 is in block 0"),
    (lambda m: m.copy_slots([4, 5, 6], [9, 8, 9]), BatchError, r"dst has 9 2 times: give each once"),
    (lambda m: m.copy_slots([1], [16], blocks=True), BatchError, r"dst\[0\]=16: the blocks of pool 'full' are 0 to 15"),
    (lambda m: m.copy_slots([1], [0], blocks=True), BatchError, r"dst\[0\]=0 is in block 0"),
    (lambda m: m.copy_slots([1.5], [8]), BatchError, "src is float64: give integers"),
    (lambda m: m.copy_slots([[4]], [[8]]), BatchError, r"src has shape \(1, 1\): give a flat list"),
    (lambda m: m.copy_slots("4", [8]), BatchError, "copy_slots"),
    (lambda m: m.copy_slots([4], [8], pool="other"), ConfigError, "no pool 'other': give one of 'full', or 0 to 0"),
    (lambda m: m.export_slots([0]), BatchError, r"export_slots\(\): slots\[0\]=0 is in block 0"),
    (
        lambda m: m.import_slots(m.export_slots([4, 5]), [8]),
        BatchError,
        "1 slots for a bundle of 2: give one per entry",
    ),
    (lambda m: m.import_slots(m.export_slots([4, 5]), [8, 8]), BatchError, "slots has 8 2 times"),
    (lambda m: m.import_slots(SlotBundle.of_nothing(), []), BundleError, "mode='off'.*adopt_slots"),
    (lambda m: m.adopt_slots([4, 5], [0, -1]), BatchError, r"positions\[1\]=-1: give 0 to 2147483647"),
    (lambda m: m.adopt_slots([4, 5], [0, 1], tokens=[7]), BatchError, "slots has 2, positions has 2, tokens has 1"),
    (lambda m: m.adopt_slots([4], None), BatchError, r"adopt_slots\(\): positions is None: give the position of each"),
    (
        lambda m: m.adopt_slots([4, 5], [0, 1], tokens=[1, 2], salt=None),
        BatchError,
        "salt=None: give an integer from 0",
    ),
    (lambda m: m.adopt_slots([4], [0], salt=-1), BatchError, r"adopt_slots\(\): salt=-1: .* to 2\^64 - 1"),
    (lambda m: m.refresh_digests([4, 4]), BatchError, "slots has 4 2 times"),
    (lambda m: m.localize_slots([70]), BatchError, r"slots\[0\]=70"),
    (
        lambda m: m.commit_slots([4, 5], [4, 6], [0, 1], [0]),
        BatchError,
        r"row_starts=\[0, 1\]: give ascending .* 0 to 2",
    ),
    (lambda m: m.commit_slots([4, 5], [4, 6], [0, 2], [0, 1]), BatchError, "row_starts has 2 entries, 2 rows need 3"),
    (
        lambda m: m.commit_slots([4], [4], [0, 1], [0], request_slots=[4]),
        BatchError,
        r"request_slots\[0\]=4: negative is none, and request slots are 0 to 3$",
    ),
    (lambda m: m.commit_slots([4], [4], [0, 1], [0], request_slots=[]), BatchError, "request_slots has 0 entries"),
    (lambda m: m.commit_slots([4], [4], None, [0]), BatchError, "row_starts and prefix_lens are needed"),
]


@pytest.mark.parametrize("number", range(len(MISUSE)))
def test_misuse_is_refused_with_a_message_and_changes_nothing(number: int) -> None:
    call, error, text = MISUSE[number]
    engine = ToyEngine(verify_data_every=1)
    engine.step((0, 0, 6), (1, 0, 3))
    arrays = engine.manager.shadow_arrays()
    before = {name: array.copy() for name, array in arrays.items()}
    with pytest.raises(error, match=text):
        call(engine.manager)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)


def test_moves_come_between_forwards() -> None:
    engine = ToyEngine()
    batch = engine.batch((0, 0, 6))
    with engine.manager.step(), engine.manager.forward(batch):
        for call in (engine.manager.copy_slots, engine.manager.adopt_slots):
            with pytest.raises(PhaseError, match="_slots"):
                call([4], [8])


def test_a_guard_that_is_off_does_nothing() -> None:
    engine = ToyEngine(mode="off")
    engine.manager.copy_slots([4], [8])
    bundle = engine.manager.export_slots([4])
    assert len(bundle) == 0
    engine.manager.import_slots(bundle, [8])
    engine.manager.adopt_slots([4], [0])
    engine.manager.refresh_digests([4])
    engine.manager.localize_slots([4])
    engine.manager.commit_slots([4], [8], [0, 1], [0])
    assert engine.manager.shadow_arrays() == {}


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


def test_an_empty_list_is_nothing_to_do(sides: Sides) -> None:
    twins = Twins([pool_spec()], sides())
    twins.call("copy_slots", [], [])
    twins.call("commit_slots", [], [], [0], [])
    assert len(twins.call("export_slots", [])) == 0
