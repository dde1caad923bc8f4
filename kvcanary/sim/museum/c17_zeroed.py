"""C17: zeroing that lands after the write."""

from __future__ import annotations

from kvcanary.sim.museum.memory import fill
from kvcanary.sim.museum.rows import A, D, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.sim.museum.stored import stored_prefix
from kvcanary.tags import Reason


@positive("C17-zeroed", "zeroing of fresh blocks lands after their first write")
def zeroed(s: Stage) -> None:
    """The pool grows on one stream while decoding runs on another: the memset comes after the KV. Stamps are intact,
    the bytes are zero.

    Sources: kekzl/imp#1709
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.memory.edit(s.of(2), fill(0))
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.expect(A, s.at([1, 2], range(s.page, n)), Reason.DATA, layers=s.layers)


@positive("C17-restored", "zeroing of fresh blocks blanks what was restored into them")
def zeroed_restore(s: Stage) -> None:
    """A restore is not ordered after the zeroing of the pages that it fills.

    Sources: 1CatAI/1Cat-vLLM#598, vllm-project/vllm-ascend#13503
    """
    n = 2 * s.page
    stored = stored_prefix(s)
    s.fault()
    s.restore(stored, s.of(3, 4))
    s.memory.edit(s.of(3, 4), fill(0))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(3, 4), Reason.DATA, layers=s.layers)
