"""Root causes of planted faults of the bytes alone: what was loaded in part or elsewhere, what nobody announced."""

from __future__ import annotations

import numpy as np
from engine import PAGE, ToyEngine
from test_causes_planted import causes, forward, ids, likely, sentences, toy

HERE = np.arange(PAGE, 4 * PAGE)  # the slots of request 1


def flat(layer: np.ndarray) -> np.ndarray:
    return layer.reshape(-1, *layer.shape[2:])


def test_a_part_of_a_load_that_is_zero_did_not_come() -> None:
    engine = toy()
    forward(engine, (0, 0, 8))
    there = np.r_[7 * PAGE : 9 * PAGE]
    engine.manager.copy_slots(HERE[:8], there)
    for layer in (*engine.k, *engine.v):
        flat(layer)[there] = flat(layer)[HERE[:8]]
        flat(layer)[there[6:]] = 0
    forward(engine, (0, 8, 1), block_table=np.array([[7, 8, 9]], np.int32), slot_mapping=np.array([9 * PAGE]))
    found = causes(engine)
    assert found[0].class_id == "C16" and "did not come" in found[0].evidence[0], sentences(found)
    assert "after the write of forward" not in sentences(found)
    assert likely(engine.manager.violations()[0]).startswith("a copy or load that came late")


def test_v_alone_is_no_padding() -> None:
    engine = toy()
    forward(engine, (0, 0, 7))
    for layer in engine.v:
        flat(layer)[HERE[5]] ^= 1
    forward(engine, (0, 7, 1))
    found = causes(engine)
    assert found[0].class_id == "C12" and "K of the same slots is intact" in found[0].evidence[0], sentences(found)


def test_a_layer_that_was_loaded_into_the_neighbours_block_is_found_there() -> None:
    engine = toy()
    forward(engine, (0, 0, 8), (1, 0, 8))
    stored = engine.manager.export_slots(HERE[:8])
    there, theirs = np.r_[7 * PAGE : 9 * PAGE], np.arange(5 * PAGE, 6 * PAGE)
    engine.manager.import_slots(stored, there)
    table = np.array([[7, 8, 9], [4, 5, 6]], np.int32)
    slots = np.array([9 * PAGE, 6 * PAGE])
    pending = np.array([1, 0], np.uint8)
    batch = engine.batch((0, 8, 1), (1, 8, 1), block_table=table, slot_mapping=slots, pending=pending)
    with engine.manager.step(), engine.manager.forward(batch):
        for layer, planes in enumerate(zip(engine.k, engine.v, strict=True)):
            for half, plane in enumerate(planes):
                flat(plane)[there] = flat(plane)[HERE[:8]]
                if (layer, half) == (1, 1):
                    flat(plane)[theirs], flat(plane)[there[4:]] = flat(plane)[there[4:]], 3
            engine.manager.verify_layer(batch, layer)
        engine.write(batch)
    forward(engine, (1, 9, 1))
    found = causes(engine)
    assert found[0].class_id == "C14" and f"is in slot {theirs[0]}" in found[0].evidence[0], sentences(found)


def test_k_and_v_of_several_slots_of_the_only_layer_are_no_failing_memory_first() -> None:
    engine = ToyEngine(n_layers=1, verify_data_every=1)
    forward(engine, (0, 0, 8))
    for layer in (*engine.k, *engine.v):
        flat(layer)[HERE[4:7]] ^= 1
    forward(engine, (0, 8, 1))
    found = causes(engine)
    assert ids(found).index("C10") < ids(found).index("C24"), sentences(found)


def test_a_block_with_other_bytes_amid_a_load_may_have_been_saved_too_late() -> None:
    engine = toy()
    forward(engine, (0, 0, 8))
    there = 7 * PAGE + np.arange(8)
    engine.manager.import_slots(engine.manager.export_slots(HERE[:8]), there)
    for layer in (*engine.k, *engine.v):
        flat(layer)[there[:4]] = flat(layer)[HERE[:4]]
        flat(layer)[there[4:]] ^= 1
    forward(engine, (0, 8, 1), block_table=np.array([[7, 8, 9]], np.int32), slot_mapping=np.array([9 * PAGE]))
    assert ids(causes(engine))[:2] == ["C16", "C02"]
