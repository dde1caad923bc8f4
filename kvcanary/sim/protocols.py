"""What the engine asks of a model and of a guard, and the guard that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.memory import MovingGuard, Slots
from kvcanary.sim.offload import Stored
from kvcanary.sim.requests import BlockCall, Rows
from kvcanary.sim.step_arrays import StepArrays


class Model(Protocol):
    """What the engine asks of a model: the size of its cache and the forward over it."""

    n_blocks: int
    page_size: int

    def forward(self, arrays: StepArrays) -> NDArray[np.int32]:
        """Next token i32[rows] of every row, padding included."""


class LayeredModel(Model, Protocol):
    """What the engine asks besides of a model whose cache is moved."""

    before_layer: Callable[[int], None] | None  # called in a forward before a layer reads its cache


class VerifyingModel(Model, Protocol):
    """What the engine asks besides of a model that verifies drafts."""

    def forward_all(self, arrays: StepArrays) -> NDArray[np.int32]:
        """The same forward; next token i32[tokens] behind every new token."""


class Guard(MovingGuard, Protocol):
    """What the engine asks of a guard: one context around the step, one around each forward inside it.

    Before the forward it is told who owns which blocks.
    """

    def step(self) -> AbstractContextManager[object]:
        """The host phases of one outer step."""

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        """Blocks that were taken and given back since the last step, in order."""

    def forward(self, arrays: StepArrays) -> AbstractContextManager[object]:
        """HEAD on entry, TAIL on exit, for the batch in `arrays`."""

    def verify_layer(self, arrays: StepArrays, layer: int) -> None:
        """Inside a forward: all KV of this layer has arrived."""


class NoGuard:
    """A guard that does nothing."""

    def step(self) -> AbstractContextManager[object]:
        """Nothing around the step."""
        return nullcontext()

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        """Nothing to know."""

    def forward(self, arrays: StepArrays) -> AbstractContextManager[object]:
        """Nothing around the forward."""
        return nullcontext()

    def verify_layer(self, arrays: StepArrays, layer: int) -> None:
        """Nothing to verify."""

    def copied(self, src: Slots, dst: Slots) -> None:
        """Nothing is known of them."""

    def exported(self, slots: Slots) -> bytes:
        """Nothing is known of them."""
        return b""

    def imported(self, stored: Stored, slots: Slots) -> None:
        """Nothing to take over."""

    def refreshed(self, slots: Slots) -> None:
        """Nothing to digest."""

    def committed(self, src: Slots, dst: Slots, rows: Rows) -> None:
        """Nothing to re-stamp."""

    def reset(self) -> None:
        """Nothing to forget."""
