"""Memory that kernels see is of exactly its size: the address sanitizer sees the byte behind each kind of it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from .build import build, find_compiler, sanitizer_environment
from .exact import ALIGNMENT, exact_array, exact_copy, exact_rows

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: install g++ or clang++")


def test_arrays_are_zeroed_aligned_and_their_own() -> None:
    for shape, dtype in ((7, np.uint8), ((3, 5), np.uint64), ((2, 0), np.int32), ((), np.int64)):
        first, second = exact_array(shape, dtype), exact_array(shape, dtype)
        assert not first.any() and not np.shares_memory(first, second)
        assert first.shape == second.shape and first.dtype == dtype
        assert first.size == 0 or first.ctypes.data % ALIGNMENT == 0


def test_copies_hold_what_they_are_copies_of() -> None:
    values = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(exact_copy(values), values)
    rows = exact_rows(values, 24)
    assert np.array_equal(rows, values) and rows.strides == (24, 4)
    assert rows.base is not None and not np.shares_memory(rows, values)


# Each kind of memory is filled to its last byte, then, in a child of its own, to the byte behind it.
OVERRUNS = textwrap.dedent("""
    import os, sys
    import numpy as np
    from simt.driver import SimtDriver
    from simt.exact import exact_copy, exact_rows
    from simt.fake_cuda import FakeCuda
    from simt.runner import SimtLibrary

    library = SimtLibrary(sys.argv[1])
    driver, world = SimtDriver(library), FakeCuda(library)
    PARAMS = np.dtype([("in", "u8"), ("out", "u8"), ("n", "u4")], align=True)
    held = []

    def fill(address, n):
        library.launch("kvc_toy_fill", 1, 256, np.array((address, address, n), PARAMS))

    def of(array):
        held.append(array)
        return array.ctypes.data, array.nbytes

    lent = driver.lend([np.zeros(5, np.int64)], 77, None)
    (listed,), scratch = lent.__enter__()
    mapped, address = driver.mapped(5, np.uint64)
    cupy_array, pinned = world.cupy.zeros(9, np.int32), world._pinned(41)
    kinds = {
        "zeros": of(driver.zeros(33, np.uint8)),
        "zeroed structures": of(driver.zeros((3, 2), np.dtype([("a", "u8"), ("b", "u4")]))),
        "mapped": (address, 40),
        "a list": (driver.upload_lists([np.zeros(7, np.int32)], 99, None)[0], 28),
        "a lent list": (listed, 40),
        "scratch": (scratch, 77),
        "a copy": of(exact_copy(np.zeros((3, 3), np.int32))),
        "rows apart": (of(exact_rows(np.zeros((3, 2), np.int32), 16))[0], 40),
        "an array of CuPy's": (cupy_array.data.ptr, 36),
        "pinned": (pinned.handle, 41),
    }
    for kind, (address, n_bytes) in kinds.items():
        fill(address, n_bytes)
        child = os.fork()
        if child == 0:
            fill(address, n_bytes + 1)
            os._exit(0)
        print(kind, "seen" if os.waitpid(child, 0)[1] else "NOT SEEN")
""")


def test_sanitizers_see_the_byte_behind_each_kind_of_memory(tmp_path: Path) -> None:
    environment = sanitizer_environment()
    if environment is None:
        pytest.skip("no libasan: install the compiler's address sanitizer runtime")
    library = build(HERE / "toy", tmp_path, sanitize=True)
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", OVERRUNS, str(library)],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.endswith(" seen") for line in lines), done.stdout
