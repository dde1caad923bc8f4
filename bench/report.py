"""From the measurements of a run to Markdown, and into the part of RESULTS.md that belongs to the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.targets import TARGETS, Verdict, judge

BEGIN_MARK, END_MARK = "<!-- kernels: begin -->", "<!-- kernels: end -->"
COMMAND = "python -m bench"
_GROUPS = ("verify data", "verify stamps", "write stamps", "digest write", "whole forwards", "baselines", "sizes")
_UNITS = {"share": "", "us": " us", "ratio": "x"}


def replace_section(text: str, section: str) -> str:
    """``text`` with what stands between the marks replaced; with marks and section behind it if it has none.

    Raises:
        ValueError: one mark without the other, twice, or in the wrong order.
    """
    block = f"{BEGIN_MARK}\n{section.strip()}\n{END_MARK}"
    if BEGIN_MARK not in text and END_MARK not in text:
        return f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"{block}\n"
    n_begin, n_end = text.count(BEGIN_MARK), text.count(END_MARK)
    begin, end = text.find(BEGIN_MARK), text.find(END_MARK)
    if (n_begin, n_end) != (1, 1) or end < begin:
        raise ValueError(f"RESULTS.md has {n_begin} begin and {n_end} end marks: give it one of each, in this order")
    return text[:begin] + block + text[end + len(END_MARK) :]


def by_key(measurements: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Measurements by their key."""
    return {m["key"]: m for m in measurements}


def verdicts(run: Mapping[str, Any]) -> list[Verdict]:
    """The targets, held against a run."""
    return judge(TARGETS, by_key(run["measurements"]))


# ---- Markdown --------------------------------------------------------------------------------------------------------
def section(run: Mapping[str, Any]) -> str:
    """The section of RESULTS.md: machine, ceiling, targets, every measurement."""
    parts = [
        "## Kernels on a GPU",
        _machine(run["machine"]),
        _how(),
        _ceiling(run["ceiling"]),
        *_failed(run.get("failures", [])),
        "### Targets",
        _verdict_table(verdicts(run)),
    ]
    for group in _GROUPS:
        rows = [m for m in run["measurements"] if m["group"] == group]
        if rows:
            parts += [f"### {group.capitalize()}", _measurement_table(rows)]
    return "\n\n".join(parts)


def _machine(machine: Mapping[str, str]) -> str:
    versions = ", ".join(
        f"{name} {machine.get(key, 'unknown')}"
        for name, key in (
            ("driver", "driver"),
            ("CUDA driver API", "cuda_driver_api"),
            ("runtime", "cuda_runtime"),
            ("NVRTC", "nvrtc"),
            ("CuPy", "cupy"),
            ("cuda.core", "cuda.core"),
            ("NumPy", "numpy"),
            ("Python", "python"),
        )
    )
    where = f"{machine.get('gpu', 'unknown')}; {machine.get('date')}, commit {machine.get('commit')}"
    return f"`{COMMAND}` on one {where}; {versions}."


def _how() -> str:
    return (
        "Microseconds of one launch: CUDA events around graphs of many copies of it, median of the replays; the spread "
        "is max - min, a launch. Bytes are what a launch must move at least; the floor is those bytes at the read "
        "ceiling. Cold: L2 flushed before each launch, taken where the bytes are below four times L2. Before a case "
        "was timed, sampled stamps and digests were equal to `kvcanary.hashing` bit for bit, the guard was silent, and "
        "where prefix stamps or data are verified one flipped bit was reported where it was, and nowhere else."
    )


def _ceiling(ceiling: Mapping[str, Any]) -> str:
    return (
        f"Ceiling of the same run: {ceiling['read_tb_s']:.3f} TB/s read ({ceiling['read_shape']}, "
        f"{ceiling['read_bytes'] / 1e9:.1f} GB), {ceiling['copy_tb_s']:.3f} TB/s copied device to device "
        f"(read + written); L2 {ceiling['l2_bytes'] / 1e6:.0f} MB; an empty kernel in such a graph takes "
        f"{ceiling['launch_floor_us']:.2f} us."
    )


def _failed(failures: Sequence[str]) -> list[str]:
    if not failures:
        return []
    return ["Cases without a time:", "\n".join(f"- {failure}" for failure in failures)]


def value_text(value: float | None, kind: str) -> str:
    """A figure of a target with its unit; a dash if there is none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if kind == "share" else f"{value:.1f}{_UNITS[kind]}"


def _verdict_table(rows: Sequence[Verdict]) -> str:
    lines = ["| measurement | target | measured | cold | |", "|---|---|---|---|---|"]
    for verdict in rows:
        target = verdict.target
        sign = "<=" if target.kind == "us" else ">="
        over = f" against {', '.join(k.rsplit(' ', 1)[1] for k in target.over)}" if target.over else ""
        bound = f"{sign} {target.bound:g}{_UNITS[target.kind]}{' of the ceiling' if target.kind == 'share' else ''}"
        figures = f"{value_text(verdict.value, target.kind)} | {value_text(verdict.cold, target.kind)}"
        lines.append(f"| `{target.key}`{over} | {bound} | {figures} | {verdict.word} |")
    return "\n".join(lines)


def _measurement_table(rows: Sequence[Mapping[str, Any]]) -> str:
    has_notes = any(m["note"] for m in rows)
    head = "| measurement | us | spread | MB | TB/s | share | floor us | cold us (share) |"
    head += " what |" if has_notes else ""
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for m in rows:
        cold = "-" if m["cold_us"] is None else f"{m['cold_us']:.2f} ({m['cold_share'] or 0:.3f})"
        in_l2 = ", fits L2" if m["is_in_l2"] else ""
        cells = (
            f"`{m['key']}`",
            f"{m['us']:.2f}{in_l2}",
            f"{m['spread_us']:.2f}",
            f"{m['bytes'] / 1e6:.2f}",
            f"{m['tb_s']:.3f}",
            f"{m['share']:.3f}",
            f"{m['floor_us']:.2f}",
            cold,
            *((m["note"],) if has_notes else ()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict_lines(rows: Sequence[Verdict]) -> list[str]:
    """The targets for a terminal."""
    lines = []
    for verdict in rows:
        target = verdict.target
        sign = "<=" if target.kind == "us" else ">="
        cold = f"  cold {value_text(verdict.cold, target.kind)}" if verdict.cold is not None else ""
        name = target.key + (f" / {target.over[0].rsplit(' ', 1)[1]}" if target.over else "")
        lines.append(
            f"{name:<66} {sign} {target.bound:>7g}{_UNITS[target.kind]:<3} "
            f"{value_text(verdict.value, target.kind):>10}  {verdict.word}{cold}"
        )
    return lines
