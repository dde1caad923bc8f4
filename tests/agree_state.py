"""What an engine is made of: its habits, its requests, the rows of a step, the free lists of its pools."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from agree import Arrays
from numpy.typing import NDArray


@dataclass(frozen=True)
class Habits:
    """What the engine does, and what it tells the guard."""

    table: str = "blocks"  # blocks, slots, csr, csr_last_page, static
    wide_ids: bool = False
    wide_slots: bool = False
    has_ids: bool = True
    has_history: bool = True
    chains: str = "none"  # prefix_chain: none, some (0 = unknown), all
    has_salts: bool = False
    has_expected: bool = False
    has_pending: bool = False
    has_verify_all: bool = False
    shares: bool = True  # prefixes
    shares_early: bool = False  # with rows of the same forward
    max_drafts: int = 0
    preempts: bool = False
    pads: bool = False
    keeps_stale_ids: bool = False  # of blocks that have left the window
    imports: bool = False
    max_chunk: int = 40
    moves: bool = False  # blocks, between two steps
    raises: bool = True  # now and then, in the middle of a forward


def random_habits(rng: random.Random) -> Habits:
    def maybe(p: float = 0.5) -> bool:
        return rng.random() < p

    return Habits(
        table=rng.choice(("blocks", "blocks", "slots", "csr", "csr_last_page", "static")),
        wide_ids=maybe(),
        wide_slots=maybe(),
        has_ids=maybe(0.8),
        has_history=maybe(),
        chains=rng.choice(("none", "some", "all")),
        has_salts=maybe(),
        has_expected=maybe(0.3),
        has_pending=maybe(0.2),
        has_verify_all=maybe(0.2),
        shares=maybe(0.8),
        shares_early=maybe(),
        max_drafts=rng.choice((0, 0, 1, 4)),
        preempts=maybe(),
        pads=maybe(),
        keeps_stale_ids=maybe(),
        imports=maybe(0.3),
        max_chunk=rng.choice((1, 9, 40, 40)),
        moves=maybe(),
    )


@dataclass(eq=False)
class Request:
    id: int
    salt: int
    tokens: list[int]  # all it will ever have
    known: int  # tokens of them that the engine knows
    slot: int = -1
    slots_before: list[int] = field(default_factory=list)  # where it was served; it may come back
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)  # per pool with a table; -1 = evicted
    shown: list[list[int]] = field(default_factory=list)  # the same as the table shows them: perhaps stale
    is_first: bool = True
    hit_early: bool = False  # its prefix is written by another row of this forward


class Row(NamedTuple):
    """New tokens of a request, or of nobody (padding)."""

    request: Request | None
    start: int
    ids: list[int]
    n_true: int  # of ids; the rest are drafts that will be rejected


@dataclass
class Forward:
    arrays: Arrays
    index: int
    pools: list[int] | None
    written: dict[int, NDArray[np.int64]]  # slots by pool


class Load(NamedTuple):
    """A prefix that comes from elsewhere: position and token of each slot of a pool that waits for some of it."""

    pool: int
    places: dict[int, tuple[int, int]]
    salt: int


@dataclass
class Plan:
    """One step: its rows, its forwards, and the slots that are loaded from elsewhere before it."""

    rows: list[Row]
    may_raise: bool = True
    forwards: list[Forward] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    published: list[tuple[Any, ...]] = field(default_factory=list)


class Book:
    """The free list of a pool's blocks (of its slots, where a LUT places them one by one), and who took which.

    Attributes:
        calls: (kind, block, owner) since they were last collected, as the guard is to be told.
    """

    def __init__(self, n: int, reserved: set[int], rng: random.Random) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.free = [b for b in range(n) if b not in reserved]
        rng.shuffle(self.free)
        self.refs: dict[int, int] = {}
        self.virgin = set(self.free)

    def take(self, owner: int) -> int:
        block = self.free.pop()
        self.refs[block] = 1
        self.virgin.discard(block)
        self.calls.append(("allocate", block, owner))
        return block

    def take_untold(self) -> int:
        """For what is moved there: whoever moves it tells."""
        block = self.free.pop()
        self.virgin.discard(block)
        return block

    def take_virgin(self, owner: int) -> int:
        block = next(b for b in self.free if b in self.virgin)
        self.free.remove(block)
        self.free.append(block)
        return self.take(owner)

    @property
    def n_virgin(self) -> int:
        return sum(b in self.virgin for b in self.free)

    def share(self, block: int, owner: int) -> None:
        self.refs[block] += 1
        self.calls.append(("share", block, owner))

    def drop(self, block: int, owner: int) -> bool:
        """Whether that was the last owner."""
        self.calls.append(("free", block, owner))
        self.refs[block] -= 1
        if self.refs[block]:
            return False
        del self.refs[block]
        self.free.insert(0, block)
        return True
