"""The C++ examples, built against the driver's headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def driver_headers() -> Path:
    """The directory of cuda.h: of a toolkit, or of the wheel nvidia-cuda-runtime; skips the test without one."""
    home = os.environ.get("CUDA_HOME")
    toolkits = [Path(home)] if home else sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    wheels = [d for p in sys.path for d in sorted(Path(p, "nvidia").glob("*"))]
    found = next((d / "include" for d in (*toolkits, *wheels) if (d / "include" / "cuda.h").is_file()), None)
    if found is None:
        pytest.skip("no cuda.h: pip install nvidia-cuda-runtime (CUDA 13), or set CUDA_HOME")
    return found


def build_shared(name: str, sources: Sequence[Path], *flags: str, into: Path) -> Path:
    """A shared library; every warning is an error."""
    if not EXAMPLES.is_dir():
        pytest.skip("examples/ is not beside the tests")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    library = into / f"lib{name}.so"
    warnings = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
    command = [compiler, "-std=c++17", *warnings, "-shared", "-fPIC", f"-I{driver_headers()}", *map(str, sources)]
    subprocess.run([*command, *flags, "-o", str(library)], check=True)
    return library
