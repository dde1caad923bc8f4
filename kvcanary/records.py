"""Violations as JSON: what the log and the black box write, and what `kvcanary explain` reads back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvcanary.elements import ELEMENTS
from kvcanary.errors import BlackBoxError
from kvcanary.tags import CanaryLaunchTag, Detail, Reason
from kvcanary.violations import Violation

# Unsigned numbers of 64 bits, which most readers of JSON would round: as hexadecimal text.
_WIDE = ("stored_chain", "expected_chain", "stored_digest", "found_digest")
_TEXT = ("pool_name", "plane_name")
_OPTIONAL = (*_WIDE, "plane", "plane_name", "layer", "stored_token", "expected_token", "element_offset", "element_bits")
_NAMED = ("tag", "reasons", "detail", "element", "is_redacted")


def as_dict(violation: Violation) -> dict[str, Any]:
    """The fields that are known, names in place of numbers; `from_dict` is its inverse."""
    values = {f.name: getattr(violation, f.name) for f in fields(Violation)}
    found = {name: value for name, value in values.items() if value is not None}
    found |= {name: hex(found[name]) for name in _WIDE if name in found}
    found["tag"] = violation.tag.name
    found["reasons"] = list(violation.reasons.names())
    found["detail"] = violation.detail.name
    if violation.element is not None:
        found["element"] = violation.element.name
    return found


def from_dict(found: Mapping[str, Any]) -> Violation:
    """The violation that `as_dict` was given.

    Raises:
        BlackBoxError: a field that is missing, or whose value cannot be.
    """
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Violation)):
        if name in _NAMED:
            continue
        value = found.get(name)
        if value is None and name not in _OPTIONAL:
            raise BlackBoxError(f"a violation without {name!r}: written by another version, or damaged")
        values[name] = None if value is None else _number(name, value) if name not in _TEXT else str(value)
    try:
        return Violation(
            **values,
            tag=CanaryLaunchTag[found["tag"]],
            reasons=Reason(sum(Reason[name] for name in found["reasons"])),
            detail=Detail[found["detail"]],
            element=ELEMENTS[found["element"]] if found.get("element") is not None else None,
            is_redacted=bool(found["is_redacted"]),
        )
    except (KeyError, TypeError) as error:
        raise BlackBoxError(f"a violation with no valid {error}: written by another version, or damaged") from error


def _number(name: str, value: Any) -> int:
    try:
        number = int(value, 16) if name in _WIDE else value
    except (TypeError, ValueError) as error:
        raise BlackBoxError(f"a violation with {name}={value!r}: not a number") from error
    if type(number) is not int or number.bit_length() > 64:
        raise BlackBoxError(f"a violation with {name}={value!r}: not a number of 64 bits")
    return number
