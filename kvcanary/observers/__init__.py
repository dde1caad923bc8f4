"""Observers: what looks at the guard from the host, after each step, outside the graph."""

from kvcanary.observers.facts import Observer, StepFacts
from kvcanary.observers.health import (
    CounterChange,
    CounterVerdict,
    Health,
    KernelRunCounterHealthChecker,
    counter_deltas,
)
from kvcanary.observers.stats import PeriodicCanaryStatsLogger
from kvcanary.observers.violations import ViolationObserver

__all__ = [
    "CounterChange",
    "CounterVerdict",
    "Health",
    "KernelRunCounterHealthChecker",
    "Observer",
    "PeriodicCanaryStatsLogger",
    "StepFacts",
    "ViolationObserver",
    "counter_deltas",
]
