"""Root causes where the engine gives no request ids: rows and positions only, and every stamp is nobody's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine
from test_causes import data, record
from test_causes_planted import causes, ids, sentences, toy

from kvcanary import Reason
from kvcanary.causes import classify

HERE = np.arange(PAGE, 4 * PAGE)  # the slots of row 0
NAMELESS: dict[str, Any] = {"request_slots": None, "request_ids": None, "token_history": None}


def forward(engine: ToyEngine, *rows: tuple[int, int, int], **overrides: Any) -> None:
    batch = engine.batch(*rows, **{**NAMELESS, **overrides})
    with engine.manager.step(), engine.manager.forward(batch):
        engine.write(batch)


def check(engine: ToyEngine, class_id: str) -> None:
    """The class is named first; no move is told of, and no request either."""
    found = causes(engine)
    assert found[0].class_id == class_id, sentences(found)
    assert "came by a copy or load" not in sentences(found)
    assert "request 0" not in sentences(found) and "no request's" not in sentences(found)


def test_a_place_that_is_one_block_off_is_no_padding() -> None:
    engine = toy()
    forward(engine, (0, 0, 4), (1, 0, 3))
    forward(engine, (0, 4, 1), (1, 3, 1), slot_mapping=np.array([PAGE, 4 * PAGE + 3]))
    forward(engine, (0, 5, 1), (1, 4, 1), slot_mapping=np.array([2 * PAGE + 1, 4 * PAGE]))
    check(engine, "C12")
    assert "C10" not in ids(causes(engine))


def test_a_mapping_of_another_table_is_not_surely_padding() -> None:
    engine = toy()
    forward(engine, (0, 0, 6), (1, 0, 6))
    forward(engine, (0, 6, 1), (1, 6, 1), slot_mapping=np.array([15 * PAGE + 2, 5 * PAGE + 2]))
    check(engine, "C12")
    assert "C10" in ids(causes(engine))


def test_one_token_from_the_first_position_on_is_padding() -> None:
    engine = toy()
    forward(engine, (0, 0, 6))
    forward(engine, (0, 6, 1), (3, 0, 1), slot_mapping=np.array([HERE[6], HERE[2]]))
    check(engine, "C10")


def test_a_tail_that_two_rows_share_is_a_fork() -> None:
    engine = toy()
    forward(engine, (0, 0, 6))
    tables = np.array([[1, 2, 3], [1, 2, 3]], np.int32)
    forward(engine, (0, 6, 1), (1, 6, 1), block_table=tables, slot_mapping=np.array([HERE[6], HERE[6]]))
    check(engine, "C21")


def test_blocks_in_other_places_are_a_table_and_no_restore() -> None:
    engine = toy()
    forward(engine, (0, 0, 10))
    forward(engine, (0, 10, 1), block_table=np.array([[2, 1, 3]], np.int32))
    check(engine, "C07")


def test_a_seam_between_two_texts_is_a_table_or_a_hit_and_no_transfer() -> None:
    engine = toy()
    forward(engine, (0, 0, 10), (1, 0, 10))
    forward(engine, (0, 10, 1), block_table=np.array([[1, 5, 3]], np.int32))
    check(engine, "C07")
    assert "C04" in ids(causes(engine)) and "C02" not in ids(causes(engine))


def test_a_slot_that_was_never_written_is_told_of_its_row() -> None:
    engine = toy()
    forward(engine, (0, 0, 6))
    forward(engine, (0, 7, 1))
    check(engine, "C20")
    assert "row 0 reads slot" in sentences(causes(engine))


@pytest.mark.parametrize(("request_id", "class_id"), [(0, "C02"), (1, "C13")])
def test_bytes_say_of_a_load_only_where_others_have_names(request_id: int, class_id: str) -> None:
    found = data(range(4, 12), range(3), stamp_owner=0, request_id=request_id)
    assert classify(found)[0].class_id == class_id


def test_padding_of_an_engine_with_names_is_padding() -> None:
    write = record(reasons=Reason.WRITE_POSITION, request_id=0, request_slot=-1, stamp_owner=0, position=5, slot=31)
    assert classify([write])[0].confidence < classify([write, record()])[0].confidence
    assert classify([write, record()])[0].class_id == "C10"
