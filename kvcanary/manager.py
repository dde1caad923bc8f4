"""The manager: what an engine holds. Its construction, the binding of batches, and the calls of a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from kvcanary.agreement import RankAgreement
from kvcanary.aliasing import check_overlaps
from kvcanary.attach import AttachCalls
from kvcanary.backends import Backend, BoundCall
from kvcanary.batch import BoundBatch, StepBatch
from kvcanary.black_box import BlackBox, open_black_box
from kvcanary.captured import CaptureWatch
from kvcanary.checks import is_first_forward
from kvcanary.config import CanaryConfig
from kvcanary.construct import check_arguments, check_capacities, choose_backend, make_backend, pool_names, zeros_beside
from kvcanary.contexts import ForwardContext, StepContext
from kvcanary.controls import ControlCalls
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.embedding import EmbedCalls
from kvcanary.ending import EndCalls
from kvcanary.errors import BatchError, ConfigError, PhaseError
from kvcanary.history import HistoryWatch
from kvcanary.host_phase import HostPhase
from kvcanary.layout import KvPool
from kvcanary.lifecycle import Lifecycle, OwnershipCalls
from kvcanary.log_lines import ErrorLog
from kvcanary.moves import MoveCalls
from kvcanary.observers import (
    KernelRunCounterHealthChecker,
    Observer,
    PeriodicCanaryStatsLogger,
    ViolationObserver,
)
from kvcanary.patrol import plan_patrol
from kvcanary.perturb import Perturber
from kvcanary.perturb_calls import DrillCalls
from kvcanary.phases import PhaseChecker
from kvcanary.pool_stats import digest_bytes
from kvcanary.queries import QueryCalls
from kvcanary.ranges import add_ranges
from kvcanary.state import CanaryDeviceState, StateSnapshot
from kvcanary.sweep import SweepOrchestrator
from kvcanary.tags import CanaryLaunchTag, Stage
from kvcanary.turns import OfThisProcess, Turns, one_at_a_time, watch_forks
from kvcanary.violation_ring import RingReader
from kvcanary.violations import new_secret


class _Bound(NamedTuple):
    """A batch bound to the pools of a forward."""

    calls: list[BoundCall]
    batches: list[BoundBatch]


class CanaryManager(
    HostPhase,
    ControlCalls,
    OwnershipCalls,
    MoveCalls,
    EmbedCalls,
    DrillCalls,
    AttachCalls,
    QueryCalls,
    EndCalls,
    OfThisProcess,
):
    """Guards the KV pools of one engine process.

    Args:
        config: see `CanaryConfig`; with mode "off" nothing is allocated or launched.
        pools: the KV pools, see `kvcanary.layouts`; one, or a list of them, each with a name of its own.
        max_requests: most rows of a batch, and request slots; 1 to 2^20.
        max_new_tokens: most new tokens of a batch, all rows and padding together; 1 to 2^30.
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
        self._at_close: tuple[Callable[[], None], ...] = ()
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

    def __enter__(self) -> CanaryManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- what it is --------------------------------------------------------------------------------------------------
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

        To be read behind TAIL: with ``overlap_head`` it may be of the step before until then.
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
            pools: names or indices of the pools that this forward writes; None = all. A pool that some first forward of
                a step (``index=0``) leaves out may rest as long as the engine likes: the health check does not take
                that for a stall, so long as all pools of one such forward run.

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
                the forward has digests of that layer. CaptureError: as in `tail`.
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
        """TAIL of the forward that `head` began, after the model; may run inside a capture.

        Raises:
            PhaseError: no HEAD before it, or that of another batch. CaptureError: with ``overlap_head``, HEAD is not in
                the same capture.
        """
        if self._backend is None:
            return
        if self._open_forward is not None and self._open_forward[1] is not batch:
            raise PhaseError("tail() came with another batch than head(): give the same StepBatch object to both")
        self._phases.tail()
        assert self._open_forward is not None
        calls, self._open_forward = self._open_forward[0], None
        try:
            self._backend.tail(calls, stream)
        except BaseException:
            self._backend.abandon()
            raise

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
        if self._phases.is_over:
            return
        self._phases.abandon_forward()
        if self._open_forward is not None and self._backend is not None:
            self._backend.abandon()
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
            self._health.choices.note(chosen, is_first=is_first)
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
        known = ", ".join(map(repr, names))
        raise ConfigError(f"there is no pool {pool!r}: give one of {known}, or 0 to {len(names) - 1}")
