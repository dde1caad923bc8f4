"""`CanaryManager.lifecycle`: the engine's calls about block ownership, checked by a ledger and passed to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvcanary.backends import Backend
from kvcanary.errors import ConfigError, LifecycleError
from kvcanary.layout import KvPool
from kvcanary.ledger import BlockLedger
from kvcanary.turns import OfThisProcess, Turns, one_at_a_time

CALLS = {kind: f"{kind}_blocks()" for kind in ("allocate", "share", "free", "claim")}
Gate = Callable[[str, Any], tuple[Any, int]]  # (call, stream or None) -> stream to use, step at hand; may refuse


class LifecycleEvent(NamedTuple):
    """One call as data, for schedulers in another process; a plain tuple or a mapping of the same does as well.

    Attributes:
        kind: "allocate", "share", "free" or "claim".
        ids: one block id, a sequence of them or an integer array on the host.
        owner: a request id from 1 to 2^32 - 2, or `kvcanary.PREFIX_CACHE`.
        pool: name or number.
    """

    kind: str
    ids: Any
    owner: int
    pool: str | int = 0


class Lifecycle(OfThisProcess):
    """Who owns which block: a ledger per pool on the host, a word per block on the device.

    Calls may come between steps and inside a step, but neither between HEAD and TAIL of a forward nor inside a capture
    of their stream. They hold from their place on the stream on: a forward launched before them is judged by what was
    true before. Calls from several threads take turns, in no order of their own. A call with up to 1,000 ids is one
    launch.

    Args:
        pools: all of the manager's; none with the guard off, when calls do nothing.
        pool_index: name or number of a pool -> its number, or a ConfigError.
        turns: the manager's.
    """

    def __init__(
        self,
        pools: Sequence[KvPool] = (),
        backend: Backend | None = None,
        gate: Gate | None = None,
        pool_index: Callable[[str | int], int] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns or Turns()
        self._ledgers = [BlockLedger(p.n_blocks, p.reserved_blocks, p.name) for p in pools]
        self._backend, self._gate, self._pool_index = backend, gate, pool_index

    def call(self, kind: str, ids: Any, owner: int, pool: str | int, stream: Any) -> None:
        """One of `CALLS`.

        Raises:
            LifecycleError: misuse; nothing was changed. PhaseError, CaptureError: at a wrong moment.
        """
        if self._gate is None:
            return
        lock = self._turns.begin(CALLS[kind])
        try:
            stream, step = self._gate(CALLS[kind], stream)
            self._do(kind, ids, owner, pool, stream, step)
        finally:
            lock.release()

    @one_at_a_time
    def apply(self, events: Iterable[LifecycleEvent | tuple[Any, ...] | Mapping[str, Any]], stream: Any = None) -> None:
        """Do the calls of a batch in order, as `allocate_blocks`, `share_blocks`, ... would.

        Raises:
            LifecycleError: ``event_index`` is the number of a bad event: those before it were applied, none after it.
            PhaseError, CaptureError: at a wrong moment; none was applied.
        """
        if self._gate is None:
            return
        stream, step = self._gate("lifecycle.apply()", stream)
        if not isinstance(events, Iterable):
            raise LifecycleError(f"lifecycle.apply(): events is {type(events).__name__}: give a list of LifecycleEvent")
        for i, event in enumerate(events):
            try:
                kind, ids, owner, pool = _event_of(event)
                self._do(kind, ids, owner, pool, stream, step)
            except (LifecycleError, ConfigError) as error:  # ConfigError: there is no such pool
                blocks = getattr(error, "blocks", ())
                before = f" The {i} events before it were applied." if i else ""
                raise LifecycleError(f"event {i} of lifecycle.apply(): {error}{before}", blocks, i) from error

    def _do(self, kind: str, ids: Any, owner: int, pool: str | int, stream: Any, step: int) -> None:
        assert self._backend is not None and self._pool_index is not None
        index = pool if type(pool) is int and 0 <= pool < len(self._ledgers) else self._pool_index(pool)
        changes = getattr(self._ledgers[index], kind)(ids, owner, step)
        if len(changes.ids):
            self._backend.update_blocks(index, changes, stream)

    # ---- what it knows -----------------------------------------------------------------------------------------------
    def owners(self, block: int, pool: str | int = 0) -> tuple[int, ...]:
        """Who holds a block, by the ledger: the primary owner first, if it still does, then the sharers."""
        return self._ledger(pool).owners(block) if self._ledgers else ()

    def epoch(self, block: int, pool: str | int = 0) -> int:
        """Allocations of a block so far, which is what its stamps carry; waits for the device. 0 = never allocated."""
        if not self._ledgers:
            return 0
        self._ledger(pool).owners(block)  # in range
        assert self._backend is not None and self._pool_index is not None
        return int(self._backend.read_blocks(self._pool_index(pool))["epoch"][block])

    def _ledger(self, pool: str | int) -> BlockLedger:
        assert self._pool_index is not None
        return self._ledgers[self._pool_index(pool)]

    def counts(self) -> tuple[BlockCounts, ...]:
        """Per pool, how many blocks are held, shared and free, by the ledger."""
        return tuple(BlockCounts(ledger.n_live, ledger.n_shared, ledger.n_free) for ledger in self._ledgers)


class BlockCounts(NamedTuple):
    """Blocks of a pool: held by somebody, of these shared, and held by nobody (cached ones too, reserved ones not)."""

    live: int
    shared: int
    free: int


def _event_of(event: Any) -> LifecycleEvent:
    try:
        told = LifecycleEvent(**event) if isinstance(event, Mapping) else LifecycleEvent(*event)
    except TypeError:
        raise LifecycleError(f"{event!r} is no event: give kind, ids, owner and, if not 0, pool") from None
    if not isinstance(told.kind, str) or told.kind not in CALLS:
        raise LifecycleError(f"kind={told.kind!r}: choose one of {', '.join(CALLS)}")
    return told


class OwnershipCalls:
    """`CanaryManager`'s part for block ownership."""

    _lifecycle: Lifecycle | None

    @property
    def lifecycle(self) -> Lifecycle:
        """Block ownership: `Lifecycle.apply` for batches of events, and what the ledger knows."""
        if self._lifecycle is None:
            raise ConfigError(
                "lifecycle=False: block ownership is not guarded; make the CanaryConfig with lifecycle=True"
            )
        return self._lifecycle

    def allocate_blocks(self, ids: Any, owner: int, *, pool: str | int = 0, stream: Any = None) -> None:
        """Say that blocks of a pool now belong to a request (or to `kvcanary.PREFIX_CACHE`), for new content.

        Needs ``lifecycle=True``; does nothing in mode "off". See `Lifecycle` for when it may be called.

        Args:
            ids: block ids: one, a sequence or an integer array on the host; none twice. Up to 1,000 are one launch.
            owner: the request id (from 1 to 2^32 - 2): what `StepBatch.request_ids` holds for its rows.
            stream: where it is ordered; None = the stream of the current (or the last) step.

        Raises:
            LifecycleError: a block that is reserved, held by somebody, out of range or named twice; nothing is changed.
            ConfigError: lifecycle is off. PhaseError, CaptureError: inside a forward, or a capture of the stream.
        """
        self.lifecycle.call("allocate", ids, owner, pool, stream)

    def share_blocks(self, ids: Any, owner: int, *, pool: str | int = 0, stream: Any = None) -> None:
        """Say that one more owner holds blocks, to read them; also of freed blocks that are still cached.

        Arguments and errors are those of `allocate_blocks`.
        """
        self.lifecycle.call("share", ids, owner, pool, stream)

    def free_blocks(self, ids: Any, owner: int, *, pool: str | int = 0, stream: Any = None) -> None:
        """Say that an owner lets go of blocks; they stay cached, in their epoch, until they are allocated anew.

        Arguments and errors are those of `allocate_blocks`; LifecycleError also for blocks that it does not hold.
        """
        self.lifecycle.call("free", ids, owner, pool, stream)

    def claim_blocks(self, ids: Any, owner: int, *, pool: str | int = 0, stream: Any = None) -> None:
        """Say that the only holder of blocks, who came to them by sharing, writes them from now on.

        For copy-on-write by reference counts: the last holder of a block appends to it in place. The epoch goes on.

        Arguments and errors are those of `allocate_blocks`; LifecycleError also for blocks that others hold too.
        """
        self.lifecycle.call("claim", ids, owner, pool, stream)
