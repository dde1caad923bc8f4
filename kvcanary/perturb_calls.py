"""The fault drill's place in a step: what it damages before the forward, and undoes after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvcanary.batch import BoundBatch, StepBatch
from kvcanary.errors import KvCanaryError
from kvcanary.perturb import Perturber
from kvcanary.perturb_record import Perturbation


class DrillCalls:
    """`CanaryManager`'s part for the fault drill (`kvcanary.perturb`)."""

    _perturber: Perturber | None
    _bound: Mapping[StepBatch, Mapping[tuple[Any, ...], Any]]
    _step: int
    _stream: Any
    _is_idle: bool
    _is_paused: bool

    if TYPE_CHECKING:

        def _bind(self, batch: StepBatch, is_first: bool, pools: Sequence[str | int] | None) -> Any: ...

        def _has_odd_stream(self) -> bool: ...

    @property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """What the fault drill has done, oldest first; empty unless it is armed."""
        return () if self._perturber is None else tuple(self._perturber.done)

    @property
    def n_perturbations_skipped(self) -> int:
        """Faults that were due and could not be done; each logged with its reason."""
        return 0 if self._perturber is None else self._perturber.n_skipped

    def _perturb_before(self, perturber: Perturber, batch: StepBatch | None) -> None:
        if batch is not None:
            perturber.note(batch)
        self._perturb(perturber, is_before_forward=True)

    def _restore_perturbed(self) -> None:
        if self._perturber is not None:
            self._perturber.restore(self._stream)

    def _perturb_after(self, perturber: Perturber) -> None:
        perturber.restore(self._stream)
        self._perturb(perturber, is_before_forward=False)

    def _perturb(self, perturber: Perturber, *, is_before_forward: bool) -> None:
        if self._is_idle or self._is_paused:  # no forward, or nobody who looks at it
            return
        step = self._step + 1
        due = perturber.due(step, is_before_forward)
        if due:
            perturber.inject(due, self._bound_for_drill(perturber.batch), step, self._stream)

    def _bound_for_drill(self, batch: StepBatch | None) -> dict[int, BoundBatch] | str:
        """Pool index -> the batch as bound to it; or why there is none."""
        if self._has_odd_stream():
            return "the step's stream is being captured, or its context died"
        if batch is None:
            return "no batch is known, or nobody holds it any more: give it to begin_step(batch=) or step(batch=)"
        try:
            known = list(self._bound.get(batch, {}).values()) or [self._bind(batch, True, None)]
        except KvCanaryError as error:
            return str(error)
        return {call.pool: bound for k in known for call, bound in zip(k.calls, k.batches, strict=True)}
