"""The patrol: a few blocks a step, whatever the batch is about, on reference and kernels."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from agree import Sides
from agree_script import N_BLOCKS, PAGE, A, B, Row, Script, batch_of, kinds
from numpy.typing import NDArray

from kvcanary import CanaryConfig, ConfigError, Reason, abi
from kvcanary.patrol import plan_patrol
from kvcanary.tags import Detail

BLOCK_BYTES = PAGE * 3 * 4  # of the script's pool, K alone


def script(sides: Sides, n_blocks: int = N_BLOCKS, **config: Any) -> Script:
    """A patrol over ``n_blocks`` blocks a step; the prefix of a row is not digested after its first forward."""
    settings = {"lifecycle": True, "scrub_bytes_per_step": n_blocks * BLOCK_BYTES, "verify_data_every": 1 << 20}
    return Script(sides(), **{**settings, **config})


def two_requests(s: Script) -> None:
    """Request 1 in blocks 1 and 2, request 2 in blocks 5 and 6, which then has nothing to do."""
    s.own("allocate", [1, 2], 1)
    s.own("allocate", [5, 6], 2)
    assert s.forward(Row(1, A, 0, 6, [1, 2]), Row(2, B, 0, 6, [5, 6])) == []


def words(s: Script, *names: int) -> list[int]:
    return [int(s.twins.words[name]) for name in names]


# ---- what it sees ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [0, 2])
def test_damage_in_a_block_that_no_row_reads(sides: Sides, layer: int) -> None:
    s = script(sides)
    two_requests(s)
    s.damage(layer, 22)
    found = s.forward(Row(1, A, 6, 7, [1, 2]))
    assert kinds(found) == {22: Reason.DATA}
    record = s.records[0]
    assert (record["detail"], record["row"], record["position"], record["plane"]) == (Detail.SCRUB, -1, 2, layer)
    assert (record["stamp_owner"], record["block_owner"]) == (2, 2), "whose bytes they are"


def test_each_turn_takes_the_next_blocks_and_the_last_turn_what_is_left(sides: Sides) -> None:
    s = script(sides, n_blocks=3)  # turns over blocks 0-2, 3-5, 6-7
    two_requests(s)  # first turn
    for layer, slot in ((0, 4), (1, 21), (2, 25)):
        s.damage(layer, slot)
    found = [kinds(s.forward(Row(1, A, n, n + 1, [1, 2]))) for n in (6, 7)]
    assert found == [{21: Reason.DATA}, {25: Reason.DATA}]
    s.own("allocate", [3], 1)
    assert kinds(s.forward(Row(1, A, 8, 9, [1, 2, 3]))) == {4: Reason.DATA}, "from the start again"


def test_link_to_a_stamp_that_was_overwritten(sides: Sides) -> None:
    s = script(sides, has_v=True, scrub_bytes_per_step=1 << 20)
    two_requests(s)

    def change(stamps: NDArray[Any]) -> None:
        stamps["chain"][20] ^= 1 << 40

    s.twins.edit_guard(0, "head1", change)
    found = s.forward(Row(1, A, 6, 7, [1, 2]))
    assert [(v.tag, v.reasons, v.slot) for v in found] == [("HEAD_V_FULL", Reason.CHAIN, 21)], (
        "slot 20 is a text's first"
    )


def test_a_shared_and_a_cached_block_are_covered(sides: Sides) -> None:
    s = script(sides)
    two_requests(s)
    s.own("share", [5], 3)
    s.own("free", [5, 6], 2)  # block 5 is left to request 3, block 6 is nobody's
    s.damage(0, 21)
    s.damage(0, 25)
    assert kinds(s.forward(Row(1, A, 6, 7, [1, 2]))) == {21: Reason.DATA}


# ---- what it must not say --------------------------------------------------------------------------------------------
def test_blocks_that_nobody_holds_may_be_overwritten(sides: Sides) -> None:
    s = script(sides)
    two_requests(s)
    s.own("free", [5, 6], 2)
    for layer in range(3):
        s.kv(layer)[20:26] = 0
    before = words(s, abi.STATE_SCRUB_ORPHANS)[0]
    assert s.forward(Row(1, A, 6, 7, [1, 2])) == []
    assert words(s, abi.STATE_SCRUB_ORPHANS)[0] - before == 6
    s.own("allocate", [5, 6], 4)  # zeroed, allocated, not written yet
    assert s.forward(Row(1, A, 7, 8, [1, 2])) == []


def test_a_slot_is_left_alone_in_the_forward_that_writes_it_and_after_one_that_failed(sides: Sides) -> None:
    s = script(sides)
    two_requests(s)
    s.forward(Row(1, A, 6, 8, [1, 2]), has_tail=False)
    for layer in range(3):
        s.kv(layer)[10] = 7
    assert s.forward(Row(2, B, 6, 7, [5, 6])) == []
    assert s.forward(Row(1, A, 6, 8, [1, 2])) == []


def test_link_to_a_block_that_was_given_away_since(sides: Sides) -> None:
    s = script(sides)
    two_requests(s)
    s.own("free", [5], 2)  # as a window does that has moved on
    s.own("allocate", [5], 3)
    s.copy([4, 5, 6, 7], [20, 21, 22, 23])  # with stamps, whose step is that of the last forward
    assert s.forward(Row(1, A, 6, 7, [1, 2])) == []


def test_moved_bytes_are_left_alone_until_a_forward_has_verified_them(sides: Sides) -> None:
    """KV is loaded layer by layer: it is not all there while the patrol passes, and is the reader's to judge."""
    s = script(sides, n_blocks=N_BLOCKS)
    two_requests(s)
    s.own("allocate", [3, 4], 7)
    bundle = s.twins.call("export_slots", range(20, 26))
    s.twins.call("import_slots", bundle, range(12, 18))
    before = words(s, abi.STATE_SCRUB_SLOTS)[0]
    assert s.forward(Row(1, A, 6, 7, [1, 2])) == [], "nothing has arrived yet"
    assert words(s, abi.STATE_SCRUB_SLOTS)[0] - before == 12
    for layer in range(3):
        s.kv(layer)[12:18] = s.kv(layer)[20:26]
    assert s.forward(Row(7, B, 6, 7, [3, 4])) == []
    s.damage(1, 13)
    assert kinds(s.forward(Row(1, A, 7, 8, [1, 2]))) == {13: Reason.DATA}, "patrolled from here on"


def test_paused_means_no_turn(sides: Sides) -> None:
    s = script(sides, n_blocks=4)
    two_requests(s)  # first turn, over blocks 0 to 3
    s.twins.set_paused(True)
    assert s.forward(Row(1, A, 6, 7, [1, 2])) == []
    s.damage(0, 21)
    assert s.forward(Row(1, A, 7, 8, [1, 2])) == []
    s.twins.set_paused(False)
    s.own("allocate", [3], 1)
    assert kinds(s.forward(Row(1, A, 8, 9, [1, 2, 3]))) == {21: Reason.DATA}, "the turn that had not come"


def test_a_step_of_several_forwards_is_one_turn(sides: Sides) -> None:
    s = script(sides, n_blocks=4)
    two_requests(s)
    state = s.twins.sides[0].manager.state
    assert state.scrub_run_counters.tolist() == [1]
    s.twins.forward(batch_of([Row(1, A, 6, 7, [1, 2])]), index=1)
    assert state.scrub_run_counters.tolist() == [1]
    assert words(s, abi.STATE_SCRUB_SLOTS) == [0], "all that was written then was written in that forward"


# ---- the plan --------------------------------------------------------------------------------------------------------
def test_needs_lifecycle() -> None:
    with pytest.raises(ConfigError, match=r"scrub_bytes_per_step=4096 with lifecycle=False.*set lifecycle=True"):
        CanaryConfig(scrub_bytes_per_step=4096)


def test_plan_and_progress(sides: Sides) -> None:
    s = script(sides, n_blocks=3)
    for side in s.twins.sides:
        manager = side.manager
        (plan,) = plan_patrol(s.twins.config, manager.pools)
        assert plan == (3, 3, 3 * BLOCK_BYTES)
        assert (
            f"3 blocks a step with a forward, at most {3 * BLOCK_BYTES} bytes; a full pass every 3 such"
            in manager.describe()
        )
        assert manager.stats().scrub_steps_per_pass == 3


def test_at_least_a_block_and_at_most_the_pool(sides: Sides) -> None:
    pools = script(sides).twins.sides[0].manager.pools
    for budget, plan in ((1, (1, N_BLOCKS, BLOCK_BYTES)), (1 << 30, (N_BLOCKS, 1, N_BLOCKS * BLOCK_BYTES))):
        assert plan_patrol(CanaryConfig(lifecycle=True, scrub_bytes_per_step=budget), pools) == [plan]


# ---- at random -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_every_flipped_byte_of_a_held_block_is_found_within_a_pass(sides: Sides, seed: int) -> None:
    rng = random.Random(seed)
    s = script(sides, n_blocks=rng.choice((1, 2, 5)), real_data=rng.choice(("all", "all", "partial")))
    two_requests(s)
    n_turns = plan_patrol(s.twins.config, s.twins.pools)[0].n_turns
    slot, layer = rng.choice((4, 7, 9, 20, 23, 25)), rng.randrange(3)
    s.kv(layer)[slot, rng.randrange(4)] ^= 1 << rng.randrange(8)
    found: dict[int, Reason] = {}
    for _ in range(n_turns):  # a forward of nobody: the patrol goes on
        found |= kinds(s.forward(Row(0, [0], 0, 1, [0], slots=[0])))
    assert found == {slot: Reason.DATA}
    assert len(np.unique(s.twins.words[abi.STATE_SCRUB_SLOTS])) == 1


def test_a_predecessor_without_a_place_is_no_predecessor(sides: Sides) -> None:
    """Of a prefill beyond the window only the last tokens are stored; the table still names what was there before."""
    s = script(sides, window=4)
    s.own("allocate", [1], 3)
    assert s.forward(Row(3, B, 0, 4, [1])) == []
    s.own("allocate", [2], 1)
    slots = [-1, -1, -1, -1, 8, 9, 10]
    assert s.forward(Row(1, A, 0, 7, [1, 2], slots=slots)) == [], "block 1 is another's, and out of the window"
    assert s.forward(Row(1, A, 7, 8, [1, 2])) == []
    assert s.twins.sides[0].read_guard(0, "head0")["prev_slot"][8] == abi.PREV_NONE
