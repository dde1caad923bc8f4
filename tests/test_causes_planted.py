"""Root causes of faults that somebody plants in an engine of their own: by the public API, one fault each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine

from kvcanary import Violation
from kvcanary.causes import Cause, classify
from kvcanary.tags import Reason

OWN = [1, 2, 3]  # the blocks of request 1, in request slot 0
NOBODYS = 15


def toy(**config: Any) -> ToyEngine:
    """An engine whose guard verifies all bytes, and has room for all records."""
    return ToyEngine(verify_data_every=1, ring_capacity=256, **config)


def forward(engine: ToyEngine, *rows: tuple[int, int, int], **overrides: Any) -> None:
    """One step of one forward; ``overrides`` are the fields of the batch that are wrong."""
    batch = engine.batch(*rows, **overrides)
    with engine.manager.step(), engine.manager.forward(batch):
        engine.write(batch)


def causes(engine: ToyEngine) -> list[Cause]:
    found = engine.manager.violations()
    assert found, "silent"
    return classify(found)


def ids(found: list[Cause]) -> list[str]:
    return [cause.class_id for cause in found]


def sentences(found: list[Cause]) -> str:
    return "\n".join(sentence for cause in found for sentence in cause.evidence)


def likely(found: Violation) -> str:
    return found.summary().split("; likely ")[-1]


def owned(*requests: int) -> ToyEngine:
    """An engine with lifecycle; request r + 1 holds three blocks."""
    engine = toy(lifecycle=True)
    for r in requests:
        engine.manager.allocate_blocks((1 + 3 * r + np.arange(3)).tolist(), r + 1)
    return engine


# ---- another root ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [3, 7], ids=["inside a block", "at the end of one"])
def test_a_salt_that_is_wrong_for_one_step_is_another_root(step: int) -> None:
    engine = toy()
    forward(engine, (0, 0, step), salts=np.zeros(1, np.uint64))
    forward(engine, (0, step, 1), salts=np.full(1, 5, np.uint64))
    forward(engine, (0, step + 1, 1), salts=np.zeros(1, np.uint64))
    found = causes(engine)
    assert found[0].class_id == "C05" and "C20" not in ids(found)
    (seen,) = engine.manager.violations()
    assert "another root (salt)" in seen.summary() and "in front" not in seen.summary()


def test_salts_of_the_row_beside_are_another_root_for_both() -> None:
    engine = toy()
    salts = np.array([3, 4], np.uint64)
    forward(engine, (0, 0, 6), (1, 0, 6), salts=salts)
    forward(engine, (0, 6, 1), (1, 6, 1), salts=salts[::-1].copy())
    found = causes(engine)
    assert found[0].class_id == "C05" and len(engine.manager.violations()) == 2


# ---- the table row ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("table", "how"),
    [([2, 3, 3], "shifted by 1 block"), ([2, 1, 3], "in another order"), ([NOBODYS, 1, 2], "shifted by 1 block")],
    ids=["without its first block", "two exchanged", "one too many in front"],
)
@pytest.mark.parametrize("lifecycle", [False, True])
def test_a_row_whose_blocks_are_in_other_places_is_a_table(table: list[int], how: str, lifecycle: bool) -> None:
    engine = owned(0) if lifecycle else toy()
    forward(engine, (0, 0, 10))
    forward(engine, (0, 10, 1), block_table=np.array([table], np.int32), slot_mapping=np.array([3 * PAGE + 2]))
    found = causes(engine)
    assert found[0].class_id == "C07"
    assert how in found[0].evidence[0]
    assert not {"C03", "C14", "C20"} & set(ids(found)), sentences(found)
    assert "written over" not in sentences(found) and "twice" not in sentences(found)
    seen = next(v for v in engine.manager.violations() if Reason.POSITION in v.reasons and v.stamp_owner == 1)
    assert "table row that is shifted" in likely(seen) and "drafts" not in likely(seen)


def test_a_block_that_a_row_names_twice_has_two_places() -> None:
    engine = toy()
    twice = {"block_table": np.array([[1, 1, 3]], np.int32)}
    forward(engine, (0, 0, 4), **twice)
    forward(engine, (0, 4, 4), slot_mapping=np.arange(PAGE, 2 * PAGE), **twice)
    forward(engine, (0, 8, 1), **twice)
    found = causes(engine)
    assert found[0].class_id == "C03" and "names one block twice" in found[0].evidence[0]


# ---- a write that did not come ---------------------------------------------------------------------------------------
def lost(engine: ToyEngine, n: int) -> None:
    """The newest of ``n`` tokens is written nowhere."""
    slots = np.arange(PAGE + 5, PAGE + 5 + n)
    slots[-1] = -1
    forward(engine, (0, 5, n), slot_mapping=slots)


def replayed(engine: ToyEngine) -> None:
    """The row of the step before once more."""
    forward(engine, (0, 4, 1))


@pytest.mark.parametrize("fault", ["lost", "replayed"])
def test_what_one_missing_slot_may_be_is_said_and_not_guessed(fault: str) -> None:
    """The records of a lost write, of a replay, and of a wrong count are the same, field by field."""
    engine = toy()
    forward(engine, (0, 0, 5))
    if fault == "lost":
        lost(engine, 1)
    else:
        replayed(engine)
    forward(engine, (0, 6, 1))
    found = causes(engine)
    assert set(ids(found)) == {"C09", "C20"}
    assert found[0].confidence == found[1].confidence
    assert all("no record tells" in cause.evidence[0] for cause in found)


def test_a_write_that_is_lost_among_others_is_no_wrong_count() -> None:
    """The row ran, so the request has come up to here: the position was computed."""
    engine = toy()
    forward(engine, (0, 0, 5))
    lost(engine, 2)
    forward(engine, (0, 7, 1))
    found = causes(engine)
    assert found[0].class_id == "C09" and "C20" not in ids(found)
    assert "slot mapping of -1" in found[0].evidence[0]


def test_one_slot_that_all_rows_miss_is_a_batch_of_another_step() -> None:
    engine = toy()
    forward(engine, (0, 0, 5), (1, 0, 6))
    forward(engine, (0, 4, 1), (1, 5, 1))
    forward(engine, (0, 6, 1), (1, 7, 1))
    found = causes(engine)
    assert found[0].class_id == "C09" and found[0].confidence > found[1].confidence


# ---- padding ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lifecycle", [False, True])
def test_a_padding_row_that_repeats_a_live_one_is_padding(lifecycle: bool) -> None:
    engine = owned(0) if lifecycle else toy()
    forward(engine, (0, 0, 5))
    again = engine.batch((0, 5, 1), (0, 5, 1))
    again.input_ids[1] += 1
    with engine.manager.step(), engine.manager.forward(again):
        engine.write(again)
    forward(engine, (0, 6, 1))
    found = causes(engine)
    assert found[0].class_id == "C10" and "C20" not in ids(found)
    seen = next(v for v in engine.manager.violations() if Reason.DUPLICATE_WRITE in v.reasons)
    assert "padding row that repeats a live row" in likely(seen)


# ---- owners ----------------------------------------------------------------------------------------------------------
def test_a_late_step_of_an_ended_request_is_a_use_after_free() -> None:
    """Its blocks went on to another request, which has filled the second in part."""
    engine = owned(0)
    forward(engine, (0, 0, 10))
    engine.manager.free_blocks(OWN, 1)
    engine.manager.allocate_blocks([2, 5], 2)
    other = {"block_table": np.array([[2, 5, 0]], np.int32)}
    forward(engine, (1, 0, 2), slot_mapping=np.array([2 * PAGE, 2 * PAGE + 1]), **other)
    forward(engine, (0, 7, 1))
    found = causes(engine)
    assert found[0].class_id == "C01"
    assert "C20" not in ids(found) and "C04" not in ids(found)


def test_a_write_over_a_neighbour_is_the_writers_doing() -> None:
    """Request 2's row names a block of request 1's; request 1 reads what is in it by then."""
    engine = owned(0)
    forward(engine, (0, 0, 7))
    tables = np.array([OWN, [1, 0, 0]], np.int32)
    forward(engine, (0, 7, 1), (1, 0, 1), block_table=tables, slot_mapping=np.array([PAGE + 7, PAGE]))
    seen = next(v for v in engine.manager.violations() if v.request_id == 1 and Reason.TOKEN in v.reasons)
    assert likely(seen).startswith("request 2 wrote over it")
    assert "block 1 was given to request 1 (who reads there)" in seen.summary()
    assert causes(engine)[0].class_id == "C03"


# ---- transfers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("missing", ["v of the last layer", "the last layer"])
def test_a_part_of_a_load_that_never_came_is_no_wrong_position(missing: str) -> None:
    """The blocks held the same request's KV of other positions before, and still do in the planes that did not come."""
    engine = toy()
    forward(engine, (0, 0, 8))
    here, there = np.arange(PAGE, 3 * PAGE), np.r_[2 * PAGE : 3 * PAGE, PAGE : 2 * PAGE]
    stored = engine.manager.export_slots(here)
    came = [engine.k[0], engine.v[0], engine.k[1]][: 3 if missing.startswith("v") else 2]
    for layer in came:
        flat = layer.reshape(-1, *layer.shape[2:])
        flat[there] = flat[here].copy()
    engine.manager.import_slots(stored, there)
    forward(engine, (0, 8, 1), block_table=np.array([[2, 1, 3]], np.int32))
    found = causes(engine)
    assert found[0].class_id in ("C15", "C16")
    assert "intact" in found[0].evidence[0]
    assert "C14" not in ids(found)[:2]


@pytest.mark.parametrize("lifecycle", [False, True])
def test_ones_own_older_kv_under_a_load_that_never_came_is_no_table(lifecycle: bool) -> None:
    """A request comes back to two of its blocks in another order; nothing is loaded, and the guard is told of none."""
    engine = owned(0) if lifecycle else toy()
    forward(engine, (0, 0, 8))
    if lifecycle:
        engine.manager.free_blocks(OWN, 1)
        engine.manager.allocate_blocks(OWN, 1)
    forward(engine, (1, 0, 1))  # the request slot is another's meanwhile
    resumed = {"request_slots": np.array([2], np.int32), "block_table": np.array([[2, 1, 3]], np.int32)}
    engine.history[2] = engine.history[0]
    forward(engine, (0, 8, 1), **resumed)
    found = causes(engine)
    assert found[0].class_id == "C16", sentences(found)


# ---- words -----------------------------------------------------------------------------------------------------------
def test_scattered_slots_are_not_told_as_a_range() -> None:
    engine = toy()
    table = {"block_table": np.array([[9, 2, 6]], np.int32)}
    slots = np.r_[9 * PAGE : 10 * PAGE, 2 * PAGE : 3 * PAGE, 6 * PAGE : 7 * PAGE]
    forward(engine, (0, 0, 11), slot_mapping=slots[:11], **table)
    for layer in (*engine.k, *engine.v):
        layer[[2, 6, 9]] ^= 1
    forward(engine, (0, 11, 1), slot_mapping=slots[11:], **table)
    assert "11 slots between 8 and 39 (blocks 2, 6, 9)" in sentences(causes(engine))


# ---- arrays that change while the forward runs -----------------------------------------------------------------------
def test_slots_that_are_advanced_before_tail_are_no_fork() -> None:
    engine = toy()
    forward(engine, (0, 0, 5))
    batch = engine.batch((0, 5, 2))
    with engine.manager.step(), engine.manager.forward(batch):
        engine.write(batch)
        batch.slot_mapping[:] += 2
    forward(engine, (0, 7, 1))
    found = causes(engine)
    assert ids(found)[0] == "C08" and "C21" not in ids(found)
    assert "slot_mapping was changed while the forward ran" in sentences(found[:1])
    lost = next(v for v in engine.manager.violations() if Reason.DUPLICATE_WRITE in v.reasons)
    assert "no token of this forward was to go here" in lost.summary()
