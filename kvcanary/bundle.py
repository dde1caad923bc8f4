"""Exported slots: what a guard knows of KV that leaves its pool, for the guard of the pool where it arrives.

A bundle holds token ids, which are user content: store and send it as you would the prompt.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends.moves import SlotImage
from kvcanary.errors import BundleError
from kvcanary.layout import KvPool

MAGIC, VERSION = b"kvcslots", 1
PORTABLE = np.dtype([("chain", "<u8"), ("token", "<i4"), ("position", "<i4")])
_HEADER = struct.Struct("<8sIIQQ")  # magic, version, bytes of the geometry, entries, bytes of the whole
_CHECKSUM_BYTES = 32
_REAL_DATA = ("none", "all", "partial")
_LINKS = (abi.PREV_IN_LIST, abi.PREV_NONE, abi.PREV_RELATIVE, abi.PREV_RELATIVE_BASE - abi.PREV_IN_LIST)

Array = npt.NDArray[Any]


class SlotState(IntEnum):
    """What became of a slot before it was exported."""

    NEVER = 0  #: never written
    UNFINISHED = 1  #: its HEAD and TAIL stamps are of different forwards: nobody vouches for it, and no import takes it
    WHOLE = 2


@dataclass(frozen=True)
class Geometry:
    """What two pools must have in common for stamps and digests of one to hold in the other.

    Page size, number of slots and where the bytes lie do not belong to it.

    Attributes:
        halves: 1 (K) or 2.
        units: per digest: 32-bit words, half, and (bytes, chunks) of each of its planes; the chunks count only with
            real_data="partial", which takes the first bytes of each.
    """

    halves: int
    real_data: str
    token_offset: int
    units: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]

    @classmethod
    def of(cls, pool: KvPool, real_data: str) -> Geometry:
        """The geometry of a pool."""
        units = []
        for unit in pool.digest_units(real_data):
            planes = pool.ordered_planes[unit.first_plane : unit.first_plane + unit.n_planes]
            sizes = [(p.n_chunks * p.digested_chunk_bytes(real_data), p.n_chunks) for p in planes]
            kept = tuple((n_bytes, n_chunks if real_data == "partial" else 0) for n_bytes, n_chunks in sizes)
            units.append((unit.n_words, int(unit.half), kept))
        return cls(len(pool.halves), real_data, pool.token_offset, tuple(units))

    def difference(self, other: Geometry) -> str:
        """The first thing in which this one (a bundle's) differs from another one (a pool's); "" if nothing."""
        for name in ("halves", "real_data", "token_offset"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"it has {name}={mine!r}, the pool {theirs!r}"
        if len(self.units) != len(other.units):
            return f"it has {len(self.units)} digests a slot, the pool {len(other.units)}"
        for d, (mine, theirs) in enumerate(zip(self.units, other.units, strict=True)):
            if mine != theirs:
                return f"its digest {d} is of (words, half, planes) {mine}, the pool's of {theirs}"
        return ""

    def _to_bytes(self) -> bytes:
        out = [struct.pack("<IIiI", self.halves, _REAL_DATA.index(self.real_data), self.token_offset, len(self.units))]
        for n_words, half, planes in self.units:
            out.append(struct.pack(f"<III{2 * len(planes)}I", n_words, half, len(planes), *sum(planes, ())))
        return b"".join(out)

    @classmethod
    def _from_bytes(cls, data: bytes) -> Geometry:
        halves, real_data, token_offset, n_units = struct.unpack_from("<IIiI", data)
        at, units = 16, []
        for _ in range(n_units):
            n_words, half, n_planes = struct.unpack_from("<III", data, at)
            numbers = struct.unpack_from(f"<{2 * n_planes}I", data, at + 12)
            units.append((n_words, half, tuple(zip(numbers[::2], numbers[1::2], strict=True))))
            at += 12 + 8 * n_planes
        return cls(halves, _REAL_DATA[real_data], token_offset, tuple(units))


@dataclass(frozen=True, eq=False)
class SlotBundle:
    """The stamps and digests of exported slots, in the order of their list; see `CanaryManager.export_slots`.

    It holds token ids, which are user content.

    Attributes:
        geometry: of the pool that it comes from.
        stamps: PORTABLE[2 * halves, n]: chain, token, position; HEAD of each half, then TAIL.
        links: i8[2 * halves, n]: whether a stamp continues the entry before it.
        states: u8[n]: `SlotState`.
        digests: u64[n_digests, n]; 0 = none.
    """

    geometry: Geometry
    stamps: Array
    links: Array
    states: Array
    digests: Array

    def __post_init__(self) -> None:
        n, planes = len(self.states), 2 * self.geometry.halves
        wanted = {"stamps": (planes, n), "links": (planes, n), "states": (n,), "digests": (len(self.geometry.units), n)}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise BundleError(f"{name} of a bundle has shape {getattr(self, name).shape}: give {shape}")
        if not np.isin(self.links, _LINKS).all() or (self.states > max(SlotState)).any():
            raise BundleError(f"links or states of a bundle hold unknown values: links are {_LINKS}")

    def __len__(self) -> int:
        return len(self.states)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlotBundle) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, part: slice) -> SlotBundle:
        """Some neighbouring entries, ``bundle[i:j]``."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise BundleError(f"bundle[{part!r}]: give a range of neighbours, bundle[i:j]")
        return SlotBundle(
            self.geometry,
            self.stamps[:, part],
            _without_a_start(self.links[:, part]),
            self.states[part],
            self.digests[:, part],
        )

    @classmethod
    def concatenate(cls, bundles: Sequence[SlotBundle]) -> SlotBundle:
        """The entries of several bundles of one geometry, one after the other."""
        if not bundles:
            raise BundleError("no bundles to concatenate: give at least one")
        for b in bundles[1:]:
            if text := b.geometry.difference(bundles[0].geometry):
                raise BundleError(f"bundles of different pools: {text.replace('the pool', 'the first')}")
        joined = [
            np.concatenate([getattr(b, name) for b in bundles], axis=-1)
            for name in ("stamps", "links", "states", "digests")
        ]
        return cls(bundles[0].geometry, *joined)

    @classmethod
    def of_nothing(cls) -> SlotBundle:
        """What a guard that is off exports: no entries, of no pool."""
        empty = [np.zeros((0, 0), PORTABLE), np.zeros((0, 0), np.int8), np.zeros(0, np.uint8), np.zeros((0, 0), "<u8")]
        return cls(Geometry(0, "none", 0, ()), *empty)

    # ---- images ------------------------------------------------------------------------------------------------------
    @classmethod
    def from_image(cls, geometry: Geometry, image: SlotImage) -> SlotBundle:
        """What a backend has exported."""
        steps = image.stamps["step"]
        head, tail = steps[: geometry.halves], steps[geometry.halves :]
        whole, never = ((head != 0) & (head == tail)).all(0), (steps == 0).all(0)
        states = np.where(whole, SlotState.WHOLE, np.where(never, SlotState.NEVER, SlotState.UNFINISHED))
        stamps = np.zeros(steps.shape, PORTABLE)
        for name in ("chain", "token", "position"):
            stamps[name] = image.stamps[name]
        links = _without_a_start(image.stamps["prev_slot"].astype(np.int8))
        return cls(geometry, stamps, links, states.astype(np.uint8), image.digests.astype("<u8"))

    def to_image(self) -> SlotImage:
        """What a backend takes: only whole slots are written in it."""
        whole = self.states == SlotState.WHOLE
        stamps = np.zeros(self.stamps.shape, abi.STAMP)
        for name in ("chain", "token", "position"):
            stamps[name] = np.where(whole, self.stamps[name], 0)
        stamps["prev_slot"], stamps["step"] = np.where(whole, self.links, 0), whole
        return SlotImage(stamps, np.where(whole, self.digests, np.uint64(0)))

    # ---- bytes -------------------------------------------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """The bundle as bytes, with a checksum: for any storage or wire. Little-endian on every machine."""
        geometry = self.geometry._to_bytes()
        parts = [geometry, *(np.ascontiguousarray(a).tobytes() for a in (self.stamps, self.links, self.states))]
        parts.append(np.ascontiguousarray(self.digests, "<u8").tobytes())
        n_bytes = _HEADER.size + sum(map(len, parts)) + _CHECKSUM_BYTES
        body = b"".join([_HEADER.pack(MAGIC, VERSION, len(geometry), len(self), n_bytes), *parts])
        return body + _checksum(body)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> SlotBundle:
        """The bundle of which these are the bytes.

        Raises:
            BundleError: they are of something else, of another version, too few, too many, or damaged.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise BundleError(f"{type(data).__name__}: give the to_bytes() of a bundle")
        data = bytes(data)
        if len(data) < _HEADER.size + _CHECKSUM_BYTES or not data.startswith(MAGIC):
            raise BundleError(f"{len(data)} bytes that do not begin with {MAGIC!r}: give the to_bytes() of a bundle")
        _magic, version, n_geometry, n, n_bytes = _HEADER.unpack_from(data)
        if version != VERSION:
            raise BundleError(f"bundle of version {version}, this is for {VERSION}: export and import with one version")
        if n_bytes != len(data):
            raise BundleError(f"{len(data)} bytes of a bundle of {n_bytes}: cut off, or more behind it; give all of it")
        body = data[:-_CHECKSUM_BYTES]
        if _checksum(body) != data[-_CHECKSUM_BYTES:]:
            raise BundleError("the bundle's checksum is not that of its bytes: it was damaged on the way; export anew")
        try:
            return cls._from_body(body, n_geometry, n)
        except BundleError:
            raise
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            raise BundleError(
                f"the bundle's checksum is right, but not its contents ({error}): made by something else; export anew"
            ) from error

    @classmethod
    def _from_body(cls, body: bytes, n_geometry: int, n: int) -> SlotBundle:
        """The parts behind the header; ValueError and the like if they are not of the sizes that it tells."""
        geometry = Geometry._from_bytes(body[_HEADER.size : _HEADER.size + n_geometry])
        at, planes, arrays = _HEADER.size + n_geometry, 2 * geometry.halves, []
        shapes: tuple[tuple[Any, tuple[int, ...]], ...]
        shapes = ((PORTABLE, (planes, n)), ("i1", (planes, n)), ("u1", (n,)), ("<u8", (len(geometry.units), n)))
        wanted = at + sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes)
        if wanted != len(body):
            raise ValueError(f"{n} entries take {wanted} bytes, there are {len(body)}")
        for dtype, shape in shapes:
            count = math.prod(shape)
            arrays.append(np.frombuffer(body, dtype, count, at).reshape(shape) if count else np.zeros(shape, dtype))
            at += count * np.dtype(dtype).itemsize
        return cls(geometry, *arrays)


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()


def _without_a_start(links: Array) -> Array:
    """Links of entries of which the first has none before it."""
    links = links.copy()
    first = links[:, :1]
    first[first == abi.PREV_IN_LIST] = abi.PREV_NONE
    first[first == abi.PREV_RELATIVE_BASE - abi.PREV_IN_LIST] = abi.PREV_RELATIVE
    return links
