"""The error tree: as drawn at the top of errors.py, each class usable the way it is caught."""

from __future__ import annotations

import inspect
import re

import pytest

from kvcanary import errors
from kvcanary.tags import CanaryLaunchTag

CLASSES = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.KvCanaryError)]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: list[tuple[str, str]] = []
    last_at: dict[int, str] = {-1: "RuntimeError"}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([│├└─ ]*)(\w+Error|KvCanaryViolation)\b", line):
            depth = len(found[1]) // 4
            drawn.append((found[2], last_at[depth - 1]))
            last_at[depth] = found[2]
    assert drawn == [(c.__name__, c.__bases__[0].__name__) for c in CLASSES]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_a_runtime_error_with_its_message_and_a_docstring(error: type[errors.KvCanaryError]) -> None:
    assert issubclass(error, RuntimeError) and error.__doc__
    assert str(error("ring_capacity=0: give an integer from 1")) == "ring_capacity=0: give an integer from 1"


@pytest.mark.parametrize("error", [errors.ConfigError, errors.LayoutError, errors.BatchError])
def test_bad_values_are_value_errors_too(error: type[errors.KvCanaryError]) -> None:
    with pytest.raises(ValueError, match="bad"):
        raise error("bad")


def test_a_stall_names_its_tags_and_its_step() -> None:
    stalled = errors.CanaryStalledError("no launch", [CanaryLaunchTag.HEAD_K_FULL], 300)
    assert (stalled.tags, stalled.step) == ((CanaryLaunchTag.HEAD_K_FULL,), 300)
    fell = errors.CanaryCounterError("fell")
    assert (fell.tags, fell.step) == ((), 0) and isinstance(fell, errors.CanaryStalledError)


def test_a_violation_holds_its_records() -> None:
    assert errors.KvCanaryViolation("corrupt").violations == ()
    assert len(errors.KvCanaryViolation("corrupt", [object(), object()]).violations) == 2  # type: ignore[list-item]
