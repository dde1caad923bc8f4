"""The fault drill on a GPU: what it does to device memory between the replays of a captured step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvcanary import FaultKind, Reason

from .toy import CudaToy

pytestmark = pytest.mark.gpu


def drill(text: str, n: int) -> tuple[CudaToy, Any, Any]:
    """A toy that replayed ``n`` decode steps, its graph and its stream; the drill is armed with ``text``."""
    toy = CudaToy(verify_data_every=1, perturb=text, perturb_armed=True)
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    replay(toy, graph, stream, n)
    return toy, graph, stream


def replay(toy: CudaToy, graph: Any, stream: Any, n: int) -> None:
    for _ in range(n):
        with toy.manager.step(stream, batch=toy.batch):
            graph.launch(stream)


@pytest.mark.parametrize("kind", [FaultKind.FLIP_USED, FaultKind.FLIP_AFTER_FORWARD])
@pytest.mark.parametrize("seed", range(4))
def test_a_flip_is_named_by_the_next_replay(kind: FaultKind, seed: int) -> None:
    toy, graph, stream = drill(f"{kind.value}:p=1,warmup=40,seed={seed}", 40)
    layers = {"k": toy.k, "v": toy.v}
    before = {half: [toy.cupy.asnumpy(a) for a in arrays] for half, arrays in layers.items()}
    replay(toy, graph, stream, 1)
    stream.synchronize()
    (done,) = toy.manager.perturbations
    place = done.places[0]
    assert done.layer is not None and done.byte is not None
    now = toy.cupy.asnumpy(layers[done.plane_name][done.layer]).reshape(-1, toy.n_bytes)[place.slot]
    old = before[done.plane_name][done.layer].reshape(-1, toy.n_bytes)[place.slot]
    if place.position < 40:  # else the slot was new in this step
        assert [(int(i), int(now[i] ^ old[i])) for i in np.flatnonzero(now != old)] == [(done.byte, done.mask)]
    replay(toy, graph, stream, 1)
    toy.manager.synchronize()
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.plane, v.layer) == (Reason.DATA, place.slot, done.plane, done.layer)
    assert (v.position, v.row, v.request_id) == (place.position, place.row, place.request_id)


def test_a_swapped_table_is_read_by_the_replay_and_put_back_after_it() -> None:
    toy, graph, stream = drill("table_swap:p=1,warmup=40", 40)
    true = toy.cupy.asnumpy(toy.table)
    replay(toy, graph, stream, 1)
    assert np.array_equal(toy.cupy.asnumpy(toy.table), true)
    toy.manager.synchronize()
    (done,) = toy.manager.perturbations
    found = toy.manager.violations()
    assert {(p.row, p.element) for p in done.places} <= {(v.row, v.position // toy.page) for v in found}
    assert {v.step for v in found} == {41}
    n_seen = toy.manager.stats().observations_total
    replay(toy, graph, stream, 3)
    toy.manager.synchronize()
    assert toy.manager.stats().observations_total == n_seen


def test_an_unused_slot_is_flipped_and_found_when_its_rows_come_back() -> None:
    toy, graph, stream = drill("flip_unused_cached:p=1,warmup=40", 40)
    small = toy.batch_of(2)  # rows 2 and 3 stay in the cache, out of the batch
    few = toy.capture(small)
    with toy.manager.step(stream, batch=small):
        few.launch(stream)
    (done,) = toy.manager.perturbations
    assert done.places[0].row == -1 and done.places[0].request_id in (3, 4)
    replay(toy, graph, stream, 1)
    toy.manager.synchronize()
    assert [(v.slot, v.plane) for v in toy.manager.violations()] == [(done.places[0].slot, done.plane)]
