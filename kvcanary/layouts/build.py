"""From arrays and the meaning of their axes to a pool.

One letter per axis: b = block, t = token in the block, s = slot (block and token in one axis), 2 = K and V, r = run of
tokens of an interleaved block (then t = token in the run), any other = content of a slot.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, NamedTuple

from kvcanary.arrays import ArrayView
from kvcanary.errors import LayoutError
from kvcanary.layout import GROUP_PLANE_BYTES, KvPool, Plane
from kvcanary.layouts.views import page_bytes, region, select, views_of
from kvcanary.tags import Half

MAX_LAYER = (1 << 31) - 1
DEFAULT_PAGE_SIZE = 16  # slots per block of arrays that do not show their blocks
_WORDS = {
    "b": "blocks", "t": "tokens", "s": "slots", "2": "2", "r": "runs", "h": "heads", "d": "dim", "c": "content",
    "x": "dim / x",
}  # fmt: skip


class Part(NamedTuple):
    """The planes that one argument gives, one a layer.

    Attributes:
        name: of the planes.
        half: K also for what holds both.
        source: the argument's name, for messages.
        arrays: one per layer.
        axes: the forms that they may have, one letter per axis.
        at: 0 or 1, which index of axis 2.
        hint: what to do about an array of another form.
        group: planes of a layer that share a digest if they are small enough.
        dtype: of the elements; None = as the pool's.
    """

    name: str
    half: Half
    source: str
    arrays: Sequence[ArrayView]
    axes: tuple[str, ...]
    at: int = 0
    hint: str = ""
    group: str | None = None
    dtype: Any = None


class Place(NamedTuple):
    """What one array says about the pool and the plane."""

    n_blocks: int
    page_size: int
    page_stride: int
    token_stride: int
    tok_split: int
    tok_hi_stride: int
    chunk_stride: int
    n_chunks: int
    chunk_bytes: int


def k_and_v(
    k: Any,
    v: Any,
    axes: Sequence[str],
    sources: tuple[str, str] = ("k", "v"),
    suffix: str = "",
    hint: str = "",
    dtype: Any = None,
) -> list[Part]:
    """Separate arrays of K and of V, or of K alone (v None); the planes are called k and v, plus ``suffix``."""
    return [
        Part("kv"[half] + suffix, half, source, views_of(source, arrays), tuple(axes), hint=hint, dtype=dtype)
        for source, half, arrays in zip(sources, Half, (k, v), strict=True)
        if arrays is not None or (half is Half.K and v is not None)
    ]


def fused(source: str, arrays: Any, axes: str, hint: str = "", may_be_latent: bool = False) -> list[Part]:
    """K and V as the two indices of axis 2 of one array.

    Args:
        may_be_latent: the axis may also be 1 wide: then there is K alone.
    """
    views = views_of(source, arrays)
    axis = axes.index("2")
    sizes = [view.shape[axis] if len(view.shape) == len(axes) else 2 for view in views]
    for i, n in enumerate(sizes):
        if n != 2 and not (may_be_latent and n == sizes[0] == 1):
            raise LayoutError(
                f"{source}[{i}] has shape {views[i].shape}: axis {axis} is K and V, so 2 wide, not {n}; give "
                f"{shape_words(axes)}{'; ' + hint if hint else ''}"
            )
    return [Part("kv"[at], Half(at), source, views, (axes,), at=at, hint=hint) for at in range(min(sizes))]


def row_parts(
    source: str, arrays: Any, page_size: int, rows: Sequence[tuple[str, int]], block_bytes: int, hint: str
) -> list[Part]:
    """Pages of ``page_size`` rows of each kind, (name, bytes of a row), one kind after the other, padded at the end."""
    pages = [page_bytes(view, f"{source}[{i}]") for i, view in enumerate(views_of(source, arrays))]
    for i, view in enumerate(pages):
        if view.shape[1] != block_bytes:
            raise LayoutError(
                f"{source}[{i}] has pages of {view.shape[1]} bytes; {page_size} tokens of "
                f"{' + '.join(str(n) for _, n in rows)} bytes take {block_bytes}: {hint}"
            )
    is_small = all(n < GROUP_PLANE_BYTES for _, n in rows)
    parts, start = [], 0
    for name, n in rows:
        views = [region(view, start, (page_size, n)) for view in pages]
        group = source if is_small else None
        parts.append(Part(name, Half.K, source, views, ("btc",), group=group, dtype="uint8"))
        start += page_size * n
    return parts


def pool_of(
    parts: Sequence[Part],
    *,
    page_size: int | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = "",
    has_rest: bool = False,
    pool: dict[str, Any],
) -> KvPool:
    """The pool of these parts, layer after layer; all of them have one slot index space.

    Args:
        page_size: slots per block, where no array shows it.
        layers: numbers of the layers; None = 0, 1, ...
        dtype: of the elements of the parts that do not say it.
        has_rest: slots behind the last whole page are no part of the pool; else they are refused.
        pool: further fields of `KvPool`.
    """
    _check_fields(pool)
    planes: list[Plane] = []
    first: Place | None = None
    for i, layer in enumerate(_layer_numbers(parts, layers)):
        for part in parts:
            label = f"{part.source}[{i}]"
            view, letters = _one_half(part.arrays[i], part, label)
            place = place_of(view, letters, page_size, label, has_rest)
            first = first or place
            if place[:2] != first[:2]:
                raise LayoutError(
                    f"{label} has {place.n_blocks} blocks of {place.page_size}, the first array {first.n_blocks} of "
                    f"{first.page_size}: one pool has one slot index space, make a pool of each kind"
                )
            planes.append(
                Plane(
                    data=view,
                    half=part.half,
                    layer=layer,
                    name=part.name,
                    dtype=dtype if part.dtype is None else part.dtype,
                    group=None if part.group is None else f"{part.group} {layer}",
                    **{field: getattr(place, field) for field in Place._fields[2:]},
                )
            )
    assert first is not None
    return KvPool(planes=tuple(planes), page_size=first.page_size, n_blocks=first.n_blocks, **pool)


def place_of(view: ArrayView, letters: str, page_size: int | None, label: str, has_rest: bool = False) -> Place:
    """What the axes of an array say, one letter each.

    Raises:
        LayoutError: a page size that does not fit, content that is not a row of equal chunks.
    """
    size, step = dict(zip(letters, view.shape, strict=True)), dict(zip(letters, view.strides, strict=True))
    split, hi_stride = 0, 0
    if page_size is not None and (isinstance(page_size, bool) or not isinstance(page_size, Integral)):
        raise LayoutError(f"page_size={page_size!r}: give the slots of a block, an integer")
    if "s" in letters:
        page = DEFAULT_PAGE_SIZE if page_size is None else page_size
        if not 1 <= page <= size["s"] or (size["s"] % page and not has_rest):
            wanted = "not one page" if has_rest else "no multiple"
            raise LayoutError(
                f"{label} has {size['s']} slots, {wanted} of page_size={page}: give the engine's page size"
            )
        n_blocks, page_stride, token_stride = size["s"] // page, page * step["s"], step["s"]
    else:
        page = size["t"]
        if "r" in letters:
            split, hi_stride, page = size["t"], step["r"], size["r"] * size["t"]
        if page_size not in (None, page):
            raise LayoutError(
                f"{label} has shape {view.shape}, that is {page} slots a block, but page_size={page_size}"
            )
        n_blocks, page_stride, token_stride = size["b"], step["b"], step["t"]
    content = [(step[a], size[a]) for a in letters if a not in "btsr"]
    chunks = _chunks(content, view.itemsize, label)
    return Place(n_blocks, page, page_stride, token_stride, split, hi_stride, *chunks)


def shape_words(letters: str) -> str:
    """The form of an array in words: "[blocks, 2, tokens, heads, dim]"."""
    return f"[{', '.join(_WORDS[a] for a in letters)}]"


def _one_half(view: ArrayView, part: Part, label: str) -> tuple[ArrayView, str]:
    """The array without axis 2, and its letters."""
    letters = next((a for a in part.axes if len(a) == len(view.shape)), None)
    if letters is None:
        known = " or ".join(shape_words(a) for a in part.axes)
        raise LayoutError(f"{label} has shape {view.shape}: give {known}{'; ' + part.hint if part.hint else ''}")
    if "2" not in letters:
        return view, letters
    axis = letters.index("2")
    return select(view, axis, part.at), letters.replace("2", "")


def _layer_numbers(parts: Sequence[Part], layers: Sequence[int] | None) -> list[int]:
    if not parts:
        raise LayoutError("None instead of arrays: give a list with one array per layer, at least one")
    counts = {part.source: len(part.arrays) for part in parts}
    if layers is not None:
        if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
            raise LayoutError(f"layers={layers!r}: give a list with the number of each layer, or None for 0, 1, ...")
        _check_layers(layers)
        counts["layers"] = len(layers)
    if len(set(counts.values())) != 1:
        raise LayoutError(f"{', '.join(f'{n} for {c} layers' for n, c in counts.items())}: give as many of each")
    return [int(n) for n in layers] if layers is not None else list(range(next(iter(counts.values()))))


def _check_layers(layers: Sequence[int]) -> None:
    """LayoutError unless these are numbers of layers, each once."""
    for i, layer in enumerate(layers):
        is_number = isinstance(layer, Integral) and not isinstance(layer, bool)
        if not is_number or not 0 <= int(layer) <= MAX_LAYER:
            raise LayoutError(f"layers[{i}]={layer!r}: give the number of the layer, an integer from 0 to {MAX_LAYER}")
    twice = next((n for n in layers if list(layers).count(n) > 1), None)
    if twice is not None:
        raise LayoutError(
            f"layers={list(layers)}: {twice} is there twice, and reports could not tell the two apart: give the number "
            "of each layer once, or None for 0, 1, ..."
        )


def _check_fields(given: Mapping[str, Any]) -> None:
    """LayoutError in the name of the constructor that was called, for what is no further field of a pool."""
    known = [f.name for f in fields(KvPool) if f.name not in ("planes", "page_size", "n_blocks")]
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    told = [name for name in unknown if name in ("planes", "page_size", "n_blocks")]
    why = f" ({', '.join(told)}: the arrays tell it)" if told else ""
    raise LayoutError(
        f"{_called()}(): unknown keyword {', '.join(unknown)}{why}; beside its own arguments it takes those of KvPool: "
        f"{', '.join(known)}"
    )


def _called() -> str:
    """The constructor that the engine has called: the outermost of this package."""
    package, name = __name__.rpartition(".")[0], "layouts"
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(package):
            of = module.removeprefix(package).replace(".generic", "")
            name = f"layouts{of}.{frame.f_code.co_name}"
        frame = frame.f_back
    return name


def _chunks(content: list[tuple[int, int]], itemsize: int, label: str) -> tuple[int, int, int]:
    """chunk_stride, n_chunks and chunk_bytes of content axes (stride, size), merged where they touch."""
    run, chunk_stride, n_chunks = itemsize, 0, 1
    for stride, n in sorted((stride, n) for stride, n in content if n != 1):
        if n_chunks == 1 and stride == run:
            run *= n
        elif n_chunks == 1:
            chunk_stride, n_chunks = stride, n
        elif stride == chunk_stride * n_chunks:
            n_chunks *= n
        else:
            raise LayoutError(
                f"{label}: the content axes of a slot, {content} (stride in bytes, size), are not one row of equal "
                "chunks: describe it by several Planes, one per index of an axis"
            )
    return chunk_stride, n_chunks, run
