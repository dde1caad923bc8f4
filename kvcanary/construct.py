"""What is decided once, when a manager is made: capacities, the backend, the names in reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from kvcanary.backends import Backend
from kvcanary.backends.host import HostBackend
from kvcanary.config import CanaryConfig
from kvcanary.errors import ConfigError
from kvcanary.layout import KvPool
from kvcanary.violations import PoolNames


def pool_names(pool: KvPool, real_data: str) -> PoolNames:
    digests = tuple((u.name, u.layer) for u in pool.digest_units(real_data))
    planes = tuple((p.name, p.layer, p.element) for p in pool.ordered_planes)
    return PoolNames(pool.name, pool.page_size, digests, planes)


def check_arguments(config: object, pools: object) -> tuple[KvPool, ...]:
    """The pools, if these are a config and pools; with the guard off there may be none."""
    if not isinstance(config, CanaryConfig):
        raise ConfigError(
            f"config is {type(config).__name__}: give a CanaryConfig, CanaryConfig.from_env() for instance"
        )
    given = (pools,) if isinstance(pools, KvPool) else tuple(pools) if isinstance(pools, (list, tuple)) else None
    if given is None or not all(isinstance(p, KvPool) for p in given) or not (given or config.mode == "off"):
        held = (
            type(pools).__name__
            if given is None
            else f"a list of {', '.join(type(p).__name__ for p in given) or 'none'}"
        )
        raise ConfigError(f"pools is {held}: give a list of at least one KvPool, see kvcanary.layouts")
    return given


def check_capacities(pools: Sequence[KvPool], max_requests: int, max_new_tokens: int) -> None:
    names = [p.name for p in pools]
    if len(set(names)) != len(names):
        raise ConfigError(f"pool names {', '.join(names)}: give each pool a name of its own")
    for name, value, high in (("max_requests", max_requests, 1 << 20), ("max_new_tokens", max_new_tokens, 1 << 30)):
        if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= high:
            raise ConfigError(f"{name}={value!r}: give an integer from 1 to {high}")
    if len({p.device for p in pools if p.device}) > 1:
        raise ConfigError("the pools lie on several devices: make a manager per device")


def choose_backend(backend: str, pools: Sequence[KvPool]) -> str:
    if backend not in ("auto", "host", "cuda"):
        raise ConfigError(f"backend={backend!r}: choose one of auto, host, cuda")
    if backend != "auto":
        return backend
    device = next((p.device for p in pools if p.device), None)
    if device is None:
        raise ConfigError("backend='auto' and no pool has planes to tell the device by: choose 'host' or 'cuda'")
    return "host" if device == "cpu" else "cuda"


def make_backend(
    kind: str | Callable[..., Backend],
    config: CanaryConfig,
    pools: Sequence[KvPool],
    max_requests: int,
    max_new_tokens: int,
) -> Backend:
    if kind == "host":
        return HostBackend(config, pools, max_requests, max_new_tokens)
    if kind == "cuda":
        from kvcanary.backends.cuda import make_cuda_backend

        return make_cuda_backend(config, pools, max_requests, max_new_tokens)
    assert callable(kind)
    return kind(config, pools, max_requests, max_new_tokens)


def zeros_beside(pools: Sequence[KvPool], n: int) -> Any:
    """Zeros u32[n] where the KV lies, for an engine that reads the taint of a guard that is off.

    Raises:
        BackendError: the KV is on a GPU, and CuPy or cuda.core is missing.
    """
    device = next((pool.device for pool in pools if pool.device), "cpu")
    if device == "cpu":
        return np.zeros(n, np.uint32)
    from kvcanary.backends.cuda import import_cuda

    cupy, _ = import_cuda()
    with cupy.cuda.Device(int(device.split(":")[1])):
        return cupy.zeros(n, np.uint32)
