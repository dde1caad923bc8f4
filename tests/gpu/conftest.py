"""Set-up of the GPU tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_pool() -> None:
    """Under a memory checker every array is an allocation of its own (KVC_TEST_NO_POOL=1)."""
    if os.environ.get("KVC_TEST_NO_POOL"):
        import cupy

        cupy.cuda.set_allocator(None)
