"""Findings at neighbouring positions, as one: where they are, and under whose stamps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvcanary import abi
from kvcanary.tags import Stage
from kvcanary.violations import Violation

if TYPE_CHECKING:
    from kvcanary.evidence import Records


class Run:
    """Findings of one request at neighbouring positions, under stamps of one writer.

    Attributes:
        records: by position; of bytes, several per slot.
        is_named: whether the engine gives request ids, so that a stamp of nobody's says something.
    """

    def __init__(self, records: Sequence[Violation], is_named: bool = True) -> None:
        self.is_named = is_named
        self.records = sorted(records, key=lambda v: (v.position, v.plane or 0))
        self.slots = slots_of(self.records)
        self.positions = positions_of(self.records)
        self.page = self.records[0].page_size
        self.blocks = sorted({slot // self.page for slot in self.slots})
        self.owner = self.records[0].stamp_owner

    @property
    def layers(self) -> list[int]:
        return sorted({v.layer for v in self.records if v.layer is not None})

    @property
    def starts_block(self) -> bool:
        return self.records[0].slot % self.page == 0

    @property
    def ends_block(self) -> bool:
        return self.records[-1].slot % self.page == self.page - 1

    @property
    def is_registered(self) -> bool:
        """Whether the request has run before, up to here."""
        return bool(self.records[0].flags & abi.ROW_REGISTERED)

    @property
    def is_pending(self) -> bool:
        return all(v.flags & abi.ROW_PENDING for v in self.records)

    @property
    def is_moved(self) -> bool:
        """Whether the stamps came by a copy or load: a move makes them anew, and they are nobody's."""
        return self.is_named and all(v.stamp_step and not v.stamp_owner for v in self.records)

    @property
    def is_own(self) -> bool:
        """Whether the request wrote the stamps itself."""
        return all(v.stamp_owner == v.request_id for v in self.records)

    @property
    def shift(self) -> int:
        """By how many positions the tokens come late: each slot holds what the one so many before should hold; 0: none.

        Known only where tokens may be told.
        """
        tokens = {v.position: (v.stored_token, v.expected_token) for v in self.records}
        for n in range(1, len(tokens)):
            pairs = [(tokens[p][0], tokens[p - n][1]) for p in tokens if p - n in tokens]
            if len(pairs) >= min(n, 2) and all(stored is not None and stored == before for stored, before in pairs):
                return n
        return 0

    def reaches_end_of(self, owner: int, records: Records) -> bool:
        """Whether these are the last positions that the writer is known to have."""
        last = max((v.position for v in records.all if v.request_id == owner), default=-1)
        return last >= 0 and max(v.stored_position for v in self.records) > last

    @property
    def is_padding(self) -> bool:
        """Whether all slots hold one and the same token (only where tokens may be told)."""
        tokens = {v.stored_token for v in self.records}
        return len(self.slots) > 1 and len(tokens) == 1 and None not in tokens

    @property
    def reader(self) -> str:
        """Whose slots these should be: a request's, or the prefix cache's where a sweep looked."""
        v = self.records[0]
        return "the prefix cache" if v.tag.stage == Stage.SWEEP else reader_name(v)

    @property
    def words(self) -> str:
        if len(self.slots) == 1:
            return f"slot {self.slots[0]}"
        first, last = min(self.slots), max(self.slots)
        if last - first + 1 == len(self.slots):
            return f"slots {first} to {last} ({len(self.slots)} of them)"
        blocks = f"blocks {', '.join(map(str, self.blocks[:4]))}{', ...' if len(self.blocks) > 4 else ''}"
        return f"{len(self.slots)} slots between {first} and {last} ({blocks})"

    @property
    def story(self) -> str:
        """Who is in the slots that the request reads."""
        v = self.records[0]
        holds = "holds" if len(self.slots) == 1 else "hold"
        tokens = f"request {self.owner}'s tokens from position {v.stored_position} on"
        return f"{self.words} of {self.reader} {holds} {tokens}, written in forward {v.stamp_step}"


def reader_name(v: Violation) -> str:
    """The request, or the row of one without an id."""
    return f"request {v.request_id}" if v.request_id or v.row < 0 else f"row {v.row}"


def slots_of(records: Iterable[Violation]) -> list[int]:
    """Slots in the order of their records, each once."""
    return list(dict.fromkeys(v.slot for v in records))


def positions_of(records: Iterable[Violation]) -> list[int]:
    """Positions in the order of their records, each once."""
    return list(dict.fromkeys(v.position for v in records))
