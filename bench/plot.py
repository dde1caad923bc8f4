"""Two panels from a results.json: share of the ceiling over plane size, microseconds over slots.

``python -m bench.plot [results.json] [kernels.png]``; needs matplotlib and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_LABELS = {"kv": "stamps, K and V", "nhd2048": "data, 2048 B a slot", "nhd512": "data, 512 B a slot"}


def series(run: Mapping[str, Any], axis: str) -> dict[str, list[Mapping[str, Any]]]:
    """The measurements on an axis by layout, ascending; all in one under "" on the axis of plane sizes."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for m in sorted((m for m in run["measurements"] if m["axis"] == axis), key=lambda m: m["x"]):
        found.setdefault(m["layout"] if axis == "slots" else "", []).append(m)
    return found


def draw(run: Mapping[str, Any], target: Path) -> None:
    """Write the PNG.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -e '.[plot]'") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rows in series(run, "plane_bytes").values():
        left.plot([m["x"] for m in rows], [m["share"] for m in rows], marker="o")
    left.set(ylim=(0, 1.05), xlabel="bytes of a plane", ylabel="share of the read ceiling")
    left.set_xscale("log", base=2)
    left.set_title("verify data, one plane, pages of 16")
    left.axhline(1.0, color="grey", linewidth=0.8)
    for layout, rows in series(run, "slots").items():
        slots, floors = [m["x"] for m in rows], [m["floor_us"] for m in rows]
        (line,) = right.plot(slots, [m["us"] for m in rows], marker="o", label=_LABELS.get(layout, layout))
        right.plot(slots, floors, color=line.get_color(), linestyle=":", linewidth=1)
    right.axhline(run["ceiling"]["launch_floor_us"], color="grey", linewidth=0.8)
    right.set(xlabel="slots verified", ylabel="microseconds a launch")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_ylim(bottom=run["ceiling"]["launch_floor_us"] / 2)
    right.set_title("one launch; dotted: its bytes at the ceiling")
    right.legend(frameon=False)
    machine = run["machine"]
    figure.suptitle(f"{machine.get('gpu')}, {machine.get('date')}, commit {machine.get('commit')}", fontsize=9)
    figure.savefig(target, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results.json")
    parser.add_argument("png", type=Path, nargs="?", default=HERE / "kernels.png")
    args = parser.parse_args(argv)
    draw(json.loads(args.results.read_text()), args.png)
    print(args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
