"""Small random pools of every layout, as contents and a description that holds over any copy of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from agree import PoolSpec

from kvcanary import Half, KvPool, Plane, PoolKind, layouts

Build = Callable[[Mapping[str, Any]], KvPool]

LAYOUTS = ("nhd", "nhd_slots", "hnd", "fused", "token_major", "planes", "groups", "interleaved")
# heads, dim of 2-byte elements: chunks of 2, 8, 16, 32 and 144 bytes, and planes of more than 128 words
_HEADS = ((1, 1), (2, 4), (2, 8), (3, 16), (1, 72), (2, 8), (1, 520))
_ROW_BYTES = (1, 3, 20, 64, 130, 1040)
_CHUNK_BYTES = (1, 2, 3, 4, 6, 8, 16, 20, 32)


def random_pool(
    rng: random.Random,
    *,
    name: str = "full",
    n_blocks: int,
    page_size: int,
    layout: str | None = None,
    has_v: bool | None = None,
    n_full_slots: int = 0,
    window: int | None = None,
    **fields: Any,
) -> PoolSpec:
    """A pool with random bytes in it; ``n_full_slots`` > 0 gives it a slot_lut of that length, all evicted."""
    layout = layout or rng.choice(LAYOUTS)
    has_v = bool(rng.getrandbits(1)) if has_v is None else has_v
    shape = _Shape(rng, n_blocks, page_size, has_v and layout != "token_major", rng.choice((1, 1, 1, 2)))
    buffers, build = getattr(shape, layout)()
    bytes_of = np.random.default_rng(rng.getrandbits(32))
    contents = {
        k: bytes_of.integers(0, 256, b.nbytes, np.uint8).view(b.dtype).reshape(b.shape) for k, b in buffers.items()
    }
    fields = {"name": name, "kind": PoolKind.FULL if window is None else PoolKind.SWA, "window": window, **fields}
    if n_full_slots:
        contents["lut"] = np.full(n_full_slots, -1, np.int64)

    def build_over(given: Mapping[str, Any]) -> KvPool:
        return build(given, {**fields, **({"slot_lut": given["lut"]} if n_full_slots else {})})

    return PoolSpec(contents, build_over)


class _Shape:
    """One method per layout: zeroed buffers, and the pool over a copy of them."""

    def __init__(self, rng: random.Random, n_blocks: int, page_size: int, has_v: bool, n_layers: int) -> None:
        self.rng, self.n_blocks, self.page, self.n_layers = rng, n_blocks, page_size, n_layers
        self.halves = "kv" if has_v else "k"

    def _layers(self, shape: tuple[int, ...], dtype: Any = np.uint16) -> dict[str, Any]:
        return {f"{half}{i}": np.zeros(shape, dtype) for half in self.halves for i in range(self.n_layers)}

    def _lists(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {half: [given[f"{half}{i}"] for i in range(self.n_layers)] for half in self.halves}

    def nhd(self) -> Any:
        buffers = self._layers((self.n_blocks, self.page, *self.rng.choice(_HEADS)))
        return buffers, lambda given, fields: layouts.nhd(**self._lists(given), **fields)

    def nhd_slots(self) -> Any:
        buffers = self._layers((self.n_blocks * self.page, *self.rng.choice(_HEADS)))
        return buffers, lambda given, fields: layouts.nhd(**self._lists(given), page_size=self.page, **fields)

    def hnd(self) -> Any:
        heads, dim = self.rng.choice(_HEADS)
        buffers = self._layers((self.n_blocks, heads, self.page, dim))
        return buffers, lambda given, fields: layouts.hnd(**self._lists(given), **fields)

    def fused(self) -> Any:
        """K and V of a block side by side in one array."""
        heads, dim = self.rng.choice(_HEADS)
        buffers = {"kv": np.zeros((self.n_blocks, 2, self.page, heads, dim), np.uint16)}
        halves = self.halves

        def build(given: Mapping[str, Any], fields: dict[str, Any]) -> KvPool:
            return layouts.nhd(**{half: [given["kv"][:, i]] for i, half in enumerate(halves)}, **fields)

        return buffers, build

    def token_major(self) -> Any:
        row = self.rng.choice(_ROW_BYTES)
        buffers = {f"k{i}": np.zeros((self.n_blocks, self.page, row), np.uint8) for i in range(self.n_layers)}

        def build(given: Mapping[str, Any], fields: dict[str, Any]) -> KvPool:
            return layouts.token_major(latent=[given[f"k{i}"] for i in range(self.n_layers)], **fields)

        return buffers, build

    def planes(self) -> Any:
        """Any nesting of strides, any alignment, chunks of odd sizes."""
        forms = {f"{half}{i}": self._form(_CHUNK_BYTES, 4) for half in self.halves for i in range(self.n_layers)}
        return self._of_forms(forms, dict.fromkeys(forms))

    def groups(self) -> Any:
        """A large plane with a digest of its own, and small ones that share one."""
        forms, groups = {}, {}
        for half in self.halves:
            for i in range(self.n_layers):
                forms[f"{half}{i}"], groups[f"{half}{i}"] = self._form((16, 32, 256), 3), None
                for part in range(self.rng.choice((1, 2, 3))):
                    name = f"{half}{i}scale{part}"
                    forms[name], groups[name] = self._form((1, 2, 3, 4, 8), 3), f"{half}{i}"
        return self._of_forms(forms, groups)

    def interleaved(self) -> Any:
        """Tokens of a page in runs, beside a plane without any; the runs may share a digest with it."""
        forms, groups = {}, {}
        divisors = [d for d in range(1, self.page + 1) if self.page % d == 0]
        for half in self.halves:
            for i in range(self.n_layers):
                group = self.rng.choice((None, f"{half}{i}"))
                for name, form in (
                    (f"{half}{i}", self._form((16, 32), 3)),
                    (f"{half}{i}scale", self._form((1, 2, 4, 8, 16), 3, self.rng.choice(divisors))),
                ):
                    forms[name], groups[name] = form, group
        return self._of_forms(forms, groups)

    def _form(self, chunk_bytes: tuple[int, ...], max_chunks: int, tok_split: int = 0) -> dict[str, int]:
        counts = {
            "page_stride": self.n_blocks,
            "token_stride": tok_split or self.page,
            "chunk_stride": self.rng.randint(1, max_chunks),
        }
        form = {"chunk_bytes": self.rng.choice(chunk_bytes), "n_chunks": counts["chunk_stride"]}
        if tok_split:
            counts["tok_hi_stride"], form["tok_split"] = self.page // tok_split, tok_split
        extent, axes = form["chunk_bytes"], list(counts)
        self.rng.shuffle(axes)
        for axis in axes:
            form[axis] = extent + self.rng.choice((0, 0, 0, 1, 4, 16))
            extent = form[axis] * counts[axis]
        form["offset"] = self.rng.choice((0, 0, 1, 6, 16))
        form["n_bytes"] = form["offset"] + extent
        return form

    def _of_forms(self, forms: dict[str, dict[str, int]], groups: dict[str, str | None]) -> Any:
        n_blocks, page = self.n_blocks, self.page

        def build(given: Mapping[str, Any], fields: dict[str, Any]) -> KvPool:
            planes = [
                Plane(
                    data=given[name],
                    half=Half.K if name[0] == "k" else Half.V,
                    layer=int(name[1]),
                    name=name,
                    group=groups[name],
                    **{k: v for k, v in form.items() if k != "n_bytes"},
                )
                for name, form in forms.items()
            ]
            return KvPool(planes=tuple(planes), page_size=page, n_blocks=n_blocks, **fields)

        return {name: np.zeros(form["n_bytes"], np.uint8) for name, form in forms.items()}, build


def random_pools(
    rng: random.Random, max_requests: int, max_len: int, is_static: bool, is_odd: bool, ring_slack: int | None = None
) -> list[PoolSpec]:
    """One to three pools that one engine may keep side by side; the first has a table of its own.

    Args:
        is_odd: give pools a token_offset that the engine does not know of, rings that are too short for what it does.
        ring_slack: tokens that a forward of the engine may write and take back; None = it knows of no rings.
    """
    n_pools = rng.choice((1, 1, 2, 3))
    page = max_len if is_static else rng.choice((1, 2, 16, 5) if max_len <= 400 else (16, 5))
    pages = [page, *(page if is_static else rng.choice((1, page) if page % 2 else (1, 2, page)) for _ in range(2))]
    room = math.ceil(rng.choice((1.5, 4)) * max_len)  # tokens: two requests of full length may not fit
    specs = []
    for i in range(n_pools):
        has_lut = i > 0 and not is_static and rng.random() < 0.4
        if has_lut:  # it counts the blocks of the same table
            pages[i] = page
        n_blocks = max_requests + rng.choice((0, 1)) if is_static else room // pages[i] + 3
        reserved = () if is_static else rng.choice(((), (0,), (0, n_blocks - 1)))
        offset = int(i > 0 and i == n_pools - 1 and not has_lut and rng.random() < 0.3)  # a draft pool
        if is_odd and rng.random() < 0.2:
            offset = rng.choice((-3, 2))
        window = None if i == 0 and n_pools > 1 else rng.choice((None, 1, 2, 3, 7, 20))
        ring: dict[str, int] = {}
        if ring_slack is not None and window and not has_lut and rng.random() < 0.7:
            slack = 0 if is_odd and rng.random() < 0.5 else ring_slack
            ring = {"ring_length": window + slack + rng.choice((0, 0, 1, 9)), "sink": rng.choice((0, 0, 1, 4))}
            ring["ring_bubble"] = 0 if is_static else rng.choice((0, 0, 1, pages[i]))
        elif window and not has_lut and rng.random() < 0.2:
            ring = {"sink": rng.choice((1, 4))}
        specs.append(
            random_pool(
                rng,
                name=f"pool{i}",
                n_blocks=n_blocks,
                page_size=pages[i],
                window=window,
                reserved_blocks=reserved,
                token_offset=offset,
                n_full_slots=(room // page + 3) * page if has_lut else 0,
                **ring,
            )
        )
    return specs
