"""A health checker over launches that a test makes by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from base import POOL_NAMES, full_config, make_facts, make_state

from kvcanary.deferred import DelayedDeviceHostHandler, HostStaging
from kvcanary.observers import KernelRunCounterHealthChecker
from kvcanary.tags import CanaryLaunchTag, Stage

T = CanaryLaunchTag
ALL = frozenset({T.HEAD_K_FULL, T.HEAD_V_FULL, T.TAIL_K_FULL, T.TAIL_V_FULL, T.SWEEP_K_FULL})
IN_GRAPH = frozenset(tag for tag in ALL if tag.stage != Stage.SWEEP)


class Rig:
    """A checker over a device state whose launches are made by hand."""

    def __init__(self, active: Mapping[int, frozenset[T]], n_pools: int = 1, depth: int = 4, **config: Any) -> None:
        self.state = make_state(n_pools)
        self.staging = HostStaging(self.state.layout.n_words, depth)
        self.handler = DelayedDeviceHostHandler(self.staging, "health", depth)
        values = {"health_check_every_n_steps": 2, "health_check_warmup_steps": 0, "health_policy": "raise", **config}
        self.checker = KernelRunCounterHealthChecker(full_config(**values), active, POOL_NAMES[:n_pools], self.handler)
        self.n_steps = self.n_counted = 0
        self.n_sweeps = dict.fromkeys(range(n_pools), 0)

    def launch(self, tags: frozenset[T], pool: int = 0) -> None:
        for tag in tags:
            self.state.kernel_run_counters[pool, tag] += np.uint64(1)

    def step(self, tags: frozenset[T] = frozenset(), counts: bool = True) -> None:
        """One outer step of pool 0; ``counts`` = it had a forward and was not paused."""
        self.launch(tags)
        self.n_steps += 1
        self.n_counted += counts
        facts = {"n_counted_steps": self.n_counted, "n_sweeps": dict(self.n_sweeps)}
        self.checker.step(make_facts(self.state, self.n_steps, **facts))

    def run(self, n_steps: int, tags: frozenset[T] = frozenset()) -> None:
        for _ in range(n_steps):
            self.step(tags)
