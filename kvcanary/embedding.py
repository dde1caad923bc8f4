"""The calls for engines that build graphs themselves, or whose KV buffers move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcanary.aliasing import check_overlaps
from kvcanary.backends import Backend, CapturedGraph
from kvcanary.batch import StepBatch
from kvcanary.checks import is_first_forward
from kvcanary.config import CanaryConfig
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.errors import CaptureError
from kvcanary.layout import KvPool
from kvcanary.perturb import Perturber
from kvcanary.phases import PhaseChecker
from kvcanary.rebind import rebound_pool


class CanaryGraphs:
    """HEAD and TAIL of one batch as CUDA graphs, to be added as child nodes before and behind the model's.

    A child node is a copy: once both are added, the handles may go. The manager, and the arrays of the batch, must stay
    as long as the graph that the engine made of them is replayed.

    Attributes:
        head, tail: ``CUgraph`` handles (``cudaGraph_t`` is the same), until `close` or as long as this object lives.
    """

    def __init__(self, head: CapturedGraph, tail: CapturedGraph, batch: StepBatch) -> None:
        self._graphs, self._batch = (head, tail), batch
        self.head, self.tail = head.handle, tail.handle

    def close(self) -> None:
        """Destroy both handles; graphs that hold copies of them as child nodes go on."""
        for graph in self._graphs:
            graph.close()
        self.head = self.tail = 0

    def __enter__(self) -> CanaryGraphs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class EmbedCalls:
    """`CanaryManager`'s part for engines that build graphs node by node or in C++, and for buffers that move."""

    config: CanaryConfig
    pools: tuple[KvPool, ...]
    _backend: Backend | None
    _phases: PhaseChecker
    _handlers: list[DelayedDeviceHostHandler]
    _perturber: Perturber | None
    _stream: Any

    if TYPE_CHECKING:

        def _pool_index(self, pool: str | int) -> int: ...

        def _bind(self, batch: StepBatch, is_first: bool, pools: Sequence[str | int] | None) -> Any: ...

    def graphs(
        self, batch: StepBatch, *, index: int = 0, pools: Sequence[str | int] | None = None
    ) -> CanaryGraphs | None:
        """HEAD and TAIL of a forward as CUDA graphs, for engines that build theirs node by node or in C++.

        They are captured on a stream of the guard's own, at any time between forwards: the engine's streams are not
        touched. Order them by edges: HEAD before whatever writes KV, TAIL after all of it. Each launch of the whole is
        one forward; `step` goes around it as always.

        Args:
            batch, index, pools: as in `head`.

        Returns:
            None with mode "off": there is nothing to add.

        Raises:
            CaptureError: the host backend, which has no graphs.
        """
        if self._backend is None:
            return None
        self._phases.need_outside_forward("graphs()")
        calls = self._bind(batch, is_first_forward("graphs()", index), pools).calls
        return CanaryGraphs(*self._backend.graphs(calls), batch)

    def rebind(self, pool: str | int, arrays: KvPool | Sequence[Any], *, stream: Any = None) -> None:
        """The KV of a pool lies in other arrays from here on; captured graphs follow without recapture.

        The bytes must be the same: what was written stays judged. Ordered on ``stream``; a forward launched before it
        reads the old arrays, which are not held any longer. Neither waits nor allocates once it was called at this
        size. May also come between HEAD and TAIL, for a model that writes its KV into new arrays (with
        ``overlap_head`` the old ones must stay as they are until TAIL).

        Args:
            pool: name or number.
            arrays: one for each array of the pool, in the order of its planes (of `layouts.nhd`: k of layer 0, v of
                layer 0, k of layer 1, ...), or a pool made like it over the new arrays.
            stream: None = the stream of the current step.

        Raises:
            LayoutError: another geometry. CaptureError: the stream is being captured. PhaseError: closed.
        """
        if self._backend is None:
            return
        self._phases.need_open("rebind()")
        stream = self._stream if stream is None else stream
        if self._handlers[0].is_capturing(stream):
            raise CaptureError("rebind() came while its stream is being captured: call it outside the capture")
        i = self._pool_index(pool)
        new = rebound_pool(self.pools[i], arrays)
        if new is self.pools[i]:
            return
        pools = (*self.pools[:i], new, *self.pools[i + 1 :])
        check_overlaps(pools, self.config)
        self._backend.rebind(i, new, stream)
        self.pools = pools
        if self._perturber is not None:
            self._perturber.rebind(pools)
