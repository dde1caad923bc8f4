"""Which planes share bytes: never inside a pool, and between pools only if both say so.

Some engines give one memory to several pools (vLLM's groups of layers): at any time a piece of it belongs to a block of
one of them. Then only block ownership tells whose the bytes are. What the guard knows of a block's bytes is judged
while somebody holds the block, at the reads of its rows and by the patrol. So a block that was freed, and whose bytes
are another pool's by now, is not judged; if it is given to a request again all the same, that is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcanary.config import CanaryConfig
from kvcanary.errors import ConfigError, LayoutError
from kvcanary.layout import KvPool
from kvcanary.overlap import Placed, overlapping


def check_overlaps(pools: Sequence[KvPool], config: CanaryConfig) -> None:
    """Refuse pools that share bytes without saying so, or without what it takes.

    Raises:
        LayoutError: two pools share bytes and not both have ``may_alias=True``.
        ConfigError: ``may_alias`` without ``lifecycle``; or reserved blocks are checked and what one pool calls padding
            has another type of elements in the other.
    """
    alias = next((p for p in pools if p.may_alias), None)
    if alias is not None and not config.lifecycle:
        raise ConfigError(
            f"pool {alias.name!r} has may_alias=True, but lifecycle=False: whose the bytes are is known from block "
            "ownership alone; make the CanaryConfig with lifecycle=True, and tell of every allocation and free"
        )
    placed = [Placed(plane, p.n_blocks, p.page_size, i) for i, p in enumerate(pools) for plane in p.planes]
    for first, second in overlapping(placed, in_one_pool=False):
        a, b = pools[first.pool], pools[second.pool]
        where = f"{first.plane.label} of pool {a.name!r} and {second.plane.label} of pool {b.name!r} share bytes"
        if not (a.may_alias and b.may_alias):
            raise LayoutError(
                f"{where}: give each pool arrays of its own; or, if the engine hands such memory to one of them at a "
                "time, make both pools with may_alias=True (needs lifecycle=True)"
            )
        if config.check_reserved_every and first.plane.element != second.plane.element:
            raise ConfigError(
                f"check_reserved_every={config.check_reserved_every}: {where} but not the type of their elements, so "
                "that finite values of one may be NaN in the other: set check_reserved_every=0"
            )
