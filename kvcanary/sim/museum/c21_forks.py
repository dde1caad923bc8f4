"""C21: a fork without a copy, or a copy without the data."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, C, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C21-shared-tail", "a fork writes into the tail that it shares")
def shared_tail(s: Stage) -> None:
    """Two branches of a beam write one position into one slot: the loser is named at once, and again when it reads.

    Sources: xLLM-AI/xllm#1984, ggml-org/llama.cpp#6664
    """
    n = s.page + 2
    tail = s.at([1, 3], n)
    texts = {r: [*text_of(A)[:n], 100 * r, 100 * r + 1] for r in (A, B)}
    s.allocate([1, 3], A)
    s.forward(Row(A, 0, n, [1, 3]))
    s.share([1, 3], B)
    s.fault()
    s.forward(*(Row(r, n, n + 1, [1, 3], text=texts[r]) for r in (A, B)))
    s.forward(*(Row(r, n + 1, n + 2, [1, 3], text=texts[r]) for r in (A, B)))
    s.expect(A, tail, Reason.DUPLICATE_WRITE)
    s.expect(B, tail, lifecycle=Reason.FOREIGN_WRITE)
    s.expect(A, tail, Reason.TOKEN | Reason.CHAIN, latency=1)


@positive("C21-no-copy", "a fork gets a new block for its tail, and the tail is not copied")
def no_copy(s: Stage) -> None:
    """The branch's first forward reads two slots that were never written.

    Sources: xLLM-AI/xllm#1984
    """
    n = s.page + 2
    s.allocate([1, 3], A)
    s.forward(Row(A, 0, n, [1, 3]))
    s.share([1], C)
    s.allocate([5], C)
    s.fault()
    s.forward(Row(C, n, n + 1, [1, 5], text=[*text_of(A)[:n], 333]), Row(A, n, n + 1, [1, 3]))
    s.expect(C, s.at([1, 5], range(s.page, n)), Reason.UNWRITTEN)
    s.expect_silence(A)
