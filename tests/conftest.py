"""Set-up that all tests share: Hypothesis profiles, and the reason why the GPU tests cannot run here."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# Matrices here are small: BLAS threads only get into each other's way. Before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Shared runners stall for seconds: no deadline, in either profile. "ci" tries more, the same each time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@cache
def why_no_gpu() -> str:
    """What the GPU tests lack, "" if nothing; asks the driver itself, as cuda.core hangs without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver: libcuda.so.1 cannot be loaded"
    if status := driver.cuInit(0):
        return f"cuInit answers CUDA error {status}: no usable GPU"
    n_devices = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(n_devices)) or not n_devices.value:
        return "the driver shows no GPU"
    missing = [name for name in ("cupy", "cuda.core", "cuda.bindings") if not _is_installed(name)]
    return f'{", ".join(missing)} missing: pip install "kvcanary[cuda13]"' if missing else ""


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


# The tests' own modules are imported where they are used: they bring NumPy, which comes after the lines at the top.
@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels built for the CPU (`simt.runner.SimtLibrary`), once a session."""
    from agree import simt_library
    from simt.build import find_compiler

    if find_compiler() is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    return simt_library(Path(os.environ.get("KVC_SIMT_BUILD") or tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def sides(request: pytest.FixtureRequest) -> Callable[[], list[Any]]:
    """New sides for a script: the reference, and the kernels where there is a compiler."""
    from agree import Side, SimtSide
    from simt.build import find_compiler

    if find_compiler() is None:
        return lambda: [Side()]
    library = request.getfixturevalue("library")
    return lambda: [Side(), SimtSide(library)]
