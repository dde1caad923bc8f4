"""What goes wrong in an engine, or worse: damaged memory, metadata of another step, metadata that are noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from agree import Arrays
from agree_twins import Twins
from numpy.typing import NDArray

Array = NDArray[Any]

EXTREMES = (-(1 << 31), -2, -1, 0, 1, (1 << 31) - 1)
WIDE_EXTREMES = (-(1 << 40), (1 << 31) + 5, (1 << 32) + 5, (1 << 63) - 1)
KINDS = ("bytes", "guard", "lut", "table", "rows", "slots", "lengths", "noise", "late", "ownership")
#: those in which the model itself writes nothing astray, so that HEAD may as well look after it
SEEN_BEFORE_THE_MODEL = ("bytes", "guard", "lut", "table", "rows", "ownership")
_TABLES = ("block_table", "kv_indices")
_LENGTHS = ("seq_lens", "kv_last_page_len", "query_start_loc", "kv_indptr", "request_slots")


class Faults:
    """Injects faults of some kinds, each with a probability; none by default.

    Kinds: "bytes" of the KV cache, bits of the "guard"'s own arrays, entries of a "lut" or a "table", "rows" of a table
    exchanged, "slots" (write targets), "lengths" off by a little, "noise" in place of an array, metadata that change
    between HEAD and TAIL ("late"), and calls about the "ownership" of blocks that are not true.
    """

    def __init__(self, rng: random.Random, kinds: tuple[str, ...] = (), probability: float = 0.3) -> None:
        self._rng, self._kinds, self._probability = rng, kinds, probability
        self._struck: set[str] = set()

    def _strikes(self, kind: str) -> bool:
        strikes = kind in self._kinds and self._rng.random() < self._probability
        if strikes:
            self._struck.add(kind)
        return strikes

    def has_struck(self, kind: str) -> bool:
        """Whether anything of this kind went wrong so far."""
        return kind in self._struck

    def at_rest(self, twins: Twins) -> None:
        """Damage to memory between two steps."""
        rng = self._rng
        pool = rng.randrange(len(twins.pools))
        buffers = twins.buffers[pool]
        if self._strikes("bytes"):
            planes = [b for name, b in buffers.items() if name != "lut"]
            flat = rng.choice(planes).reshape(-1).view(np.uint8)
            flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
        if self._strikes("lut") and "lut" in buffers:
            lut = buffers["lut"]
            used = np.flatnonzero(lut >= 0).tolist()
            lut[rng.choice(used or [0])] = rng.choice((*EXTREMES, 1 << 40, rng.randrange(len(lut))))
        if self._strikes("guard"):
            self._flip_guard(twins, pool)

    def _flip_guard(self, twins: Twins, pool: int) -> None:
        halves = range(len(twins.pools[pool].halves))
        stamps = [f"{plane}{h}" for plane in ("head", "tail") for h in halves]
        has_digests = bool(twins.pools[pool].digest_units(twins.config.real_data))
        owners = ["blocks", "blocks"] if twins.config.lifecycle else []
        name = self._rng.choice(
            [*stamps, *stamps, "claims", "registers", *(["digests"] if has_digests else []), *owners]
        )
        array = twins.sides[0].read_guard(pool, name)
        if not array.size:
            return
        # Somewhere where there is something, so that the flip is met.
        used = np.flatnonzero(array.reshape(-1).view(np.uint8))
        byte = self._rng.choice(used.tolist()) if len(used) else self._rng.randrange(array.nbytes)
        twins.flip(pool, name, byte, 1 << self._rng.randrange(8))

    def in_events(self, events: list[Any]) -> list[Any]:
        """What the guard is told of who owns which blocks."""
        if not events or not self._strikes("ownership"):
            return events
        rng, told = self._rng, list(events)
        at = rng.randrange(len(told))
        kind, ids, owner, pool = told[at].values() if isinstance(told[at], dict) else told[at]
        odd = (
            (rng.choice(("allocate", "share", "free", "claim", "lend")), ids, owner, pool),
            (kind, ids, rng.choice((0, -1, owner + 1, 1 << 32)), pool),
            (kind, rng.choice((-1, 0, 1, 1 << 20, [2, 2], [])), owner, pool),
            (kind, ids, owner, rng.choice((-1, 0, 9, "nowhere"))),
        )
        told[at : at + 1] = rng.choice(([], [told[at]] * 2, [rng.choice(odd)], [rng.choice(odd), told[at]]))
        return told

    def in_arrays(self, arrays: Arrays) -> Arrays:
        """The arrays of a forward as the device finds them."""
        spoiled = dict(arrays)
        for kind in ("table", "rows", "slots", "lengths", "noise"):
            if self._strikes(kind):
                getattr(self, f"_spoil_{kind}")(spoiled)
        return spoiled

    def late(self, arrays: Arrays) -> Arrays | None:
        """What the arrays hold at TAIL, if that is not what HEAD found."""
        if not self._strikes("late"):
            return None
        spoiled = dict(arrays)
        for kind in ("table", "rows", "slots"):
            if self._rng.random() < 0.5:
                getattr(self, f"_spoil_{kind}")(spoiled)
        return {name: value for name, value in spoiled.items() if value is not arrays[name]}

    # ---- one kind each: an array of `arrays` is replaced by a changed copy ----
    def _change(self, arrays: Arrays, name: str, change: Callable[[Array], None]) -> None:
        value = arrays.get(name)
        if isinstance(value, list):
            i = self._rng.randrange(len(value))
            arrays[name] = [_changed(v, change) if n == i else v for n, v in enumerate(value)]
        elif value is not None:
            arrays[name] = _changed(value, change)

    def _spoil_table(self, arrays: Arrays) -> None:
        def change(table: Array) -> None:
            for _ in range(self._rng.randint(1, 3)):
                at = tuple(self._rng.randrange(n) for n in table.shape)
                table[at] = self._rng.choice((*EXTREMES, *range(40)))

        for name in _TABLES:
            self._change(arrays, name, change)

    def _spoil_rows(self, arrays: Arrays) -> None:
        def change(table: Array) -> None:
            a, b = (self._rng.randrange(len(table)) for _ in range(2))
            if self._rng.random() < 0.5:
                table[[a, b]] = table[[b, a]]
            else:
                table[a] = table[b]

        self._change(arrays, self._rng.choice(("block_table", "kv_indices", "request_slots", "request_ids")), change)

    def _spoil_slots(self, arrays: Arrays) -> None:
        def change(slots: Array) -> None:
            for _ in range(self._rng.randint(1, 3)):
                other = int(slots[self._rng.randrange(len(slots))])
                far = (*EXTREMES, *(WIDE_EXTREMES if slots.itemsize == 8 else ()))
                slots[self._rng.randrange(len(slots))] = self._rng.choice((*far, other, other, *range(80)))

        self._change(arrays, "slot_mapping", change)

    def _spoil_lengths(self, arrays: Arrays) -> None:
        def change(values: Array) -> None:
            values[self._rng.randrange(len(values))] += self._rng.choice((-3, -1, 1, 2, 9))

        self._change(arrays, self._rng.choice(_LENGTHS), change)

    def _spoil_noise(self, arrays: Arrays) -> None:
        rng = self._rng

        def change(values: Array) -> None:
            size, low = values.size, rng.choice((0, 0, -3))
            far = (*EXTREMES, *(WIDE_EXTREMES if values.itemsize == 8 else ()))
            noise = [rng.randrange(low, 60) if rng.random() < 0.9 else rng.choice(far) for _ in range(size)]
            values[...] = np.array(noise, np.int64).astype(values.dtype).reshape(values.shape)

        given = sorted(name for name, value in arrays.items() if isinstance(value, (list, np.ndarray)))
        for _ in range(rng.randint(1, 3)):
            self._change(arrays, rng.choice(given), change)


def _changed(array: Array, change: Callable[[Array], None]) -> Array:
    """A changed copy, its rows as far apart as those of the original."""
    if not array.size:
        return array
    if array.ndim == 2 and not array.flags.c_contiguous:
        copy = np.zeros((array.shape[0], array.strides[0] // array.itemsize), array.dtype)[:, : array.shape[1]]
        copy[...] = array
    else:
        copy = array.copy()
    change(copy)
    return copy
