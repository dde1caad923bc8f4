"""The examples run as they stand: each serves honestly in silence, then its fault is caught."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)
ANYWHERE: dict[str, tuple[str, ...]] = {  # and the packages that each needs
    "numpy_engine": (),
    "containment": (),
    "torch_llama": ("torch", "transformers"),
    "jax_callback": ("jax",),
    "tinygrad_llm": ("tinygrad",),
}
ON_A_GPU: dict[str, tuple[str, ...]] = {
    "cupy_graph": (),
    "cuda_core_graph": (),
    "torch_llama": ("torch", "transformers"),
    "jax_callback": ("jax",),
    "tinygrad_llm": ("tinygrad",),
    "numba_engine": ("numba.cuda",),
}
# A module that a package imports only once it compiles, and that a version of NumPy it does not know breaks.
AT_USE = {"numba.cuda": "numba.cuda.np.arrayobj"}
HELPERS = {"device_toy"}  # of other examples
ELSEWHERE = {"two_ranks"}  # with tests of their own
HOST_ONLY = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "DEV": "CPU" if shutil.which("clang") else "PYTHON",  # of tinygrad
}


def skip_if_broken(package: str) -> None:
    """Skips where an installed package does not work by itself, with its own words for it."""
    if package not in AT_USE:
        return
    alone = [sys.executable, "-W", "ignore", "-c", f"import {AT_USE[package]}"]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        pytest.skip(f"{package} is installed, but does not work with NumPy {np.__version__} here: {why[0]}")


def run(name: str, packages: tuple[str, ...], *arguments: str, **environment: str) -> list[str]:
    """What an example prints (or another script, beside the directory of the examples); it must end with 0."""
    for package in packages:
        if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package.split('.')[0]}")
        skip_if_broken(package)
    path = os.pathsep.join(p for p in (str(EXAMPLES.parent), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / f"{name}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ANYWHERE)
def test_on_the_host(name: str) -> None:
    silent, caught, *_ = run(name, ANYWHERE[name], **HOST_ONLY)
    assert silent.startswith("silent over ") and "gpu" not in silent and "cuda" not in silent
    assert caught.startswith("caught: reasons=DATA ") and "request=2 " in caught


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name: str) -> None:
    silent, caught = run(name, ON_A_GPU[name], DEV="CUDA", XLA_PYTHON_CLIENT_PREALLOCATE="false")[:2]
    assert silent.startswith("silent over ") and "cpu" not in silent.lower(), silent
    assert caught.startswith("caught: reasons=DATA ") and "request=2 " in caught


def check_llama(lines: list[str], device: str, n_flips: int) -> None:
    silent, named, time = lines
    assert silent.startswith(f"{device}: ") and silent.endswith(": no report")
    assert named.endswith(f": {n_flips} of {n_flips}") and "with the guard" in time


def test_a_flip_in_any_layer_of_a_llama_is_named() -> None:
    small = ("--rows", "2", "--steps", "12", "--layers", "3", "--hidden", "256")
    check_llama(run("../bench/bench_llama", ANYWHERE["torch_llama"], *small, **HOST_ONLY), "cpu", 6)


@pytest.mark.gpu
def test_a_captured_llama_decodes_two_thousand_tokens_for_eight_requests() -> None:
    lines = run("../bench/bench_llama", ON_A_GPU["torch_llama"])
    print(*lines, sep="\n")
    check_llama(lines, "cuda", 16)


def test_a_fault_is_contained() -> None:
    lines = run("containment", ())
    assert lines[2].startswith("contained: computed anew as request 4, all texts as undisturbed, blocks [")


def test_each_is_short_says_what_it_shows_and_is_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names - ELSEWHERE == {*ANYWHERE, *ON_A_GPU, *HELPERS}
    for name in names:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert len(text.splitlines()) < 100, name
        assert ast.get_docstring(ast.parse(text)), name
