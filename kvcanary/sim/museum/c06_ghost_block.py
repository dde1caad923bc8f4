"""C06: a block is published before it is written."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, C, Row, X, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C06-reused", "a hit on a block whose hash was committed before its forward; it holds another's KV")
def reused(s: Stage) -> None:
    """The block held X's tokens, goes to A, and its hash is published at scheduling. C hits it before A has written.

    Sources: vllm-project/vllm#42359, sgl-project/sglang#24175
    """
    page = s.page
    s.allocate([3], X)
    s.forward(Row(X, 0, page, [3]))
    s.free([3], X)
    s.allocate([3], A)
    s.share([3], C)
    s.allocate([4], C)
    s.fault()
    s.forward(Row(C, page, page + 1, [3, 4], text=text_of(A)))
    s.expect(C, s.of(3), Reason.UNWRITTEN if s.lifecycle else Reason.TOKEN)


@positive("C06-fresh", "a hit on a block whose hash was committed before its forward; it was never written")
def fresh(s: Stage) -> None:
    """A cancelled request's block is marked computed.

    Sources: vllm-project/vllm#41400, vllm-project/vllm#42359
    """
    page = s.page
    s.allocate([3], A)
    s.share([3], C)
    s.allocate([4], C)
    s.fault()
    s.forward(Row(C, page, page + 1, [3, 4], text=text_of(A)))
    s.expect(C, s.of(3), Reason.UNWRITTEN)
