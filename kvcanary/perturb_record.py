"""What the fault drill has done: a record of each fault, to compare with what the guard said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvcanary.perturb_spec import FaultKind

_SWAPS = (FaultKind.TABLE_SWAP, FaultKind.NEXT_TOKEN_SWAP)


class Place(NamedTuple):
    """One thing that was changed.

    Attributes:
        row: batch row, -1 = of no row of the batch; ``request_id`` its request (or the writer's), 0 unknown.
        position: in the request: of the slot, of the new token, or the first that the table entry holds.
        slot: of the pool, before the change; its block is ``slot // page_size``.
        address: of the first changed byte; ``offset`` in bytes from the array's first element.
        element: number of the table entry in its row, or of the token in the batch; -1 for a flip.
        before: table entry or token id; None for a flip, and for token ids without ``log_tokens``; ``after`` likewise.
    """

    row: int
    request_id: int
    position: int
    slot: int
    block: int
    address: int
    offset: int
    element: int = -1
    before: int | None = None
    after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One fault that was injected; `str` is its log line.

    Attributes:
        kind: which fault of the drill.
        step: outer step from 1, as `Violation.step` where every step has a forward.
        pool: pool index, with ``pool_name``.
        places: one of a flip, or of the only row whose token was replaced; two of a swap.
        plane: index of the digest, as `Violation.plane`, with ``plane_name`` and ``layer``; None unless a flip.
        byte: of the slot's digested bytes in that plane.
        mask: what the byte was XORed with.
        n_users: rows of the batch that use the slot, this one included.
    """

    kind: FaultKind
    step: int
    pool: int
    pool_name: str
    places: tuple[Place, ...]
    plane: int | None = None
    plane_name: str = ""
    layer: int | None = None
    byte: int | None = None
    mask: int | None = None
    n_users: int = 0

    def __str__(self) -> str:
        head = f"{self.kind.value} at step {self.step}: pool {self.pool_name!r}"
        if self.kind in _SWAPS:
            until = ", until the end of the step" if self.kind is FaultKind.TABLE_SWAP else ""
            return f"{head}: " + "; ".join(self._swapped(place) for place in self.places) + until
        p = self.places[0]
        who = f"row {p.row}, request {p.request_id}" if p.row >= 0 else f"no row, written by request {p.request_id}"
        others = f" and {self.n_users - 1} more rows" if self.n_users > 1 else ""
        return (
            f"{head}, plane {self.plane_name!r} of layer {self.layer}, block {p.block}, slot {p.slot}, "
            f"position {p.position}, {who}{others}: byte {self.byte} at {p.address:#x} (array + {p.offset:#x}), "
            f"mask {self.mask:#04x}"
        )

    def _swapped(self, p: Place) -> str:
        what = "table entry" if self.kind is FaultKind.TABLE_SWAP else "token"
        change = "ids withheld (log_tokens=False)" if p.before is None else f"{p.before} -> {p.after}"
        return (
            f"{what} {p.element} of row {p.row} (request {p.request_id}, position {p.position}, block {p.block}, "
            f"slot {p.slot}) at {p.address:#x} (array + {p.offset:#x}): {change}"
        )
