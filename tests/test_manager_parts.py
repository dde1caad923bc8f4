"""The parts that a manager is put together from: what each needs is there, and no two define the same."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter

import pytest
from engine import ToyEngine

from kvcanary import CanaryManager

PARTS = [cls for cls in CanaryManager.__mro__ if cls.__module__.startswith("kvcanary.") and cls is not CanaryManager]


def needed_methods(part: type) -> list[str]:
    """What a part declares for the type checker alone, as some other part has it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    assert isinstance(tree, ast.ClassDef)
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return [node.name for block in blocks for node in block.body if isinstance(node, ast.FunctionDef)]


def needed_attributes(part: type) -> list[str]:
    return list(vars(part).get("__annotations__", {}))


def test_there_are_parts() -> None:
    assert len(PARTS) >= 9
    assert sum(len(needed_methods(part)) for part in PARTS) >= 10


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_what_a_part_needs_is_there(part: type) -> None:
    needed = [*needed_methods(part), *needed_attributes(part)]
    with ToyEngine().manager as manager:
        assert [name for name in needed if not hasattr(manager, name)] == []


def test_public_names_that_parts_need_are_the_managers_own_so_that_their_docstrings_are_found() -> None:
    needed = {name for part in PARTS for name in needed_methods(part) if not name.startswith("_")}
    assert needed and needed <= set(vars(CanaryManager))


def test_no_two_parts_define_the_same_so_that_their_order_does_not_matter() -> None:
    defined = Counter(
        name for part in [CanaryManager, *PARTS] for name, value in vars(part).items() if _is_method(value)
    )
    assert [name for name, n in defined.items() if n > 1] == []


def _is_method(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, (property, staticmethod, classmethod))
