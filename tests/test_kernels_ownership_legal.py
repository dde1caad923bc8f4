"""The legal twins of the recipes, for a guard that is told who owns which block: what must not be reported."""

from __future__ import annotations

import numpy as np
import pytest
from agree import Sides
from agree_script import A, B, C, Row, Script, kinds, owned_script

from kvcanary import PREFIX_CACHE, LifecycleEvent, Reason, abi

STALE = Reason.STALE_EPOCH


def blocks_of(s: Script, *ids: int) -> list[tuple[int, ...]]:
    """(epoch, owner, flags, since) of some blocks."""
    words = s.twins.sides[0].read_guard(0, "blocks")
    return [tuple(word) for word in words[list(ids)].tolist()]


def test_n01_prefix_sharing_until_nobody_is_left(sides: Sides) -> None:
    s = owned_script(sides)
    second = [*A[:4], 900, 901, 902, 903]
    s.own("allocate", [3], 1)
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    s.own("share", [3], 2)
    s.own("allocate", [4], 2)
    assert s.forward(Row(2, second, 4, 5, [3, 4])) == []
    assert blocks_of(s, 3) == [(1, 1, abi.BLOCK_LIVE | abi.BLOCK_SHARED, 0)]
    s.own("free", [3], 1)
    assert blocks_of(s, 3) == [(1, 0, abi.BLOCK_LIVE | abi.BLOCK_SHARED, 2)]
    assert s.forward(Row(2, second, 5, 6, [3, 4])) == []
    s.own("free", [3, 4], 2)
    assert blocks_of(s, 3, 4) == [(1, 0, 0, 3), (1, 0, 0, 3)]
    s.own("share", [3], 5)
    assert blocks_of(s, 3) == [(1, 0, abi.BLOCK_LIVE | abi.BLOCK_SHARED, 3)]
    s.own("allocate", [5], 5)
    assert s.forward(Row(5, second, 4, 5, [3, 5])) == [], "revived from the cache"


def test_n02_copy_on_write_with_stamps_and_digests(sides: Sides) -> None:
    s = owned_script(sides)
    first, second = [*A[:6], 111, 5], [*A[:6], 222, 6]
    s.own("allocate", [1, 3], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    s.own("share", [1], 2)
    s.own("allocate", [5], 6)
    s.own("free", [5], 6)
    s.own("allocate", [5], 2)
    s.copy([12, 13], [20, 21])
    for n in (6, 7):
        assert s.forward(Row(1, first, n, n + 1, [1, 3]), Row(2, second, n, n + 1, [1, 5])) == []


def test_n03_preemption_and_recompute_elsewhere(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [1, 2, 3], 2)
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    s.own("allocate", [5, 6], 1)
    assert s.forward(Row(1, A, 0, 6, [5, 6])) == []
    assert s.forward(Row(1, A, 6, 7, [5, 6]), Row(2, B, 8, 9, [1, 2, 3])) == []


def test_n04_block_reuse_in_another_order(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [2, 1], 1)
    s.own("allocate", [2, 1, 3], 2)
    assert s.forward(Row(2, B, 0, 8, [2, 1])) == []
    assert s.forward(Row(2, B, 8, 9, [2, 1, 3])) == []
    assert blocks_of(s, 1, 2, 3) == [(2, 2, abi.BLOCK_LIVE, 1), (2, 2, abi.BLOCK_LIVE, 1), (1, 2, abi.BLOCK_LIVE, 1)]


def test_n06_rejected_drafts_are_rewritten(sides: Sides) -> None:
    s = owned_script(sides)
    drafted = [*A[:6], 106, 777, 778]
    s.own("allocate", [1, 2, 3], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2, 3])) == []
    assert s.forward(Row(1, drafted, 6, 9, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 7, 9, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3])) == []


def test_n07_blocks_behind_the_window_belong_to_others(sides: Sides) -> None:
    s = owned_script(sides, window=5)
    s.own("allocate", [1, 2, 3, 4], 1)
    assert s.forward(Row(1, A, 0, 12, [1, 2, 3, 4])) == []
    s.own("free", [1], 1)
    s.own("allocate", [1], 2)
    assert s.forward(Row(2, B, 0, 4, [1])) == []
    assert s.forward(Row(1, A, 12, 13, [1, 2, 3, 4])) == []
    s.own("free", [2], 1)
    s.own("free", [1], 2)
    s.own("allocate", [1, 2], 3)
    assert s.forward(Row(3, C, 0, 8, [1, 2])) == []
    assert s.forward(Row(1, A, 13, 14, [1, 2, 3, 4])) == []


def test_n08_padding_writes_the_reserved_block_or_nothing(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    assert s.forward(Row(0, [0], 0, 1, [0], slots=[0]), Row(0, [0], 0, 1, [0], slots=[-1])) == []
    assert s.forward(Row(1, A, 4, 5, [1, 2]), Row(0, [0], 0, 1, [0], slots=[2])) == []
    assert s.twins.words[abi.STATE_UNOWNED_WRITES] == 0


def test_n12_zeroing_of_fresh_blocks(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [1, 2], 2)
    for layer in range(3):
        s.kv(layer)[4:12] = 0
    for n in range(8):
        assert s.forward(Row(2, B, n, n + 1, [1, 2])) == []


def test_n13_restore_into_other_blocks(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [5, 6], 6)
    s.own("free", [5, 6], 6)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [5, 6, 7], 4)
    s.copy(range(4, 12), range(20, 28))
    assert s.forward(Row(4, A, 8, 9, [5, 6, 7])) == []


def test_n15_late_write_into_a_block_that_nobody_owns(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    s.own("free", [1, 2], 1)
    late = s.forward(Row(1, A, 6, 7, [1, 2]))
    assert kinds(late) == dict.fromkeys(range(4, 10), STALE), "what it reads is freed; what it writes hurts nobody"
    assert s.twins.words[abi.STATE_UNOWNED_WRITES] == 1
    s.own("allocate", [2, 1], 2)
    assert s.forward(Row(2, B, 0, 8, [2, 1])) == []
    assert s.forward(Row(2, B, 7, 8, [2, 1])) == []


def test_n24_prefix_written_in_the_same_forward(sides: Sides) -> None:
    s = owned_script(sides)
    second = [*A[:4], 900, 901]
    s.own("allocate", [3, 4], 5)
    assert s.forward(Row(5, C, 0, 8, [3, 4])) == [], "what was there before"
    s.own("free", [3, 4], 5)
    s.own("allocate", [3, 5], 1)
    s.own("share", [3], 2)
    s.own("allocate", [4], 2)
    assert s.forward(Row(2, second, 4, 5, [3, 4]), Row(1, A, 0, 5, [3, 5])) == []
    assert s.forward(Row(1, A, 5, 6, [3, 5]), Row(2, second, 5, 6, [3, 4])) == []


def test_n25_write_that_was_launched_before_the_free(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    assert s.forward(Row(1, A, 6, 7, [1, 2])) == []
    error = s.twins.lifecycle(
        [
            LifecycleEvent("free", [1, 2], 1),
            {"kind": "allocate", "ids": np.array([1, 2, 3]), "owner": 2},
            ("share", 3, PREFIX_CACHE, "full"),
        ]
    )
    assert error is None
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    assert s.forward(Row(2, B, 8, 9, [1, 2, 3])) == []


def test_the_last_holder_claims_the_tail_and_writes_it(sides: Sides) -> None:
    """Copy-on-write by reference counts: the fork's tail is B's alone once A has let go."""
    second = [*A[:6], 900, 901]
    for claims in (True, False):
        s = owned_script(sides)
        s.own("allocate", [1, 2], 1)
        assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
        s.own("share", [1, 2], 2)
        s.own("free", [1, 2], 1)
        if claims:
            s.own("claim", [2], 2)
        written = s.forward(Row(2, second, 6, 7, [1, 2]))
        later = s.forward(Row(2, second, 7, 8, [1, 2]))
        assert kinds(written) == ({} if claims else {10: Reason.FOREIGN_WRITE})
        assert (kinds(later) == {}) == claims
        if claims:
            s.own("allocate", [3], 3)
            seen_by_others = s.forward(Row(3, [*second, *C], 8, 9, [1, 2, 3]))
            assert kinds(seen_by_others, request=3)[8] == Reason.STALE_EPOCH, "it is nobody else's to read any more"


def test_adopted_slots_are_of_their_block(sides: Sides) -> None:
    s = owned_script(sides, on_unwritten="adopt")
    s.own("allocate", [1, 2], 6)
    s.own("free", [1, 2], 6)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 4, 5, [1, 2])) == []
    assert s.twins.sides[0].read_guard(0, "head0")["epoch"][4:9].tolist() == [2] * 5
    assert s.forward(Row(1, A, 5, 6, [1, 2])) == []


@pytest.mark.parametrize("leave_out", [[], ["token_history"], ["token_history", "request_ids"]], ids=str)
def test_kv_loaded_into_a_used_block_is_adopted(sides: Sides, leave_out: list[str]) -> None:
    """The stamps that it finds are of an epoch that is over: they are no anchor, no link and no evidence."""
    s = owned_script(sides, on_unwritten="adopt", leave_out=leave_out)
    s.own("allocate", [1, 2], 6)
    assert s.forward(Row(6, B, 0, 8, [1, 2])) == []
    s.own("free", [1, 2], 6)
    s.own("allocate", [2, 1], 1)
    for layer in range(3):
        s.kv(layer)[4:12] = 7
    assert s.forward(Row(1, A, 4, 5, [2, 1]), pending=np.ones(1, np.uint8)) == [], "not there yet"
    for n in range(5, 8):
        assert s.forward(Row(1, A, n, n + 1, [2, 1])) == []
    assert s.twins.words[abi.STATE_ADOPTED_SLOTS] == 4
    s.own("share", [2, 1], 3)
    s.own("allocate", [3], 3)
    assert s.forward(Row(3, A, 8, 9, [2, 1, 3])) == []
    s.damage(1, 9)
    assert kinds(s.forward(Row(3, A, 9, 10, [2, 1, 3]))) == {9: Reason.DATA}


def test_a_reset_leaves_ownership_alone(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1], 1)
    assert s.forward(Row(1, A, 0, 2, [1])) == []
    before = blocks_of(s, 1)
    s.twins.reset()
    assert blocks_of(s, 1) == before == [(1, 1, abi.BLOCK_LIVE, 0)]
    assert s.forward(Row(1, A, 0, 2, [1])) == []


def test_stamps_get_their_epoch_while_the_guard_is_paused(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [1], 1)
    s.twins.set_paused(True)
    assert s.forward(Row(1, A, 0, 2, [1])) == []
    assert s.forward(Row(2, B, 3, 4, [1])) == []
    s.twins.set_paused(False)
    assert s.twins.sides[0].read_guard(0, "head0")["epoch"][4:8].tolist() == [1, 1, 0, 0]
    assert s.forward(Row(1, A, 2, 3, [1])) == []
