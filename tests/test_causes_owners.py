"""Root causes where blocks are in the wrong hands, and where the guard is not told in whose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_causes import SUBSTITUTED, A, B, first, record, run

from kvcanary import Reason, Violation, abi
from kvcanary.causes import classify
from kvcanary.sim.museum import SCENARIOS, play
from kvcanary.sim.museum.places import HostPlace
from kvcanary.sim.museum.scenario import POSITIVE
from kvcanary.tags import CanaryLaunchTag

LIVE, SHARED = abi.BLOCK_LIVE, abi.BLOCK_LIVE | abi.BLOCK_SHARED
FRESH = abi.ROW_LIVE
OTHERS: dict[str, Any] = {"block_owner": B, "block_epoch": 1, "block_flags": LIVE, "stamp_epoch": 1}
FREED: dict[str, Any] = {"block_epoch": 1, "block_since": 2, "stamp_epoch": 1, "stamp_owner": A}


def stale(more: Reason = Reason.STALE_EPOCH, **changed: Any) -> list[Violation]:
    """All that request 1 has, six slots from slot 12 on, in blocks that are not its own."""
    *body, end = run(range(12, 18), 0, reasons=Reason.STALE_EPOCH | more, **changed)
    return [*body, replace(end, reasons=end.reasons | Reason.CHAIN) if more & Reason.TOKEN else end]


def confidences(violations: list[Violation]) -> dict[str, float]:
    return {cause.class_id: cause.confidence for cause in classify(violations)}


# ---- the reader does not hold the block ------------------------------------------------------------------------------
def test_another_requests_row_is_not_a_request_that_had_ended() -> None:
    """The block was never handed on: no step that was dispatched before can have had it."""
    causes = classify(stale(Reason.TOKEN, **OTHERS))
    assert causes[0].class_id == "C07"
    assert "nobody had it before" in causes[0].evidence[0]
    assert not any("had ended" in sentence for cause in causes for sentence in cause.evidence)


def test_a_request_that_still_holds_its_blocks_has_not_ended() -> None:
    """Its block has had another owner, as in an engine that ran for long; it writes into a block of its own."""
    read = stale(Reason.TOKEN, **{**OTHERS, "block_epoch": 2, "stamp_epoch": 2})
    assert first(read) == "C01", "nothing says that it still runs"
    write = record(reasons=Reason.WRITE_POSITION, slot=10, prev_slot=18, stamp_owner=A, stamp_step=3)
    own = replace(write, block_owner=A, block_epoch=1, block_flags=LIVE)
    assert first([*read, own]) == "C07"


def test_a_running_request_whose_row_still_names_a_block_that_was_handed_on() -> None:
    """It holds the block behind, so it has not ended: the block was freed too early, or the row is stale."""
    *read, _, _ = stale(Reason.TOKEN, **{**OTHERS, "block_epoch": 2, "stamp_epoch": 2})
    seam = record(reasons=Reason.CHAIN, slot=16, position=4, stamp_owner=A, stamp_step=1, block_owner=A, block_epoch=1)
    causes = classify([*read, seam])
    assert [cause.class_id for cause in causes] == ["C07", "C01"]
    assert "still names it" in causes[0].evidence[0]


def test_what_it_writes_through_anothers_row_does_not_make_it_a_late_writer() -> None:
    read = stale(Reason.TOKEN, **OTHERS)
    found = record(request_id=B, slot=18, forward=4, stamp_owner=A, stamp_step=3, block_owner=B, block_epoch=1)
    assert first([*read, found]) == "C07"
    handed_on = [replace(v, block_epoch=2, stamp_epoch=2) for v in read]
    assert first([*handed_on, found]) == "C01"


def test_a_prefix_hit_that_was_not_told() -> None:
    causes = classify(stale(**OTHERS, flags=FRESH))
    assert causes[0].class_id == "C04"
    assert "share_blocks() was not told" in causes[0].evidence[0]
    assert "C01" not in {cause.class_id for cause in causes}


def test_a_running_request_on_anothers_block() -> None:
    assert first(stale(**OTHERS)) == "C07"


def test_a_wrong_hit_on_the_kv_of_the_present_owner_is_not_called_older() -> None:
    causes = classify(stale(Reason.TOKEN, **OTHERS, flags=FRESH))
    assert causes[0].class_id == "C04"
    assert not any("its new owner has not written it" in s for cause in causes for s in cause.evidence)


def test_a_block_that_was_never_allocated() -> None:
    causes = classify(stale(stamp_owner=A))
    assert causes[0].class_id == "C07"
    assert "block 3 was never allocated: allocate_blocks() was not told" in causes[0].evidence[0]
    assert "C01" not in {cause.class_id for cause in causes}


def test_a_freed_block_with_nothing_overwritten_is_a_use_after_free_first() -> None:
    for found in (stale(**FREED), run(range(12, 14), 4, reasons=Reason.STALE_EPOCH, **FREED)):
        causes = classify(found)
        assert [cause.class_id for cause in causes] == ["C01", "C07"]
        assert all("request 1" in sentence for cause in causes for sentence in cause.evidence)


def test_older_kv_in_a_block_that_was_given_back_to_its_reader_did_not_come() -> None:
    again = {"block_owner": A, "block_epoch": 2, "block_flags": LIVE, "stamp_epoch": 1, "stamp_owner": A}
    causes = classify(stale(Reason.UNWRITTEN, **again))
    assert "C01" not in {cause.class_id for cause in causes}
    assert causes[0].class_id == "C16"


# ---- writes ----------------------------------------------------------------------------------------------------------
def test_a_write_into_a_shared_block_of_nobodys_is_a_missed_copy() -> None:
    (cause,) = classify([record(reasons=Reason.FOREIGN_WRITE, stamp_owner=A, block_epoch=1, block_flags=SHARED)])
    assert cause.class_id == "C21"
    assert "claim_blocks()" in cause.evidence[0]


@pytest.mark.parametrize(("epoch", "class_id"), [(1, "C07"), (2, "C01")])
def test_a_write_by_the_row_into_anothers_block(epoch: int, class_id: str) -> None:
    write = record(reasons=Reason.FOREIGN_WRITE, stamp_owner=A, **{**OTHERS, "block_epoch": epoch})
    assert first([write]) == class_id, "it can be late only where the block has had another owner"


def test_wrong_input_ids() -> None:
    wrong = record(reasons=Reason.WRITE_TOKEN, stamp_owner=A, stamp_step=3)
    causes = classify([wrong])
    assert [cause.class_id for cause in causes] == ["C08", "C09"]
    read_again = record(stamp_owner=A, stamp_step=3, forward=4)
    assert [cause.class_id for cause in classify([wrong, read_again])] == ["C08", "C09"], "no draft"


def test_input_ids_of_another_row_are_known_by_their_tokens() -> None:
    mine = record(reasons=Reason.WRITE_TOKEN, stored_token=5, expected_token=3)
    other = record(reasons=Reason.WRITE_TOKEN, request_id=B, slot=20, stored_token=3, expected_token=5)
    assert "request 1 got what was meant for request 2" in classify([mine, other])[0].evidence[0]


def test_padding_that_writes_a_live_slot_leaves_a_seam_that_is_no_draft() -> None:
    """Slot 5 is overwritten; slot 6 is right, and no longer continues the slot before it."""
    write = record(reasons=Reason.WRITE_POSITION, request_id=0, request_slot=-1, slot=5, position=0, prev_slot=20)
    damage = record(reasons=SUBSTITUTED | Reason.POSITION, slot=5, position=1, stamp_owner=0, stamp_step=3)
    seam = record(reasons=Reason.CHAIN, slot=6, position=2, stamp_owner=A, stamp_step=1)
    (cause,) = classify([write, damage, seam])
    assert cause.class_id == "C10"
    assert "padding" in cause.evidence[0]
    assert classify([damage, seam])[0].class_id == "C10", "one slot of nobody's: also where the write was not judged"


# ---- one's own tokens ------------------------------------------------------------------------------------------------
def test_ones_own_wrong_token_may_be_a_wrong_input() -> None:
    assert list(confidences([record(stamp_owner=A)])) == ["C20", "C08"]


def test_all_of_ones_own_tokens_against_anothers_history() -> None:
    first_run, second_run = run(range(12, 16), 0, stamp_owner=A), run(range(17, 19), 5, stamp_owner=A)
    causes = classify([*first_run, *second_run])
    assert causes[0].class_id == "C08"
    assert "C20" not in {cause.class_id for cause in causes}, "no draft is at position 0"


def test_a_row_of_another_request_is_seen_by_where_the_mapping_goes() -> None:
    """Without owners: the KV before the new token is another's by the row, and the new token goes elsewhere."""
    write = record(reasons=Reason.WRITE_POSITION, slot=10, prev_slot=18, stamp_owner=A, stamp_step=3)
    assert first([*run(range(12, 18), 0), write]) == "C07"


def test_request_ids_of_two_rows_exchanged() -> None:
    mine = stale(**OTHERS, flags=FRESH)
    other = stale(**{**OTHERS, "block_owner": A}, request_id=B, stamp_owner=A, flags=FRESH)
    causes = classify([*mine, *other])
    assert causes[0].class_id == "C08"
    assert "request_ids" in causes[0].evidence[0]


def test_what_was_written_into_a_shared_block_is_a_fork_without_a_copy() -> None:
    shared = {"block_owner": B, "block_epoch": 1, "block_flags": SHARED, "stamp_epoch": 0, "stamp_owner": A}
    assert first(run(range(14, 16), 2, reasons=Reason.STALE_EPOCH, **shared)) == "C21"


# ---- owners are not told ---------------------------------------------------------------------------------------------
def test_a_lost_write_over_older_kv_is_no_cache_key() -> None:
    """Inside a block, where decoding ends and a prefix hit does not; the stamp may be what the block held before."""
    lost = record(reasons=SUBSTITUTED, flags=FRESH)
    found = confidences([lost])
    assert {"C16", "C06"} <= found.keys()
    assert found["C05"] < min(found["C16"], found["C06"])
    assert first([lost]) == "C20", "one position: counted, and never written"
    assert first(run(range(9, 11), 5, reasons=SUBSTITUTED, flags=FRESH)) == "C16", "several"
    assert "C05" not in confidences([replace(lost, reasons=SUBSTITUTED | Reason.POSITION, stored_position=2)])
    at_the_end = replace(lost, slot=11, position=7, stored_position=7)
    assert first([at_the_end]) == "C05", "a hit of whole blocks whose beginning is right"


@pytest.mark.parametrize("shift", [0, 4])
def test_without_owners_a_shared_block_is_only_supposed(shift: int) -> None:
    found = [replace(v, stored_position=v.position + shift) for v in run(range(12, 16), 0)]
    causes = {cause.class_id: " ".join(cause.evidence) for cause in classify(found)}
    assert "may" in causes["C03"].split()
    known = [replace(v, block_owner=A, block_epoch=1, block_flags=LIVE) for v in found]
    assert "may" not in {c.class_id: " ".join(c.evidence) for c in classify(known)}["C03"].split()


# ---- sentences -------------------------------------------------------------------------------------------------------
def test_evidence_is_whole_sentences() -> None:
    """No sentence leans on one that another cause has."""
    for scenario in SCENARIOS.values():
        if scenario.kind == POSITIVE:
            for lifecycle in scenario.lifecycle:
                outcome = play(scenario, HostPlace(), scenario.shapes[0], lifecycle)
                assert not [s for cause in outcome.causes for s in cause.evidence if s.startswith("or ")]


def test_a_sweep_says_nothing_of_readers() -> None:
    swept = stale(**{**OTHERS, "stamp_epoch": 0}, request_id=0, tag=CanaryLaunchTag.SWEEP_K_FULL)
    assert not any("share_blocks" in s for cause in classify(swept) for s in cause.evidence)
