"""Arguments that several calls take: any value that they cannot be is refused, with what they may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine import ToyEngine

from kvcanary import BatchError, CanaryManager, StepBatch
from kvcanary.checks import MAX_FORWARDS, MAX_SALT, check_salt, is_first_forward


def head(manager: CanaryManager, batch: StepBatch, index: Any) -> None:
    manager.head(batch, index=index)


def forward(manager: CanaryManager, batch: StepBatch, index: Any) -> None:
    with manager.forward(batch, index=index):
        pass


def graphs(manager: CanaryManager, batch: StepBatch, index: Any) -> None:
    manager.graphs(batch, index=index)


@pytest.mark.parametrize("call", [head, forward, graphs])
@pytest.mark.parametrize("index", [None, 1.5, 0.0, "a", -1, 10**20, True, MAX_FORWARDS, [0]])
def test_a_forward_has_a_number(call: Any, index: Any) -> None:
    engine = ToyEngine()
    with pytest.raises(BatchError, match=r"index=.*: give the number of the forward .* from 0 .* to 2147483645"):
        call(engine.manager, engine.batch((0, 0, 4)), index)
    engine.step((0, 0, 4))  # nothing was begun
    assert engine.manager.step_number == 1


@pytest.mark.parametrize("index", [0, 1, np.int64(0), np.uint8(7), MAX_FORWARDS - 1])
def test_numbers_of_any_integer_type(index: Any) -> None:
    assert is_first_forward("head()", index) is (int(index) == 0)
    engine = ToyEngine()
    forward(engine.manager, engine.batch((0, 0, 4)), index)


@pytest.mark.parametrize("salt", [None, 1.5, "x", -1, 1 << 64, True, [1]])
def test_a_salt_has_64_bits_wherever_it_is_given(salt: Any) -> None:
    engine = ToyEngine()
    for call in (
        lambda: CanaryManager.chain([1, 2], salt),
        lambda: engine.manager.adopt_slots([4, 5], [0, 1], salt=salt),
        lambda: engine.manager.adopt_slots([4, 5], [0, 1], tokens=[1, 2], salt=salt),
    ):
        with pytest.raises(BatchError, match=r"salt=.*: give an integer from 0 to 2\^64 - 1"):
            call()


def test_salts_of_any_integer_type() -> None:
    assert [check_salt("chain()", s) for s in (0, MAX_SALT, np.uint64(MAX_SALT), np.int8(3))] == [
        0, MAX_SALT, MAX_SALT, 3,
    ]  # fmt: skip
    engine = ToyEngine()
    engine.manager.adopt_slots([4, 5], [0, 1], tokens=[1, 2], salt=np.uint64(MAX_SALT))
