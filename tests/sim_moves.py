"""What the tests of the engine's moves share: prompts, what they say when served plainly, and a guarded engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from kvcanary import CanaryConfig, CanaryManager, Reason
from kvcanary.sim.engine import SimEngine
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.habits import Habits
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.requests import Request
from kvcanary.sim.scribe import ScribeModel
from kvcanary.sim.texts import load_texts

SMALL = ModelConfig(n_layers=2, n_heads=2, head_dim=16)
PAGE, MAX_LEN = 4, 96
TEXTS = [text[:n] for text, n in zip(load_texts().values(), (50, 33, 61, 18), strict=True)]
TEXTS.append(TEXTS[2][40:] + TEXTS[0][:20])


@cache
def plain(prompt: bytes, n: int) -> bytes:
    """What the transformer says, alone and unguarded."""
    return SimEngine(NumpyModel(SMALL, 40, PAGE), prefix_sharing=False, max_len=128).run([prompt], n)[0]


class Guarded:
    """An engine over a guard that judges every byte at every step; `log` keeps violations instead of raising."""

    def __init__(
        self,
        habits: Habits | None = None,
        *,
        n_blocks: int = 120,
        page: int = PAGE,
        model: Callable[..., Any] = ScribeModel,
        log: bool = False,
        lifecycle: bool = True,
        leave_out: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.model = model(SMALL, n_blocks, page)
        self.engine = SimEngine(self.model, max_new_tokens=128, max_len=MAX_LEN, habits=habits, **options)
        config = CanaryConfig(mode="log" if log else "raise", verify_data_every=1, lifecycle=lifecycle)
        self.manager = CanaryManager(config, [pool_of(self.model)], self.engine.max_requests, 128)
        self.guard = CanaryGuard(self.manager, leave_out=leave_out)

    def add(self, prompt: bytes, n: int = 12, **options: Any) -> Request:
        return self.engine.add_request(prompt, n, **options)

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.engine.step(self.guard)

    def finish(self, max_steps: int = 400) -> None:
        """Serve until nothing is left to do, then one step more, which does what the last one left to be done."""
        while self.engine.has_work and self.engine.n_steps < max_steps:
            self.step()
        self.step()
        self.manager.synchronize()

    def reasons(self) -> Reason:
        """All that was reported."""
        found = Reason(0)
        for violation in self.manager.violations():
            found |= violation.reasons
        return found

    def assert_silent(self) -> None:
        self.finish()
        stats = self.manager.stats()
        assert self.manager.violations() == () and stats.observations_total == stats.unanchored_rows == 0
        assert stats.unowned_writes == 0
        cached = self.engine.allocator.n_cached if self.engine.habits.cache_owns else 0
        assert not self.engine.allocator.ref_counts.any()
        if self.manager.config.lifecycle:
            assert stats.live_blocks == cached


def other_byte(request: Request) -> int:
    """Another printable byte than the request's last one."""
    return 32 + (int(request.known[-1]) - 31) % 95


def zeros_like(kv: Sequence[Any]) -> list[Any]:
    return [np.zeros_like(values) for values in kv]
