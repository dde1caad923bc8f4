"""The package: its public names, and what importing it does not import."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from enum import Enum
from pathlib import Path

import kvcanary
from kvcanary import CanaryLaunchTag, Half

# What an assert may call: nothing that has an effect, which `python -O` would leave out.
PURE = {"isinstance", "len", "callable", "int", "all", "any", "prod"}
SELF_EXPLAINING = {CanaryLaunchTag, Half}  # put together of words that the docstring has


class TestPackage:
    def test_no_assert_does_any_work(self) -> None:
        found = []
        for path in Path(kvcanary.__file__).parent.rglob("*.py"):
            for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(statement, ast.Assert):
                    calls = [node.func for node in ast.walk(statement.test) if isinstance(node, ast.Call)]
                    names = {getattr(call, "id", getattr(call, "attr", "?")) for call in calls}
                    is_loading = "num_regs" in ast.unparse(statement.test)  # to ask for it loads a kernel
                    found += [f"{path.name}:{statement.lineno}"] if names - PURE or is_loading else []
        assert not found, "python -O leaves asserts out, and what they do with them"

    def test_public_names_are_sorted_and_there(self) -> None:
        names = kvcanary.__all__
        assert names == sorted(names, key=lambda name: (not name.isupper(), name)), "constants first"
        assert all(getattr(kvcanary, n) is not None for n in names)

    def test_help_names_every_field_and_member(self) -> None:
        missing = []
        for name in kvcanary.__all__:
            thing = getattr(kvcanary, name)
            if not isinstance(thing, type):
                continue
            fields = [f.name for f in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
            members = list(thing.__members__) if issubclass(thing, Enum) and thing not in SELF_EXPLAINING else []
            named = set(re.findall(r"\w+", inspect.getdoc(thing) or ""))
            missing += [f"{name}.{one}" for one in (*fields, *members) if one not in named]
        assert not missing, "help() says nothing of them"

    def test_the_package_imports_no_framework(self) -> None:
        import subprocess
        import sys

        names = ("torch", "jax", "cupy", "cuda", "vllm", "sglang")
        code = f"import sys, kvcanary; print([m for m in {names} if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"
