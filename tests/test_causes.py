"""Root causes from records alone: made by hand, and by the museum's scenarios."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from kvcanary import CanaryLaunchTag, Reason, Violation, abi, hashing
from kvcanary.causes import CANNOT_TELL, NAMES, classify
from kvcanary.sim.museum import SCENARIOS, play
from kvcanary.sim.museum.places import HostPlace
from kvcanary.tags import Detail

A, B = 1, 2
SUBSTITUTED = Reason.CHAIN | Reason.TOKEN
PLAIN: dict[str, Any] = {
    "step": 3,
    "forward": 3,
    "tag": CanaryLaunchTag.HEAD_K_FULL,
    "reasons": Reason.TOKEN,
    "pool": 0,
    "pool_name": "full",
    "page_size": 4,
    "plane": None,
    "plane_name": None,
    "layer": None,
    "slot": 10,
    "position": 6,
    "row": 0,
    "request_id": A,
    "request_slot": A,
    "stored_token": None,
    "expected_token": None,
    "stored_chain": None,
    "expected_chain": None,
    "stored_digest": None,
    "found_digest": None,
    "stored_position": 6,
    "prev_slot": -1,
    "stamp_owner": B,
    "stamp_step": 2,
    "stamp_epoch": 0,
    "detail": Detail.SLOT,
    "flags": abi.ROW_LIVE | abi.ROW_REGISTERED,
    "is_redacted": True,
}


def record(**changed: Any) -> Violation:
    """A record: request 1 finds request 2's token in its slot 10; fields of later versions are 0."""
    known = {f.name for f in fields(Violation)}
    position = {"stored_position": changed["position"]} if "position" in changed else {}
    values = {**dict.fromkeys(known, 0), **PLAIN, **position, **changed}
    return Violation(**{name: value for name, value in values.items() if name in known})


def run(slots: range, first_position: int, **changed: Any) -> list[Violation]:
    return [record(slot=slot, position=first_position + i, **changed) for i, slot in enumerate(slots)]


def data(slots: range, layers: range, planes: str = "k v", **changed: Any) -> list[Violation]:
    """Bytes of slots differ on all these layers and planes; a slot's position is its offset from slot 4."""
    names = planes.split()
    found = {"reasons": Reason.DATA, "stamp_owner": A, "stored_digest": 5, "found_digest": 6, **changed}
    return [
        record(slot=s, position=s - 4, plane=layer * len(names) + i, plane_name=name, layer=layer, **found)
        for s in slots
        for layer in layers
        for i, name in enumerate(names)
    ]


def first(violations: list[Violation]) -> str:
    return classify(violations)[0].class_id


# ---- by hand ---------------------------------------------------------------------------------------------------------
def test_nothing_to_explain() -> None:
    assert classify([]) == []


def test_it_says_when_it_cannot_tell() -> None:
    unheard_of = record(reasons=Reason.WRITE_TOKEN, tag=CanaryLaunchTag.TAIL_K_FULL, stamp_owner=A)
    (cause,) = classify([unheard_of])
    assert (cause.name, cause.class_id, cause.confidence) == (CANNOT_TELL, "", 0.0)
    assert "slot 10" in cause.evidence[0]


def test_causes_come_in_the_order_of_their_confidence_each_class_once() -> None:
    causes = classify(run(range(12, 16), 0) + data(range(4, 5), range(1), "k"))
    assert [c.confidence for c in causes] == sorted((c.confidence for c in causes), reverse=True)
    assert len({c.class_id for c in causes}) == len(causes)
    assert all(c.name == NAMES[c.class_id] for c in causes)


def test_one_bit_of_one_plane() -> None:
    assert first(data(range(6, 7), range(1, 2), "k")) == "C24"


def test_one_slot_of_all_planes_is_a_stray_write() -> None:
    assert first(data(range(7, 8), range(3))) == "C10"


def test_whole_blocks_of_all_planes_are_a_transfer() -> None:
    assert first(data(range(4, 12), range(3))) == "C02"


def test_the_beginning_of_a_block_is_a_writer_that_ran_on() -> None:
    assert first(data(range(8, 10), range(3))) == "C12"


def test_loaded_slots_with_other_bytes() -> None:
    loaded = {"stamp_owner": 0}
    assert first(data(range(4, 12), range(3), **loaded)) == "C13", "from the first position on"
    assert first(data(range(8, 12), range(3), **loaded)) == "C16", "the blocks before are intact"


def test_bytes_that_are_not_there_yet() -> None:
    pending = {"flags": abi.ROW_LIVE | abi.ROW_PENDING, "stamp_owner": 0}
    assert first(data(range(4, 12), range(2, 3), **pending)) == "C15"


def test_scales_alone() -> None:
    assert first(data(range(4, 8), range(3), "k_scale v_scale")) == "C18"


def digest(content: np.ndarray, plane: int, position: int) -> int:
    return int(hashing.digest(content[None], plane, np.array([position]))[0])


@pytest.mark.parametrize("n_bytes", [4, 30, 256])
def test_zeros_are_known_by_their_digest(n_bytes: int) -> None:
    zeros, ones = np.zeros(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)
    for content, class_id in ((zeros, "C17"), (ones, "C02")):
        found = [
            replace(v, found_digest=digest(content, v.plane or 0, v.position)) for v in data(range(4, 8), range(2))
        ]
        assert first(found) == class_id


def test_displaced_bytes_are_known_by_their_digests() -> None:
    """Position and plane can be taken out of a digest, so that the bytes of one slot are recognised in another."""
    content = {s: np.random.default_rng(s).integers(0, 256, 64, np.uint8) for s in range(3, 13)}

    def shifted(v: Violation) -> Violation:
        here, there = (digest(content[s], v.plane or 0, v.position) for s in (v.slot, v.slot - 1))
        return replace(v, stored_digest=here, found_digest=there)

    causes = classify([shifted(v) for v in data(range(4, 12), range(1), "k", stamp_owner=0)])
    assert causes[0].class_id == "C14"
    assert "slot 5 holds the bytes that were written for slot 4" in causes[0].evidence[0]


def test_one_slot_of_a_running_request_under_a_late_writers_stamp() -> None:
    late_writer_reads = run(range(4, 10), 0, request_id=B, stamp_owner=A, stamp_step=2, forward=3, step=3)
    found = [record(reasons=SUBSTITUTED, forward=4, step=4, stamp_step=3)]
    causes = classify(late_writer_reads + found)
    assert causes[0].class_id == "C01"
    assert (
        "slot 10 of request 1 holds request 2's tokens from position 6 on, written in forward 3"
        in causes[0].evidence[0]
    )


def test_a_substitution_that_ends_and_leaves_a_hole_is_overwritten_metadata() -> None:
    reads = run(range(12, 18), 0)
    hole = record(reasons=Reason.UNWRITTEN, slot=10, stamp_owner=0, stamp_step=0, forward=4)
    assert first([*reads, hole]) == "C08"
    assert first(reads) != "C08", "without the hole nothing says that it ended"


def test_a_block_of_two_running_requests() -> None:
    assert first(run(range(12, 16), 0)) == "C03"


def test_a_prefix_hit_on_anothers_block() -> None:
    fresh = {"flags": abi.ROW_LIVE}
    assert first(run(range(12, 16), 0, **fresh)) == "C04"
    assert first(run(range(14, 16), 2, **fresh)) == "C05", "the beginning of the block is right"
    assert first(run(range(12, 13), 0, reasons=Reason.CHAIN, **fresh)) == "C05", "only the root is another"


def test_stamps_that_came_by_a_transfer() -> None:
    moved = {"stamp_owner": 0, "prev_slot": 11}
    assert first(run(range(12, 16), 0, **moved)) == "C02"
    shifted = [
        replace(v, reasons=Reason.POSITION, stored_position=v.position + 4) for v in run(range(12, 16), 0, **moved)
    ]
    assert first(shifted) == "C14"


def test_ones_own_other_token() -> None:
    own = {"stamp_owner": A}
    assert first(run(range(11, 13), 7, **own)) == "C20"
    tokens = [replace(v, stored_token=v.position - 1, expected_token=v.position) for v in run(range(8, 11), 4, **own)]
    assert first(tokens) == "C22", "each is the token of the position before"


def test_writes_that_went_elsewhere() -> None:
    write = {"reasons": Reason.WRITE_POSITION, "stamp_owner": A, "stamp_step": 3}
    pad = record(**{**write, "request_id": 0, "slot": 31})
    assert first([pad, record(slot=31, stamp_owner=0, stamp_step=3, forward=4)]) == "C10"
    stale = record(**{**write, "slot": 8, "prev_slot": 12, "position": 8})
    own = record(
        slot=8, position=4, stored_position=8, stamp_owner=A, stamp_step=3, reasons=SUBSTITUTED | Reason.POSITION
    )
    assert first([stale, own]) == "C09"
    assert first([stale]) == "C12", "nobody reads there"
    window = replace(own, tag=CanaryLaunchTag.HEAD_K_SWA)
    assert first([stale, window]) == "C19"


@pytest.mark.parametrize(
    ("detail", "reasons", "slot", "class_id"),
    [
        (Detail.SLOT_MAPPING, Reason.OUT_OF_RANGE, 75849, "C12"),
        (Detail.TABLE_ENTRY, Reason.OUT_OF_RANGE, 75849, "C07"),
        (Detail.TABLE_ENTRY, Reason.OUT_OF_RANGE, 6, "C07"),
        (Detail.TABLE_ENTRY, Reason.UNWRITTEN, -1, "C07"),
        (Detail.SEQ_LEN, Reason.OUT_OF_RANGE, 99, "C07"),
        (Detail.QUERY_START_LOC, Reason.OUT_OF_RANGE, 99, "C08"),
        (Detail.REQUEST_SLOT, Reason.OUT_OF_RANGE, 99, "C08"),
        (Detail.KV_INDPTR, Reason.OUT_OF_RANGE, 99, "C08"),
    ],
)
def test_values_that_cannot_be(detail: Detail, reasons: Reason, slot: int, class_id: str) -> None:
    assert first([record(detail=detail, reasons=reasons, slot=slot)]) == class_id


def test_two_tokens_in_one_slot() -> None:
    duplicate = {"reasons": Reason.DUPLICATE_WRITE, "tag": CanaryLaunchTag.TAIL_K_FULL, "forward": 9, "stamp_step": 9}
    assert first(run(range(14, 15), 6, **duplicate)) == "C21"
    assert first(run(range(12, 16), 0, **duplicate)) == "C03"
    own = run(range(12, 16), 0, **{**duplicate, "stamp_owner": A})
    assert first(own) == "C10", "one position from two rows of one request: the second repeats the first"
    wrapped = [replace(v, stored_position=v.position + 8) for v in own]
    assert first(wrapped) == "C12", "two positions of one request"
    others = run(range(14, 15), 6, **{**duplicate, "stamp_step": 8})
    assert first(others) == "C08", "nobody wrote there in this forward"


def test_what_was_never_written() -> None:
    hole = {"reasons": Reason.UNWRITTEN, "stamp_owner": 0, "stamp_step": 0, "flags": abi.ROW_LIVE}
    assert first(run(range(12, 16), 0, **hole)) == "C06"
    assert first(run(range(16, 20), 4, **hole)) == "C16", "what comes before it is there"
    assert first(run(range(20, 22), 4, **hole)) == "C21", "a part of a block, from its beginning"
    assert first(run(range(11, 12), 7, **hole)) == "C20", "one slot behind what was written"
    at_tail = run(range(18, 19), 6, **{**hole, "tag": CanaryLaunchTag.TAIL_K_FULL})
    assert first(at_tail) == "C08", "the table changed while the forward ran"


# ---- by the museum ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "id_",
    ["C01-write", "C03-block", "C05-adapter", "C08-row", "C09-slot", "C10-stamped", "C12-rows", "C20-kept", "C24-bit"],
)
def test_tokens_and_raw_chains_are_not_needed(id_: str) -> None:
    """With log_tokens=False the records hold no token and masked chains; the cause is the same."""
    seen = play(SCENARIOS[id_], HostPlace(), "nhd4", False).reported
    redacted = [
        replace(v, stored_token=None, expected_token=None, stored_chain=None, expected_chain=None, is_redacted=True)
        for v in seen
    ]
    assert first(redacted) == SCENARIOS[id_].class_id
    assert classify(redacted) == classify(list(seen))


def test_classifying_changes_nothing_and_does_not_depend_on_the_order_of_slots() -> None:
    seen = list(play(SCENARIOS["C08-row"], HostPlace(), "nhd4", False).reported)
    assert classify(seen) == classify(sorted(seen, key=lambda v: (v.forward, -v.slot))) == classify(seen)
