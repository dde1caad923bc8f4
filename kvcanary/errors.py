"""The errors of kvcanary.

KvCanaryError(RuntimeError)
├── KvCanaryViolation     the cache is corrupt (mode "raise"); .violations
├── CanaryStalledError    the guard itself has stopped running; .tags, .step
│   ├── CanaryCounterError    a counter of the guard fell: its state was overwritten or reset behind its back
│   └── RankStalledError      another rank did not come to an agreement: it died, hangs or is behind; .step
├── ConfigError           a configuration value that cannot work
├── LayoutError           a plane or pool that cannot be addressed
├── BatchError            a batch whose arrays do not fit together, or exceed the manager's capacities
├── PhaseError            calls in the wrong order
├── CaptureError          something that must not run inside a stream capture was called there
├── BundleError           exported slots that are damaged, of another version, or of another kind of cache
├── BlackBoxError         a black box that is damaged, of another version, or no black box at all
├── LifecycleError        misuse of block ownership; .blocks, .event_index
└── BackendError          the device, its driver or the kernel compiler is missing or failed

Every message gives the value, the allowed range and the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcanary.tags import CanaryLaunchTag
    from kvcanary.violations import Violation


class KvCanaryError(RuntimeError):
    """Base of all errors that kvcanary raises."""


class KvCanaryViolation(KvCanaryError):
    """The KV cache is corrupt; ``violations`` holds the new records of this step, oldest first.

    With a `RankAgreement` all ranks raise it: those that have seen nothing themselves with no records.
    """

    def __init__(self, message: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)


class CanaryStalledError(KvCanaryError):
    """Launch tags that should run at every forward did not run between two health checks."""

    def __init__(self, message: str, tags: Sequence[CanaryLaunchTag] = (), step: int = 0) -> None:
        super().__init__(message)
        self.tags = tuple(tags)
        self.step = step


class CanaryCounterError(CanaryStalledError):
    """A launch counter is lower than at the check before: the guard's device state was overwritten."""


class RankStalledError(CanaryStalledError):
    """Another rank did not come to an agreement in time; see `RankAgreement`. ``tags`` is empty."""


class ConfigError(KvCanaryError, ValueError):
    """A configuration value that cannot work."""


class LayoutError(KvCanaryError, ValueError):
    """A plane or pool that cannot be addressed."""


class BatchError(KvCanaryError, ValueError):
    """Batch arrays that do not fit together or exceed the manager's capacities."""


class PhaseError(KvCanaryError):
    """A call that came in the wrong order."""


class CaptureError(KvCanaryError):
    """A host-driven call that was made on a stream that is being captured."""


class BundleError(KvCanaryError, ValueError):
    """A bundle of exported slots that is damaged, of another version, or not for this pool."""


class BlackBoxError(KvCanaryError, ValueError):
    """A black box that is damaged, of another version, or a file of something else."""


class LifecycleError(KvCanaryError):
    """Misuse of block ownership; ``blocks`` are the bad ones.

    ``event_index`` is the number of the bad event of `lifecycle.apply`: those before it were applied. None elsewhere.
    """

    def __init__(self, message: str, blocks: Sequence[int] = (), event_index: int | None = None) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)
        self.event_index = event_index


class BackendError(KvCanaryError):
    """The device, its driver or the kernel compiler is missing or failed."""
