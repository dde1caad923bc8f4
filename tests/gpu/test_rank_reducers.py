"""The maximum over ranks on a GPU, with one rank: the way up, NCCL or the engine's function, the way down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvcanary import RankAgreement
from kvcanary.backends.nccl import DeviceCallReducer, available
from kvcanary.reducers import Reducer, wait_for

pytestmark = pytest.mark.gpu
WORDS = np.array([(1 << 62) + 5, 0, 7], np.int64)


def check(reducer: Reducer) -> None:
    for factor in (1, 0, 1):
        reducer.start(WORDS * factor)
        assert wait_for(reducer, 60)
        np.testing.assert_array_equal(reducer.result(), WORDS * factor)


def test_the_engines_function_gets_device_words_and_our_stream() -> None:
    seen: list[tuple[Any, Any]] = []
    reducer = DeviceCallReducer(lambda words, stream: seen.append((words, stream)), 0, 0, 1)
    check(reducer)
    words, stream = seen[0]
    assert words.dtype == np.int64 and words.shape == WORDS.shape and int(words.device.id) == 0
    assert int(stream.handle) not in (0, 1, 2)
    reducer.close()


def test_a_maximum_that_hangs_is_not_waited_for() -> None:
    import cupy

    flag = cupy.cuda.alloc_pinned_memory(4)
    host = np.frombuffer(flag, np.uint32, 1)
    host[0] = 0
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(volatile unsigned* flag) { while (*flag == 0) {} }', "spin", backend="nvrtc"
    )
    assert spin.num_regs > 0  # loaded now

    def allreduce_max(_words: Any, stream: Any) -> None:
        with cupy.cuda.Stream.from_external(stream):
            spin((1,), (1,), (np.uintp(flag.ptr),))

    reducer = DeviceCallReducer(allreduce_max, 0, 0, 1)
    reducer.start(WORDS)
    assert not wait_for(reducer, 0.2)
    host[0] = 1
    assert wait_for(reducer, 60)
    np.testing.assert_array_equal(reducer.result(), WORDS)
    reducer.close()


@pytest.mark.parametrize("backend", ["nccl4py", "cupy"])
def test_nccl_with_one_rank(backend: str) -> None:
    if not available(backend):
        pytest.skip(f'no NCCL for {backend}: pip install "kvcanary[nccl]"')
    agreement = RankAgreement(unique_id=RankAgreement.new_unique_id(backend), rank=0, n_ranks=1, backend=backend)
    check(agreement._reducer)
    agreement.close()
    broken = RankAgreement(unique_id=RankAgreement.new_unique_id(backend), rank=0, n_ranks=1, backend=backend)
    broken._reducer.abort()
    broken._reducer.close()
