"""The small engine on the host or on a GPU, sized for the prompts at hand, with or without a guard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvcanary.config import CanaryConfig
from kvcanary.errors import BackendError
from kvcanary.manager import CanaryManager
from kvcanary.sim.engine import SimEngine
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.model import ModelConfig, NumpyModel

MAX_REQUESTS, MAX_NEW_TOKENS, CHUNK, PAGE_SIZE = 8, 256, 64, 16


class Choice(NamedTuple):
    """A backend, and why this one."""

    backend: str
    why: str


def choose_backend(asked: str) -> Choice:
    """The backend that was asked for; for "auto" the GPU, if the kernels can be loaded on one, else the host."""
    if asked == "host":
        return Choice("host", "as asked")
    try:
        _try_gpu()
    except BackendError as error:
        if asked == "cuda":
            raise
        return Choice("host", f"no GPU can be used: {str(error).splitlines()[0]}")
    return Choice("cuda", "as asked" if asked == "cuda" else "a GPU works here")


def _try_gpu() -> None:
    from kvcanary.backends.cuda import CudaDriver

    try:
        driver = CudaDriver(None)
        driver.kernel("begin", "kvc_begin")
    except BackendError:
        raise
    except Exception as error:  # whatever CuPy and cuda.core raise on a machine that has only a part of what they need
        raise BackendError(f"{type(error).__name__}: {error}; `kvcanary doctor` looks closer") from error


@dataclass(frozen=True)
class Sizes:
    """Capacities of the engine."""

    max_len: int  # tokens
    n_blocks: int

    @classmethod
    def of(cls, prompts: Sequence[bytes], max_tokens: int) -> Sizes:
        """Room for the longest prompts side by side, twice, so that finished requests stay cached for a while."""
        lengths = sorted((len(prompt) + max_tokens for prompt in prompts), reverse=True)
        blocks = sum(-(-length // PAGE_SIZE) for length in lengths[:MAX_REQUESTS])
        return cls(lengths[0], 2 * blocks + 1)


@dataclass(frozen=True)
class Rig(AbstractContextManager["Rig"]):
    """A fresh engine; `guard` and `manager` are None where nothing is guarded, `runner` on the host."""

    engine: SimEngine
    guard: CanaryGuard | None
    manager: CanaryManager | None
    runner: Any  # the `CudaRunner`

    def __exit__(self, *exc: object) -> None:
        if self.manager is not None:
            self.manager.close()


def make_rig(backend: str, sizes: Sizes, config: CanaryConfig | None) -> Rig:
    """A fresh model, engine and, with a `config`, guard; the same sizes give the same run.

    Raises:
        BackendError: no GPU, or kernels that do not compile.
    """
    model: Any
    runner, stream = None, None
    if backend == "cuda":
        from kvcanary.sim.cuda_model import CudaModel, CudaRunner

        model = CudaModel(ModelConfig(), sizes.n_blocks, PAGE_SIZE)
        runner = CudaRunner(model)
        stream = model.stream
    else:
        model = NumpyModel(ModelConfig(), sizes.n_blocks, PAGE_SIZE)
    engine = SimEngine(
        model,
        max_requests=MAX_REQUESTS,
        max_new_tokens=MAX_NEW_TOKENS,
        max_len=sizes.max_len,
        chunk=CHUNK,
        execute=None if runner is None else runner.execute,
    )
    if config is None:
        return Rig(engine, None, None, runner)
    manager = CanaryManager(config, [pool_of(model)], MAX_REQUESTS, MAX_NEW_TOKENS, backend=backend)
    return Rig(engine, CanaryGuard(manager, stream), manager, runner)
