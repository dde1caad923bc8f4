"""The maximum over ranks on a GPU, over stand-ins for CuPy, cuda.core and NCCL: order, waits, the end of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from simt.fake_cuda import FakeArray, FakeCuda, FakeStream

from kvcanary import ConfigError, RankAgreement
from kvcanary.backends import cuda, nccl
from kvcanary.backends.nccl import REDUCERS, DeviceCallReducer, Nccl4pyReducer
from kvcanary.verdict import N_WORDS

UNIQUE_ID = bytes(range(64, 192))  # has bytes that are negative as C chars
INT64, MAX = 4, 2  # ncclDataType_t, ncclRedOp_t


class FakeNccl:
    """Communicators of all ranks in one process: a maximum runs when all ranks have come to it, or one was aborted."""

    def __init__(self, world: FakeCuda) -> None:
        self.world, self.n_ranks = world, 0
        self.brought: list[dict[int, np.ndarray[Any, Any]]] = []
        self.ids: list[Any] = []
        self.takes: type = bytes  # of CuPy; older ones take a tuple of C chars
        self.ended: list[tuple[str, int]] = []

    def communicator(self, n_ranks: int, unique_id: Any, rank: int) -> _Communicator:
        self.n_ranks = n_ranks
        self.ids.append(unique_id)
        return _Communicator(self, rank)

    # nccl4py
    @property
    def core(self) -> Any:
        init = lambda n_ranks, rank, uid, config: self.communicator(n_ranks, uid, rank)  # noqa: E731  as it is called
        return SimpleNamespace(
            MAX=MAX,
            NCCLConfig=lambda min_ctas, max_ctas: (min_ctas, max_ctas),
            Communicator=SimpleNamespace(init=init),
            UniqueId=SimpleNamespace(from_bytes=lambda data: data),
            get_unique_id=lambda: UNIQUE_ID,
        )

    # cupy.cuda.nccl
    def cupy(self) -> Any:
        chars = tuple(np.frombuffer(UNIQUE_ID, np.int8).tolist())

        def communicator(n_ranks: int, unique_id: Any, rank: int) -> Any:
            if not isinstance(unique_id, self.takes):
                raise TypeError(f"Argument 'commId' has incorrect type (expected {self.takes.__name__})")
            return self.communicator(n_ranks, unique_id, rank)

        return SimpleNamespace(
            NCCL_INT64=INT64,
            NCCL_MAX=MAX,
            NcclCommunicator=communicator,
            get_unique_id=lambda: UNIQUE_ID if self.takes is bytes else chars,
        )


class _Communicator:
    def __init__(self, group: FakeNccl, rank: int) -> None:
        self._group, self._rank, self._n = group, rank, 0
        self.is_valid, self._is_aborted = True, False

    def _enqueue(self, words: np.ndarray[Any, Any], handle: int) -> None:
        number, self._n = self._n, self._n + 1

        def run() -> bool:
            while len(self._group.brought) <= number:
                self._group.brought.append({})
            here = self._group.brought[number]
            here.setdefault(self._rank, words.copy())
            if len(here) == self._group.n_ranks:
                words[:] = np.max(list(here.values()), axis=0)
            return len(here) == self._group.n_ranks or self._is_aborted

        self._group.world.streams[handle].submit(run)

    def allreduce(self, sent: FakeArray, received: FakeArray, op: int, *, stream: int) -> None:
        assert sent is received and op == MAX
        self._enqueue(sent.np, stream)

    def allReduce(self, sent: int, received: int, n: int, dtype: int, op: int, stream: int) -> None:  # noqa: N802
        assert sent == received and (n, dtype, op) == (N_WORDS, INT64, MAX)
        words = next(a for a in self._group.world.keep if a.data.ptr == sent)
        self._enqueue(words.np, stream)

    def abort(self) -> None:
        self._group.ended.append(("abort", self._rank))
        self._is_aborted, self.is_valid = True, False

    def destroy(self) -> None:
        self._group.ended.append(("destroy", self._rank))
        self.is_valid = False


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    world = FakeCuda(None)  # type: ignore[arg-type]  # no kernel is launched here
    zeros = world.cupy.zeros
    world.cupy.zeros = lambda shape, dtype: world.keep.append(zeros(shape, dtype)) or world.keep[-1]
    monkeypatch.setattr(cuda, "check_driver", lambda: None)
    monkeypatch.setattr(cuda, "import_cuda", lambda: (world.cupy, world.core))
    return world


@pytest.fixture
def group(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    group = FakeNccl(world)
    monkeypatch.setattr(nccl, "_import_nccl4py", lambda: group.core)
    monkeypatch.setattr(nccl, "_import_cupy_nccl", group.cupy)
    return group


def words(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def pair(backend: str) -> list[Any]:
    return [REDUCERS[backend](UNIQUE_ID, None, rank, 2) for rank in (0, 1)]


@pytest.mark.parametrize("backend", list(REDUCERS))
def test_the_maximum_comes_when_both_ranks_have_come_and_nothing_waits_for_it(
    world: FakeCuda, group: FakeNccl, backend: str
) -> None:
    first, second = pair(backend)
    world.calls.clear()
    for factor in (1, 3):
        first.start(words(5, 1 << 62, 0) // factor)
        world.pump()
        assert not first.is_done()
        second.start(words(2, 7, 9) // factor)
        assert not second.is_done()
        world.pump()
        for reducer in (first, second):
            assert reducer.is_done()
            np.testing.assert_array_equal(reducer.result(), words(5, 1 << 62, 9) // factor)
    assert set(world.calls) == {"copy"}  # no wait, no allocation, no blocking copy
    for reducer in (first, second):
        reducer.close()
    assert group.ended == [("destroy", 0), ("destroy", 1)]


@pytest.mark.parametrize("backend", list(REDUCERS))
def test_an_abort_ends_the_kernel_and_destroys_nothing_twice(world: FakeCuda, group: FakeNccl, backend: str) -> None:
    first, _second = pair(backend)
    first.start(words(1, 2, 3))
    world.pump()
    first.abort()
    world.pump()
    assert first.is_done()
    first.close()
    assert group.ended == [("abort", 0)]


def test_the_unique_id_arrives_as_each_library_takes_it(group: FakeNccl) -> None:
    for takes in (bytes, tuple):
        group.takes = takes
        for backend in REDUCERS:
            assert RankAgreement.new_unique_id(backend) == UNIQUE_ID
            pair(backend)
    assert group.ids[:6] == [UNIQUE_ID] * 6
    assert group.ids[6:] == [tuple(np.frombuffer(UNIQUE_ID, np.int8).tolist())] * 2
    with pytest.raises(ConfigError, match="unique_id of 3 bytes: give the 128"):
        Nccl4pyReducer(b"abc", None, 0, 2)


def test_where_c_chars_are_unsigned_the_id_arrives_too(group: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    communicator = group.communicator

    def on_arm(n_ranks: int, chars: tuple[int, ...], rank: int) -> Any:
        if min(chars) < 0:
            raise OverflowError("can't convert negative value to char")
        return communicator(n_ranks, bytes(chars), rank)

    group.takes = tuple
    monkeypatch.setattr(group, "communicator", on_arm)
    pair("cupy")
    assert group.ids == [UNIQUE_ID] * 2


@pytest.mark.parametrize(("found", "wanted"), [(("nccl4py", "cupy"), "nccl4py"), (("cupy",), "cupy")])
def test_auto_takes_the_first_that_is_there(
    world: FakeCuda, group: FakeNccl, monkeypatch: pytest.MonkeyPatch, found: tuple[str, ...], wanted: str
) -> None:
    monkeypatch.setattr(nccl, "available", lambda name: name in found)
    is_done = nccl.DeviceReducer.is_done
    monkeypatch.setattr(nccl.DeviceReducer, "is_done", lambda self: (world.pump(), is_done(self))[1])
    agreement = RankAgreement(unique_id=UNIQUE_ID, rank=0, n_ranks=1)
    assert agreement._reducer.name == wanted
    agreement.close()
    assert group.ended == [("destroy", 0)]


def test_the_engines_function_enqueues_on_our_stream(world: FakeCuda) -> None:
    def allreduce_max(device_words: FakeArray, stream: FakeStream) -> None:
        stream.submit(lambda: np.maximum(device_words.np, words(4, 4, 4), out=device_words.np))

    reducer = DeviceCallReducer(allreduce_max, 0, 0, 2)
    reducer.start(words(1, 9, 4))
    world.pump()
    assert reducer.is_done()
    np.testing.assert_array_equal(reducer.result(), words(4, 9, 4))
    reducer.close()


def test_a_function_that_returns_something_for_device_words_is_told_so(world: FakeCuda) -> None:
    reducer = DeviceCallReducer(lambda device_words, stream: lambda: True, 0, 0, 2)
    with pytest.raises(ConfigError, match="return None, or leave device= out"):
        reducer.start(words(1, 2, 3))
