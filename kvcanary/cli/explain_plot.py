"""The picture of `kvcanary explain`: each pool as a map of its slots, and when what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary.box_reader import BoxRun
from kvcanary.errors import ConfigError
from kvcanary.pool_stats import leading_reason
from kvcanary.violations import Violation

MAX_CELLS = 1 << 14  # of a map; a larger pool has several slots in a cell
MAX_OWNERS = 18  # that have a colour of their own
MAX_POOLS = 8
_FEW = 40  # bad cells that get a large cross
UNKNOWN, RESERVED, OTHERS = 0, 1, 2  # values of cells; owners follow
_COLOURS = {UNKNOWN: "#e8e8e8", RESERVED: "#a8a8a8", OTHERS: "#5b5b5b"}


class PoolMap(NamedTuple):
    """A pool as cells.

    Attributes:
        cells: int[rows, columns]: UNKNOWN, RESERVED, OTHERS or 3 + the index in ``owners``; -1 behind the last slot.
        per_cell: slots of a cell.
        owners: request ids that have a colour.
        bad: cells (row, column) with a finding.
    """

    cells: npt.NDArray[np.int64]
    per_cell: int
    owners: tuple[int, ...]
    bad: tuple[tuple[int, int], ...]


class Owners(NamedTuple):
    """Who is where, as far as the findings know; later ones know better than earlier ones."""

    of_blocks: dict[int, int]  #: block -> the request to which it was given
    of_slots: dict[int, int]  #: slot -> the request that wrote it: this knows better than the block


def owners_of(violations: Sequence[Violation], page_size: int) -> Owners:
    """The owners that the findings of one pool name."""
    found = Owners({}, {})
    for v in violations:
        if v.is_in_pool and v.block_owner:
            found.of_blocks[v.slot // page_size] = v.block_owner
        if v.is_in_pool and v.stamp_owner:
            found.of_slots[v.slot] = v.stamp_owner
    return found


def map_pool(pool: Mapping[str, Any], violations: Sequence[Violation]) -> PoolMap:
    """Lay a pool out: row after row, whole blocks in a row where they fit.

    Args:
        pool: as the black box describes it.
        violations: those of this pool.
    """
    page, n_slots = int(pool["page_size"]), int(pool["page_size"]) * int(pool["n_blocks"])
    per_cell = _slots_per_cell(n_slots, page)
    n_cells = -(-n_slots // per_cell)
    block = max(1, page // per_cell)  # cells
    columns = min(n_cells, max(block, round((n_cells * 2.5) ** 0.5) // block * block))
    owners = owners_of(violations, page)
    sizes: Counter[int] = Counter(owners.of_slots.values())
    for owner in owners.of_blocks.values():
        sizes[owner] += page
    named = tuple(sorted(owner for owner, _ in sizes.most_common(MAX_OWNERS)))
    colour = {owner: OTHERS + 1 + i for i, owner in enumerate(named)}
    cells = np.full(-(-n_cells // columns) * columns, -1)
    cells[:n_cells] = UNKNOWN

    def paint(first: int, n: int, value: int) -> None:
        if 0 <= first < n_slots:
            cells[first // per_cell : max(first // per_cell + 1, (first + n) // per_cell)] = value

    for reserved in pool.get("reserved_blocks", ()):
        paint(reserved * page, page, RESERVED)
    for block_id, owner in owners.of_blocks.items():
        paint(block_id * page, page, colour.get(owner, OTHERS))
    for slot, owner in owners.of_slots.items():
        paint(slot, 1, colour.get(owner, OTHERS))
    bad = sorted({v.slot // per_cell for v in violations if v.is_in_pool and v.slot < n_slots})
    places = tuple((cell // columns, cell % columns) for cell in bad)
    return PoolMap(cells.reshape(-1, columns), per_cell, named, places)


def _slots_per_cell(n_slots: int, page: int) -> int:
    """As few as there is room for; whole blocks, or whole parts of a block, unless that would be much coarser."""
    n = max(1, -(-n_slots // MAX_CELLS))
    if n >= page:
        return -(-n // page) * page
    return next((k for k in range(n, min(page, 4 * n) + 1) if page % k == 0), n)


def draw(run: BoxRun, path: Path) -> None:
    """Write the picture of a run.

    Raises:
        ConfigError: matplotlib is missing, or the run has no first line, so that the pools are not known.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('--plot needs matplotlib: pip install "kvcanary[plot]"') from error
    if not run.pools:
        raise ConfigError(f"--plot: run {run.run} has no first line in this file, so its pools are not known")
    violations = [v for _, v in run.violations]
    hit = [pool for pool in run.pools if any(v.pool_name == pool["name"] for v in violations)] or run.pools
    pools = hit[:MAX_POOLS]
    figure = Figure(figsize=(13, 4.2 * len(pools) + 3), layout="constrained")
    rows = figure.subplots(len(pools) + 1, 1, squeeze=False, height_ratios=[*[4.2] * len(pools), 2.6])[:, 0]
    for axes, pool in zip(rows, pools, strict=False):
        _draw_map(axes, pool, [v for v in violations if v.pool_name == pool["name"]])
    _draw_time(rows[-1], violations, run.stalls)
    figure.suptitle(_plain(f"kvcanary run {run.run} (pid {run.pid}): {len(violations)} findings"), parse_math=False)
    figure.savefig(path, dpi=110)


def _plain(text: str) -> str:
    """Any name as a font can draw it."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):x}" for c in text)


def _draw_map(axes: Any, pool: Mapping[str, Any], violations: Sequence[Violation]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = map_pool(pool, violations)
    palette = [colormaps["tab20"](i) for i in range(20) if i not in (14, 15)]  # but its greys
    colours = ["#ffffff", *_COLOURS.values(), *palette[: len(found.owners)]]
    norm = BoundaryNorm(np.arange(len(colours) + 1) - 1.5, len(colours))
    axes.imshow(found.cells, cmap=ListedColormap(colours), norm=norm, aspect="auto", interpolation="nearest")
    columns = found.cells.shape[1]
    if found.bad:
        ys, xs = zip(*found.bad, strict=True)
        size = 70 if len(found.bad) <= _FEW else 18
        axes.scatter(xs, ys, s=size, marker="x", c="black", linewidths=3.0 if len(found.bad) <= _FEW else 1.8)
        axes.scatter(xs, ys, s=size, marker="x", c="#ff1a1a", linewidths=1.6 if len(found.bad) <= _FEW else 0.9)
    block = int(pool["page_size"]) // found.per_cell
    if block > 1:
        axes.vlines(np.arange(block, columns, block) - 0.5, *axes.get_ylim(), colors="white", linewidths=1.0)
    handles: list[Any] = [Patch(color=_COLOURS[UNKNOWN], label="not known from the findings")]
    if (found.cells == RESERVED).any():
        handles.append(Patch(color=_COLOURS[RESERVED], label="reserved"))
    handles += [Patch(color=c, label=f"request {owner}") for c, owner in zip(palette, found.owners, strict=False)]
    if (found.cells == OTHERS).any():
        handles.append(Patch(color=_COLOURS[OTHERS], label="other requests"))
    handles.append(Line2D([], [], marker="x", linestyle="", color="#ff1a1a", label=f"bad ({len(found.bad)} cells)"))
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
    cell = "one cell = 1 slot" if found.per_cell == 1 else f"one cell = {found.per_cell} slots"
    axes.set_title(
        _plain(f"pool '{pool['name']}': {pool['n_blocks']} blocks of {pool['page_size']} slots; {cell}"),
        fontsize=10,
        parse_math=False,
    )
    axes.set_xlabel(f"slot within the row (rows of {columns * found.per_cell} slots)")
    axes.set_ylabel("first slot of the row")
    ticks = np.unique(np.linspace(0, found.cells.shape[0] - 1, min(9, found.cells.shape[0])).astype(int))
    axes.set_yticks(ticks, [str(int(t) * columns * found.per_cell) for t in ticks])
    unit = max(1, block)
    xticks = np.arange(0, columns, unit * max(1, -(-columns // unit // 8)))
    axes.set_xticks(xticks, [str(int(t) * found.per_cell) for t in xticks])


def _draw_time(axes: Any, violations: Sequence[Violation], stalls: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    reasons = sorted({leading_reason(v.reasons) for v in violations})
    names = [str(reason.name) for reason in reasons]
    for row, reason in enumerate(reasons):
        steps, counts = np.unique(
            [v.step for v in violations if leading_reason(v.reasons) == reason], return_counts=True
        )
        axes.scatter(steps, [row] * len(steps), s=30 + 12 * np.sqrt(counts), alpha=0.8)
        for step, n in zip(steps, counts, strict=True):
            if len(steps) <= 20:
                axes.annotate(str(n), (step, row), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=7)
    if stalls:
        axes.scatter([s.get("step", 0) for s in stalls], [len(reasons)] * len(stalls), marker="s", c="black", s=40)
        names.append("guard stalled")
    times = [v.step for v in violations] + [int(stall.get("step", 0)) for stall in stalls]
    if times:
        margin = max(2.0, 0.04 * (max(times) - min(times)))
        axes.set_xlim(min(times) - margin, max(times) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, max(0, len(names) - 1) + 0.7)
    axes.set_xlabel("step (the number at a dot: findings)")
    axes.set_title("when it was found, by the reason that says most", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
