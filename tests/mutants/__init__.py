"""Small bugs, planted one at a time: ``python -m tests.mutants`` shows that the tests kill each."""

from __future__ import annotations

from .mutant import Mutant


def catalogue() -> list[Mutant]:
    """All mutants."""
    from .host import HOST
    from .kernels import KERNELS

    return [*KERNELS, *HOST]
