"""The toy engine for the fault drill: decode steps over one set of arrays whose contents change, as a graph's do."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from base import full_config
from engine import PAGE, ToyEngine
from simt.driver import simt_backend

from kvcanary import CanaryConfig, Perturbation, StepBatch


def nothing() -> None:
    """Between `begin_step` and the forward, and after it, unless a test looks there."""


class DrillToy(ToyEngine):
    """Two requests (by default) that decode one token a step; `decode` goes to position ``p``.

    Args:
        extra: names of further inputs: "expected_tokens".
    """

    def __init__(self, *, rows: int = 2, extra: tuple[str, ...] = (), **config: Any) -> None:
        config = {"verify_data_every": 1, "ring_capacity": 256, "perturb_armed": "perturb" in config, **config}
        super().__init__(**config)
        self.n_rows = rows
        self.p = 0
        self.fixed = self._copy(self.batch(*((r, 0, 1) for r in range(rows))), extra)
        self.history[:] = -1

    def _copy(self, batch: StepBatch, extra: tuple[str, ...]) -> StepBatch:
        given = {n: getattr(batch, n) for n in StepBatch.__dataclass_fields__ if n != "token_history"}
        arrays = {n: a.copy() for n, a in given.items() if isinstance(a, np.ndarray)}
        return StepBatch(**arrays, token_history=self.history, **{n: batch.input_ids.copy() for n in extra})

    def fill(self, p: int) -> None:
        new = self.batch(*((r, p, 1) for r in range(self.n_rows)))
        for name in ("block_table", "seq_lens", "input_ids", "slot_mapping"):
            getattr(self.fixed, name)[...] = getattr(new, name)
        if self.fixed.expected_tokens is not None:
            self.fixed.expected_tokens[...] = new.input_ids

    def decode(self, before: Callable[[], None] = nothing, between: Callable[[], None] = nothing) -> None:
        """One step: ``before`` runs before `begin_step`, ``between`` after it and before the forward."""
        self.fill(self.p)
        before()
        self.manager.begin_step(batch=self.fixed)
        between()
        with self.manager.forward(self.fixed):
            self.write(self.fixed)
        self.manager.end_step()
        self.p += 1

    def run(self, n: int) -> DrillToy:
        """``n`` steps; at the end of its blocks a request takes back its last six tokens, as after rejected drafts."""
        for _ in range(n):
            self.decode()
            if self.p == 3 * PAGE:
                self.p = 6
        return self

    def memory(self) -> list[np.ndarray[Any, Any]]:
        """Copies of all that the engine owns and the drill might touch: planes, then batch arrays."""
        fields = (getattr(self.fixed, n) for n in StepBatch.__dataclass_fields__)
        return [a.copy() for a in (*self.k, *self.v, *(f for f in fields if isinstance(f, np.ndarray)))]

    def changed_bits(self, before: list[np.ndarray[Any, Any]]) -> list[tuple[int, int]]:
        """(address, mask) of each byte of the planes that is not as in ``before``."""
        pairs = [(now.ravel(), old.ravel()) for now, old in zip((*self.k, *self.v), before, strict=False)]
        return [
            (now.ctypes.data + int(i), int(now[i] ^ old[i])) for now, old in pairs for i in np.flatnonzero(now != old)
        ]


Make = Callable[..., DrillToy]


@pytest.fixture(name="make", params=["host", "kernels"])
def drill_maker(request: pytest.FixtureRequest) -> Make:
    """Makes toys on the reference, and on the kernels' CPU build."""
    if request.param == "host":
        return functools.partial(DrillToy, backend="host")
    return functools.partial(
        DrillToy, backend=functools.partial(simt_backend, library=request.getfixturevalue("library"))
    )


def armed(text: str, **config: Any) -> CanaryConfig:
    """For a manager that a test makes itself."""
    settings = {"verify_data_every": 1, "ring_capacity": 256, "perturb": text, "perturb_armed": True}
    return full_config(**{**settings, **config})


def the_one(toy: ToyEngine) -> Perturbation:
    (done,) = toy.manager.perturbations
    return done


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return [line for line in lines if line.startswith("[canary] perturb:")]
