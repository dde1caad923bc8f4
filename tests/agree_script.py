"""Forwards written out by hand, over 8 blocks of 4 slots with block 0 reserved, and 3 layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from agree import Arrays, PoolSpec, Side, Sides
from agree_twins import Twins
from numpy.typing import NDArray

from kvcanary import KvPool, PoolKind, Reason, abi, layouts
from kvcanary.tags import CanaryLaunchTag

PAGE, N_BLOCKS, N_LAYERS = 4, 8, 3
MAX_REQUESTS, MAX_LEN, WIDTH = 8, 32, 6
A, B, C = ([base + i for i in range(20)] for base in (100, 200, 300))  # the texts of the recipes


class Row(NamedTuple):
    """A row of a batch: new tokens text[start:end] of a request.

    Attributes:
        request: its id, and its request slot; 0 = nobody's (padding).
        table: blocks.
        slots: where the engine writes; None = where the table says.
        kv_slots: where the model writes; None = ``slots``.
    """

    request: int
    text: Sequence[int]
    start: int
    end: int
    table: Sequence[int]
    slots: Sequence[int] | None = None
    salt: int = 0
    kv_slots: Sequence[int] | None = None

    @property
    def targets(self) -> list[int]:
        if self.slots is not None:
            return list(self.slots)
        return [self.table[p // PAGE] * PAGE + p % PAGE for p in range(self.start, self.end)]


class Seen(NamedTuple):
    """What a record says, as far as the scripts foretell it."""

    tag: str
    reasons: Reason
    slot: int
    position: int
    row: int = 0
    request: int = 0
    plane: int = -1


def pool_spec(has_v: bool = False, window: int | None = None, dtype: str | None = None) -> PoolSpec:
    """4 bytes a slot and plane; ``dtype`` = what the engine says that they are."""
    halves = "kv" if has_v else "k"
    names = [f"{half}{i}" for half in halves for i in range(N_LAYERS)]
    kind = PoolKind.FULL if window is None else PoolKind.SWA

    def build(given: Mapping[str, Any]) -> KvPool:
        arrays = {half: [given[f"{half}{i}"] for i in range(N_LAYERS)] for half in halves}
        return layouts.nhd(**arrays, kind=kind, window=window, dtype=dtype)

    return PoolSpec({name: np.zeros((N_BLOCKS, PAGE, 1, 2), np.uint16) for name in names}, build)


def batch_of(rows: Sequence[Row], leave_out: Collection[str] = ()) -> Arrays:
    """The arrays of a batch; the history tells each request's whole text."""
    table = np.zeros((len(rows), WIDTH), np.int32)
    history = np.full((MAX_REQUESTS, MAX_LEN), -1, np.int32)
    for r, row in enumerate(rows):
        table[r, : len(row.table)] = row.table
        if row.request:
            known = row.text[:MAX_LEN]
            history[row.request, : len(known)] = known
    arrays: Arrays = {
        "block_table": table,
        "seq_lens": np.array([row.end for row in rows], np.int32),
        "query_start_loc": np.cumsum([0, *(row.end - row.start for row in rows)]).astype(np.int32),
        "input_ids": np.array([t for row in rows for t in row.text[row.start : row.end]], np.int32),
        "slot_mapping": np.array([s for row in rows for s in row.targets], np.int64),
        "request_slots": np.array([row.request or -1 for row in rows], np.int32),
        "request_ids": np.array([row.request for row in rows], np.uint32),
        "token_history": history,
        "salts": np.array([row.salt for row in rows], np.uint64),
    }
    return {name: array for name, array in arrays.items() if name not in leave_out}


class Script:
    """Forwards written out by hand, on all sides at once.

    Args:
        leave_out: arrays that this engine does not hand in.
        spec: another pool than that of `pool_spec`.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        *,
        leave_out: Collection[str] = (),
        has_v: bool = False,
        window: int | None = None,
        spec: PoolSpec | None = None,
        **config: Any,
    ) -> None:
        specs = [spec or pool_spec(has_v, window)]
        self.twins = Twins(specs, sides, MAX_REQUESTS, **{"verify_data_every": 1, **config})
        self.planes = [(layer, half) for half in ("kv" if has_v else "k") for layer in range(N_LAYERS)]
        self.leave_out = set(leave_out)
        self.records = self.twins.records
        self._bytes_of = np.random.default_rng(0)

    def forward(self, *rows: Row, has_tail: bool = True, late: Arrays | None = None, **arrays: Any) -> list[Seen]:
        """HEAD, a model that writes the KV of the new tokens, TAIL; what was reported, in order of meaning."""
        written = [s for row in rows for s in (row.targets if row.kv_slots is None else row.kv_slots)]

        def model() -> None:
            inside = [s for s in written if 0 <= s < PAGE * N_BLOCKS]
            self.twins.write_kv(0, np.array(inside, np.int64), self._bytes_of)

        given = {**batch_of(rows, self.leave_out), **arrays}
        self.records = self.twins.forward(given, model=model, has_tail=has_tail, between=late)
        return seen(self.records)

    def damage(self, layer: int, slot: int, mask: int = 1, half: str = "k") -> None:
        """Flip bits of the first byte of a slot."""
        self.kv(layer, half)[slot, 0] ^= mask

    def kv(self, layer: int, half: str = "k") -> NDArray[np.uint8]:
        """u8[slots, bytes] of a layer, to be read and written."""
        return self.twins.buffers[0][f"{half}{layer}"].reshape(PAGE * N_BLOCKS, -1).view(np.uint8)

    def own(self, kind: str, ids: Sequence[int], owner: int) -> None:
        """An honest call about who owns blocks: "allocate", "share" or "free"."""
        error = self.twins.lifecycle([(kind, ids, owner)])
        assert error is None, error

    def copy(
        self, source: Sequence[int], target: Sequence[int], *, bytes_too: bool = True, stamps_too: bool = True
    ) -> None:
        """A transfer between slots: the KV bytes, and, if they ride along, the stamps and digests.

        What of a stamp is local is made new: its predecessor, and its block's epoch.
        """
        source, target = list(source), list(target)
        for layer, half in self.planes if bytes_too else ():
            self.kv(layer, half)[target] = self.kv(layer, half)[source]

        def stamps(array: NDArray[Any]) -> None:
            array[target] = array[source]
            array["prev_slot"][target] = abi.PREV_NONE
            if self.twins.config.lifecycle:
                blocks = self.twins.sides[0].read_guard(0, "blocks")
                array["epoch"][target] = blocks["epoch"][np.array(target) // PAGE]

        def digests(array: NDArray[Any]) -> None:
            array[:, target] = array[:, source]

        if stamps_too:
            self.twins.edit_guard(0, "head0", stamps)
            self.twins.edit_guard(0, "tail0", stamps)
            self.twins.edit_guard(0, "digests", digests)


def owned_script(sides: Sides, **config: object) -> Script:
    """One whose guard is told who owns which block."""
    return Script(sides(), **{"lifecycle": True, **config})  # type: ignore[arg-type]


def seen(records: NDArray[Any]) -> list[Seen]:
    """The records, sorted by tag, row, position, plane."""
    found = [
        Seen(
            CanaryLaunchTag(int(v["tag"])).name,
            Reason(int(v["reasons"])),
            *(int(v[name]) for name in ("slot", "position", "row", "request_id", "plane")),
        )
        for v in records
    ]
    return sorted(found, key=lambda v: (CanaryLaunchTag[v.tag], v.row, v.position, v.plane, v.reasons))


def kinds(found: Sequence[Seen], stage: str = "", request: int | None = None) -> dict[int, Reason]:
    """All reasons by slot, of one stage and one request."""
    by_slot: dict[int, Reason] = {}
    for v in found:
        if v.tag.startswith(stage) and request in (None, v.request):
            by_slot[v.slot] = by_slot.get(v.slot, Reason(0)) | v.reasons
    return by_slot


def stamps(s: Script, name: str, slots: Any) -> NDArray[Any]:
    """Of some slots, what "head0", "tail0", ... of the first side has: STAMP[len(slots)]."""
    found: NDArray[Any] = s.twins.sides[0].read_guard(0, name)[list(slots)]
    return found


def skipped(s: Script) -> int:
    """Entries of moves that named no slot, so far."""
    return int(s.twins.words[abi.STATE_SKIPPED_MOVES])
