"""The scripts of the other files that ask for ``sides``, with the kernels on a GPU beside the reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import test_bundle
import test_kernels_catch
import test_kernels_museum
import test_kernels_relative
import test_layouts_digests
import test_moves
import test_moves_museum
from agree import Side

from .test_agree import CupySide

pytestmark = pytest.mark.gpu

MODULES = (
    test_bundle,
    test_kernels_catch,
    test_kernels_museum,
    test_kernels_relative,
    test_layouts_digests,
    test_moves,
    test_moves_museum,
)


@pytest.fixture
def sides() -> Callable[[], list[Side]]:
    return lambda: [Side(), CupySide()]


for _module in MODULES:
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and callable(_test) and "sides" in inspect.signature(_test).parameters:
            globals()[f"test_{_module.__name__.removeprefix('test_')}_{_name.removeprefix('test_')}"] = _test
