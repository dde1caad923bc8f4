"""C16: a transfer is reported complete, with bytes missing, or other bytes."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, D, Row, X, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.sim.museum.stored import stored_prefix
from kvcanary.tags import Reason


@positive("C16-descriptor", "the second descriptor of a transfer is lost, its stamps with it")
def descriptor(s: Stage) -> None:
    """Completion is signalled; the second block still holds what X left there.

    Sources: ai-dynamo/dynamo#15079, vllm-project/vllm#50754, sgl-project/sglang#38586
    """
    n = 2 * s.page
    s.allocate([1], A)
    s.forward(Row(A, 0, s.page, [1]))
    stored = s.export(s.of(1))
    s.free([1], A)
    s.allocate([3, 4], X)
    s.forward(Row(X, 0, n, [3, 4]))
    s.free([3, 4], X)
    s.allocate([3, 4, 5], D)
    s.fault()
    s.restore(stored, s.of(3))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(4), Reason.UNWRITTEN if s.lifecycle else Reason.TOKEN)


@positive("C16-fresh", "a transfer into fresh blocks is reported complete and never came")
def fresh(s: Stage) -> None:
    """A write that fails to post is only logged; half of the prefix arrives.

    Sources: vllm-project/vllm#50754, ai-dynamo/dynamo#15079
    """
    n = 2 * s.page
    s.allocate([1], A)
    s.forward(Row(A, 0, s.page, [1]))
    stored = s.export(s.of(1))
    s.free([1], A)
    s.allocate([5, 6, 7], D)
    s.fault()
    s.restore(stored, s.of(5))
    s.forward(Row(D, n, n + 1, [5, 6, 7], text=text_of(A)))
    s.expect(D, s.of(6), Reason.UNWRITTEN)


@positive("C16-bytes", "stamps and digests arrived, the bytes of the second block did not")
def bytes_lost(s: Stage) -> None:
    """Source hash stable, destination hash different, the transfer returned success.

    Sources: vllm-project/vllm#44238, sgl-project/sglang#28971
    """
    n = 2 * s.page
    stored = stored_prefix(s)
    old = s.memory.save(s.of(4))
    s.fault()
    s.restore(stored, s.of(3, 4))
    s.memory.load(old, s.of(4))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(4), Reason.DATA, layers=s.layers)
    s.expect_silence(X)


@positive("C16-sweep", "blocks of the prefix cache into which a transfer never came", config={"sweep_interval": 1})
def swept(s: Stage) -> None:
    """Decode keeps a prefix whose slots are all zero; nobody has read it yet.

    Sources: sgl-project/sglang#38586
    """
    page = s.page
    s.allocate([5], X)
    s.forward(Row(X, 0, 2, [5]))
    s.fault()
    s.allocate([3], D)
    s.keep_resident([3], page, text_of(D))
    s.forward(Row(X, 2, 3, [5]))
    s.expect(None, s.of(3), Reason.UNWRITTEN)
    s.expect_silence(X)
