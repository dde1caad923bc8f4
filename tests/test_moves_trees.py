"""Draft trees: the path that was accepted is moved home, and is guarded from there on."""

from __future__ import annotations

import numpy as np
import pytest
from agree import Sides
from agree_script import A, Row, Script, kinds, skipped, stamps

from kvcanary import Reason
from kvcanary.backends.moves import MoveOp

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
