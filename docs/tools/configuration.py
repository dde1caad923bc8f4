"""Writes docs/configuration.md from `CanaryConfig`: ``python docs/tools/configuration.py``.

A test says when it is out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "configuration.md"
if __name__ == "__main__":  # from a checkout that is not installed
    sys.path.insert(0, str(PAGE.parents[1]))

from kvcanary.config import ENV_PREFIX, CanaryConfig, choices_of, range_of  # noqa: E402  after the path is set

HEAD = """# Configuration

<!-- written by docs/tools/configuration.py: do not edit -->

`CanaryConfig(...)` takes these as keywords and reads no environment. `CanaryConfig.from_env(...)` also reads them from
the environment; keywords win over it, except that `{prefix}MODE` always wins: it is the operator's kill switch. An
unknown variable with that prefix is a `ConfigError`; one that is empty counts as not set. No word in a variable stands
for Python's `None`: the text `None` is taken as it is, as the name of a file say. `True` and `False` may be written as
1 and 0, yes and no, on and off too, in either case.

| setting | variable | default | may be | what it does |
|---|---|---|---|---|
"""


def describe(name: str) -> str:
    """What the docstring of `CanaryConfig` says about a setting, on one line."""
    text = inspect.getdoc(CanaryConfig) or ""
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{name}: the docstring of CanaryConfig does not describe it")
    words = " ".join(found[1].split())
    return words[0].upper() + words[1:]


def allowed(name: str, default: object) -> str:
    """The values that a setting takes."""
    if choices := choices_of(name):
        return ", ".join(f"`{choice}`" for choice in choices)
    if limits := range_of(name):
        low, high = limits
        return f"{low} to {high:,}".replace(",", " ")
    return (
        "`True`, `False`"
        if isinstance(default, bool)
        else "text; for none: `None` as a keyword, no variable or an empty one"
    )


def render() -> str:
    """The page."""
    rows = []
    for f in fields(CanaryConfig):
        variable, words = ENV_PREFIX + f.name.upper(), describe(f.name).replace("``", "`")
        rows.append(f"| `{f.name}` | `{variable}` | `{f.default}` | {allowed(f.name, f.default)} | {words} |\n")
    return HEAD.format(prefix=ENV_PREFIX) + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
