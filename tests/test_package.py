"""The package: its public names, and what importing it does not import."""

from __future__ import annotations

import kvcanary


class TestPackage:
    def test_public_names_are_sorted_and_there(self) -> None:
        names = kvcanary.__all__
        assert names == sorted(names, key=lambda name: (not name.isupper(), name)), "constants first"
        assert all(getattr(kvcanary, n) is not None for n in names)

    def test_the_package_imports_no_framework(self) -> None:
        import subprocess
        import sys

        names = ("torch", "jax", "cupy", "cuda", "vllm", "sglang")
        code = f"import sys, kvcanary; print([m for m in {names} if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"
