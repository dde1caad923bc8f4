"""What a launch costs the host, by the size of its parameters and the way it is made. Needs a GPU.

``PYTHONPATH=. python bench/bench_launch.py``. The guard's kernels take one struct by value: about 0.6 KB in a step,
4 KB in a call about block ownership. Compared: a CuPy RawKernel, and the driver's own call over parameters that stay.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu import GpuPlace

N_CALLS = 2000
SIZES = (64, 640, 1024, 2048, 4048)
SOURCE = "\n".join(
    f"struct P{n} {{ unsigned long long to; unsigned char rest[{n - 8}]; }};\n"
    f'extern "C" __global__ void launch_{n}(const __grid_constant__ P{n} p) {{\n'
    f"    if (threadIdx.x == 0 && blockIdx.x == 0) *(unsigned long long*)p.to += p.rest[{n - 9}];\n}}"
    for n in SIZES
)


def times(place: GpuPlace, call: Callable[[], None]) -> str:
    """Median, 10th and 90th percentile in microseconds; the queue is drained now and then."""
    spent = []
    for i in range(N_CALLS):
        if i % 100 == 0:
            place.synchronize()
        start = time.perf_counter_ns()
        call()
        spent.append((time.perf_counter_ns() - start) / 1e3)
    low, median, high = np.percentile(spent, (10, 50, 90))
    return f"{median:6.1f} us ({low:.1f} to {high:.1f})"


def main() -> None:
    from cuda.bindings import driver

    place = GpuPlace()
    module = place.xp.RawModule(code=SOURCE, options=("-std=c++17",), backend="nvrtc")
    total = place.xp.zeros(1, np.uint64)
    stream = driver.CUstream(place.stream.ptr)
    for n in SIZES:
        kernel = module.get_function(f"launch_{n}")
        record = np.zeros((), np.dtype([("to", "<u8"), ("rest", "u1", (n - 8,))]))
        record["to"], record["rest"] = total.data.ptr, 1
        by_value: Any = record[()]
        pointers = (ctypes.c_void_p * 1)(record.ctypes.data)
        handle, address = driver.CUfunction(kernel.kernel.ptr), ctypes.addressof(pointers)

        def with_cupy(kernel: Any = kernel, by_value: Any = by_value) -> None:
            with place.stream:
                kernel((4, 1), (256,), (by_value,))

        def with_driver(handle: Any = handle, address: int = address) -> None:
            (error,) = driver.cuLaunchKernel(handle, 4, 1, 1, 256, 1, 1, 0, stream, address, 0)
            assert not error, error

        before = int(total.get()[0])
        with_cupy()
        with_driver()
        place.synchronize()
        assert int(total.get()[0]) == before + 2, "a launch did not get its parameters"
        print(f"{n:5} bytes   CuPy {times(place, with_cupy)}   driver {times(place, with_driver)}")


if __name__ == "__main__":
    main()
