"""Set-up of the GPU tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvcanary import captured


@pytest.fixture(scope="session", autouse=True)
def _no_pool() -> None:
    """Under a memory checker every array is an allocation of its own (KVC_TEST_NO_POOL=1)."""
    if os.environ.get("KVC_TEST_NO_POOL"):
        import cupy

        cupy.cuda.set_allocator(None)


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    """Graphs of a test are gone with it: so is the memory that is kept for graphs of managers nobody closed."""
    yield
    captured._orphans.clear()
