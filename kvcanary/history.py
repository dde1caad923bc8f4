"""A token history that is narrower than the table: said once, when a batch is bound, and by `describe`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from kvcanary import abi
from kvcanary.batch import BoundBatch
from kvcanary.layout import KvPool

logger = logging.getLogger("kvcanary")


class NarrowHistory(NamedTuple):
    """A shape of ``token_history`` beside a table that reaches further.

    Attributes:
        pool: name of the pool whose table it is.
        width: tokens of a request that the history has room for.
        reach: tokens of a request that the table has room for.
        end: the first position that the history does not tell.
    """

    pool: str
    width: int
    reach: int
    end: int

    def __str__(self) -> str:
        return (
            f"token_history is {self.width} wide, and the block table of pool {self.pool!r} reaches {self.reach} "
            f"positions: from position {self.end} on TOKEN is not judged, and a prefix that goes further is not "
            "anchored by it (CHAIN)"
        )


class HistoryWatch:
    """Knows the narrow histories of the batches that were bound; asked when one is bound, never in a step."""

    def __init__(self) -> None:
        self._known: frozenset[NarrowHistory] = frozenset()  # replaced whole: `describe` may come from any thread

    def note(self, pools: Sequence[KvPool], bound: Sequence[BoundBatch]) -> None:
        """Warn of each narrow history, once per shape; ``bound`` has a batch per pool. May run inside a capture."""
        for pool, batch in zip(pools, bound, strict=True):
            found = narrow_history(pool, batch)
            if found is None or found in self._known:
                continue
            self._known |= {found}
            with suppress(Exception):  # a log handler's: the forward goes on
                logger.warning("[canary] %s: give i32[max_requests, tokens of the longest request]", found)

    @property
    def narrowest(self) -> NarrowHistory | None:
        """The one that tells least; None if all reach as far as their tables."""
        return min(self._known, key=lambda narrow: (narrow.end, -narrow.reach), default=None)


def narrow_history(pool: KvPool, batch: BoundBatch) -> NarrowHistory | None:
    """The history of a bound batch, if it ends a page or more before the table, whose width is in whole pages.

    How far a row reaches is not known of CSR tables, whose rows share their entries, nor of rings, where positions go
    round.
    """
    record = batch.record
    if "token_history" not in batch.views or record["table_kind"] == abi.TABLE_CSR or pool.ring_length:
        return None
    width, n_entries = int(record["history_length"]), int(record["table_width"])
    reach = n_entries * int(record["table_page"])
    spare = pool.page_size - 1 if record["table_kind"] == abi.TABLE_DENSE and reach > pool.page_size else 0
    if width - min(0, pool.token_offset) >= reach - spare:  # no request has the token behind its last one
        return None
    return NarrowHistory(pool.name, width, reach, max(0, width - pool.token_offset))
