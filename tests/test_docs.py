"""The docs: every code block runs as it stands there or is marked, the tables agree with the code, the site builds."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from docs_blocks import DOCS, FRAGMENT, ROOT, Block, blocks_of, missing, needs_of, pages

import kvcanary
from kvcanary import CanaryConfig, Reason, errors, layouts
from kvcanary.cli import main

if not DOCS.is_dir():
    pytest.skip("docs/ is not beside the tests", allow_module_level=True)
PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
LINE_LENGTH = 150


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python" and block.title != FRAGMENT]


def page_with_code(page: Path) -> Any:
    needs = needs_of(page)
    modules = missing([need for need in needs if need != "gpu"])
    marks = [pytest.mark.gpu] if "gpu" in needs else []
    if modules:
        marks.append(pytest.mark.skip(reason=f"missing: pip install {' '.join(modules)}"))
    return pytest.param(page, id=name_of(page), marks=marks)


@pytest.mark.parametrize("page", [page_with_code(page) for page in PAGES if runnable(page)])
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    """In a process of its own, as a reader would paste it: engines set up GPUs and devices for good."""
    lines = [""] * page.read_text(encoding="utf-8").count("\n")
    for block in runnable(page):
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code  # a traceback then names the line of the page
    program = f"exec(compile({chr(10).join(lines)!r}, {str(page)!r}, 'exec'), {{'__name__': '__main__'}})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVCANARY_")}
    if "gpu" not in needs_of(page):
        environment |= {"DEV": "PYTHON", "JAX_PLATFORMS": "cpu"}  # the device that needs nothing else
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_every_block_is_run_or_marked() -> None:
    """Python runs unless it is a fragment, which must parse all the same; commands run; "text" is what tools print."""
    assert {block.language for block in BLOCKS} <= {"python", "bash", "text"}
    assert {block.title for block in BLOCKS} <= {"", FRAGMENT}
    fragments = [block for block in BLOCKS if block.title]
    assert fragments
    for block in fragments:
        assert block.language == "python", f"{block.page}:{block.line}"
        compile(block.code, f"{block.page}:{block.line}", "exec")


def test_the_readme_has_no_block_that_nothing_runs() -> None:
    """Its Python is taken apart by name in test_readme.py, the rest are commands."""
    blocks = blocks_of(ROOT / "README.md")
    text = (ROOT / "tests" / "test_readme.py").read_text(encoding="utf-8")
    found = re.search(r"^(LOOP, (?:[A-Z]+, )+[A-Z]+) = ", text, re.MULTILINE)
    assert found is not None
    names = found[1].split(", ")
    assert len(names) == sum(block.language == "python" for block in blocks)
    for name in names:
        assert f"exec({name}," in text, name
    assert {block.language for block in blocks} == {"python", "bash"}
    page = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    ours = ("pip install ", "kvcanary ")
    for block in blocks:
        is_marked = page[block.line - 3] == f"<!-- {FRAGMENT} -->"
        if block.language == "bash" and not is_marked:  # what a newcomer types: .ci/run does
            assert all(line.startswith(ours) for line in block.code.splitlines()), f"README.md:{block.line}"


@pytest.mark.parametrize(
    "command",
    sorted({line for block in BLOCKS if block.language == "bash" for line in block.code.splitlines() if line.strip()}),
)
def test_commands_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        for extra in re.findall(r"kvcanary\[([\w,]+)\]", command)[0].split(","):
            assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), extra
        return
    assert words[0] == "kvcanary"
    code = main(words[1:])
    assert code in ((0, 1) if words[1] == "doctor" else (0,)), capsys.readouterr()


def test_extras_named_in_the_text_exist() -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for page in [*PAGES, ROOT / "README.md"]:
        for names in re.findall(r"kvcanary\[([\w,]+)\]", page.read_text()):
            for extra in names.split(","):
                assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), f"{page}: {extra}"


def test_the_configuration_page_is_up_to_date() -> None:
    module = runpy.run_path(str(DOCS / "tools" / "configuration.py"))
    assert module["render"]() == (DOCS / "configuration.md").read_text(), "python docs/tools/configuration.py"


def test_the_configuration_page_says_what_leaves_a_setting_out() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| `None` \| (.*?) \|", (DOCS / "configuration.md").read_text(), re.MULTILINE
    )
    assert [name for name, _, _ in rows] == ["black_box_path", "perturb"]
    for name, variable, allowed in rows:
        assert allowed == "text; for none: `None` as a keyword, no variable or an empty one"
        for environ in ({}, {variable: ""}):
            assert getattr(CanaryConfig.from_env(environ), name) is None
        assert getattr(CanaryConfig.from_env({}, **{name: None}), name) is None
    assert CanaryConfig.from_env({"KVCANARY_BLACK_BOX_PATH": "None"}).black_box_path == "None", "as the page says"


def test_every_reason_and_every_alarm_has_a_section_for_whoever_is_on_call() -> None:
    text = (DOCS / "on-call.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    alarms = {name for name, error in vars(errors).items() if isinstance(error, type)
              and issubclass(error, errors.CanaryStalledError)}  # fmt: skip
    names = [reason.name for reason in Reason] + sorted(alarms)
    assert set(names) <= set(sections)
    assert [name for name in sections if name.isupper()] == [reason.name for reason in Reason]
    for name in names:
        assert "**Says:**" in sections[name] and "**At 3 a.m.:**" in sections[name], name


def test_the_line_that_the_on_call_page_shows_is_the_one_of_the_first_page() -> None:
    names: dict[str, Any] = {}
    for block in runnable(DOCS / "start.md"):
        exec(block.code, names)
    (shown,) = (block.code for block in blocks_of(DOCS / "on-call.md") if block.language == "text")
    shown = " ".join(shown.split()).removeprefix("[canary] violation ").removesuffix("...")
    assert names["violation"].summary().startswith(shown)


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference.md").read_text()
    listed = set(re.findall(r"^::: kvcanary\.(\w+)", text, re.MULTILINE))
    in_errors = set(vars(errors)) if "errors" in listed else set()
    assert set(kvcanary.__all__) <= listed | in_errors


def test_the_reference_has_every_call_of_the_manager_once() -> None:
    text = (DOCS / "reference.md").read_text()
    (members,) = re.findall(
        r"^::: kvcanary\.CanaryManager\n    options:\n      members: \[(.*?)\]", text, re.DOTALL | re.MULTILINE
    )
    assert sorted(re.findall(r"\w+", members)) == [n for n in dir(kvcanary.CanaryManager) if not n.startswith("_")]


def test_every_layout_of_an_engine_is_in_the_docs() -> None:
    text = (DOCS / "layouts.md").read_text()
    modules = {name for name in layouts.__all__ if isinstance(getattr(layouts, name), ModuleType)}
    assert set(re.findall(r"^::: kvcanary\.layouts\.(\w+)", text, re.MULTILINE)) == modules


def test_settings_named_in_the_docs_exist() -> None:
    settings = set(kvcanary.CanaryConfig.__dataclass_fields__) | set(kvcanary.KvPool.__dataclass_fields__)
    settings |= set(kvcanary.RankAgreement.__init__.__annotations__) | {"idle", "command_buffer_compatible"}
    settings |= {"key", "block", "request", "tag", "violations"}  # of log lines
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+)=[^`]*`", page.read_text()):
            assert name in settings, f"{page}: {name}"
        for name in re.findall(r"`KVCANARY_([A-Z_]+)", page.read_text()):
            assert name.lower() in settings, f"{page}: {name}"


def test_lines_are_not_too_long() -> None:
    for page in PAGES:
        is_table = page.name == "configuration.md"
        for n, line in enumerate(page.read_text().splitlines(), 1):
            assert is_table or line.startswith("|") or len(line) <= LINE_LENGTH, f"{page}:{n}: {len(line)} characters"


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made of their words."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_hold_in_the_tree_as_it_is(page: Path) -> None:
    """The site is built with pages that lie elsewhere; whoever reads in a checkout follows the same links."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), f"{page}: {link}: there is no such file"
        assert not anchor or anchor in anchors_of(target), f"{page}: {link}: there is no such heading"


@pytest.mark.parametrize("name", ["kvcanary.StepBatch", "kvcanary.layouts.vllm"])
def test_pydoc_shows_what_the_pages_made_of_docstrings_name(name: str) -> None:
    for page in (ROOT / "README.md", DOCS / ("layouts.md" if "layouts" in name else "reference.md")):
        assert f"`python -m pydoc {name}`" in page.read_text(encoding="utf-8")
    shown = subprocess.run([sys.executable, "-m", "pydoc", name], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "no Python documentation found" not in shown.stdout.lower()
    assert {"kvcanary.StepBatch": "block_table: i32[rows", "kvcanary.layouts.vllm": "packed("}[name] in shown.stdout


@pytest.mark.skipif(bool(missing(["mkdocs", "material", "mkdocstrings"])), reason='pip install "kvcanary[docs]"')
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not re.search("^WARNING", ended.stderr, re.MULTILINE), ended.stderr
    for page in ("index", "on-call/index", "reference/index", "changelog/index", "results/index", "overview/index"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 5000, page
    text = (tmp_path / "site" / "embedding" / "index.html").read_text(encoding="utf-8")
    assert 'href="../overview/#moves"' in text, "links to the README lead to where the site shows it"
