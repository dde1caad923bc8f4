"""The context managers of a step and of a forward: they only call the manager's primitives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvcanary.batch import StepBatch

if TYPE_CHECKING:
    from kvcanary.manager import CanaryManager


class StepContext(AbstractContextManager[None]):
    """`begin_step` ... `end_step`, or `abandon_step` when the body raised."""

    def __init__(self, manager: CanaryManager, stream: Any, idle: bool, batch: StepBatch | None = None) -> None:
        self._manager, self._stream, self._idle, self._batch = manager, stream, idle, batch

    def __enter__(self) -> None:
        self._manager.begin_step(self._stream, idle=self._idle, batch=self._batch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._manager.end_step()
        else:
            self._manager.abandon_step()


class ForwardContext(AbstractContextManager[None]):
    """`head` ... `tail`, or `abandon_forward` when the body raised."""

    def __init__(
        self, manager: CanaryManager, batch: StepBatch, stream: Any, index: int, pools: Sequence[str | int] | None
    ) -> None:
        self._manager, self._batch, self._stream, self._index, self._pools = manager, batch, stream, index, pools

    def __enter__(self) -> None:
        self._manager.head(self._batch, self._stream, index=self._index, pools=self._pools)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._manager.tail(self._batch, self._stream)
        else:
            self._manager.abandon_forward()
