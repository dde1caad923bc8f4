"""The place of the benches on a GPU, through CuPy, and what this machine can do at best."""

from __future__ import annotations

import gc
import itertools
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.timing import FLUSH_BYTES, GraphTimer, Timing

SOURCE = Path(__file__).with_name("baselines.cu")
KERNELS = (
    "bench_fill", "bench_empty", "bench_read_4", "bench_read_8", "bench_read_16", "bench_flush", "base_plan",
    "base_verify_stamps", "base_fold_slots", "base_verify_folds", "base_write_stamps", "base_write_folds",
)  # fmt: skip
CEILING_BYTES = 4 << 30
READ_THREADS = 512
Array = npt.NDArray[Any]


class GpuPlace:
    """`bench.rig.Place` on the current GPU."""

    backend = "cuda"

    def __init__(self) -> None:
        import cupy

        self.xp = self._cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        attributes = cupy.cuda.Device().attributes
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self.l2_bytes = int(attributes.get("L2CacheSize") or properties["l2CacheSize"])
        self.n_multiprocessors = int(attributes["MultiProcessorCount"])
        module = cupy.RawModule(code=SOURCE.read_text(), options=("-std=c++17",), backend="nvrtc")
        self._kernels = {name: module.get_function(name) for name in KERNELS}
        assert all(k.num_regs > 0 for k in self._kernels.values())  # asks the driver: loaded now, not in a capture
        self._flushed = self.random_bytes(FLUSH_BYTES, 0)
        self._sink = cupy.zeros(1, np.uint32)
        self.synchronize()

    def upload(self, values: Array) -> Any:
        return self._cupy.asarray(values)

    def to_host(self, array: Any) -> Array:
        self.synchronize()
        host: Array = array.get()
        return host

    def random_bytes(self, n: int, seed: int) -> Any:
        words = self._cupy.empty(-(-n // 8), np.uint64)
        grid = min(8 * self.n_multiprocessors, -(-words.size // 256))
        self.launch("bench_fill", grid, 256, (words, np.int64(words.size), np.uint64(seed)), self.stream)
        return words.view(np.uint8)[:n]

    def launch(self, name: str, grid: int, threads: int, args: Sequence[Any], stream: Any) -> None:
        with stream:
            self._kernels[name]((grid,), (threads,), tuple(args))

    def copy(self, to: Any, source: Any, stream: Any) -> None:
        runtime = self._cupy.cuda.runtime
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpyAsync(to.data.ptr, source.data.ptr, source.nbytes, kind, stream.ptr)

    def synchronize(self) -> None:
        self._cupy.cuda.runtime.deviceSynchronize()

    def release(self) -> None:
        gc.collect()
        self.synchronize()
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._cupy.get_default_pinned_memory_pool().free_all_blocks()

    def timer(self, n_replays: int) -> GraphTimer:
        """A timer on this place's stream."""
        return GraphTimer(self._cupy, self.stream, self.flush, n_replays)

    # ---- the machine -------------------------------------------------------------------------------------------------
    def flush(self, stream: Any) -> None:
        """Read more than L2 holds."""
        args = (self._flushed, np.int64(FLUSH_BYTES // 16), self._sink)
        self.launch("bench_flush", 4 * self.n_multiprocessors, READ_THREADS, args, stream)

    def read(self, unroll: int, blocks: int, data: Any) -> Callable[[Any], None]:
        """A launch that reads all of ``data`` once."""
        args = (data, np.int64(data.nbytes // 16), self._sink)
        return lambda stream: self.launch(f"bench_read_{unroll}", blocks, READ_THREADS, args, stream)

    def ceilings(self, timer: GraphTimer) -> dict[str, Any]:
        """Read bandwidth (the best of several shapes), copy bandwidth (read + written) and the floor of a launch."""
        data = self.random_bytes(CEILING_BYTES, 1)
        best: tuple[Timing, str] | None = None
        for unroll, per_sm in itertools.product((4, 8, 16), (1, 2, 4, 8)):
            found = timer.time(self.read(unroll, per_sm * self.n_multiprocessors, data))
            if best is None or found.us < best[0].us:
                best = found, f"{unroll} loads in flight, {per_sm} blocks of {READ_THREADS} a multiprocessor"
        assert best is not None
        half = CEILING_BYTES // 2
        copied = timer.time(lambda stream: self.copy(data[half:], data[:half], stream))
        floor = timer.time(lambda stream: self.launch("bench_empty", 1, 32, (), stream))
        return {
            "read_tb_s": CEILING_BYTES / best[0].us / 1e6,
            "read_spread_us": best[0].spread_us,
            "read_us": best[0].us,
            "read_shape": best[1],
            "read_bytes": CEILING_BYTES,
            "copy_tb_s": CEILING_BYTES / copied.us / 1e6,
            "launch_floor_us": floor.us,
            "l2_bytes": self.l2_bytes,
        }

    def describe(self) -> dict[str, str]:
        """The machine and the versions; nothing that identifies one card."""
        import cuda.core

        runtime = self._cupy.cuda.runtime
        return {
            "gpu": runtime.getDeviceProperties(self._cupy.cuda.Device().id)["name"].decode(),
            "driver": _driver_release(),
            "cuda_driver_api": str(runtime.driverGetVersion()),
            "cuda_runtime": str(runtime.runtimeGetVersion()),
            "nvrtc": ".".join(map(str, self._cupy.cuda.nvrtc.getVersion())),
            "cupy": self._cupy.__version__,
            "cuda.core": cuda.core.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "commit": _commit(),
        }


def _driver_release() -> str:
    """Release of the kernel driver; "unknown" where nvidia-smi is missing."""
    return _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"


def _commit() -> str:
    """Commit of the checkout, with + when tracked files differ from it."""
    at = str(SOURCE.parent)
    commit = _output_of(["git", "-C", at, "rev-parse", "--short", "HEAD"])
    if not commit:
        return "unknown"
    return commit + ("+" if _output_of(["git", "-C", at, "status", "--porcelain", "-uno"]) else "")


def _output_of(command: list[str]) -> str:
    """First line of what a command prints; "" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else ""
