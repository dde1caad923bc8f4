"""NVTX ranges around the host phases, for Nsight Systems.

What runs inside a captured graph is found by the names of its kernels (``kvc_*``): a range on a capturing stream would
cover the capture, not the replays. The ranges are put around the phases once, when the manager is made; a manager
without them pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from kvcanary.errors import ConfigError

DOMAIN = "kvcanary"
_COLOR = "green"


def add_ranges(manager: Any, sweep: Any, observers: Sequence[Any]) -> None:
    """Put a range around `begin_step` and `end_step`, around the sweep, and around each observer in it.

    Raises:
        ConfigError: the package ``nvtx`` is missing.
    """
    try:
        import nvtx
    except ImportError as error:
        raise ConfigError('nvtx=True, and there is no package nvtx: pip install "kvcanary[nvtx]"') from error
    domain = nvtx.get_domain(DOMAIN)
    places = [(manager, "begin_step", "begin_step"), (manager, "end_step", "end_step"), (sweep, "step", "sweep")]
    places += [(observer, "step", _name(observer)) for observer in observers]
    for owner, method, message in places:
        setattr(owner, method, _ranged(domain, message, getattr(owner, method)))


def _name(observer: Any) -> str:
    return f"observer {type(observer).__name__}"


def _ranged(domain: Any, message: str, call: Callable[..., Any]) -> Callable[..., Any]:
    attributes = domain.get_event_attributes(message=message, color=_COLOR)

    @wraps(call)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        domain.push_range(attributes)
        try:
            return call(*args, **kwargs)
        finally:
            domain.pop_range()

    return ranged
