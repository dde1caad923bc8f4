"""One line now and then: the guard is alive, and how much it has covered."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from kvcanary.config import CanaryConfig
from kvcanary.deferred import DelayedDeviceHostHandler, Words
from kvcanary.log_lines import line
from kvcanary.observers.facts import StepFacts
from kvcanary.observers.health import ActiveTags
from kvcanary.state import StateSnapshot
from kvcanary.tags import CanaryLaunchTag

logger = logging.getLogger("kvcanary")

STATS_LINE = "[canary] step=%d protected_tokens=%d sweep_passes=%d violations=%d launch_tags_active=%d/%d"


class PeriodicCanaryStatsLogger:
    """Logs `STATS_LINE` at INFO every ``stats_print_every_n_steps`` steps, never at step 0.

    ``protected_tokens`` is the sum of all slot_run_counters since the start: every slot that a launch checked or
    stamped counts once per tag, so one that HEAD and TAIL handle for K and for V counts four times, and again at every
    step. It says how much the guard has done, not how many tokens are in the cache. ``launch_tags_active`` counts the
    active tags that have ever run, over all of them. All numbers are those of the step in the line, also when it is
    printed later.

    One snapshot is ``8 * (24 + 28 * pools)`` bytes: 416 with one pool, 640 with two.

    Args:
        config: how often.
        active_tags: pool index -> tags; may be replaced.
        handler: over ``state.layout.n_words`` words; this logger is its only user.
    """

    def __init__(self, config: CanaryConfig, active_tags: ActiveTags, handler: DelayedDeviceHostHandler) -> None:
        self.active_tags = active_tags
        self.latest: StateSnapshot | None = None  #: the last snapshot that was delivered
        self._every = config.stats_print_every_n_steps
        self._log_format = config.log_format
        self._handler = handler

    def is_due(self, step: int) -> bool:
        """Whether `step` has anything to do after step number ``step``: to take a snapshot or to deliver one."""
        every = self._every
        return every > 0 and (step % every == 0 or self._handler.has_in_flight)

    def step(self, facts: StepFacts) -> None:
        """Log the snapshots that arrived, take a new one when due; never blocks, must not run inside a capture.

        Raises:
            CaptureError: ``facts.stream`` is being captured.
        """
        if self._every == 0:
            return
        receive = partial(self._postprocess_on_host, facts=facts)
        self._handler.step(partial(self._compute_on_device, facts), receive, facts.stream)

    def _compute_on_device(self, facts: StepFacts) -> Any:
        """The device words, when a line is due."""
        return facts.state.words if facts.step > 0 and facts.step % self._every == 0 else None

    def _postprocess_on_host(self, words: Words, facts: StepFacts) -> None:
        """Log the line of the snapshot ``words`` (u64[n_words], taken at ``facts.step``)."""
        snapshot = self.latest = StateSnapshot(facts.step, facts.state.layout, words.copy())
        if not logger.isEnabledFor(logging.INFO):
            return
        active = frozenset[CanaryLaunchTag]().union(*self.active_tags.values())
        runs = snapshot.kernel_run_counters.tolist()
        has_run = {tag for tag in active if any(of_pool[tag] for of_pool in runs)}
        numbers = {
            "step": facts.step,
            "protected_tokens": snapshot.protected_tokens,
            "sweep_passes": facts.sweep_passes,
            "violations": facts.violations_total,
            "launch_tags_active": len(has_run),
            "launch_tags": len(active),
        }
        if self._log_format == "text":
            logger.info(STATS_LINE, *numbers.values())
        else:
            text = STATS_LINE % tuple(numbers.values())
            logger.info("%s", line(self._log_format, logging.INFO, "stats", text, numbers))
