"""Short prompts that ship with the package; the two lighthouse texts begin alike, over more than seven pages of 16."""

from __future__ import annotations

from importlib import resources


def load_texts() -> dict[str, bytes]:
    """All shipped texts by name, in sorted order, without the line end at the end of the file."""
    files = (entry for entry in resources.files(__name__).iterdir() if entry.name.endswith(".txt"))
    return {entry.name[:-4]: entry.read_bytes().rstrip() for entry in sorted(files, key=lambda entry: entry.name)}
