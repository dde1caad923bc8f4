"""The manager: what an engine holds."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary import abi, hashing
from kvcanary.agreement import RankAgreement
from kvcanary.aliasing import check_overlaps
from kvcanary.backends import Backend, BoundCall
from kvcanary.batch import BoundBatch, StepBatch
from kvcanary.black_box import BlackBox, open_black_box
from kvcanary.captured import CaptureWatch
from kvcanary.checks import check_observer, check_salt, is_first_forward
from kvcanary.config import CanaryConfig
from kvcanary.construct import check_arguments, check_capacities, choose_backend, make_backend, pool_names, zeros_beside
from kvcanary.contexts import ForwardContext, StepContext
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.describe import describe_pools, estimate_bytes
from kvcanary.embedding import EmbedCalls
from kvcanary.errors import BackendError, BatchError, CaptureError, ConfigError, KvCanaryError, PhaseError
from kvcanary.history import HistoryWatch
from kvcanary.layout import KvPool
from kvcanary.lifecycle import BlockCounts, Lifecycle, OwnershipCalls
from kvcanary.log_lines import ErrorLog
from kvcanary.moves import MoveCalls
from kvcanary.observers import (
    KernelRunCounterHealthChecker,
    Observer,
    PeriodicCanaryStatsLogger,
    StepFacts,
    ViolationObserver,
)
from kvcanary.patrol import plan_patrol
from kvcanary.perturb import Perturber
from kvcanary.perturb_record import Perturbation
from kvcanary.phases import Phase, PhaseChecker
from kvcanary.pool_stats import digest_bytes, pool_stats
from kvcanary.prove import Proof, prove_batch
from kvcanary.ranges import add_ranges
from kvcanary.state import CanaryDeviceState, StateSnapshot
from kvcanary.stats import CanaryStats
from kvcanary.sweep import ResidentSet, SweepOrchestrator
from kvcanary.tags import CanaryLaunchTag, Stage
from kvcanary.turns import OfThisProcess, Turns, one_at_a_time, watch_forks
from kvcanary.violations import RingReader, Violation, new_secret

logger = logging.getLogger("kvcanary")


class _Bound(NamedTuple):
    """A batch bound to the pools of a forward."""

    calls: list[BoundCall]
    batches: list[BoundBatch]


class CanaryManager(OwnershipCalls, MoveCalls, EmbedCalls, OfThisProcess):
    """Guards the KV pools of one engine process.

    Args:
        config: see `CanaryConfig`; with mode "off" nothing is allocated or launched.
        pools: the KV pools, see `kvcanary.layouts`.
        max_requests: most rows of a batch, and request slots.
        max_new_tokens: most tokens of a batch.
        backend: "host", "cuda", or "auto": where the pools' planes lie.

    Raises:
        ConfigError, LayoutError: capacities, settings or pools that cannot work.
        BackendError: no device, no driver, or kernels that do not compile.
    """

    def __init__(
        self,
        config: CanaryConfig,
        pools: Sequence[KvPool],
        max_requests: int,
        max_new_tokens: int,
        backend: str | Callable[..., Backend] = "auto",
    ) -> None:
        self.config = config
        self.pools = check_arguments(config, pools)
        self.max_requests = max_requests
        self.max_new_tokens = max_new_tokens
        self._phases = PhaseChecker()
        self._turns = Turns()
        self._backend: Backend | None = None
        self._step = 0
        self._n_counted_steps = 0
        self._is_idle = False
        self._inputs_seen: set[str] = set()
        self._histories = HistoryWatch()
        self._errors = ErrorLog()
        self._is_out_of_numbers = False
        self._is_paused = False
        self._perturber: Perturber | None = None  # the fault drill, when armed
        self._stream: Any = None
        self._bound: weakref.WeakKeyDictionary[StepBatch, dict[tuple[Any, ...], _Bound]] = weakref.WeakKeyDictionary()
        self._open_forward: tuple[list[BoundCall], Any] | None = None
        self._lifecycle: Lifecycle | None = None
        self._zeros: Any = None  # the taint when the guard is off
        self._layers: dict[int, set[int | None]] = {}
        self._synced: StateSnapshot | None = None  # taken by the last `synchronize`
        self._box: BlackBox | None = None
        self._more_observers: tuple[Observer, ...] = ()
        if config.mode == "off":
            self._lifecycle = Lifecycle()
            return
        check_capacities(self.pools, max_requests, max_new_tokens)
        self.max_requests, self.max_new_tokens = int(max_requests), int(max_new_tokens)  # NumPy's are no JSON
        check_overlaps(self.pools, config)
        kind = backend if callable(backend) else choose_backend(backend, self.pools)
        device_kind = "cpu" if kind == "host" else "cuda"
        for pool in self.pools:
            pool.check(config.real_data, None if callable(kind) else device_kind)
        self._device_kind = next((p.device.split(":")[0] for p in self.pools if p.device), device_kind)
        self._backend = make_backend(kind, config, self.pools, max_requests, max_new_tokens)
        try:
            self._complete(config, self._backend)
        except BaseException:
            backend_of_this, self._backend, self._lifecycle = self._backend, None, None
            backend_of_this.close()
            raise
        self._captures = CaptureWatch(self, self._backend)
        self._control = memoryview(self._backend.state.control)  # type: ignore[arg-type]  # the cheapest way to read a word of it
        watch_forks(self)

    def _complete(self, config: CanaryConfig, backend: Backend) -> None:
        """All that comes after the backend; what it fails to allocate is not held by anybody."""
        if config.lifecycle:
            self._lifecycle = Lifecycle(self.pools, backend, self._gate, self._pool_index, self._turns)
        self._sweep = SweepOrchestrator(config.sweep_interval)
        self._patrols = plan_patrol(config, self.pools)
        self._make_observers(backend)
        if config.perturb is not None:
            self._perturber = Perturber(config, self.pools, backend)
        if config.nvtx:
            add_ranges(self, self._sweep, self._observers)

    def _make_observers(self, backend: Backend) -> None:
        config, state = self.config, backend.state
        names = [pool_names(p, config.real_data) for p in self.pools]
        self._digest_bytes = digest_bytes(self.pools, config.real_data)
        reader = RingReader(state.violation_log, state.control, config.ring_capacity)
        box = self._box = open_black_box(self)
        self._violations = ViolationObserver(config, reader, names, new_secret(), box.violations if box else None)
        handlers = [DelayedDeviceHostHandler(backend.staging(4), name) for name in ("health", "stats")]
        self._handlers = handlers
        on_report = box.stall if box else None
        self._health = KernelRunCounterHealthChecker(config, self.active_tags, names, handlers[0], on_report)
        self._stats_logger = PeriodicCanaryStatsLogger(config, self.active_tags, handlers[1])
        self._agreement: RankAgreement | None = None
        self._observers: tuple[Any, ...] = (self._violations, self._health, self._stats_logger)

    # ---- what it is --------------------------------------------------------------------------------------------------
    @property
    def n_observer_errors(self) -> int:
        """How often something that is not ours raised beside a step: a log handler, callback, driver, provider."""
        if self._backend is None:
            return 0
        return self._errors.n + self._violations.n_errors + self._sweep.errors.n

    @property
    def is_on(self) -> bool:
        """Whether the guard runs at all (mode is not "off")."""
        return self._backend is not None

    @property
    def backend(self) -> Backend:
        """The backend in use."""
        if self._backend is None:
            raise ConfigError("mode='off': there is no backend; set mode to 'log' or 'raise'")
        return self._backend

    @property
    def state(self) -> CanaryDeviceState:
        """Device state: counters, taint, the violation ring."""
        return self.backend.state

    @property
    def taint(self) -> Any:
        """u32[max_requests] on the device, at a fixed address: reason bits of each batch row of the step at hand.

        Zeros beside the KV when the guard is off, so that a sampler that reads them goes on.
        """
        if self._backend is not None:
            return self._backend.state.taint
        if self._zeros is None:
            self._zeros = zeros_beside(self.pools, self.max_requests)
        return self._zeros

    @property
    def alarm_address(self) -> int:
        """Host address of the u64 alarm word: it changes when a record was committed (a hint for other languages)."""
        return int(self.state.control.ctypes.data)

    @property
    def step_number(self) -> int:
        """Steps ended so far."""
        return self._step

    @property
    def active_tags(self) -> dict[int, frozenset[CanaryLaunchTag]]:
        """Pool index -> tags launched for it: HEAD and TAIL of its halves, SWEEP where a resident set is attached."""
        if self._backend is None:
            return {}
        tags = {}
        for i, pool in enumerate(self.pools):
            stages = [Stage.HEAD, Stage.TAIL] if pool.expected_every_step else []
            if self._sweep.is_sweeping and i in self._sweep.pools:
                stages.append(Stage.SWEEP)
            tags[i] = frozenset(CanaryLaunchTag.of(s, h, pool.kind) for s in stages for h in pool.halves)
        return tags

    # ---- phases ------------------------------------------------------------------------------------------------------
    @one_at_a_time
    def begin_step(self, stream: Any = None, *, idle: bool = False, batch: StepBatch | None = None) -> None:
        """Begin an outer engine step, outside any capture.

        Args:
            stream: the stream on which this step's graphs and forwards are launched; host-driven work is ordered on it.
            idle: this step runs no forward, so the health check expects nothing of it.
            batch: of this step's forward, for the fault drill alone (`kvcanary.perturb`); None = the last of `head`.
        """
        if self._backend is None:
            return
        self._phases.begin_step()
        self._stream, self._is_idle = stream, idle
        if self._perturber is not None:
            self._perturb_before(self._perturber, batch)

    @one_at_a_time
    def head(
        self, batch: StepBatch, stream: Any = None, *, index: int = 0, pools: Sequence[str | int] | None = None
    ) -> None:
        """HEAD of a forward, before the model; may run inside a capture, where it only adds launches to the graph.

        Args:
            batch: the arrays of this forward; a captured graph reads their contents anew at every replay.
            stream: the stream of the forward, or of the capture (a graph builder is one).
            index: number of this forward within its step; 0 clears the taint.
            pools: names or indices of the pools that this forward writes; None = all.

        Raises:
            BatchError: arrays that do not fit. PhaseError: HEAD of the forward before has no TAIL yet.
        """
        if self._backend is None:
            return
        calls = self._bind(batch, is_first_forward("head()", index), pools).calls
        self._phases.head()
        self._open_forward = (calls, batch)
        if self._perturber is not None:
            self._perturber.note(batch)
        try:
            if not self._captures.was_captured:
                self._captures.note(self._handlers[0].is_capturing(stream))
            self._backend.head(calls, stream)
        except BaseException:
            self.abandon_forward()
            raise

    @one_at_a_time
    def verify_layer(self, batch: StepBatch, layer: int, stream: Any = None) -> None:
        """Digest one layer of the prefixes of the rows marked ``pending``, right before that layer reads them.

        For KV that is loaded layer by layer: HEAD leaves pending rows' data out, because it is still on its way; call
        this between `head` and `tail`, after the wait for the layer's load. May run inside a capture. Does nothing with
        ``real_data="none"``.

        Args:
            batch: the one that HEAD was given.
            layer: the ``layer`` of the planes, as `kvcanary.layouts` numbers them (from 0).

        Raises:
            PhaseError: not between HEAD and TAIL of ``batch``. BatchError: ``batch`` has no ``pending``, or no pool of
                the forward has digests of that layer.
        """
        if self._backend is None:
            return
        self._phases.need_open("verify_layer()")
        if self._open_forward is None or self._open_forward[1] is not batch:
            raise PhaseError("verify_layer() must come between head() and tail() of the same StepBatch object")
        if batch.pending is None:
            raise BatchError("verify_layer(): the batch has no pending rows; give pending u8[rows] to StepBatch")
        if self.config.real_data == "none":  # a setting must not make an engine's model raise
            return
        try:
            calls = [call for call in self._open_forward[0] if layer in self._layers_of(call.pool)]
        except TypeError:  # what cannot be looked up is no number
            calls = []
        if not calls:
            known = {n for call in self._open_forward[0] for n in self._layers_of(call.pool) if n is not None}
            raise BatchError(
                f"verify_layer(): layer {layer!r} has no digests in this forward's pools; they have {sorted(known)}"
            )
        self._backend.verify_layer(calls, layer, stream)

    def _layers_of(self, pool: int) -> set[int | None]:
        if pool not in self._layers:
            self._layers[pool] = {unit.layer for unit in self.pools[pool].digest_units(self.config.real_data)}
        return self._layers[pool]

    @one_at_a_time
    def tail(self, batch: StepBatch, stream: Any = None) -> None:
        """TAIL of the forward that `head` began, after the model; may run inside a capture."""
        if self._backend is None:
            return
        if self._open_forward is not None and self._open_forward[1] is not batch:
            raise PhaseError("tail() came with another batch than head(): give the same StepBatch object to both")
        self._phases.tail()
        assert self._open_forward is not None
        calls, self._open_forward = self._open_forward[0], None
        self._backend.tail(calls, stream)

    @one_at_a_time
    def end_step(self) -> None:
        """End the outer step: sweep if due, count it, then violations, health and stats; never waits for the device.

        Raises:
            KvCanaryViolation: mode "raise" and new violations. CanaryStalledError: the guard stopped running.
            RankStalledError: another rank did not come to an agreement (`attach_agreement`).
        """
        if self._backend is None:
            return
        self._phases.end_step()
        if self._perturber is not None:
            self._perturb_after(self._perturber)
        self._post_ops_outside_graph()

    def abandon_forward(self) -> None:
        """The model raised after `head`: forget the open forward. Its slots are neither reported nor trusted."""
        self._phases.abandon_forward()
        self._open_forward = None

    def abandon_step(self) -> None:
        """The engine raised inside a step: report what is there without raising, and be ready for the next step."""
        if self._backend is None or self._phases.is_over:
            return
        self.abandon_forward()
        if self._agreement is not None:
            self._agreement.abandon(self._facts(self._backend), is_idle=self._is_idle)
        self._phases.abandon_step()
        # Whatever goes wrong here would stand in front of the engine's own error.
        self._quietly(self._violations.poll)  # first: it asks nothing of a device that may have died
        self._quietly(self._restore_perturbed)

    def step(
        self, stream: Any = None, *, idle: bool = False, batch: StepBatch | None = None
    ) -> AbstractContextManager[None]:
        """`begin_step` ... `end_step`; an exception of the body is never masked."""
        return nullcontext() if self._backend is None else StepContext(self, stream, idle, batch)

    def forward(
        self, batch: StepBatch, stream: Any = None, *, index: int = 0, pools: Sequence[str | int] | None = None
    ) -> AbstractContextManager[None]:
        """`head` ... `tail`; may run inside a capture."""
        return nullcontext() if self._backend is None else ForwardContext(self, batch, stream, index, pools)

    # ---- fault drill -------------------------------------------------------------------------------------------------
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

    # ---- host phases -------------------------------------------------------------------------------------------------
    def _post_ops_outside_graph(self) -> None:
        assert self._backend is not None
        counted = not (self._is_idle or self._is_paused)
        if not self._is_paused and self._sweep.is_sweeping:
            self._quietly(self._sweep_now)
        if self._control[abi.CONTROL_RENUMBER]:  # once in two thousand million forwards
            self._quietly(self._renumber)
        if self._agreement is not None:
            self._agreement.tick(is_idle=self._is_idle)
        self._step += 1
        self._n_counted_steps += counted
        step = self._step
        due: list[Observer] = [observer for observer in self._observers if observer.is_due(step)]
        # An observer with a snapshot to take looks at the stream itself.
        if all(observer in (self._violations, self._agreement) for observer in due) and self._has_odd_stream():
            due = list(self._observers)
        if self._more_observers:
            due += [observer for observer in self._more_observers if self._is_due(observer, step)]
        if due:
            self._observe(due, self._backend)

    def _renumber(self) -> None:
        """Numbers of forwards have 32 bits: move them down. Records told before have the old ones."""
        assert self._backend is not None
        if self._has_odd_stream() or self._is_out_of_numbers:  # else it is asked for again
            return
        self._is_out_of_numbers = bool(self._backend.state.control[abi.CONTROL_RENUMBER] == abi.LAST_FORWARD)
        if self._is_out_of_numbers:
            logger.error(
                "[canary] step %d: more than %d forwards since the last end_step(), so that their numbers ran out: "
                "nothing is judged any more. Make a new manager, and end a step now and then",
                self._step + 1,
                abi.LAST_FORWARD - abi.RENUMBER_AT,
            )
            return
        self._backend.renumber(self._stream)
        logger.info("[canary] step %d: the numbers of forwards were moved down", self._step + 1)

    def _sweep_now(self) -> None:
        assert self._backend is not None
        self._sweep.step(self._step + 1, self._backend, self._stream)

    def _quietly(self, work: Callable[[], object]) -> None:
        """Do something that is not worth the engine's step: whatever it raises is counted and logged."""
        try:
            work()
        except Exception:  # noqa: BLE001  whatever a driver raises
            name = getattr(work, "__name__", "?").strip("_")
            self._errors.note("[canary] the guard could not do all of its work (%s); the engine goes on", name)

    def _is_due(self, observer: Observer, step: int) -> bool:
        try:
            return observer.is_due(step)
        except Exception:  # noqa: BLE001  whatever an engine's observer raises
            self._errors.note("[canary] %s raised; the step goes on", type(observer).__name__)
            return False

    def _has_odd_stream(self) -> bool:
        """A stream that is captured, or whose context died: for the handlers to refuse, so all observers are asked."""
        try:
            return self._handlers[0].is_capturing(self._stream)
        except Exception:  # noqa: BLE001  the observers meet it again and report it, after the violations were read
            return True

    def _observe(self, due: Sequence[Observer], backend: Backend) -> None:
        errors: list[KvCanaryError] = []
        # The order is violations, health, stats; the totals in the facts are those after the first.
        facts: StepFacts | None = None
        for observer in due:
            if self._phases.is_over:  # a callback closed the manager, or this is a child that it forked
                return
            try:
                facts = facts or self._facts(backend)
                observer.step(facts)
            except KvCanaryError as error:  # the others still get their step; the first error is the one raised
                errors.append(error)
            except Exception:  # noqa: BLE001  a log handler that raises is not the engine's problem
                self._errors.note("[canary] %s raised; the step goes on", type(observer).__name__)
            if observer is self._violations:
                facts = None  # its totals are older than what it has just read
        with suppress(Exception):
            self._note_dropped()
            for later in errors[1:]:
                logger.error("%s", later)
        if errors:
            raise errors[0]

    def _note_dropped(self) -> None:
        newest = self._newest_snapshot()
        if newest is not None:
            self._violations.note_dropped(newest.word(abi.STATE_DROPPED))

    def _facts(self, backend: Backend) -> StepFacts:
        return StepFacts(
            step=self._step,
            stream=self._stream,
            state=backend.state,
            n_counted_steps=self._n_counted_steps,
            sweep_passes=self._sweep.sweep_passes,
            n_sweeps=dict(self._sweep.n_sweeps),
            violations_total=self._violations.violations_total,
            observations_total=self._violations.observations_total,
        )

    def _newest_snapshot(self) -> StateSnapshot | None:
        newest = self._synced
        for observer in (self._health, self._stats_logger):
            latest = observer.latest
            if latest is not None and (newest is None or latest.step > newest.step):
                newest = latest
        return newest

    # ---- binding -----------------------------------------------------------------------------------------------------
    def _bind(self, batch: StepBatch, is_first: bool, pools: Sequence[str | int] | None) -> _Bound:
        if not isinstance(batch, StepBatch):
            raise BatchError(f"batch is {type(batch).__name__}: give a StepBatch of the forward's arrays")
        try:
            key = (is_first, None if pools is None else tuple(pools))
            known = self._bound.setdefault(batch, {})
            is_known = key in known
        except TypeError as error:
            raise ConfigError(
                f"head() came with pools={pools!r} ({error}): give a list of pool names or numbers, or None for all"
            ) from error
        if not is_known:
            self._phases.need_open("head()")
            chosen = range(len(self.pools)) if pools is None else self._choose_pools(pools)
            of = [self.pools[i] for i in chosen]
            bound = batch.validate(of, self.max_requests, self.max_new_tokens, self._device_kind)
            calls = [self.backend.bind(i, b, is_first) for i, b in zip(chosen, bound, strict=True)]
            known[key] = _Bound(calls, bound)
            self._inputs_seen |= {n for n in StepBatch.__dataclass_fields__ if getattr(batch, n) is not None}
            self._histories.note(of, bound)
        return known[key]

    def _choose_pools(self, pools: Sequence[str | int]) -> list[int]:
        chosen = [] if isinstance(pools, str) else [self._pool_index(p) for p in pools]
        if not chosen or len(set(chosen)) != len(chosen):
            raise ConfigError(f"pools={pools!r}: give a list of pool names or numbers, each once, or None for all")
        return chosen

    def _pool_index(self, pool: str | int) -> int:
        names = [p.name for p in self.pools]
        if isinstance(pool, str) and pool in names:
            return names.index(pool)
        if isinstance(pool, int) and 0 <= pool < len(names):
            return pool
        raise ConfigError(f"pool {pool!r}: the pools are {', '.join(names)} (0 to {len(names) - 1})")

    # ---- host-driven calls -------------------------------------------------------------------------------------------
    def _gate(self, call: str, stream: Any) -> tuple[Any, int]:
        stream = self._stream if stream is None else stream
        self._host_driven(call, stream)
        return stream, self._step + (self._phases.phase is Phase.STEP)

    def _host_driven(self, call: str, stream: Any = None) -> Backend:
        stream = self._stream if stream is None else stream
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
        self._phases.need_outside_forward(call)
        return self.backend

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
    def attach_resident_set(self, provider: ResidentSet | None, pool: str | int = 0) -> None:
        """Give the sweep the resident slots of a pool, see `SweepOrchestrator`; None detaches."""
        if provider is not None and not callable(provider):
            raise ConfigError(
                f"attach_resident_set({type(provider).__name__}): give a function without arguments, or None"
            )
        if self._backend is not None:
            self._phases.need_open("attach_resident_set()")
            if provider is not None and not self.config.sweep_interval:
                logger.warning("a resident set is attached, but sweep_interval is 0: nothing is swept; set it to steps")
            self._sweep.attach(self._pool_index(pool), provider)
            self._health.active_tags = self._stats_logger.active_tags = self.active_tags

    @one_at_a_time
    def attach_agreement(self, agreement: RankAgreement) -> None:
        """Let all ranks log or raise at the same step, see `RankAgreement`; between steps, on all ranks; for good.

        `close` closes it. Does nothing in mode "off".
        """
        if self._backend is not None:
            self._phases.need_outside_forward("attach_agreement()")
            if not isinstance(agreement, RankAgreement):
                given = type(agreement).__name__
                raise ConfigError(f"attach_agreement({given}): give a RankAgreement, made on all ranks at this point")
            on_stall = self._box.stall if self._box is not None else None
            agreement.attach(self._violations, self.config, self._n_counted_steps, on_stall)
            self._agreement = agreement
            self._observers = (self._violations, agreement, *self._observers[1:])

    @staticmethod
    def chain(tokens: Sequence[int] | npt.NDArray[Any], salt: int = 0) -> int:
        """The chain over a prefix of ``tokens``: what `StepBatch.prefix_chain` takes for a row with that prefix.

        Args:
            tokens: integer token ids, of which the low 32 bits count.
            salt: as in `StepBatch.salts`, 0 to 2^64 - 1.

        Raises:
            BatchError: anything else.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise BatchError(
                f"chain(): tokens are {ids.dtype}{list(ids.shape)}: give a flat sequence of integer token ids"
            )
        return hashing.prefix_chain(ids.astype(np.int64), check_salt("chain()", salt))

    @one_at_a_time
    def prove(self, batch: StepBatch, stream: Any = None) -> Proof:
        """Show that the wiring is right: flip one bit in each plane of a live slot and see that exactly it is named.

        Every bit is restored. Waits for the device and allocates: for start-up and tests, between steps, with a batch
        whose tables still hold after its forward.

        Raises:
            BatchError: no row of the batch has a position that was written and digested.
        """
        if self._backend is None:
            return Proof((), is_off=True)
        backend = self._host_driven("prove()")
        bound = self._bind(batch, True, None)
        return prove_batch(backend, self.pools, self.config, list(zip(bound.calls, bound.batches, strict=True)), stream)

    # ---- what it knows -----------------------------------------------------------------------------------------------
    def add_observer(self, observer: Observer) -> None:
        """Have an observer asked at the end of each step, behind the guard's own; what it raises is logged and counted.

        It runs on the thread that ends the step: it must neither wait for the device nor take long.

        Raises:
            ConfigError: it has no `is_due` or no `step`.
        """
        check_observer(observer)
        self._phases.need_open("add_observer()")
        self._more_observers += (observer,)

    def on_violation(self, callback: Callable[[Violation], None]) -> None:
        """Call back for every first sighting of a violation, on the thread that ends the step (or polls)."""
        if not callable(callback):
            raise ConfigError(f"on_violation({callback!r}): give a function that takes a Violation")
        if self._backend is not None:
            self._phases.need_open("on_violation()")
            self._violations.on_violation(callback)

    def poll(self) -> tuple[Violation, ...]:
        """Read what is new in the ring now, without waiting and without raising; from any thread."""
        self._phases.need_parent("poll()")
        return self._violations.poll() if self._backend is not None else ()

    def violations(self) -> tuple[Violation, ...]:
        """Recent first sightings, oldest first; from any thread."""
        self._phases.need_parent("violations()")
        return self._violations.violations() if self._backend is not None else ()

    def stats(self) -> CanaryStats:
        """What is known on the host now, without asking the device; from any thread.

        The device's counters are those of the last snapshot: of the health check, the stats line, or `synchronize`.
        """
        if self._backend is None:
            return CanaryStats()
        self._phases.need_parent("stats()")
        newest, blocks, turns = self._newest_snapshot(), self._block_counts(), [p.n_turns for p in self._patrols]
        stats = CanaryStats.of(
            self._step,
            self._sweep.sweep_passes,
            self._violations.violations_total,
            self._violations.observations_total,
            newest,
            blocks,
            turns,
        )
        intervals = (self.config.stats_print_every_n_steps, self.config.health_check_every_n_steps)
        return replace(
            stats,
            digested_bytes=round(stats.data_slots * self._digest_bytes),
            is_on=self._phases.phase is not Phase.CLOSED,
            is_paused=self._is_paused,
            health=self._health.health.value,
            stalls_total=self._health.n_reports,
            observer_errors=self.n_observer_errors,
            snapshots_not_taken=sum(handler.n_not_taken for handler in self._handlers),
            snapshot_interval=min((n for n in intervals if n), default=0),
            black_box_errors=self._box.n_errors if self._box is not None else 0,
            pools=pool_stats(self.pools, newest, self._violations.counts(), dict(self._sweep.n_sweeps), turns, blocks),
        )

    def _block_counts(self) -> tuple[BlockCounts, ...]:
        return self._lifecycle.counts() if self._lifecycle is not None else ()

    def describe(self) -> str:
        """Per pool: bytes per slot, memory, expected cost, and which reasons are on, or off for lack of which input."""
        inputs, narrow = set(self._inputs_seen) or None, self._histories.narrowest
        return describe_pools(self.config, self.pools, self.max_requests, inputs, self._block_counts(), narrow)

    @staticmethod
    def estimate_bytes(config: CanaryConfig, pools: Sequence[KvPool], max_requests: int) -> int:
        """Device and pinned memory that a manager of these would take, in bytes; nothing is allocated."""
        return estimate_bytes(config, pools, max_requests)

    @property
    def memory_bytes(self) -> int:
        """Device and pinned memory that the guard holds, in bytes."""
        is_closed = self._phases.phase is Phase.CLOSED
        return 0 if self._backend is None or is_closed else self._backend.memory_bytes

    # ---- end ---------------------------------------------------------------------------------------------------------
    @one_at_a_time
    def synchronize(self) -> None:
        """Wait for all that was launched, deliver all snapshots, read all violations, and bring `stats` up to date.

        Violations are not raised here (the next `end_step` does); a stall that a delivered snapshot shows is.
        """
        if self._backend is not None:
            self._phases.need_outside_forward("synchronize()")
            self._backend.synchronize()
            self._violations.poll()
            for handler in self._handlers:
                handler.drain()
            self._take_snapshot(self._backend)

    def _take_snapshot(self, backend: Backend) -> None:
        words = backend.snapshot_words()
        self._synced = StateSnapshot(self._step, backend.state.layout, words)
        self._violations.note_dropped(int(words[abi.STATE_DROPPED]))

    def _finish(self, backend: Backend) -> None:
        """What the device still has to tell, for `stats` and the black box."""
        backend.synchronize()
        self._violations.poll()
        self._take_snapshot(backend)

    @one_at_a_time
    def close(self) -> None:
        """Give everything back; waits for the device. Graphs with the guard's launches must not be replayed after."""
        if self._backend is None or self._phases.is_over:
            return
        self._phases.close()
        if self._agreement is not None:
            self._agreement.close()
        self._open_forward = None
        self._quietly(self._restore_perturbed)
        self._quietly(self._violations.poll)  # first: it asks nothing of a device that may have died
        with suppress(Exception):  # of such a one, the end of this call says so
            self._finish(self._backend)
        self._captures.end()
        if self._box is not None:
            self._box.end("close")
        for handler in self._handlers:
            handler.close()
        self._backend.close()

    def after_fork(self) -> None:
        """In a forked child: every call but `close` is refused, and nothing of the parent's device state is touched."""
        self._phases.phase = Phase.FORKED
        self._turns.renew()

    def __enter__(self) -> CanaryManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
