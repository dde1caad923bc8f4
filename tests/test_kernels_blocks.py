"""kvc_blocks_update, which writes down who owns which block: many at once, all kinds of calls, and bad ids."""

from __future__ import annotations

import random

import numpy as np
import pytest
from agree import Sides, SimtSide
from agree_pools import random_pool
from agree_twins import Twins
from simt.runner import SimtLibrary

from kvcanary import PREFIX_CACHE, abi


@pytest.fixture
def large(sides: Sides) -> Twins:
    """2,600 blocks of one slot, of which the first and the last are reserved."""
    spec = random_pool(random.Random(0), n_blocks=2600, page_size=1, layout="nhd", reserved_blocks=(0, 2599))
    return Twins([spec], sides(), lifecycle=True)


def test_one_call_of_all_kinds_is_one_launch(large: Twins) -> None:
    """A request that ends lets go of blocks of its own, of shared ones, and of other requests'."""
    ids = np.random.default_rng(1).permutation(np.arange(1, 1001))
    own, published, hit, held = np.split(ids, 4)
    assert (
        large.lifecycle([("allocate", np.concatenate([own, published]), 7), ("share", published, PREFIX_CACHE)]) is None
    )
    assert large.lifecycle([("allocate", np.concatenate([hit, held]), 8), ("share", [*hit, *held], 7)]) is None
    assert large.lifecycle([("share", held, 9)]) is None
    device = large.sides[-1]
    n_before = len(device.manager.backend._driver.launches) if isinstance(device, SimtSide) else 0
    assert large.lifecycle([("free", ids, 7)]) is None
    words = large.sides[0].read_guard(0, "blocks")
    live, shared = abi.BLOCK_LIVE, abi.BLOCK_LIVE | abi.BLOCK_SHARED
    for part, owner, flags in ((own, 0, 0), (published, 0, shared), (hit, 8, live), (held, 8, shared)):
        assert set(zip(words["owner"][part].tolist(), words["flags"][part].tolist(), strict=True)) == {(owner, flags)}
    if isinstance(device, SimtSide):
        assert device.manager.backend._driver.launches[n_before:] == [("kvc_blocks_update", (3, 1))]


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000, 1001, 2598])
def test_any_number_of_ids(large: Twins, n: int) -> None:
    ids = np.arange(1, n + 1)[::-1]
    assert large.lifecycle([("allocate", ids, 7), ("free", ids, 7), ("allocate", ids, 8)]) is None
    words = large.sides[0].read_guard(0, "blocks")
    assert words["epoch"].tolist() == [0, *[2] * n, *[0] * (2599 - n)]
    assert [side.manager.stats().live_blocks for side in large.sides] == [n] * len(large.sides)


def test_an_epoch_never_is_zero_again(large: Twins) -> None:
    def wrap(words: np.ndarray) -> None:
        words["epoch"][5] = (1 << 32) - 1

    large.edit_guard(0, "blocks", wrap)
    assert large.lifecycle([("allocate", 5, 7)]) is None
    assert large.sides[0].read_guard(0, "blocks")["epoch"][5] == 1


def test_a_kernel_never_leaves_the_array(library: SimtLibrary) -> None:
    """Whatever is in its parameters: the words before and behind are not touched."""
    words = np.zeros(12, abi.BLOCK_STATE)
    state = np.zeros(abi.N_STATE_WORDS, np.uint64)
    params = abi.zeros_of(abi.PARAMS["LifecycleParams"])
    params["state"], params["blocks"], params["n_blocks"] = state.ctypes.data, words[4:].ctypes.data, 4
    params["owner"], params["ends"] = 7, 2000
    params["ids"][:] = -1
    params["ids"][:8] = [-4, 4, 1 << 30, 3, 1000, -(1 << 31), 2, 5]
    library.launch("kvc_blocks_update", 1, abi.THREADS, params[()])
    assert np.flatnonzero(words["owner"]).tolist() == [6, 7]
