"""What a process holds: resident memory, open files, threads, memory of a GPU. Of a soak it must not grow."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

MIB = 1 << 20
MAX_GROWTH = 32 * MIB  # of resident memory: what allocators keep differs by so much between equal runs
MIN_SAMPLES = 6  # fewer cannot be told apart from a beginning


class Footprint(NamedTuple):
    """What a process holds now.

    Attributes:
        resident: bytes of memory.
        n_files: open file handles.
        n_threads: threads.
        on_device: bytes of GPU memory that are in use, by whomever; 0 without a GPU.
    """

    resident: int
    n_files: int
    n_threads: int
    on_device: int = 0

    @classmethod
    def now(cls, *, on_gpu: bool = False) -> Footprint | None:
        """None where the system has no /proc."""
        gc.collect()
        status, files = Path("/proc/self/statm"), Path("/proc/self/fd")
        if not status.exists():
            return None
        resident = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(resident, len(list(files.iterdir())), threading.active_count(), _on_device() if on_gpu else 0)


def _on_device() -> int:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


def growth(samples: Sequence[Footprint]) -> Footprint | None:
    """From the first third of the samples to the last, by medians; None of too few to tell."""
    if len(samples) < MIN_SAMPLES:
        return None
    third = len(samples) // 3
    ends = (samples[:third], samples[-third:])
    first, last = ([int(median(column)) for column in zip(*part, strict=True)] for part in ends)
    return Footprint(*(after - before for before, after in zip(first, last, strict=True)))


def is_flat(grown: Footprint) -> bool:
    """Whether nothing grew but by what allocators keep."""
    is_small = grown.resident <= MAX_GROWTH and grown.on_device <= MAX_GROWTH
    return is_small and grown.n_files <= 0 and grown.n_threads <= 0


def told(samples: Sequence[Footprint], grown: Footprint | None) -> str:
    """A line about one process."""
    if not samples:
        return "memory: not measured, there is no /proc here"
    held = f"memory: {samples[-1].resident / MIB:.0f} MiB resident, {samples[-1].n_files} files, "
    held += f"{samples[-1].n_threads} threads at the end"
    if samples[-1].on_device:
        held += f", {samples[-1].on_device / MIB:.0f} MiB of the GPU in use"
    if grown is None:
        return f"{held}; too few seeds to tell whether it grows: give more --minutes"
    changes = f"{grown.resident / MIB:+.1f} MiB, {grown.n_files:+d} files, {grown.n_threads:+d} threads"
    if samples[-1].on_device:
        changes += f", {grown.on_device / MIB:+.1f} MiB of the GPU"
    return (
        f"{held}; {'flat' if is_flat(grown) else 'NOT FLAT'}: {changes} from the first third of the seeds to the last"
    )
