"""The pools that scenarios are played on: other layouts, page sizes and neighbours, the same recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcanary import layouts
from kvcanary.layout import KvPool, Plane
from kvcanary.tags import Half, PoolKind

N_BLOCKS, N_LAYERS = 8, 3  # of the recipes; block 0 is reserved
BYSTANDER_BLOCKS = 6  # of each of two
HEADS, HEAD_DIM = 2, 8


@dataclass(frozen=True)
class Shape:
    """A pool and its neighbours.

    Attributes:
        layout: "nhd", "hnd", "latent" (one half), or "scales" (int8 K and V, and a scale per token beside each).
        page: slots per block.
        crowd: two more requests decode in every forward, and two rows of padding fill the bucket.
        window: of a sliding-window pool, in tokens.
        token_offset: of a draft pool.
        lut: the tables name slots of a larger space, translated by ``slot_lut``.
        ring: ``ring_length``, ``sink`` and ``ring_bubble`` of a rolling buffer behind the table.
    """

    name: str
    layout: str = "nhd"
    page: int = 4
    crowd: bool = False
    window: int | None = None
    token_offset: int = 0
    lut: bool = False
    ring: tuple[int, int, int] = (0, 0, 0)

    @property
    def n_blocks(self) -> int:
        return N_BLOCKS + 2 * BYSTANDER_BLOCKS * self.crowd

    @property
    def array_name(self) -> Callable[[Plane], str]:
        """The name of the array that a plane lies in: "k0", "v0", "k_scale0", ..."""
        return plane_name

    def arrays(self) -> dict[str, Any]:
        """Zeroed host arrays by name: "k0", "v0", "k_scale0", ..."""
        n, page, n_layers = self.n_blocks, self.page, range(N_LAYERS)
        kv = {"hnd": (n, HEADS, page, HEAD_DIM), "latent": (n, page, 24)}.get(self.layout, (n, page, HEADS, HEAD_DIM))
        dtype = {"latent": np.uint8, "scales": np.uint8}.get(self.layout, np.uint16)  # uint16: the bytes of bf16
        halves = "k" if self.layout == "latent" else "kv"
        made: dict[str, Any] = {f"{half}{layer}": np.zeros(kv, dtype) for half in halves for layer in n_layers}
        if self.layout == "scales":
            made |= {f"{h}_scale{i}": np.zeros((n, page, HEADS), np.uint32) for h in halves for i in n_layers}
        return made

    def pool(self, arrays: dict[str, Any], slot_lut: Any = None) -> KvPool:
        """The pool over such arrays, wherever they lie."""
        n_layers = range(N_LAYERS)
        dtype = {"latent": "float8_e4m3fn", "scales": "int8"}.get(self.layout, "bfloat16")
        fields: dict[str, Any] = {"window": self.window, "token_offset": self.token_offset, "slot_lut": slot_lut}
        fields |= zip(("ring_length", "sink", "ring_bubble"), self.ring, strict=True)
        fields["kind"] = PoolKind.FULL if self.window is None else PoolKind.SWA
        k = [arrays[f"k{i}"] for i in n_layers]
        if self.layout == "latent":
            return layouts.token_major(latent=k, dtype=dtype, **fields)
        v = [arrays[f"v{i}"] for i in n_layers]
        if self.layout == "hnd":
            return layouts.hnd(k=k, v=v, dtype=dtype, **fields)
        pool = layouts.nhd(k=k, v=v, dtype=dtype, **fields)
        if self.layout != "scales":
            return pool
        scales = [
            Plane(
                data=arrays[f"{name}_scale{layer}"],
                page_stride=self.page * HEADS * 4,
                token_stride=HEADS * 4,
                chunk_bytes=HEADS * 4,
                half=half,
                layer=layer,
                name=f"{name}_scale",
                dtype="float32",
            )
            for layer in n_layers
            for name, half in (("k", Half.K), ("v", Half.V))
        ]
        return KvPool(planes=(*pool.planes, *scales), page_size=self.page, n_blocks=self.n_blocks, **fields)


def plane_name(plane: Plane) -> str:
    """Name and layer of a plane, as in 'k0'."""
    return f"{short_name(plane)}{plane.layer}"


def short_name(plane: Plane) -> str:
    """The name alone; a latent counts as K."""
    return "k" if plane.name == "latent" else plane.name


SMALL = Shape("nhd4")
SHAPES = {
    shape.name: shape
    for shape in (
        SMALL,
        Shape("crowd", crowd=True),
        Shape("hnd16", "hnd", page=16),
        Shape("latent8", "latent", page=8),
        Shape("scales4", "scales"),
        Shape("swa4", window=5),
        Shape("swa8", "latent", page=8, window=9),
        Shape("draft4", token_offset=1),
        Shape("lut4", lut=True, window=5),
        Shape("ring4", window=5, ring=(8, 2, 2)),
        Shape("ring8", "latent", page=8, window=9, ring=(16, 0, 0)),
    )
}
GENERAL = ("nhd4", "crowd", "hnd16", "latent8")  # where every recipe without needs of its own is played
