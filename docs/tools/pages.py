"""A hook of MkDocs: pages that live elsewhere in the tree are shown from there, and never copied.

Pages link to where they live, so that the links hold in the tree; on the site they lead to where they are shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # page -> (file, title in the navigation)
    "overview.md": ("README.md", "Everything on one page"),
    "changelog.md": ("CHANGELOG.md", "Changelog"),
    "results.md": ("bench/RESULTS.md", "What was measured"),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; what links into docs/ from outside links beside it from inside."""
    for page, (path, title) in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=f"---\ntitle: {title}\n---\n\n{text}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links out of docs/, such as ``../README.md#moves`` on its first level, to the pages of the site."""
    to_docs = "../" * page.file.src_uri.count("/")
    for name, (path, _title) in PAGES.items():
        markdown = markdown.replace(f"](../{to_docs}{path}", f"]({to_docs}{name}")
    return markdown
