"""Asynchronous scheduling: a step is planned and launched before the host has seen what the one before has sampled.

Until then the sampled token is a placeholder, -1, on the host: in the request's tokens and in the token history. The
device knows better, so the true ids are put into the batch as it is launched. A request that has ended is found out
one step too late: what its last forward wrote lies before the release of its blocks in the order of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.requests import PLACEHOLDER, Request, Share

if TYPE_CHECKING:
    from kvcanary.sim.scheduler import Scheduler


@dataclass(frozen=True)
class Sampled:
    """A token that the device has sampled for position `position` of a request."""

    request: Request
    position: int
    token: int


class InFlight:
    """The step that is under way."""

    def __init__(self, scheduler: Scheduler, token_history: NDArray[np.int32]) -> None:
        self._scheduler, self._history = scheduler, token_history
        self._sampled: list[Sampled] = []
        self.n_late_writes = self.n_placeholders = 0

    def fill_in(self, input_ids: NDArray[np.int32], shares: list[Share], starts: NDArray[np.int32]) -> None:
        """What the device does: put the tokens that it has sampled where the host has put placeholders."""
        of = {id(s.request): s for s in self._sampled}
        for share, start in zip(shares, starts.tolist(), strict=False):
            known = of.get(id(share.request))
            at = -1 if known is None else known.position - share.request.n_computed
            if known is not None and 0 <= at < share.n_new and input_ids[start + at] == PLACEHOLDER:
                input_ids[start + at] = known.token
                self.n_placeholders += 1

    def resolve(self) -> list[Request]:
        """See the tokens of the step before; returns the requests that have ended with it."""
        ended = []
        for request, position, token in ((s.request, s.position, s.token) for s in self._sampled):
            request.tokens[position] = token
            is_last = token == request.end_byte and not request.is_finished
            if is_last:
                request.n_known = position + 1
                self._scheduler.abort(request)
            elif request in self._scheduler.running:
                self._history[request.slot, position] = token
            if is_last or (request.is_finished and position == len(request.tokens) - 1):
                ended.append(request)
        self._sampled = []
        return ended

    def launched(self, shares: list[Share], choices: list[int]) -> None:
        """Book the shares of the step that was just launched, without a look at what it samples."""
        for share, token in zip(shares, choices, strict=True):
            request = share.request
            if request.is_finished:  # ended by the step before: this one has written for nothing
                self.n_late_writes += 1
                continue
            n_gained = self._scheduler.complete(share, [PLACEHOLDER])
            if n_gained:
                self._sampled.append(Sampled(request, request.n_known - 1, token))
