"""The README's section on what the guard catches and what it cannot, made of a drill's outcomes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from kvcanary.causes import NAMES
from kvcanary.cli.drill_report import reported_reasons
from kvcanary.errors import ConfigError
from kvcanary.sim.museum.scenario import BLIND, NEGATIVE, POSITIVE, Outcome

BEGIN, END = "<!-- drill: made by `kvcanary drill --render-readme README.md` -->", "<!-- drill: end -->"

WIDTH = 125  # columns, as the rest of the README has them


def render(text: str, outcomes: Sequence[Outcome]) -> str:
    """The text with the part between the markers made anew.

    Raises:
        ConfigError: the markers are not there.
    """
    check_markers(text)
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section(outcomes)}\n{END}{after}"


def check_markers(text: str) -> None:
    """ConfigError if the section has no place in the text."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"the file must hold {BEGIN} and {END}, once each: put them where the section belongs")


def section(outcomes: Sequence[Outcome]) -> str:
    """The tables."""
    played = [o for o in outcomes if o.ok is not None]
    positive, negative, blind = ([o for o in played if o.scenario.kind == k] for k in (POSITIVE, NEGATIVE, BLIND))
    lines = ["| class | what goes wrong | reported as | steps until then |", "|---|---|---|---|"]
    for class_id in sorted({o.scenario.class_id for o in positive}):
        of_class = [o for o in positive if o.scenario.class_id == class_id]
        first = sorted({min(o.latencies) for o in of_class if o.latencies})
        steps = " to ".join(dict.fromkeys(map(str, (first[0], first[-1])))) if first else "at the call"
        reasons = ", ".join(f"`{name}`" for name in reported_reasons(of_class).names())
        lines.append(f"| {class_id} | {NAMES[class_id]} | {reasons} | {steps} |")
    missing = sorted({o.missing for o in outcomes if o.ok is None})
    titles = {o.scenario.id: o.scenario.title for o in negative}
    twins = f"Silent, as it should be, over {len(titles)} legal twins: " + "; ".join(titles.values()) + "."
    lines += ["", *textwrap.wrap(twins, WIDTH)]
    lines += ["", "It cannot see:", ""]
    lines += [f"- {title}" for title in dict.fromkeys(o.scenario.title for o in blind)]
    if missing:
        named = ", ".join(f"`{m}`" for m in missing)
        lines += ["", *textwrap.wrap(f"Not in this version, so that what needs it is not drilled: {named}.", WIDTH)]
    return "\n".join(lines)
