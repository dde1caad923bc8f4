"""C01: a block is freed, and given away, while a step that was dispatched before still uses it."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, C, Row
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C01-write", "late write of a dispatched step into a block that is another's by now")
def late_write(s: Stage) -> None:
    """Async scheduling dispatches A's step before it knows that A ended on the step before. A's blocks go to B, B fills
    them, then A's write executes.

    Sources: vllm-project/vllm#45357, sgl-project/sglang#36738
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.allocate([1, 2], B)
    s.forward(Row(B, 0, n + 1, [1, 2]))
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.forward(Row(B, n + 1, n + 2, [1, 2]))
    late = s.at([1, 2], n)
    s.expect(A, late, lifecycle=Reason.FOREIGN_WRITE)
    s.expect(B, late, Reason.CHAIN | Reason.TOKEN, latency=1, lifecycle=Reason.STALE_EPOCH)


@positive("C01-read", "late read of a block that is another's by now")
def late_read(s: Stage) -> None:
    """A's dispatched step reads a prefix that B has overwritten; its own token goes to a block that nobody has yet.

    Sources: vllm-project/vllm-ascend#14055
    """
    n = 2 * s.page
    s.allocate([1, 2, 6], A)
    s.allocate([5], C)
    s.forward(Row(A, 0, n, [1, 2, 6]), Row(C, 0, 2, [5]))
    s.free([1, 2, 6], A)
    s.allocate([1, 2, 3], B)
    s.forward(Row(B, 0, n, [1, 2, 3]))
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2, 6]))
    s.expect(A, s.at([1, 2], range(n)), Reason.TOKEN, lifecycle=Reason.STALE_EPOCH)
    s.expect(A, s.at([1, 2], n - 1), Reason.CHAIN)
    s.expect_silence(B)


@positive("C01-read-early", "late read of a freed block, before its new owner wrote", lifecycle=(True,))
def late_read_early(s: Stage) -> None:
    """The bytes are still A's; only who owns the block tells that A has no business there.

    Sources: vllm-project/vllm-ascend#14055
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.allocate([1, 2], B)
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.expect(A, s.at([1, 2], range(n)), Reason.STALE_EPOCH)
    s.expect(A, s.at([1, 2], n), Reason.FOREIGN_WRITE)
