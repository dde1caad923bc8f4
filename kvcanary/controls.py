"""The calls that the host orders on a stream, outside forwards and captures: pause, resume, reset, prove."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcanary.backends import Backend
from kvcanary.batch import StepBatch
from kvcanary.config import CanaryConfig
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.errors import BackendError, CaptureError
from kvcanary.layout import KvPool
from kvcanary.observers import ViolationObserver
from kvcanary.phases import Phase, PhaseChecker
from kvcanary.prove import Proof, prove_batch
from kvcanary.turns import Turns, one_at_a_time

_STEP, _OUTSIDE = Phase.STEP, Phase.OUTSIDE  # at hand: to look up a member of an enum takes its time


class ControlCalls:
    """`CanaryManager`'s part for host-driven calls, and the gate that all of them pass."""

    config: CanaryConfig
    pools: tuple[KvPool, ...]
    _backend: Backend | None
    _phases: PhaseChecker
    _handlers: list[DelayedDeviceHostHandler]
    _violations: ViolationObserver
    _step: int
    _stream: Any
    _is_paused: bool
    _turns: Turns

    if TYPE_CHECKING:

        @property
        def backend(self) -> Backend: ...

        def _pool_index(self, pool: str | int) -> int: ...

        def _bind(self, batch: StepBatch, is_first: bool, pools: Sequence[str | int] | None) -> Any: ...

    @one_at_a_time
    def pause(self) -> None:
        """Stop judging from the next forward on, also in captured graphs; stamps and digests are still written.

        So nothing that was written in between is reported after `resume`. Ordered on the stream of the current step.
        """
        if self._backend is not None:
            self._host_driven("pause()").set_paused(True, self._stream)
            self._is_paused = True

    @one_at_a_time
    def resume(self) -> None:
        """Judge again, from the next forward on."""
        if self._backend is not None:
            self._host_driven("resume()").set_paused(False, self._stream)
            self._is_paused = False

    @one_at_a_time
    def reset(self, pool: str | int | None = None) -> None:
        """Forget all stamps, digests and registers (of one pool): for cache flush, sleep and wake, weight reload.

        Counters go on. Ordered on the stream of the current step.
        """
        if self._backend is not None:
            index = None if pool is None else self._pool_index(pool)
            self._host_driven("reset()").reset(index, self._stream)
            self._violations.forget()

    @one_at_a_time
    def prove(self, batch: StepBatch, stream: Any = None) -> Proof:
        """Show that the wiring is right: flip one bit in each plane of a live slot and see that exactly it is named.

        Every bit is restored. Waits for the device and allocates: for start-up and tests, between steps, with a batch
        whose tables still hold after its forward.

        Returns:
            What was found; nothing is raised of a plane that was not named. Ask its ``ok``: ``proof =
            manager.prove(batch); assert proof.ok, proof`` says which planes were not, and what was reported instead.
            True with mode "off"; False with ``real_data="none"``, where no plane is digested.

        Raises:
            BatchError: no row of the batch has a position that was written and digested. PhaseError, CaptureError:
                inside a forward, or a capture.
        """
        if self._backend is None:
            return Proof((), is_off=True)
        backend = self._host_driven("prove()")
        bound = self._bind(batch, True, None)
        return prove_batch(backend, self.pools, self.config, list(zip(bound.calls, bound.batches, strict=True)), stream)

    def _host_driven(self, call: str, stream: Any = None) -> Backend:
        self._gate(call, stream)
        return self.backend

    def _gate(self, call: str, stream: Any) -> tuple[Any, int]:
        if stream is None:
            stream = self._stream
        phase = self._phases.phase
        is_between_forwards = phase is _STEP or phase is _OUTSIDE
        if not is_between_forwards:
            self._phases.need_open(call)
        try:
            is_capturing = self._handlers[0].is_capturing(stream)
        except Exception as error:  # of the driver: the stream, or its context, is gone
            raise BackendError(
                f"{call}: stream {stream!r} cannot be used ({error}); without one of its own, a call is ordered on the "
                "stream of the last step: if that was destroyed, call it within step() on one that lives"
            ) from error
        if is_capturing:
            raise CaptureError(f"{call} came while its stream is being captured: call it outside the capture")
        if not is_between_forwards:
            self._phases.need_outside_forward(call)
        return stream, self._step + (phase is _STEP)
