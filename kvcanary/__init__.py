"""kvcanary: a guard for the paged KV cache of LLM inference engines."""

from kvcanary import layouts
from kvcanary.agreement import RankAgreement
from kvcanary.batch import StepBatch
from kvcanary.bundle import SlotBundle
from kvcanary.config import CanaryConfig
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.embedding import CanaryGraphs
from kvcanary.errors import (
    BackendError,
    BatchError,
    BlackBoxError,
    BundleError,
    CanaryCounterError,
    CanaryStalledError,
    CaptureError,
    ConfigError,
    KvCanaryError,
    KvCanaryViolation,
    LayoutError,
    LifecycleError,
    PhaseError,
    RankStalledError,
)
from kvcanary.layout import KvPool, Plane
from kvcanary.ledger import PREFIX_CACHE
from kvcanary.lifecycle import LifecycleEvent
from kvcanary.manager import CanaryManager
from kvcanary.observers import KernelRunCounterHealthChecker, PeriodicCanaryStatsLogger
from kvcanary.perturb_record import Perturbation
from kvcanary.perturb_spec import FaultKind
from kvcanary.state import CanaryDeviceState
from kvcanary.stats import CanaryStats
from kvcanary.sweep import SweepOrchestrator
from kvcanary.tags import CanaryLaunchTag, Half, PoolKind, Reason, Stage
from kvcanary.verdict import RankVerdict, Severity
from kvcanary.violations import Violation

__version__ = "0.1.0"

__all__ = [
    "PREFIX_CACHE",
    "BackendError",
    "BatchError",
    "BlackBoxError",
    "BundleError",
    "CanaryConfig",
    "CanaryCounterError",
    "CanaryDeviceState",
    "CanaryGraphs",
    "CanaryLaunchTag",
    "CanaryManager",
    "CanaryStalledError",
    "CanaryStats",
    "CaptureError",
    "ConfigError",
    "DelayedDeviceHostHandler",
    "FaultKind",
    "Half",
    "KernelRunCounterHealthChecker",
    "KvCanaryError",
    "KvCanaryViolation",
    "KvPool",
    "LayoutError",
    "LifecycleError",
    "LifecycleEvent",
    "PeriodicCanaryStatsLogger",
    "Perturbation",
    "PhaseError",
    "Plane",
    "PoolKind",
    "RankAgreement",
    "RankStalledError",
    "RankVerdict",
    "Reason",
    "Severity",
    "SlotBundle",
    "Stage",
    "StepBatch",
    "SweepOrchestrator",
    "Violation",
    "layouts",
]
