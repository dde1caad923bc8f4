"""The kernels on a GPU against the reference, bit for bit, over random engines, layouts and faults."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from agree import DeviceSide, Side
from agree_drive import drive, random_scenario
from agree_faults import KINDS, Faults

pytestmark = pytest.mark.gpu


class CupySide(DeviceSide):
    """A guard on the GPU; engine arrays are CuPy arrays."""

    name = "cuda"
    backend = "cuda"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def to_device(self, array: np.ndarray[Any, Any]) -> Any:
        return self._cupy.array(array, order="C")

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        if isinstance(array, np.ndarray):
            return np.array(array)
        self._cupy.cuda.runtime.deviceSynchronize()
        return self._cupy.asnumpy(array)

    def write(self, array: Any, values: np.ndarray[Any, Any]) -> None:
        array[...] = self._cupy.asarray(values)
        self._cupy.cuda.runtime.deviceSynchronize()


def nothing(_call: str) -> None: ...


def run_honest(seed: int, side: Side) -> None:
    """A random honest engine: the side agrees with the reference, and both are silent."""
    rng = random.Random(seed)
    twins, engine = random_scenario(rng, [Side(), side])

    def after(call: str) -> None:
        assert not len(twins.records), f"{call}: {twins.records}"

    drive(twins, engine, rng, 12, after, Faults(rng))


def run_faulty(seed: int, side: Side, kinds: Sequence[str]) -> None:
    """A random engine with faults of about half of the kinds: the side agrees with the reference."""
    rng = random.Random(seed)
    twins, engine = random_scenario(rng, [Side(), side], is_odd=True)
    drive(twins, engine, rng, 12, nothing, Faults(rng, tuple(k for k in kinds if rng.random() < 0.5)))


@pytest.mark.parametrize("seed", range(60))
def test_honest_engines_agree_and_are_silent(seed: int) -> None:
    run_honest(seed, CupySide())


@pytest.mark.parametrize("seed", range(100, 180))
def test_faults_are_reported_alike(seed: int) -> None:
    run_faulty(seed, CupySide(), KINDS)


@pytest.mark.parametrize("seed", range(4))
def test_long_requests_agree(seed: int) -> None:
    rng = random.Random(1000 + seed)
    twins, engine = random_scenario(rng, [Side(), CupySide()], max_len=6000)
    drive(twins, engine, rng, 4, nothing, Faults(rng, ("bytes", "table"), 0.3))
