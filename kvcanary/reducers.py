"""Who carries out the maximum over the ranks on the host: the engine's own function, or MPI."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary.errors import BackendError, ConfigError
from kvcanary.verdict import MAX_RANK, N_WORDS

Words: TypeAlias = npt.NDArray[np.int64]
AllreduceMax: TypeAlias = Callable[[Any, Any], Callable[[], bool] | None]  # None with ``device`` alone

BACKENDS = ("auto", "callable", "nccl4py", "cupy", "mpi4py")
INSTALL_MPI = 'pip install "kvcanary[mpi]", or mpi4py beside the MPI that the machine has'
POLL_S = 0.0005  # between two looks while `close` waits
NO_ANSWER = "which does not say, when called, whether the maximum is there"
LEFT_BEHIND: list[object] = []  # of reductions that never ended: whoever carries them out may still write there


class Reducer(Protocol):
    """A maximum over all ranks of i64[N_WORDS], one at a time; made by all ranks together, in the same order."""

    name: str
    rank: int
    n_ranks: int

    def start(self, words: Words) -> None:
        """Begin the maximum over what each rank brings; never waits for another rank."""

    def is_done(self) -> bool:
        """Whether the maximum begun last is there; never waits. Asked at every step, as some need it to get on."""

    def result(self) -> Words:
        """The maximum; read before the next `start`."""

    def abort(self) -> None:
        """Give up on the maximum begun last, and on all later ones; not collective."""

    def close(self) -> None:
        """Give the communicator back, together with all ranks, when nothing is under way."""


def check_ranks(rank: Any, n_ranks: Any) -> None:
    """Raise `ConfigError` unless ``rank`` is one of ``n_ranks``."""
    _check_range("n_ranks", n_ranks, 1, MAX_RANK + 1)
    _check_range("rank", rank, 0, n_ranks - 1)


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: give an integer from {low} to {high}")


def wait_for(reducer: Reducer, timeout_s: float) -> bool:
    """Whether the maximum under way ends within so many seconds."""
    end = time.monotonic() + timeout_s
    while not reducer.is_done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


class HostCallReducer:
    """A function of the engine over words in host memory: ``allreduce_max(words, None)``.

    It replaces ``words`` (i64[3]) by their maximum over all ranks, in place. It must not wait for other ranks: it
    returns what says, when called, whether the maximum is there. None is refused: a function that forgot its ``return``
    would pass for a maximum that is there.
    """

    name = "callable"

    def __init__(self, allreduce_max: AllreduceMax, rank: int, n_ranks: int) -> None:
        check_ranks(rank, n_ranks)
        self.rank, self.n_ranks = rank, n_ranks
        self._call = allreduce_max
        self._words = np.zeros(N_WORDS, np.int64)
        self._is_done: Callable[[], bool] = lambda: True  # nothing is under way

    def start(self, words: Words) -> None:
        np.copyto(self._words, words)
        is_done = self._call(self._words, None)
        if not callable(is_done):
            raise ConfigError(
                f"allreduce_max returned {is_done!r}, {NO_ANSWER}: return a function without arguments, such as "
                "is_completed of torch.distributed's work; where the maximum is there already, lambda: True"
            )
        self._is_done = is_done

    def is_done(self) -> bool:
        return bool(self._is_done())

    def result(self) -> Words:
        return self._words

    def abort(self) -> None:
        LEFT_BEHIND.append(self._words)

    def close(self) -> None:
        """The communicator is the engine's."""


class MpiReducer:
    """``MPI_Iallreduce`` on a communicator of its own, a duplicate of ``comm`` (``mpi4py``).

    A reduction that a rank never comes to cannot be taken back in MPI: `abort` leaves it and the communicator behind,
    and ``MPI_Finalize`` may wait for it. End such a process with ``comm.Abort()`` or ``os._exit``.
    """

    name = "mpi4py"

    def __init__(self, comm: Any) -> None:
        self._mpi = import_mpi()
        self._comm = (self._mpi.COMM_WORLD if comm is None else comm).Dup()
        self._comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self.rank, self.n_ranks = int(self._comm.Get_rank()), int(self._comm.Get_size())
        check_ranks(self.rank, self.n_ranks)
        self._sent, self._words = np.zeros(N_WORDS, np.int64), np.zeros(N_WORDS, np.int64)
        self._request: Any = None

    def start(self, words: Words) -> None:
        np.copyto(self._sent, words)
        self._request = self._comm.Iallreduce(self._sent, self._words, op=self._mpi.MAX)

    def is_done(self) -> bool:
        if self._request is not None and self._request.Test():  # Test is also what lets MPI get on
            self._request = None
        return self._request is None

    def result(self) -> Words:
        return self._words

    def abort(self) -> None:
        LEFT_BEHIND.append((self._comm, self._request, self._sent, self._words))
        self._request = None

    def close(self) -> None:
        self._comm.Free()


def import_mpi() -> Any:
    """``mpi4py.MPI``, which starts MPI if nobody has; or a `BackendError` with the install command."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, an MPI library is not
        raise BackendError(f"ranks agree over MPI through mpi4py ({error}): {INSTALL_MPI}") from error
    return MPI


def make_reducer(
    allreduce_max: AllreduceMax | None,
    rank: int | None,
    n_ranks: int | None,
    unique_id: bytes | None,
    comm: Any,
    backend: str,
    device: int | None,
) -> Reducer:
    """What `RankAgreement` is asked for, or the first that has what it needs.

    Raises:
        ConfigError: arguments that do not go together. BackendError: what was chosen is not there.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if (backend == "callable") is not (allreduce_max is not None) and (backend != "auto"):
        raise ConfigError(
            f"backend={backend!r} and allreduce_max={allreduce_max!r}: these go together, or leave one out"
        )
    if allreduce_max is not None:
        if rank is None or n_ranks is None:
            raise ConfigError("allreduce_max without rank= and n_ranks=: give both, as the engine's group has them")
        if device is None:
            return HostCallReducer(allreduce_max, rank, n_ranks)
        from kvcanary.backends.nccl import DeviceCallReducer

        return DeviceCallReducer(allreduce_max, device, rank, n_ranks)
    if backend in ("auto", "mpi4py") and unique_id is None:
        return MpiReducer(comm)
    return _make_nccl(rank, n_ranks, unique_id, comm, backend, device)


def _make_nccl(
    rank: int | None, n_ranks: int | None, unique_id: bytes | None, comm: Any, backend: str, device: int | None
) -> Reducer:
    from kvcanary.backends.nccl import REDUCERS, available

    if backend == "auto":
        backend = next((name for name in REDUCERS if available(name)), "cupy")
    elif backend == "mpi4py":
        raise ConfigError("unique_id with backend='mpi4py': the id is NCCL's; leave it out, or choose nccl4py or cupy")
    if unique_id is None:
        comm = import_mpi().COMM_WORLD if comm is None else comm
        rank, n_ranks = int(comm.Get_rank()), int(comm.Get_size())
        unique_id = _send_round(comm, backend, rank)
    elif rank is None or n_ranks is None:
        raise ConfigError("unique_id without rank= and n_ranks=: give both, as the engine's group has them")
    return REDUCERS[backend](unique_id, device, rank, n_ranks)


def _send_round(comm: Any, backend: str, rank: int) -> bytes:
    """Rank 0's id, on all ranks; that it has none is told to all of them, or they would wait for it."""
    from kvcanary.backends.nccl import new_unique_id

    told: tuple[bytes, str] = (b"", "")
    if rank == 0:
        try:
            told = (new_unique_id(backend), "")
        except BackendError as error:
            told = (b"", str(error))
    unique_id: bytes
    unique_id, problem = comm.bcast(told, root=0)
    if problem:
        raise BackendError(f"rank 0 has no NCCL: {problem}")
    return unique_id
