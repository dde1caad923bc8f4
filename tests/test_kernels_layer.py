"""KV that is loaded layer by layer: pending rows are judged at the point of the read, on reference and kernels."""

from __future__ import annotations

import numpy as np
import pytest
from agree import Sides
from agree_script import N_LAYERS, A, B, Row, Script, batch_of, kinds, pool_spec, seen

from kvcanary import BatchError, CanaryConfig, CanaryManager, KvPool, PhaseError, Reason, StepBatch


def a_pool() -> KvPool:
    spec = pool_spec()
    return spec.build(spec.buffers)


def load_by_layers(s: Script, late: int | None) -> list[dict[int, Reason]]:
    """Request 4 takes over the 8 positions of request 1, its layers arriving one by one; layer ``late`` does not.

    Returns what HEAD reported, then what each layer did.
    """
    assert s.forward(Row(1, A, 0, 8, [1, 2]), Row(3, B, 0, 8, [3, 4])) == []
    s.copy(range(4, 12), range(12, 20), bytes_too=False)  # stamps and digests come first
    arrays = {**batch_of([Row(4, A, 8, 9, [3, 4, 5])]), "pending": np.ones(1, np.uint8)}
    batches, found = s.twins.bind(arrays), []

    def model() -> None:
        found.append(kinds(seen(s.twins.records)))
        for layer in range(N_LAYERS):
            if layer != late:
                s.kv(layer)[12:20] = s.kv(layer)[4:12]
            found.append(kinds(seen(s.twins.verify_layer(batches, layer))))

    s.twins.forward(arrays, model=model, batches=batches)
    return found


def test_a_load_still_in_flight_is_seen_at_the_read_of_its_layer(sides: Sides) -> None:
    found = load_by_layers(Script(sides()), late=2)
    assert found == [{}, {}, {}, dict.fromkeys(range(12, 20), Reason.DATA)]


def test_a_load_in_time_is_silent_at_head_and_at_each_layer(sides: Sides) -> None:
    assert load_by_layers(Script(sides()), late=None) == [{}] * (1 + N_LAYERS)


def test_other_rows_are_not_judged_again(sides: Sides) -> None:
    s = Script(sides(), verify_data_every=1 << 20)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.damage(0, 6)
    arrays = {**batch_of([Row(1, A, 8, 9, [1, 2, 3])]), "pending": np.zeros(1, np.uint8)}
    batches = s.twins.bind(arrays)
    of_layer = []
    s.twins.forward(arrays, model=lambda: of_layer.extend(s.twins.verify_layer(batches, 0)), batches=batches)
    assert of_layer == []


@pytest.mark.parametrize("is_pending", [True, False])
def test_at_the_wrong_moment_or_without_the_input(is_pending: bool) -> None:
    manager = CanaryManager(CanaryConfig(), [a_pool()], 8, 64)
    given = {"pending": np.ones(1, np.uint8)} if is_pending else {}
    batch = StepBatch(**batch_of([Row(1, A, 0, 4, [1])]), **given)
    with pytest.raises(PhaseError, match=r"verify_layer\(\) must come between head\(\) and tail\(\)"):
        manager.verify_layer(batch, 0)
    manager.head(batch)
    text = r"layer 7 has no digests.*they have \[0, 1, 2\]" if is_pending else "give pending"
    with pytest.raises(BatchError, match=text):
        manager.verify_layer(batch, 7)
    manager.tail(batch)


def test_off_does_nothing() -> None:
    manager = CanaryManager(CanaryConfig(mode="off"), [a_pool()], 8, 64)
    batch = StepBatch(**batch_of([Row(1, A, 0, 4, [1])]))
    manager.verify_layer(batch, 99)
