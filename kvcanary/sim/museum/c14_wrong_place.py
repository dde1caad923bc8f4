"""C14: a restore to the wrong blocks or the wrong position."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, D, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C14-shifted", "restored blocks land one block too far, with their stamps")
def shifted(s: Stage) -> None:
    """Two external prefix blocks are written to the last two blocks of the table instead of the first two; the text
    stays coherent.

    Sources: ai-dynamo/dynamo#8419, LMCache/LMCache#5151
    """
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([3, 4, 5], D)
    s.fault()
    s.restore(stored, s.of(4, 5))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(3), Reason.UNWRITTEN)
    s.expect(D, s.of(4), Reason.POSITION)


@positive("C14-bytes", "restored bytes land one block too far, and the guard is told of the right blocks")
def shifted_bytes(s: Stage) -> None:
    """The same where the stamps and digests are put where the data should have been.

    Sources: ai-dynamo/dynamo#8419
    """
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([3, 4, 5], D)
    s.fault()
    s.restore(stored, s.of(3, 4))
    s.memory.edit(s.of(3), lambda data: data * 0 + 17)
    s.memory.load(stored[1], s.of(4, 5))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(3, 4), Reason.DATA, layers=s.layers)


@positive("C14-offset", "a prefix is restored but the position counter is not")
def offset(s: Stage) -> None:
    """Decoding goes on at position 0 behind a restored prefix: it overwrites the first slot.

    Sources: vllm-project/vllm-metal#144
    """
    n = 2 * s.page
    s.allocate([1, 2, 3], A)
    s.forward(Row(A, 0, n, [1, 2, 3]))
    s.fault()
    late = [text_of(A)[n], *text_of(A)[1:]]
    s.forward(Row(A, 0, 1, [1, 2, 3], text=late))
    s.forward(Row(A, n + 1, n + 2, [1, 2, 3]))
    s.expect(A, s.of(1)[:1], Reason.TOKEN, latency=1)
    s.expect(A, s.of(3)[:1], Reason.UNWRITTEN, latency=1)
