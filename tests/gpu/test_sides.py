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
import test_moves_lists
import test_moves_museum
import test_moves_trees
from agree import Side

from .test_agree import CupySide

pytestmark = pytest.mark.gpu

SUBJECTS = {
    "bundle": (test_bundle,),
    "kernels_catch": (test_kernels_catch,),
    "kernels_museum": (test_kernels_museum,),
    "kernels_relative": (test_kernels_relative,),
    "layouts_digests": (test_layouts_digests,),
    "moves": (test_moves, test_moves_lists, test_moves_trees),
    "moves_museum": (test_moves_museum,),
}


@pytest.fixture
def sides() -> Callable[[], list[Side]]:
    return lambda: [Side(), CupySide()]


for _subject, _modules in SUBJECTS.items():
    for _name, _test in (item for module in _modules for item in vars(module).items()):
        if _name.startswith("test_") and callable(_test) and "sides" in inspect.signature(_test).parameters:
            globals()[f"test_{_subject}_{_name.removeprefix('test_')}"] = _test
