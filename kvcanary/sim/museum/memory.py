"""The bytes of a stage's pool: what faults do to them behind the guard's back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary.layout import KvPool, Plane
from kvcanary.sim.museum.places import Array, Place
from kvcanary.sim.museum.shapes import plane_name, short_name

Bytes: TypeAlias = npt.NDArray[np.uint8]


class Layout(Protocol):
    """What arrays an engine keeps, and the pool that describes them."""

    @property
    def page(self) -> int:
        """Slots per block."""

    @property
    def n_blocks(self) -> int:
        """Blocks of the pool."""

    @property
    def lut(self) -> bool:
        """Whether the tables are translated by a slot look-up table."""

    def arrays(self) -> dict[str, Any]:
        """Zeroed host arrays by name."""

    def pool(self, arrays: dict[str, Any], slot_lut: Any = None) -> KvPool:
        """The pool over such arrays, wherever they lie."""

    @property
    def array_name(self) -> Callable[[Plane], str]:
        """The name of the array that a plane lies in."""


class Memory:
    """A pool at a place, and its bytes as the host sees them.

    Attributes:
        pool: what the guard is given.
    """

    def __init__(self, place: Place, shape: Layout) -> None:
        self._place, self._page, self._name_of = place, shape.page, shape.array_name
        self._here = shape.arrays()  # host twins; on the host the arrays themselves
        self._is_host = place.stream is None
        self._there = self._here if self._is_host else {name: place.put(a) for name, a in self._here.items()}
        lut = np.arange(shape.n_blocks * shape.page, dtype=np.int64) if shape.lut else None
        self._lut = None if lut is None else place.put(lut)
        self.pool = shape.pool(self._there, self._lut)
        self._twin = shape.pool(self._here)

    @contextmanager
    def bytes_of(self, plane: Plane) -> Iterator[Bytes]:
        """The bytes of a plane, u8[n_blocks, page, chunks, bytes of a chunk], to be read and written."""
        name = self._name_of(plane)
        if not self._is_host:
            np.copyto(self._here[name], self._place.read(self._there[name]))
        yield self._twin.host_bytes(self._twin.planes[self.pool.planes.index(plane)])
        if not self._is_host:
            self._place.assign(self._there[name], self._here[name])

    def planes(self, layers: Sequence[int] | None = None, names: str | None = None) -> list[Plane]:
        """Planes of some layers (None = all) and some names ("k v"; None = all)."""
        return [
            p
            for p in self.pool.planes
            if (layers is None or p.layer in layers) and (names is None or short_name(p) in names.split())
        ]

    def edit(self, slots: Sequence[int], change: Callable[[Bytes], Any], planes: Sequence[Plane] | None = None) -> None:
        """Overwrite slots; ``change`` takes and returns u8[n, bytes of a slot]."""
        for plane in self.pool.planes if planes is None else planes:
            with self.bytes_of(plane) as view:
                at = self._index(slots)
                found = view[at]
                view[at] = np.asarray(change(found.reshape(len(found), -1)), np.uint8).reshape(found.shape)

    def save(self, slots: Sequence[int], planes: Sequence[Plane] | None = None) -> dict[str, Array]:
        """Copies of the bytes of slots, by plane."""
        saved: dict[str, Array] = {}
        for plane in self.pool.planes if planes is None else planes:
            with self.bytes_of(plane) as view:
                saved[plane_name(plane)] = view[self._index(slots)].copy()
        return saved

    def load(self, saved: Mapping[str, Array], slots: Sequence[int], planes: Sequence[Plane] | None = None) -> None:
        """Write saved bytes into slots, as DMA does."""
        for plane in self.pool.planes if planes is None else planes:
            if plane_name(plane) in saved:
                with self.bytes_of(plane) as view:
                    view[self._index(slots)] = saved[plane_name(plane)]

    def set_lut(self, slots: Sequence[int], to: int) -> None:
        """Change entries of the slot look-up table."""
        assert self._lut is not None, "this shape has no slot_lut"
        table = self._place.read(self._lut)
        table[list(slots)] = to
        self._place.assign(self._lut, table)

    def _index(self, slots: Sequence[int]) -> tuple[Array, Array]:
        index = np.array(list(slots))
        return index // self._page, index % self._page


# ---- what happens to bytes -------------------------------------------------------------------------------------------
def flip(byte: int = 0, mask: int = 1) -> Callable[[Bytes], Bytes]:
    """Flip bits of one byte."""

    def change(data: Bytes) -> Bytes:
        data[:, byte] ^= np.uint8(mask)
        return data

    return change


def fill(value: int) -> Callable[[Bytes], Bytes]:
    """Set every byte: 0 is a memset, 0xFF a NaN in every floating-point format."""
    return lambda data: np.full_like(data, value)


def permute(data: Bytes) -> Bytes:
    """What another layout makes of the bytes."""
    return data[:, ::-1]
