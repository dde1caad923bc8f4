"""The pool: one slot index space, the planes stored in it, and what the kernels must know of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary.abi import DIGEST, MAX_PLANE_BYTES, MAX_RESERVED, MAX_SINK, PLANE, zeros_of
from kvcanary.arrays import ArrayView, host_array, view_of
from kvcanary.errors import LayoutError
from kvcanary.overlap import Placed, overlapping
from kvcanary.planes import (
    ONE_WORD,
    Plane,
    axes_of,
    blocks_that_fit,
    check_addresses,
    is_one_word,
    plane_address,
)
from kvcanary.tags import Half, PoolKind

__all__ = ["DigestUnit", "KvPool", "Plane", "plane_address"]

GROUP_PLANE_BYTES = 256  # planes that share a digest are smaller
MAX_SLOTS = (1 << 31) - 1
_MAX_LOAD_BYTES = 16


class DigestUnit(NamedTuple):
    """A plane, or a group of planes, with a digest per slot; ``first_plane`` counts in `KvPool.ordered_planes`."""

    first_plane: int
    n_planes: int
    n_words: int
    half: Half
    name: str
    layer: int


@dataclass(frozen=True, kw_only=True, eq=False)
class KvPool:
    """One slot index space and the planes stored in it.

    Attributes:
        planes: one or more per layer; none only with ``real_data="none"`` (stamps alone).
        page_size: slots per block; 1 where the table is per token, the whole sequence in static caches.
        n_blocks: 0 = as many as fit into the planes' arrays.
        name: one word, for reports and for ``pool=``.
        kind: `PoolKind.FULL` for layers that see all tokens, `PoolKind.SWA` for sliding-window layers.
        window: tokens that a query of an SWA pool sees, its own included; None for FULL.
        ring_length: positions that a request's tables hold of the later ones, the newest in the place of the oldest
            (a rolling buffer); 0 = every position has a place of its own. An SWA pool's, and not below its window.
        sink: positions at the start of a request that stay visible beside the window (attention sinks), at most 128.
        ring_bubble: places left unused between the sink and the ring.
        reserved_blocks: blocks that hold no request's data (the null block, padding): at most 8, and not all.
        token_offset: token that position p holds is the request's token p + token_offset (EAGLE draft pools).
        slot_lut: i64[n_full] from the slot in the batch's tables to the slot here; negative or reserved = evicted.
        may_alias: whether its bytes may also be another pool's, at other times; needs ``lifecycle``.
        expected_every_step: whether steps without a launch for this pool count as a stalled guard, unless the engine's
            forwards leave it out by ``pools=``.

    Raises:
        LayoutError: some byte of some slot lies outside its array, or two slots share one.
    """

    planes: tuple[Plane, ...]
    page_size: int
    n_blocks: int = 0
    name: str = "full"
    kind: PoolKind = PoolKind.FULL
    window: int | None = None
    reserved_blocks: tuple[int, ...] = (0,)
    token_offset: int = 0
    slot_lut: Any = None
    may_alias: bool = False
    expected_every_step: bool = True
    ring_length: int = 0
    sink: int = 0
    ring_bubble: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if self.page_size < 1 or self.n_blocks < 0:
            raise self._error(f"page_size={self.page_size}, n_blocks={self.n_blocks}: give both >= 1, or n_blocks=0")
        for plane in self.planes:
            if plane.tok_split and self.page_size % plane.tok_split:
                raise self._error(
                    f"{plane.label}: tok_split={plane.tok_split} does not divide page_size={self.page_size}: "
                    "give the tokens of a run that the pages are whole numbers of"
                )
        if not self.planes and not self.n_blocks:
            raise self._error("n_blocks=0 and no plane to derive it from: give n_blocks")
        if not self.n_blocks:
            object.__setattr__(self, "n_blocks", min(blocks_that_fit(p, self.page_size) for p in self.planes))
        self._check_numbers()
        self._check_groups()
        self._check_arrays()
        for plane in self.planes:
            check_addresses(plane, self.n_blocks, self.page_size)
        self.check_overlaps()

    def __repr__(self) -> str:
        size = f"{self.n_blocks} blocks x {self.page_size} slots"
        planes = f"{len(self.planes)} planes on {self.device}" if self.planes else "no planes"
        n_bytes = self.bytes_per_slot * self.n_slots
        return f"<KvPool {self.name} ({self.kind.name}): {size}, {planes}, {n_bytes} bytes>"

    # ---- derived -----------------------------------------------------------------------------------------------------
    @property
    def n_slots(self) -> int:
        """Slots of the pool, those of reserved blocks too."""
        return self.n_blocks * self.page_size

    @property
    def halves(self) -> tuple[Half, ...]:
        """The halves that have planes; K alone for a pool without planes."""
        return tuple(h for h in Half if any(p.half == h for p in self.planes)) or (Half.K,)

    @property
    def device(self) -> str | None:
        """Where the planes lie, "cpu" or "cuda:N"; None without planes."""
        return self.planes[0].view.device if self.planes else None

    @property
    def bytes_per_slot(self) -> int:
        """KV bytes of one slot, all planes together."""
        return sum(p.n_bytes for p in self.planes)

    @cached_property
    def ordered_planes(self) -> tuple[Plane, ...]:
        """The planes in declared order, each group drawn together behind its first member."""
        return tuple(p for unit in self._units for p in unit)

    @cached_property
    def lut_view(self) -> ArrayView | None:
        """The resolved ``slot_lut``."""
        return None if self.slot_lut is None else view_of(self.slot_lut, f"pool {self.name!r}: slot_lut", LayoutError)

    @cached_property
    def _units(self) -> tuple[tuple[Plane, ...], ...]:
        units: dict[object, list[Plane]] = {}
        for i, plane in enumerate(self.planes):
            units.setdefault(("alone", i) if plane.group is None else ("group", plane.group), []).append(plane)
        return tuple(map(tuple, units.values()))

    # ---- what crosses to the device ----------------------------------------------------------------------------------
    def digest_units(self, real_data: str = "all") -> list[DigestUnit]:
        """What has a digest per slot, in the order of the digests."""
        units, first = [], 0
        for planes in self._units if real_data != "none" else ():
            n_bytes = sum(p.n_chunks * p.digested_chunk_bytes(real_data) for p in planes)
            name = "+".join(p.name for p in planes)
            units.append(DigestUnit(first, len(planes), -(-n_bytes // 4), planes[0].half, name, planes[0].layer))
            first += len(planes)
        return units

    def digest_records(self, real_data: str = "all", base_of: Callable[[Plane], int] | None = None) -> npt.NDArray[Any]:
        """DIGEST[n_digests]: `digest_units` as the kernels read them; ``base_of`` as in `plane_records`."""
        planes = self.plane_records(real_data, base_of)
        units = self.digest_units(real_data)
        records = np.zeros(len(units), DIGEST)
        for record, unit in zip(records, units, strict=True):
            record["first_plane"], record["n_planes"] = unit.first_plane, unit.n_planes
            record["n_words"], record["half"] = unit.n_words, unit.half
            plane = planes[unit.first_plane]
            if unit.n_planes == 1 and plane["load_bytes"] >= 8 and not plane["tok_split"]:
                record["n_loads"] = plane["n_chunks"] * plane["chunk_bytes"] // plane["load_bytes"]
                record["load_bytes"] = plane["load_bytes"]
        return records

    def plane_records(self, real_data: str = "all", base_of: Callable[[Plane], int] | None = None) -> npt.NDArray[Any]:
        """PLANE[n_planes], in the order of `ordered_planes`.

        Args:
            base_of: address of the first element of a plane's array; None = as the array itself tells it.
        """
        records = np.zeros(len(self.planes) if real_data != "none" else 0, PLANE)
        i = 0
        for planes in self._units if real_data != "none" else ():
            byte_offset = 0
            for plane in planes:
                n = plane.digested_chunk_bytes(real_data)
                first = plane.view.pointer if base_of is None else base_of(plane)
                records[i] = self.plane_record(plane, n, byte_offset, first)
                byte_offset += plane.n_chunks * n
                i += 1
        return records

    def plane_record(self, plane: Plane, n: int, byte_offset: int = 0, first: int | None = None) -> npt.NDArray[Any]:
        """One PLANE.

        Args:
            n: bytes of each chunk that count.
            byte_offset: bytes of its digest before it.
            first: address of the array's first element; None = as the array itself tells it.
        """
        row = zeros_of(PLANE)
        base = (plane.view.pointer if first is None else first) + plane.offset
        steps = [stride for stride, _ in axes_of(plane, self.n_blocks, self.page_size)]
        row["base"], row["page_stride"], row["token_stride"] = base, plane.page_stride, plane.token_stride
        row["chunk_stride"], row["n_chunks"], row["chunk_bytes"] = plane.chunk_stride, plane.n_chunks, n
        row["tok_split"], row["tok_hi_stride"] = plane.tok_split, plane.tok_hi_stride
        row["load_bytes"] = math.gcd(_MAX_LOAD_BYTES, base, n, byte_offset, *steps)
        row["byte_offset"], per_chunk = byte_offset, n // int(row["load_bytes"])
        row["chunk_magic"] = -(-(1 << 32) // per_chunk) if per_chunk > 1 else 0
        return row

    # ---- host memory -------------------------------------------------------------------------------------------------
    def host_bytes(self, plane: Plane, real_data: str = "all") -> npt.NDArray[np.uint8]:
        """The plane in host memory, as a view u8[n_blocks, page_size, n_chunks, bytes of a chunk].

        Of a plane with a split it is u8[n_blocks, page_size / split, split, ...]; `slot_index` fits both.
        """
        view = plane.view
        if not view.is_host:
            raise LayoutError(f"{plane.label} is on {view.device}: only planes in host memory can be read from here")
        shape = [self.n_blocks, self.page_size, plane.n_chunks, plane.digested_chunk_bytes(real_data)]
        strides = [plane.page_stride, plane.token_stride, plane.chunk_stride, 1]
        if plane.tok_split:
            shape[1:2] = self.page_size // plane.tok_split, plane.tok_split
            strides.insert(1, plane.tok_hi_stride)
        first = view.pointer + plane.offset
        return host_array(first, shape, strides, np.uint8, owner=view.owner, readonly=view.readonly)

    def slot_index(self, plane: Plane, slots: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """Index of ``slots`` (integers in [0, n_slots)) in `host_bytes`: it gives u8[n, n_chunks, bytes of a chunk]."""
        block, token = np.divmod(slots, self.page_size)
        return (block, *np.divmod(token, plane.tok_split)) if plane.tok_split else (block, token)

    def gather(self, plane: Plane, slots: npt.NDArray[Any], real_data: str = "all") -> npt.NDArray[np.uint8]:
        """Copy the digested bytes of ``slots`` (integers in [0, n_slots)) of a plane in host memory: u8[n, bytes]."""
        data = self.host_bytes(plane, real_data)
        found: npt.NDArray[np.uint8] = data[self.slot_index(plane, slots)]
        return found.reshape(len(slots), data.shape[-2] * data.shape[-1])

    # ---- checks ------------------------------------------------------------------------------------------------------
    def check(self, real_data: str = "all", device_kind: str | None = None) -> None:
        """Check what depends on the configuration.

        Args:
            device_kind: where the guard runs, "cpu" or "cuda"; None = not known yet.

        Raises:
            LayoutError: a digest over more than 64 KiB, no planes to digest, or planes where the guard does not run.
        """
        if not self.planes and real_data != "none":
            raise self._error(
                f"no planes, but real_data={real_data!r}: give planes, or real_data='none' for stamps alone"
            )
        if device_kind is not None and self.device is not None and self.device.split(":")[0] != device_kind:
            raise self._error(
                f"its planes are on {self.device}, the guard runs on {device_kind}: "
                "choose backend='host' for KV in host memory and backend='cuda' for KV on a GPU"
            )
        for unit in self.digest_units(real_data):
            if unit.n_words * 4 > MAX_PLANE_BYTES:
                raise self._error(
                    f"{unit.name!r} of layer {unit.layer} digests {unit.n_words * 4} bytes a slot, at most "
                    f"{MAX_PLANE_BYTES} are allowed: split it into planes by its chunks, or use real_data='partial'"
                )

    def check_overlaps(self) -> None:
        """LayoutError if two planes share a byte."""
        placed = [Placed(plane, self.n_blocks, self.page_size) for plane in self.planes]
        for first, second in overlapping(placed, in_one_pool=True):
            a, b = first.plane, second.plane
            begin = " and begin at the same byte" if _first_byte(a) == _first_byte(b) else ""
            raise self._error(
                f"{a.label} and {b.label} share bytes{begin}: give shared memory once, and check offsets and strides"
            )

    def _error(self, text: str) -> LayoutError:
        return LayoutError(f"pool {self.name!r}: {text}")

    def _check_types(self) -> None:
        """Every field of its type, integers of any kind as Python's."""
        kinds = [kind for kind in PoolKind if isinstance(self.kind, int) and kind == self.kind]
        if not isinstance(self.name, str):
            raise LayoutError(f"pool name={self.name!r}: give a string")
        if not is_one_word(self.name):
            raise LayoutError(f"pool name={self.name!r}: give {ONE_WORD}")
        planes = self._items("planes", self.planes, "Planes")
        if not all(isinstance(p, Plane) for p in planes):
            kinds_given = ", ".join(sorted({type(p).__name__ for p in planes}))
            raise self._error(f"planes is a list of {kinds_given}: give a tuple of Planes")
        if not kinds:
            raise self._error(f"kind={self.kind!r}: choose one of {', '.join(f'PoolKind.{k.name}' for k in PoolKind)}")
        for name in ("expected_every_step", "may_alias"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(f"{name}={getattr(self, name)!r}: give True or False")
        names = ("page_size", "n_blocks", "token_offset", "ring_length", "sink", "ring_bubble")
        numbers = {name: self._integer(name, getattr(self, name)) for name in names}
        if self.window is not None:
            numbers["window"] = self._integer("window", self.window)
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
        blocks = self._items("reserved_blocks", self.reserved_blocks, "block numbers")
        reserved = tuple(self._integer("a block of reserved_blocks", b) for b in blocks)
        object.__setattr__(self, "reserved_blocks", reserved)
        object.__setattr__(self, "planes", planes)
        object.__setattr__(self, "kind", kinds[0])

    def _items(self, name: str, values: Any, what: str) -> tuple[Any, ...]:
        try:
            return tuple(values)
        except TypeError:
            raise self._error(f"{name}={values!r}: give a tuple of {what}") from None

    def _integer(self, name: str, value: Any) -> int:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise self._error(f"{name}={value!r}: give an integer")
        return int(value)

    def _check_numbers(self) -> None:
        if not 1 <= self.n_slots <= MAX_SLOTS:
            raise self._error(f"{self.n_blocks} blocks x {self.page_size} = {self.n_slots} slots; 1 to {MAX_SLOTS} fit")
        is_window = self.window is None or 1 <= self.window <= MAX_SLOTS
        if (self.kind is PoolKind.SWA) != (self.window is not None) or not is_window:
            raise self._error(
                f"kind {self.kind.name} with window={self.window}: an SWA pool needs a window of 1 to {MAX_SLOTS} "
                "(tokens, the query's own included), a FULL pool has None"
            )
        self._check_ring()
        blocks = self.reserved_blocks
        if len(blocks) > MAX_RESERVED or len(set(blocks)) != len(blocks):
            raise self._error(f"reserved_blocks={blocks}: give at most {MAX_RESERVED} blocks, each once")
        if any(not 0 <= b < self.n_blocks for b in blocks):
            raise self._error(f"reserved_blocks={blocks}: blocks are 0 to {self.n_blocks - 1}; () if none is reserved")
        if len(blocks) == self.n_blocks:
            raise self._error(
                f"reserved_blocks={blocks} are all of its {self.n_blocks} blocks, so nothing would be guarded: give "
                "more blocks, or reserved_blocks=() if the engine hands them out"
            )
        if not -MAX_SLOTS <= self.token_offset <= MAX_SLOTS:
            raise self._error(f"token_offset={self.token_offset}: must fit in 32 bits")
        if self.halves == (Half.V,):
            raise self._error("all planes are of half V: a pool of one half gives its planes half K")

    def _check_ring(self) -> None:
        window, ring = self.window or 0, self.ring_length
        if not 0 <= self.sink <= MAX_SINK or (self.sink and not window):
            raise self._error(
                f"sink={self.sink} with window={self.window}: give 0 to {MAX_SINK} tokens, to an SWA pool"
            )
        if ring and not 1 <= window <= ring <= MAX_SLOTS:
            raise self._error(
                f"ring_length={ring} with window={self.window}: a ring holds at least the window of an SWA pool"
            )
        if not 0 <= self.ring_bubble <= MAX_SLOTS or ring < 0 or (self.ring_bubble and not ring):
            raise self._error(
                f"ring_bubble={self.ring_bubble} with ring_length={ring}: places >= 0, and a bubble only before a ring"
            )

    def _check_groups(self) -> None:
        for planes in self._units:
            if len({(p.layer, p.half) for p in planes}) > 1:
                where = ", ".join(f"{p.name!r} ({p.half.name}, layer {p.layer})" for p in planes)
                raise self._error(f"group {planes[0].group!r} mixes {where}: one label per layer and half")
            large = next((p for p in planes if p.group is not None and p.n_bytes >= GROUP_PLANE_BYTES), None)
            if large is not None:
                raise self._error(
                    f"group {large.group!r}: {large.label} has {large.n_bytes} bytes; only planes of less than "
                    f"{GROUP_PLANE_BYTES} share a digest, give it group=None"
                )

    def _check_arrays(self) -> None:
        for plane in self.planes:
            if plane.view.device != self.device:
                raise self._error(
                    f"{self.planes[0].label} is on {self.device}, {plane.label} on {plane.view.device}: "
                    "one pool lies on one device, make a pool per device"
                )
        lut = self.lut_view
        if lut is None:
            return
        if len(lut.shape) != 1 or lut.itemsize != 8 or lut.dtype not in ("", "int64") or not lut.is_contiguous:
            raise self._error(f"slot_lut is {lut.dtype}{list(lut.shape)}: give a contiguous int64[n_full]")
        if self.device is not None and lut.device != self.device:
            raise self._error(f"slot_lut is on {lut.device}, the planes on {self.device}: put it beside them")


def _first_byte(plane: Plane) -> int:
    return plane.view.pointer + plane.offset
