"""What a descriptor covers, as a picture in text: which bytes of a block belong to which slot and plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool, Plane
from kvcanary.layouts.guess import guess

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_RUNS = 1 << 22  # drawn of one block; larger blocks are told in words alone
_MAX_TOLD = 3  # runs of one slot that are listed
_INDENT = " " * 6


def describe(what: Any, *, block: int = 0, layer: int | None = None, width: int = 64) -> str:
    """What a pool covers, drawn for one block; of an array, which layouts it could have.

    Reads no memory but the arrays' shapes and strides.

    Args:
        what: a `KvPool`, several of them, or one array of one layer.
        block: which block is drawn.
        layer: number of the layer that is drawn; None = all, those alike together.
        width: characters of a drawing.

    Raises:
        LayoutError: no such block or layer, or what is no pool and no array.
    """
    if isinstance(what, KvPool):
        return _pool_text(what, block, layer, width)
    if isinstance(what, (list, tuple)) and what and all(isinstance(pool, KvPool) for pool in what):
        return "\n\n".join(_pool_text(pool, block, layer, width) for pool in what)
    return guess(what)


def _pool_text(pool: KvPool, block: int, layer: int | None, width: int) -> str:
    if not 0 <= block < pool.n_blocks:
        raise LayoutError(f"block={block}: pool {pool.name!r} has blocks 0 to {pool.n_blocks - 1}")
    if width < 1:
        raise LayoutError(f"width={width}: give the characters of a drawing, at least 1")
    numbers = sorted({plane.layer for plane in pool.planes})
    if layer is not None and layer not in numbers:
        raise LayoutError(f"layer={layer}: pool {pool.name!r} has {_these(numbers) if numbers else 'no layers'}")
    window = f", window {pool.window}" if pool.window else ""
    blocks = f"{pool.n_blocks} blocks of {pool.page_size} slots"
    reserved = ", ".join(map(str, pool.reserved_blocks)) or "none"
    count = f"{len(numbers)} layer{'' if len(numbers) == 1 else 's'}"
    sizes = f"{count}, {pool.bytes_per_slot} bytes a slot; reserved blocks: {reserved}"
    lines = [f"pool {pool.name!r} ({pool.kind.name}{window}): {blocks}, {sizes}"]
    alike: dict[Any, list[int]] = {}
    for number in numbers if layer is None else [layer]:
        drawn = _drawn_of(pool, number, block)
        places = tuple(tuple(one.first - group[0].first for one in group) for group in _blocks_of(drawn))
        alike.setdefault((tuple(_plane_lines(pool, drawn)), places), []).append(number)
    for (text, _), members in alike.items():
        lines += [_these(members), *text]
        lines += _drawings(pool, _drawn_of(pool, members[0], block), block, width)
    return "\n".join(lines)


def _these(numbers: Sequence[int]) -> str:
    """ "layer 0", "layers 1, 5", "layers 0 to 31"."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    is_range = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"layers {numbers[0]} to {numbers[-1]}" if is_range else f"layers {', '.join(map(str, numbers))}"


class _Drawn(NamedTuple):
    """A plane, its letter, the first byte of the block, and its digest."""

    plane: Plane
    letter: str
    first: int
    digest: int


def _drawn_of(pool: KvPool, layer: int, block: int) -> list[_Drawn]:
    planes = [
        (plane, d)
        for d, unit in enumerate(pool.digest_units())
        for plane in pool.ordered_planes[unit.first_plane : unit.first_plane + unit.n_planes]
        if unit.layer == layer
    ]
    return [
        _Drawn(plane, _LETTERS[i % len(_LETTERS)], plane.view.pointer + plane.offset + block * plane.page_stride, d)
        for i, (plane, d) in enumerate(planes)
    ]


def _plane_lines(pool: KvPool, drawn: Sequence[_Drawn]) -> list[str]:
    lines = []
    for plane, letter, _, digest in drawn:
        chunks = f"{plane.n_chunks} chunks of {plane.chunk_bytes}" if plane.n_chunks > 1 else f"{plane.chunk_bytes}"
        kind = plane.dtype or plane.view.dtype or "unknown type"
        loads = int(pool.plane_record(plane, plane.chunk_bytes)["load_bytes"])
        others = [one.letter for one in drawn if one.digest == digest and one.letter != letter]
        shared = f", one digest with {', '.join(others)}" if others else ""
        lines += [
            f"  {letter} = {plane.name} ({plane.half.name}): {chunks} bytes a slot, {kind}, loads of {loads}{shared}",
            f"      {_nest(pool, plane)}",
        ]
    return lines


def _nest(pool: KvPool, plane: Plane) -> str:
    """The axes of a plane from the widest step to the smallest."""
    run = plane.tok_split or pool.page_size
    axes = [
        (plane.page_stride, pool.n_blocks, "blocks"),
        (plane.tok_hi_stride, pool.page_size // run, "runs of slots"),
        (plane.token_stride, run, "slots"),
        (plane.chunk_stride, plane.n_chunks, "chunks"),
    ]
    steps = sorted((axis for axis in axes if axis[1] > 1), reverse=True)
    return " > ".join([*(f"{n} {word} every {stride}" for stride, n, word in steps), f"{plane.chunk_bytes} bytes"])


def _blocks_of(drawn: Sequence[_Drawn]) -> list[list[_Drawn]]:
    """The planes whose bytes of a block lie within one step from block to block, together."""
    found: list[list[_Drawn]] = []
    for one in sorted(drawn, key=lambda d: d.first):
        last, stride = found[-1][0] if found else None, one.plane.page_stride
        if last is not None and last.plane.page_stride == stride and one.first - last.first < stride:
            found[-1].append(one)
        else:
            found.append([one])
    return found


# ---- the drawing -----------------------------------------------------------------------------------------------------
class _Runs(NamedTuple):
    """The runs of bytes of a block: where they start and end, from its first byte, and whose they are; i64[n] each."""

    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    plane: npt.NDArray[np.int64]


def _runs_of(pool: KvPool, drawn: Sequence[_Drawn]) -> _Runs:
    parts = []
    for i, one in enumerate(drawn):
        plane, slot = one.plane, np.arange(pool.page_size)
        run, token = np.divmod(slot, plane.tok_split) if plane.tok_split else (0 * slot, slot)
        at = one.first - drawn[0].first + run * plane.tok_hi_stride + token * plane.token_stride
        start = (at[:, None] + np.arange(plane.n_chunks) * plane.chunk_stride).ravel()
        owner = np.repeat(slot, plane.n_chunks)
        parts.append((start, start + plane.chunk_bytes, owner, np.full(len(start), i)))
    joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    return _Runs(*(column[order] for column in joined))


def _drawings(pool: KvPool, drawn: Sequence[_Drawn], block: int, width: int) -> list[str]:
    """A drawing of each group of planes; planes that look the same have one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for group in _blocks_of(drawn):
        letters = "".join(one.letter for one in group)
        text = _drawing(pool, group, letters if len(group) > 1 else "", width)
        alike.setdefault(tuple(text), []).append(", ".join(letters))
    lines = []
    for (first, *rest), those in alike.items():
        lines += [f"  block {block} of {' and likewise of '.join(those)}{first}", *rest]
    return lines


def _drawing(pool: KvPool, drawn: Sequence[_Drawn], letters: str, width: int) -> list[str]:
    """The lines of it; ``letters`` of the planes, none if there is but one."""
    if pool.page_size * sum(one.plane.n_chunks for one in drawn) > _MAX_RUNS:
        return [" is too large to draw"]
    runs = _runs_of(pool, drawn)
    span = int(runs.end.max())
    cell = _cell_bytes(runs, span, width)
    strip = _strip(pool, runs, letters, cell, (0, -(-span // cell)), span)
    lines = [f": {span} bytes", *strip]
    coarse = [text.index("*") for text in strip[1:] if "*" in text]
    finest = math.gcd(*(runs.end - runs.start).tolist(), *runs.start.tolist())
    if coarse and finest < cell:  # from there on, finer
        first = (min(coarse) - len(_INDENT)) * cell // finest
        lines += _strip(pool, runs, letters, finest, (first, min(first + width, span // finest)), span)
    last = pool.page_size - 1
    return lines + [_slot_line(runs, letters, slot) for slot in sorted({0, min(1, last), last})]


def _cell_bytes(runs: _Runs, span: int, width: int) -> int:
    """Bytes of a character: a whole number of runs of one length, or a part of one, if that is about the width."""
    least = -(-span // width)
    for n in sorted(set((runs.end - runs.start).tolist()), reverse=True):
        parts = next((k for k in range(n // least, 1, -1) if n % k == 0), 1)
        per = n // parts if n >= least else -(-least // n) * n
        if per < 2 * least:
            return int(per)
    return least


def _strip(pool: KvPool, runs: _Runs, letters: str, cell: int, cells: tuple[int, int], span: int) -> list[str]:
    """Whose the bytes of the cells [first, last) are."""
    per_digit = -(-pool.page_size // len(_DIGITS))
    strips = "".join(_mark(owner, _DIGITS) for owner in _cells(runs, runs.slot // per_digit, cell, cells))
    lines = [f"{_INDENT}{strips}"]
    if letters:
        planes = "".join(_mark(i, letters) for i in _cells(runs, runs.plane, cell, cells))
        lines.append(f"{_INDENT}{planes}")
        strips += planes
    digits = "a slot" if per_digit == 1 else f"{per_digit} slots"
    marks = [f", {mark} {what}" for mark, what in ((".", "nothing here"), ("*", "several")) if mark in strips]
    bounds = f"bytes {cells[0] * cell} to {min(cells[1] * cell, span) - 1}"
    return [f"    {bounds}: a character is {cell}, a digit {digits}{''.join(marks)}", *lines]


def _cells(runs: _Runs, of: npt.NDArray[np.int64], cell: int, cells: tuple[int, int]) -> list[int]:
    """What the bytes of each of the cells [first, last) are of: the one number in ``of``, -1 = none, -2 = several."""
    low, high = np.full(cells[1], np.iinfo(np.int64).max), np.full(cells[1], -1)
    shown = (runs.start // cell < cells[1]) & ((runs.end - 1) // cell >= cells[0])
    first, last, mine = runs.start[shown] // cell, (runs.end[shown] - 1) // cell, of[shown]
    last = np.minimum(last, cells[1] - 1)
    for step in range(int((last - first).max(initial=-1)) + 1):
        at = np.minimum(first + step, last)
        np.minimum.at(low, at, mine)
        np.maximum.at(high, at, mine)
    found = np.where(high < 0, -1, np.where(low == high, high, -2))
    return [int(i) for i in found[cells[0] :]]


def _mark(owner: int, marks: str) -> str:
    return "." if owner == -1 else "*" if owner == -2 else marks[owner]


def _slot_line(runs: _Runs, letters: str, slot: int) -> str:
    told = []
    for i, letter in enumerate(letters or " "):
        mine = np.flatnonzero((runs.slot == slot) & (runs.plane == i))
        ranges = [f"{runs.start[r]}-{runs.end[r] - 1}" for r in mine[:_MAX_TOLD]]
        rest = f" ... {runs.start[mine[-1]]}-{runs.end[mine[-1]] - 1}" if len(mine) > _MAX_TOLD else ""
        told.append(f"{letter} {' '.join(ranges)}{rest}".strip())
    return f"    slot {slot}: {', '.join(told)}"
