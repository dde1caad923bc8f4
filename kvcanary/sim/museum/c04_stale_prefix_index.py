"""C04: the prefix index still points at a block whose content changed."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, C, Row, X, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C04-hit", "a prefix hit on a block that was rewritten since")
def stale_hit(s: Stage) -> None:
    """A's prefix stays indexed after its block went to B; C, with A's prefix, hits it.

    Sources: ovg-project/kvcached#362, local-inference-lab/vllm#480
    """
    page = s.page
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3]))
    s.free([3], A)
    s.allocate([3], B)
    s.forward(Row(B, 0, page, [3]))
    s.free([3], B)
    s.share([3], C)
    s.allocate([4], C)
    s.fault()
    s.forward(Row(C, page, page + 2, [3, 4], text=text_of(A)))
    s.expect(C, s.of(3), Reason.TOKEN)
    s.expect(C, s.of(3)[-1:], Reason.CHAIN)


@positive("C04-churn", "A, then one request that evicts everything, then A again")
def churn(s: Stage) -> None:
    """The pattern that the reporters replayed: the index survives a full eviction.

    Sources: local-inference-lab/vllm#480, novitalabs/pegaflow#305, vllm-project/vllm#50630
    """
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, 2 * page, [1, 2]))
    s.free([1, 2], A)
    s.allocate([2, 1, 3, 4, 5], X)
    s.forward(Row(X, 0, 5 * page, [2, 1, 3, 4, 5]))
    s.free([2, 1, 3, 4, 5], X)
    s.share([1, 2], C)
    s.allocate([6], C)
    s.fault()
    s.forward(Row(C, 2 * page, 2 * page + 1, [1, 2, 6], text=text_of(A)))
    s.expect(C, s.of(1, 2), Reason.TOKEN | Reason.POSITION)


@positive("C04-retracted", "chunks of a retracted prefill stay in the tree, their pages do not")
def retracted(s: Stage) -> None:
    """Pages are inserted into the radix tree while the prefill goes on; the retract frees them, the tree keeps them.

    Sources: sgl-project/sglang#38319, NVIDIA/TensorRT-LLM#15018
    """
    page = s.page
    s.allocate([1, 2, 3], A)
    s.forward(Row(A, 0, page, [1, 2, 3]))
    s.forward(Row(A, page, 2 * page, [1, 2, 3]))
    s.free([1, 2, 3], A)
    s.allocate([2], B)
    s.forward(Row(B, 0, page, [2]))
    s.free([2], B)
    s.share([1, 2], C)
    s.allocate([4], C)
    s.fault()
    s.forward(Row(C, 2 * page, 2 * page + 1, [1, 2, 4], text=text_of(A)))
    s.expect(C, s.of(2), Reason.TOKEN | Reason.POSITION)
    s.expect(C, s.of(2)[-1:], Reason.CHAIN)


@positive("C04-sweep", "an index entry whose block was rewritten, before anybody hits it", config={"sweep_interval": 1})
def swept(s: Stage) -> None:
    """The sweep compares what the prefix cache believes with what the slots hold.

    Sources: ovg-project/kvcached#362
    """
    page = s.page
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3]))
    s.keep_resident([3], page, text_of(A))
    s.free([3], A)
    s.allocate([3], B)
    s.fault()
    s.forward(Row(B, 0, page, [3]))
    s.expect(None, s.of(3), Reason.TOKEN)
