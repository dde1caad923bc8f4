"""What the manager asks of a backend when KV changed its place, or came from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy.typing as npt


class MoveOp(Enum):
    """What is to be done with the slots of a `Move`."""

    COPY = "the stamps and digests of `sources` to `slots`"
    EXPORT = "an image of `slots`"
    IMPORT = "`image` to `slots`"
    COMMIT = "the accepted paths of draft trees from `sources` to `slots`"
    LOCALIZE = "a local part for the stamps in `slots`"
    ADOPT = "stamps and digests for what lies in `slots`"
    REFRESH = "digests of what lies in `slots`"


class SlotImage(NamedTuple):
    """The portable part of some slots.

    Attributes:
        stamps: STAMP[2 * halves, n], HEAD of each half, then TAIL. ``step`` 0 = never written; owner and epoch are 0;
            ``prev_slot`` is coded as in a pool, with ``abi.PREV_IN_LIST`` for the slot of the entry before.
        digests: u64[n_digests, n].
    """

    stamps: npt.NDArray[Any]
    digests: npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Move:
    """One call, checked as far as the host can see; lists are NumPy arrays or `ArrayView`s of device memory.

    Attributes:
        n: slots, after blocks were taken apart.
        slots, sources: slots of the pool (of its own index space: a ``slot_lut`` is not applied), or blocks.
        positions, tokens: one per slot, of ADOPT.
        chains: u64[n], of ADOPT; 0 = unknown.
        row_starts, request_slots, prefix_lens: of COMMIT: row r has entries row_starts[r] to row_starts[r + 1].
        per_entry: slots of an entry of the lists: 1, or the page size where they are blocks.
        is_wide: whether the lists are i64; else i32.
        drops_digests: LOCALIZE: the digests did not come along.
    """

    op: MoveOp
    pool: int
    n: int
    slots: Any
    sources: Any = None
    positions: Any = None
    tokens: Any = None
    chains: Any = None
    row_starts: Any = None
    request_slots: Any = None
    prefix_lens: Any = None
    per_entry: int = 1
    is_wide: bool = False
    drops_digests: bool = False
    image: SlotImage | None = None
