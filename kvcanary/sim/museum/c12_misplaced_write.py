"""C12: a kernel, or what feeds it, computes the place of a write wrongly."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, Row
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C12-overflow", "slot ids of another namespace point beyond the pool")
def overflow(s: Stage) -> None:
    """Slot ids of a 16-token namespace are decoded with another block size: the write goes past the backing.

    Sources: vllm-project/vllm#47056, lightseekorg/tokenspeed#501, vllm-project/vllm#1486
    """
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    s.fault()
    s.forward(Row(A, page, page + 1, [1, 2], slots=[75849]))
    s.expect(A, [75849], Reason.OUT_OF_RANGE)
    s.expect(A, s.at([1, 2], page), Reason.UNWRITTEN)


@positive("C12-context-parallel", "an owner transform applied where there is none: half the tokens padded out")
def context_parallel(s: Stage) -> None:
    """Every second token gets slot -1, the others are packed as if the pool were split.

    Sources: vllm-project/vllm#57260, vllm-project/vllm-ascend#14534
    """
    n = 2 * s.page
    table = [1, 2, 3]
    packed = [s.at(table, p // 2)[0] if p % 2 == 0 else -1 for p in range(n)]
    s.allocate(table, A)
    s.fault()
    s.forward(Row(A, 0, n, table, slots=packed))
    s.forward(Row(A, n, n + 1, table))
    s.expect(A, s.at(table, *range(s.page, n, 2)), Reason.UNWRITTEN)
    s.expect(A, s.at(table, range(1, s.page)), Reason.WRITE_POSITION)
    s.expect(A, s.at(table, *range(s.page + 1, n, 2)), Reason.UNWRITTEN, latency=1)
    s.expect(A, s.at(table, range(1, s.page)), Reason.POSITION | Reason.TOKEN, latency=1)


@positive("C12-rows", "a writer walks into the rows of another block")
def walks_on(s: Stage) -> None:
    """The kernel counts page ids up across a boundary: the last slots of a chunk land in the next block of the pool,
    which is another request's.

    Sources: tenstorrent/tt-metal#54742
    """
    page = s.page
    s.allocate([2, 3], B)
    s.forward(Row(B, 0, page, [2, 3]))
    s.allocate([1, 4], A)
    s.fault()
    targets = s.at([1, 2], range(page + 2))  # where the table says [1, 4]
    s.forward(Row(A, 0, page + 2, [1, 4], kv_slots=targets))
    s.forward(Row(B, page, page + 1, [2, 3]))
    s.expect(B, s.of(2)[:2], Reason.DATA, latency=1, layers=s.layers)


@positive("C12-wrong-block", "a write goes to the right offset of a wrong block")
def wrong_block(s: Stage) -> None:
    """Slot mapping computed with the block table of another group.

    Sources: vllm-project/vllm-ascend#14534
    """
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    s.fault()
    s.forward(Row(A, page, page + 1, [1, 2], slots=s.of(6)[:1]))
    s.forward(Row(A, page + 1, page + 2, [1, 2]))
    s.expect(A, s.of(6)[:1], Reason.WRITE_POSITION)
    s.expect(A, s.of(2)[:1], Reason.UNWRITTEN)
