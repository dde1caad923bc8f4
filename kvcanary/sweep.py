"""Sweeps: host-driven checks of resident slots that no running request reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from kvcanary.arrays import view_of
from kvcanary.backends import Backend, Resident
from kvcanary.errors import BatchError
from kvcanary.log_lines import ErrorLog

ResidentSet: TypeAlias = Callable[[], "Resident | Sequence[Any] | None"]
_NAMES = ("slots", "positions", "predecessors", "tokens")


class SweepOrchestrator:
    """Every ``interval`` steps, hands the resident slots of each attached provider to the backend.

    A provider is called on the thread that ends the step and returns (slots, positions, predecessors[, tokens]), each
    i32[n], NumPy or on the guard's device; or None for nothing. Of each slot: its position in the text, the slot of the
    position before (-1 = none, or not known) and its token (-1 = not known).

    A sweep whose lists cannot be copied yet without waiting is tried again at the next step. A provider that raises, or
    whose lists are none, is counted, logged ever more rarely and skipped: the engine's step is not the one to suffer.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.sweep_passes = 0  #: sweeps over all attached resident sets in which there was something to check
        self.n_sweeps: dict[int, int] = {}  #: pool -> sweeps launched for it
        self.errors = ErrorLog()
        self._launched = False
        self._providers: dict[int, ResidentSet] = {}
        self._due: list[int] = []

    @property
    def is_sweeping(self) -> bool:
        return self.interval > 0 and bool(self._providers)

    @property
    def pools(self) -> tuple[int, ...]:
        """Pools with a resident set."""
        return tuple(self._providers)

    def attach(self, pool: int, provider: ResidentSet | None) -> None:
        """Attach, replace or (None) detach the resident set of a pool."""
        if provider is None:
            self._providers.pop(pool, None)
        else:
            self._providers[pool] = provider

    def step(self, step: int, backend: Backend, stream: Any) -> None:
        """Sweep if due at ``step``; never waits, must not run inside a capture."""
        if not self.is_sweeping:
            return
        if step % self.interval == 0 and not self._due:
            self._due = list(self._providers)
        while self._due:
            pool = self._due[0]
            resident = self._ask(pool)
            if resident is not None:
                if not backend.sweep(pool, resident, stream):
                    return
                self.n_sweeps[pool] = self.n_sweeps.get(pool, 0) + 1
                self._launched = True
            self._due.pop(0)
            if not self._due:
                self.sweep_passes += self._launched
                self._launched = False

    def _ask(self, pool: int) -> Resident | None:
        try:
            answer = self._providers[pool]() if pool in self._providers else None
            return None if answer is None else check_resident(answer)
        except Exception:  # noqa: BLE001  whatever an engine's function raises
            self.errors.note(
                "[canary] the resident set of pool %d could not be read; this sweep leaves it out. Mend the function "
                "that attach_resident_set() was given, or detach it: attach_resident_set(None, pool)",
                pool,
            )
            return None


def check_resident(answer: Resident | Sequence[Any]) -> Resident | None:
    """Check a provider's answer; None when it holds no slot.

    Raises:
        BatchError: not three or four flat int32 arrays of one length.
    """
    n_arrays = len(answer) if hasattr(answer, "__len__") else 0
    if not 3 <= n_arrays <= 4:
        given = f"{n_arrays} arrays" if n_arrays else f"a {type(answer).__name__}"
        raise BatchError(f"{given}: give (slots, positions, predecessors) and, if known, tokens")
    arrays = [np.asarray(a, np.int32) if isinstance(a, (list, tuple)) else a for a in answer]
    n = None
    for name, array in zip(_NAMES, arrays, strict=False):
        if array is None and name == "tokens":
            continue
        view = view_of(array, name, BatchError)
        if len(view.shape) != 1 or view.itemsize != 4 or view.dtype not in ("", "int32") or not view.is_contiguous:
            raise BatchError(f"{name} is {view.dtype or view.itemsize}{list(view.shape)}: give a contiguous int32[n]")
        if n is not None and view.shape[0] != n:
            raise BatchError(f"{name} has {view.shape[0]} entries, slots has {n}: give one per slot")
        n = view.shape[0]
    return Resident(*arrays) if n else None
