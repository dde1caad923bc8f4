"""C02: a block is freed, and given away, while DMA, RDMA or a store job still uses it."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, D, Row, X, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C02-bytes", "late transfer of bytes onto another request's blocks")
def bytes_only(s: Stage) -> None:
    """Decode aborts X and frees its pages, B gets them; the prefill side's write of X's KV runs on and lands on B.

    Sources: sgl-project/sglang#24527, sgl-project/sglang#35049
    """
    n = 2 * s.page
    s.allocate([5, 6], X)
    s.forward(Row(X, 0, n, [5, 6]))
    in_flight = s.memory.save(s.of(5, 6))
    s.free([5, 6], X)
    s.allocate([1, 2, 3], B)
    s.forward(Row(B, 0, n, [1, 2, 3]))
    s.fault()
    s.memory.load(in_flight, s.of(1, 2))
    s.forward(Row(B, n, n + 1, [1, 2, 3]))
    s.expect(B, s.of(1, 2), Reason.DATA, layers=s.layers)


@positive("C02-one-layer-group", "late transfer of K alone onto another request's block")
def keys_only(s: Stage) -> None:
    """The same with one descriptor of two: the pages of the keys of one block.

    Sources: sgl-project/sglang#27372
    """
    n = 2 * s.page
    s.allocate([5], X)
    s.forward(Row(X, 0, s.page, [5]))
    in_flight = s.memory.save(s.of(5), s.memory.planes(names="k"))
    s.allocate([1, 2, 3], B)
    s.forward(Row(B, 0, n, [1, 2, 3]))
    s.fault()
    s.memory.load(in_flight, s.of(2))
    s.forward(Row(B, n, n + 1, [1, 2, 3]))
    names = "latent" if s.shape.layout == "latent" else "k"
    s.expect(B, s.of(2), Reason.DATA, layers=s.layers, names=names)


@positive("C02-stamped", "late transfer of bytes and stamps onto another request's blocks")
def stamps_travel(s: Stage) -> None:
    """The same where the guard's stamps move with the KV: they tell whose it is.

    Sources: dingodb/DingoCache#76
    """
    n = 2 * s.page
    s.allocate([5, 6], X)
    s.forward(Row(X, 0, n, [5, 6]))
    s.allocate([1, 2, 3], B)
    s.forward(Row(B, 0, n, [1, 2, 3]))
    s.fault()
    s.copy(s.of(5, 6), s.of(1, 2))
    s.forward(Row(B, n, n + 1, [1, 2, 3]))
    s.expect(B, s.of(1, 2), Reason.TOKEN)
    s.expect(B, s.of(2)[-1:], Reason.CHAIN)


@positive("C02-store", "a store saves blocks that were given away meanwhile, a later hit loads them")
def mixed_image(s: Stage) -> None:
    """A is preempted and its second block goes to B in the same step, before the queued store job has read it: the
    image under A's key is half B's.

    Sources: vllm-project/vllm#52360, dingodb/DingoCache#76
    """
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.allocate([7, 2], B)
    s.forward(Row(B, 0, n, [7, 2]))
    image = s.export(s.of(1, 2))
    s.fault()
    s.allocate([3, 4, 5], D)
    s.restore(image, s.of(3, 4))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(4), Reason.TOKEN)
    s.expect(D, s.of(4)[:1], Reason.CHAIN)
