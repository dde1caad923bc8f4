"""The toy of the GPU examples on the CPU: its kernels built as C++, its arrays in NumPy, the host backend."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cpp import EXAMPLES
from simt.build import find_compiler

from kvcanary.backends.compile import compile_file

if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)
# What CUDA adds to C++, as far as the toy's kernels use it; without barriers, threads may run one after the other.
CUDA = """
#include <math.h>
#define __global__
#define __device__ static
struct Index { unsigned x; };
extern "C" { Index threadIdx, blockIdx; }
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module, with NumPy for CuPy."""
    runtime = SimpleNamespace(deviceSynchronize=lambda: None)
    names = {name: getattr(np, name) for name in ("zeros", "arange", "full", "float32", "int32", "int64")}
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), **names))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("device_toy")
    del sys.modules["device_toy"]


def test_the_toy_serves_in_silence_and_its_fault_is_caught(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    (tmp_path / "toy.cpp").write_text(CUDA + toy.SOURCE)
    command = [str(compiler), "-std=c++17", "-shared", "-fPIC", "toy.cpp", "-o", "libtoy.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "libtoy.so"))
    thread, block = (ctypes.c_uint.in_dll(library, name) for name in ("threadIdx", "blockIdx"))

    def kernel_of(name: str) -> Any:
        def launch(n_blocks: int, arguments: tuple[Any, ...], _stream: Any) -> None:
            pointers = [ctypes.c_void_p(array.ctypes.data) for array in arguments]
            for block.value in range(n_blocks):
                for thread.value in range(toy.THREADS):
                    getattr(library, name)(*pointers)

        return launch

    kernels = {name: kernel_of(name) for name in ("next_inputs", "write_kv", "sample")}
    engine = toy.Toy()

    def step() -> None:
        with engine.manager.step():
            engine.launch(kernels, None)

    engine.show(step)
    silent, caught = capsys.readouterr().out.splitlines()
    assert silent == "silent over 60 steps" and caught.startswith("caught: reasons=DATA ")
    assert len(set(engine.history[0, :60].tolist())) > 5, "it does not say the same over and over"


def test_its_kernels_compile_for_a_gpu(toy: Any, tmp_path: Path) -> None:
    reason = 'NVRTC missing: pip install "kvcanary[dev]"'
    try:
        pytest.importorskip("cuda.bindings.nvrtc", reason=reason).nvrtcVersion()
    except RuntimeError:
        pytest.skip(reason)
    (tmp_path / "toy.cu").write_text(toy.SOURCE)
    names = {usage.name for usage in compile_file(tmp_path / "toy.cu", "sm_90").usage()}
    assert names == {"next_inputs", "write_kv", "sample"}
