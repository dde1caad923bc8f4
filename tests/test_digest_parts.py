"""How the digests of a pool are shared out among blocks that work side by side: by the bytes that they are of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import abi
from kvcanary.backends.device_memory import DIGEST_WORDS, MAX_UNEVEN, digest_parts


@pytest.mark.parametrize(
    ("n_words", "wanted"),
    [
        ([], [0, 0]),
        ([512], [0, 1]),
        ([512, 512], [0, 1, 2]),
        ([512] * 64, [0, 8, 16, 24, 32, 40, 48, 56, 64]),
        ([144, 2], [0, 2]),  # of a small plane beside a large one: its blocks would be done long before the others
        ([128] * 64 + [16] * 64, [0, 10, 21, 31, 42, 52, 62, 93, 128]),  # data, then scales
    ],
)
def test_parts(n_words: list[int], wanted: list[int]) -> None:
    assert digest_parts(np.array(n_words, np.uint32)).tolist() == wanted


@given(st.lists(st.integers(1, 1024), min_size=1, max_size=130))
def test_parts_are_whole_few_and_of_about_one_size(n_words: list[int]) -> None:
    bounds = digest_parts(np.array(n_words, np.uint32))
    assert bounds[0] == 0 and bounds[-1] == len(n_words)
    assert len(bounds) - 1 <= abi.MAX_DIGEST_PARTS and (np.diff(bounds) > 0).all()
    parts = np.add.reduceat(np.array(n_words) + DIGEST_WORDS, bounds[:-1])
    assert parts.max() * len(parts) <= MAX_UNEVEN * parts.sum()
