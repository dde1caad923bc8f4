"""Faults for the small engine: each does one thing, says in words what, and what the guard promises to say of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from kvcanary.sim.engine import SimEngine
from kvcanary.sim.scheduler import Request
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.tags import Reason
from kvcanary.violations import Violation


@dataclass(frozen=True)
class Injected:
    """What was done, and where; step = the first that runs over the damage; layer None = no bytes were changed."""

    words: str
    step: int
    request: int
    slot: int
    position: int
    layer: int | None = None


class Candidate(NamedTuple):
    """A batch row that decodes in the step at hand."""

    row: int
    request: Request


def decoding_rows(engine: SimEngine, arrays: StepArrays, min_steps_left: int) -> list[Candidate]:
    """The rows that bring one new token, and whose requests run for at least `min_steps_left` steps after this one."""
    n_new = np.diff(arrays.query_start_loc[: arrays.n_rows + 1])
    by_id = {request.id: request for request in engine.scheduler.running}
    found = [Candidate(row, by_id[int(arrays.request_ids[row])]) for row in np.flatnonzero(n_new == 1).tolist()]
    return [c for c in found if c.request.n_known + min_steps_left < len(c.request.tokens) and c.request.n_computed]


class Fault(ABC):
    """A hook for `SimEngine.before_forward` that strikes once, at `at_step` or the first later step that has a target.

    It runs between two steps: the batch is filled, neither the guard nor the model has seen it. The choice of the
    target depends on the engine's state and the seed alone: two runs of the same prompts get the same fault.

    Args:
        engine: the engine, whose hooks this fault joins.
        at_step: first step that shall run over the damage; the engine's first step is 1.
        min_steps_left: steps for which the target must still run after that one.
        seed: of the choice.
    """

    name: ClassVar[str]
    promised: ClassVar[Reason]  #: any one of these must be reported
    needs: ClassVar[str] = "a request that decodes"

    def __init__(self, engine: SimEngine, at_step: int, *, min_steps_left: int = 0, seed: int = 0) -> None:
        self.engine = engine
        self.at_step = at_step
        self.injected: Injected | None = None
        self._min_steps_left = min_steps_left
        self._rng = np.random.default_rng(seed)
        engine.before_forward.append(self._before_forward)

    @staticmethod
    @abstractmethod
    def max_steps(verify_data_every: int) -> int:
        """Steps after the struck one within which the guard promises to report it; 0 = in the same step."""

    def is_seen_in(self, violation: Violation) -> bool:
        """Whether this violation is the one that was promised: a promised reason, at the right place."""
        return self.injected is not None and bool(violation.reasons & self.promised) and self._is_place(violation)

    def _before_forward(self, arrays: StepArrays) -> None:
        if self.injected is None and self.engine.n_steps + 1 >= self.at_step:
            rows = decoding_rows(self.engine, arrays, self._min_steps_left)
            targets = self._targets(arrays, rows)
            if targets:
                self.injected = self._strike(arrays, targets[int(self._rng.integers(len(targets)))])

    def _targets(self, arrays: StepArrays, rows: list[Candidate]) -> list[Candidate]:
        return rows

    @abstractmethod
    def _strike(self, arrays: StepArrays, target: Candidate) -> Injected:
        """Do the damage and say what was done."""

    @abstractmethod
    def _is_place(self, violation: Violation) -> bool:
        """Whether a violation is at the damaged place."""

    def _slot(self, arrays: StepArrays, row: int, position: int) -> int:
        page = self.engine.model.page_size
        return int(arrays.block_table[row, position // page]) * page + position % page


class BitFlip(Fault):
    """One bit of the bytes that one layer keeps as K or V for a slot which only the target reads."""

    name = "bit-flip"
    promised = Reason.DATA
    needs = "a request that decodes and has a block of its own"

    @staticmethod
    def max_steps(verify_data_every: int) -> int:
        return verify_data_every - 1

    def _targets(self, arrays: StepArrays, rows: list[Candidate]) -> list[Candidate]:
        return [c for c in rows if self._own_positions(c.request)]

    def _own_positions(self, request: Request) -> list[int]:
        page, counts = self.engine.model.page_size, self.engine.allocator.ref_counts
        return [p for p in range(request.n_computed) if counts[request.blocks[p // page]] == 1]

    def _strike(self, arrays: StepArrays, target: Candidate) -> Injected:
        model: Any = self.engine.model
        step = self.engine.n_steps + 1
        positions = self._own_positions(target.request)
        position = positions[int(self._rng.integers(len(positions)))]
        slot, layer = self._slot(arrays, target.row, position), int(self._rng.integers(len(model.k_cache)))
        half = "KV"[int(self._rng.integers(2))]
        cache = (model.k_cache if half == "K" else model.v_cache)[layer]
        elements = cache.reshape(model.n_blocks * model.page_size, -1)[slot]
        element, size = int(self._rng.integers(len(elements))), cache.dtype.itemsize
        byte, bit = element * size + size - 1, 6  # little-endian: the highest bit of a float's exponent
        data = elements.view(np.uint8)
        before = int(data[byte])
        data[byte] = before ^ (1 << bit)
        after = int(data[byte])  # on a GPU this also waits until the byte is written
        assert before ^ after == 1 << bit
        words = (
            f"before step {step}, bit {bit} of byte {byte} of layer {layer}'s {half} in slot {slot} was flipped "
            f"(0x{before:02x} -> 0x{after:02x}): position {position} of request {target.request.id}"
        )
        return Injected(words, step, target.request.id, slot, position, layer)

    def _is_place(self, violation: Violation) -> bool:
        assert self.injected is not None
        return (violation.slot, violation.layer) == (self.injected.slot, self.injected.layer)


class StaleTable(Fault):
    """For one step, the target's block table row is the row of another running request."""

    name = "stale-table"
    promised = Reason.CHAIN | Reason.TOKEN | Reason.POSITION
    needs = "a request that decodes while one of another text runs"

    @staticmethod
    def max_steps(verify_data_every: int) -> int:
        return 0

    def _targets(self, arrays: StepArrays, rows: list[Candidate]) -> list[Candidate]:
        return [c for c in rows if self._others(arrays, c)]

    def _others(self, arrays: StepArrays, target: Candidate) -> list[int]:
        """Rows of requests whose text differs from the target's where both are computed: equal text is equal KV."""
        rows = {int(arrays.request_ids[row]): row for row in range(arrays.n_rows)}
        others = []
        for request in self.engine.scheduler.running:
            n = min(request.n_computed, target.request.n_computed)
            if request.id in rows and (request.tokens[:n] != target.request.tokens[:n]).any():
                others.append(rows[request.id])
        return others

    def _strike(self, arrays: StepArrays, target: Candidate) -> Injected:
        others = self._others(arrays, target)
        other = others[int(self._rng.integers(len(others)))]
        position = int(arrays.seq_lens[target.row]) - 1
        slot = self._slot(arrays, target.row, position)
        arrays.block_table[target.row] = arrays.block_table[other]
        words = (
            f"in step {self.engine.n_steps + 1}, the block table row of request {target.request.id} was that of "
            f"request {int(arrays.request_ids[other])}: it read the other's keys and values"
        )
        return Injected(words, self.engine.n_steps + 1, target.request.id, slot, position)

    def _is_place(self, violation: Violation) -> bool:
        assert self.injected is not None
        return violation.request_id == self.injected.request


class LostWrite(Fault):
    """The target's slot mapping is -1 for one token, so that neither the model nor the guard writes its slot.

    Only a slot that was never written is struck: a reused one holds an older token, which is another finding.
    """

    name = "lost-write"
    promised = Reason.UNWRITTEN
    needs = "a request that decodes into a slot that was never used before"

    def __init__(self, engine: SimEngine, at_step: int, *, min_steps_left: int = 0, seed: int = 0) -> None:
        super().__init__(engine, at_step, min_steps_left=min_steps_left, seed=seed)
        self._is_written = np.zeros(engine.model.n_blocks * engine.model.page_size, np.bool_)

    @staticmethod
    def max_steps(verify_data_every: int) -> int:
        return 1

    def _before_forward(self, arrays: StepArrays) -> None:
        super()._before_forward(arrays)
        slots = arrays.slot_mapping[: arrays.n_tokens]
        self._is_written[slots[slots >= 0]] = True

    def _targets(self, arrays: StepArrays, rows: list[Candidate]) -> list[Candidate]:
        return [c for c in rows if not self._is_written[self._target_slot(arrays, c.row)]]

    def _target_slot(self, arrays: StepArrays, row: int) -> int:
        return int(arrays.slot_mapping[arrays.query_start_loc[row]])

    def _strike(self, arrays: StepArrays, target: Candidate) -> Injected:
        slot, position = self._target_slot(arrays, target.row), int(arrays.seq_lens[target.row]) - 1
        arrays.slot_mapping[arrays.query_start_loc[target.row]] = -1
        words = (
            f"in step {self.engine.n_steps + 1}, the slot mapping of request {target.request.id}'s token at position "
            f"{position} was -1 instead of {slot}: its keys and values were never written"
        )
        return Injected(words, self.engine.n_steps + 1, target.request.id, slot, position)

    def _is_place(self, violation: Violation) -> bool:
        assert self.injected is not None
        return violation.slot == self.injected.slot and violation.is_in_pool


FAULTS: dict[str, type[Fault]] = {fault.name: fault for fault in (BitFlip, StaleTable, LostWrite)}
