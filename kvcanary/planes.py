"""One plane: where the bytes that one array keeps for each slot lie.

address(slot, chunk, byte) = first element + offset + slot // page_size * page_stride
                             + token(slot % page_size) + chunk * chunk_stride + byte
token(t) = t * token_stride, or with a split t // tok_split * tok_hi_stride + t % tok_split * token_stride
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvcanary.arrays import ArrayView, view_of
from kvcanary.elements import ELEMENTS, Element, dtype_name
from kvcanary.errors import LayoutError
from kvcanary.tags import Half

ONE_WORD = "one word of printable characters, without spaces and '=': it stands in lines of key=value"
PARTIAL_BYTES = 16  # of each chunk, with real_data="partial"
_MAX_RUNS_COMPARED = 1 << 22  # runs whose addresses are sorted when strides alone do not show that slots are apart
_FAR = 1 << 62  # bytes: further than any memory, and still a 64-bit number after a step or two
# Fields of Plane and the least they can be; a flipped array has negative strides and is not addressed.
_PLANE_NUMBERS = (
    ("offset", -_FAR),
    ("page_stride", 0),
    ("token_stride", 0),
    ("chunk_stride", 0),
    ("tok_split", 0),
    ("tok_hi_stride", 0),
    ("n_chunks", 1),
    ("chunk_bytes", 1),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plane:
    """The bytes that one array keeps for each slot: ``n_chunks`` runs of ``chunk_bytes``; touching runs become one.

    Attributes:
        data: any array, or ``(pointer, shape, strides, itemsize[, device])``; see `kvcanary.arrays.view_of`.
        offset: bytes from the array's first element to the first byte of slot 0.
        page_stride: bytes from one page to the next; may be smaller than ``token_stride``.
        token_stride: bytes from one slot to the next inside a page.
        chunk_stride: bytes from one chunk of a slot to the next.
        tok_split: tokens of a page that are ``token_stride`` apart, where the page's tokens are interleaved; it divides
            the page size. 0 = all of them.
        tok_hi_stride: bytes from one such run of tokens to the next; 0 without ``tok_split``.
        half: `Half.K` also for fused and latent arrays.
        layer: number of the layer, as `verify_layer` and the reports call it.
        name: "k", "v", "k_scale", ..., one word; empty = the half's.
        group: planes (< 256 bytes) of one layer and half with the same label share one digest.
        dtype: name or type object of the elements, where the array does not tell it (uint8 or uint16 arrays, raw
            pointers); "uint8" for what holds no floats; empty = as the array says.
    """

    data: Any
    offset: int = 0
    page_stride: int
    token_stride: int
    chunk_stride: int = 0
    tok_split: int = 0
    tok_hi_stride: int = 0
    n_chunks: int = 1
    chunk_bytes: int
    half: Half = Half.K
    layer: int = 0
    name: str = ""
    group: int | str | None = None
    dtype: Any = ""

    def __post_init__(self) -> None:
        self._check_names()
        for field, least in _PLANE_NUMBERS:
            value = getattr(self, field)
            if not isinstance(value, (int, np.integer)) or value < least:
                raise LayoutError(f"{self.label}: {field}={value!r}; give an integer >= {least} (sizes in bytes)")
            if value > _FAR:
                raise LayoutError(f"{self.label}: {field}={value}; no memory reaches that far, give bytes")
            object.__setattr__(self, field, int(value))
        if self.n_chunks > 1 and self.chunk_stride == self.chunk_bytes:
            object.__setattr__(self, "chunk_bytes", self.n_chunks * self.chunk_bytes)
            object.__setattr__(self, "n_chunks", 1)
        if self.n_chunks == 1:
            object.__setattr__(self, "chunk_stride", 0)
        if self.tok_hi_stride and not self.tok_split:
            raise LayoutError(
                f"{self.label}: tok_hi_stride={self.tok_hi_stride} without tok_split: give the tokens of a run, >= 1"
            )
        if self.tok_hi_stride == self.tok_split * self.token_stride:  # runs in line are no split
            object.__setattr__(self, "tok_split", 0)
            object.__setattr__(self, "tok_hi_stride", 0)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype in ELEMENTS and self.element is None:
            raise LayoutError(
                f"{self.label}: dtype {self.dtype} in chunks of {self.chunk_bytes} bytes: give the type whose size "
                "divides them, or an integer type (uint8) for what holds no floats"
            )

    def _check_names(self) -> None:
        halves = [half for half in Half if isinstance(self.half, int) and half == self.half]
        if not halves or not isinstance(self.name, str):
            raise LayoutError(f"plane of half={self.half!r}, name={self.name!r}: give Half.K or Half.V, and a string")
        if self.name and not is_one_word(self.name):
            raise LayoutError(f"plane name={self.name!r}: give {ONE_WORD}")
        object.__setattr__(self, "half", halves[0])
        object.__setattr__(self, "name", self.name or self.half.name.lower())
        if not isinstance(self.layer, (int, np.integer)):
            raise LayoutError(f"plane {self.name!r}: layer={self.layer!r}; give the number of the layer")
        object.__setattr__(self, "layer", int(self.layer))  # NumPy's are no JSON
        if not isinstance(self.group, (int, np.integer, str, type(None))):
            raise LayoutError(f"{self.label}: group={self.group!r}; give an integer or a string, or None for none")

    def __repr__(self) -> str:
        view = self.__dict__.get("view")
        on = f"{view.dtype or 'elements of unknown type'} on {view.device}" if view is not None else "not resolved"
        return f"<Plane {self.name} of layer {self.layer}, half {self.half.name}: {self.n_bytes} bytes a slot, {on}>"

    @property
    def label(self) -> str:
        """How messages call the plane."""
        return f"plane {self.name!r} of layer {self.layer}"

    @cached_property
    def view(self) -> ArrayView:
        """The resolved ``data``."""
        return view_of(self.data, self.label, LayoutError)

    @property
    def element(self) -> Element | None:
        """The type of the elements; None if they are integers, or of no known type.

        What the array says counts only where the plane lies on its elements: it may be a buffer of something else.
        """
        found = ELEMENTS.get(self.dtype or self.view.dtype)
        if found is None or self.chunk_bytes % found.n_bytes:
            return None
        steps = (self.offset, self.page_stride, self.token_stride, self.tok_hi_stride, self.chunk_stride)
        return found if self.dtype or not any(step % found.n_bytes for step in steps) else None

    @property
    def n_bytes(self) -> int:
        """Bytes of one slot."""
        return self.n_chunks * self.chunk_bytes

    def digested_chunk_bytes(self, real_data: str) -> int:
        """Bytes of each chunk that enter the digest with this ``CanaryConfig.real_data``."""
        return {"all": self.chunk_bytes, "partial": min(PARTIAL_BYTES, self.chunk_bytes), "none": 0}[real_data]


def is_one_word(name: str) -> bool:
    """Whether a line of key=value can hold it as a value."""
    return name.isprintable() and not set(name) & {" ", "="} and bool(name)


def plane_address(plane_record: Any, slot: int, page_size: int, byte: int) -> int:
    """Address of a slot's ``byte``-th digested byte in a plane; ``plane_record`` is one of `KvPool.plane_records`."""
    block, token = divmod(slot, page_size)
    chunk, rest = divmod(byte, int(plane_record["chunk_bytes"]))
    run, token = divmod(token, int(plane_record["tok_split"]) or page_size)
    return (
        int(plane_record["base"])
        + block * int(plane_record["page_stride"])
        + run * int(plane_record["tok_hi_stride"])
        + token * int(plane_record["token_stride"])
        + chunk * int(plane_record["chunk_stride"])
        + rest
    )


# ---- addresses -------------------------------------------------------------------------------------------------------
def axes_of(plane: Plane, n_blocks: int, page_size: int) -> list[tuple[int, int]]:
    """(stride, count) of the axes that have more than one step."""
    run = plane.tok_split or page_size
    axes = (
        (plane.page_stride, n_blocks),
        (plane.tok_hi_stride, page_size // run),
        (plane.token_stride, run),
        (plane.chunk_stride, plane.n_chunks),
    )
    return [(stride, n) for stride, n in axes if n > 1]


def _span(plane: Plane, n_blocks: int, page_size: int) -> int:
    """Bytes from the first byte of slot 0 to behind the last byte of the last slot."""
    return plane.chunk_bytes + sum(stride * (n - 1) for stride, n in axes_of(plane, n_blocks, page_size))


def blocks_that_fit(plane: Plane, page_size: int) -> int:
    """Blocks that the plane's array holds behind ``offset``; LayoutError if not even one."""
    start = plane.view.pointer + plane.offset
    room = plane.view.byte_range[1] - start - _span(plane, 1, page_size)
    if room < 0:
        raise LayoutError(
            f"{plane.label}: one block of {page_size} slots needs {_span(plane, 1, page_size)} bytes, "
            f"{plane.view.byte_range[1] - start} lie behind offset {plane.offset}: check the strides and the page size"
        )
    return room // plane.page_stride + 1 if plane.page_stride else 1


def check_addresses(plane: Plane, n_blocks: int, page_size: int) -> None:
    """LayoutError unless every byte of every slot lies inside the array and belongs to one slot alone."""
    low, high = plane.view.byte_range
    start = plane.view.pointer + plane.offset
    end = start + _span(plane, n_blocks, page_size)
    if start < low or end > high:
        raise LayoutError(
            f"{plane.label}: {n_blocks} blocks of {page_size} slots take bytes {start - low} to {end - low} "
            f"of an array of {high - low}: check offset, strides, n_blocks and page_size"
        )
    if not (_is_nested(plane, n_blocks, page_size) or _is_apart(plane, n_blocks, page_size)):
        raise LayoutError(
            f"{plane.label}: slots overlap, or cannot be shown to be apart, with page_stride {plane.page_stride}, "
            f"token_stride {plane.token_stride}{_split_words(plane)}, {plane.n_chunks} chunks of {plane.chunk_bytes} "
            f"bytes every {plane.chunk_stride}: check the strides (bytes, not elements)"
        )


def _split_words(plane: Plane) -> str:
    return f" in runs of {plane.tok_split} tokens every {plane.tok_hi_stride}" if plane.tok_split else ""


def _is_nested(plane: Plane, n_blocks: int, page_size: int) -> bool:
    """Each axis steps over all that the finer axes span: then no two runs share a byte."""
    extent = plane.chunk_bytes
    for stride, n in sorted(axes_of(plane, n_blocks, page_size)):
        if stride < extent:
            return False
        extent += stride * (n - 1)
    return True


def _is_apart(plane: Plane, n_blocks: int, page_size: int) -> bool:
    """The same by sorting the start of every run, where that is affordable; False if it is not."""
    starts = np.zeros(1, np.int64)
    if n_blocks * page_size * plane.n_chunks > _MAX_RUNS_COMPARED:
        return False
    for stride, n in axes_of(plane, n_blocks, page_size):
        starts = (starts[:, None] + np.arange(n) * stride).ravel()
    return bool((np.diff(np.sort(starts)) >= plane.chunk_bytes).all())
