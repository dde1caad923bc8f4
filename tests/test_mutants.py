"""The mutation check itself: every edit fits, its tests are there, and some mutants are planted now.

``python -m tests.mutants`` plants them all and lists what survives (minutes).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from interleavings import BROKEN
from mutants import catalogue
from mutants.mutant import ROOT, Mutant, MutantError, Tree

CATALOGUE = catalogue()
QUICK = [m for m in CATALOGUE if m.is_quick]


def name_of(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.name}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("mutants"))


def test_there_are_enough_of_each_kind() -> None:
    in_kernels = [m for m in CATALOGUE if m.file.startswith("kernels/")]
    assert len(in_kernels) >= 40 and len(CATALOGUE) - len(in_kernels) >= 40
    assert len({name_of(m) for m in CATALOGUE}) == len(CATALOGUE)
    assert 8 <= len(QUICK) <= 12


@pytest.mark.parametrize("mutant", CATALOGUE, ids=name_of)
def test_each_fits_the_tree_and_names_tests_that_are_there(mutant: Mutant, tree: Tree) -> None:
    text = (tree.root / mutant.file).read_text()
    assert mutant.planted_in(text) != text
    assert all((ROOT / test).exists() for test in mutant.tests.split())
    assert not mutant.twin or mutant.twin in BROKEN


def test_what_does_not_fit_is_an_error(tree: Tree) -> None:
    for old, new in (("nowhere to be found", "x"), ("import", "x"), ("class Phase(Enum)", "class Phase(Enum)")):
        with pytest.raises(MutantError, match="is to be changed"):
            Mutant("bad", "kvcanary/phases.py", old, new, "tests").planted_in(
                (tree.root / "kvcanary/phases.py").read_text()
            )


@pytest.mark.slow
@pytest.mark.parametrize("mutant", QUICK, ids=name_of)
def test_it_is_killed(mutant: Mutant, tree: Tree) -> None:
    before = (tree.root / mutant.file).read_text()
    verdict = tree.judge(mutant, asks_everything=False)
    assert verdict.is_killed, f"{name_of(mutant)} survives {mutant.tests}"
    assert (tree.root / mutant.file).read_text() == before


@pytest.mark.slow
def test_what_changes_nothing_survives(tree: Tree) -> None:
    comment = '"""The order of calls: which phase the manager is in, and what may come next."""'
    harmless = Mutant(
        "harmless", "kvcanary/phases.py", comment, comment.replace("order", "Order"), "tests/test_tags.py"
    )
    assert not tree.judge(harmless, asks_everything=False).is_killed


@pytest.mark.slow
def test_a_crash_is_a_kill(tree: Tree) -> None:
    crash = Mutant(
        "crash",
        "kvcanary/tags.py",
        "import annotations",
        "import annotations\nimport os; os.abort()",
        "tests/test_tags.py",
    )
    assert tree.judge(crash, asks_everything=False).killer == "a crash (signal 6)"


def test_the_tree_is_a_copy(tree: Tree) -> None:
    assert tree.root != ROOT and not (tree.root / "kvcanary" / "_kernels").exists()
    assert sorted(p.name for p in (tree.root / "kernels").glob("*.cu")) == sorted(
        p.name for p in (Path(ROOT) / "kernels").glob("*.cu")
    )
