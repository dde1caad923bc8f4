"""C03: double free, wrong reference count: one block with two owners."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, Row
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C03-block", "a block on the free list twice, two requests fill it")
def two_owners(s: Stage) -> None:
    """Block 3 is on the free list twice. A gets it and fills it, then B does.

    Sources: LMCache/LMCache#5005, Avarok-Cybersecurity/atlas#373, vllm-project/vllm-ascend#15990
    """
    page = s.page
    s.allocate([3, 4], A)
    s.forward(Row(A, 0, page, [3, 4]))
    s.fault()
    with s.misuse("block 3 given to B while A owns it"):
        s.allocate([3], B)
    s.allocate([5], B)
    s.forward(Row(B, 0, page, [3, 5]))
    s.forward(Row(A, page, page + 1, [3, 4]), Row(B, page, page + 1, [3, 5]))
    s.expect(B, s.of(3), lifecycle=Reason.FOREIGN_WRITE)
    s.expect(A, s.of(3), Reason.TOKEN, latency=1, lifecycle=Reason.STALE_EPOCH)
    s.expect(A, s.of(3)[-1:], Reason.CHAIN, latency=1)
    if not s.lifecycle:
        s.expect_silence(B)


@positive("C03-middle", "one block of many has a second owner, at another place of its table")
def other_place(s: Stage) -> None:
    """A block in the middle of A is the last one of B: positions differ too.

    Sources: sgl-project/sglang-jax#1618, ModelEngine-Group/unified-cache-management#1053
    """
    page = s.page
    s.allocate([1, 3, 4], A)
    s.forward(Row(A, 0, 2 * page + 1, [1, 3, 4]))
    s.fault()
    s.allocate([5, 6, 7], B)
    with s.misuse("block 3 given to B while A owns it"):
        s.allocate([3], B)
    s.forward(Row(B, 0, 3 * page, [5, 6, 3]))
    s.forward(Row(A, 2 * page + 1, 2 * page + 2, [1, 3, 4]))
    s.expect(B, s.of(3), lifecycle=Reason.FOREIGN_WRITE)
    s.expect(A, s.of(3), Reason.TOKEN | Reason.POSITION, latency=1, lifecycle=Reason.STALE_EPOCH)


@positive("C03-one-forward", "two owners fill one block in the same forward")
def one_forward(s: Stage) -> None:
    """If both write in one step, the one who lost is named at its end.

    Sources: LMCache/LMCache#5005
    """
    s.fault()
    s.allocate([3], A)
    with s.misuse("block 3 given to B while A owns it"):
        s.allocate([3], B)
    s.forward(Row(A, 0, s.page, [3]), Row(B, 0, s.page, [3]))
    s.expect(A, s.of(3), Reason.DUPLICATE_WRITE)
    s.expect(B, s.of(3), lifecycle=Reason.FOREIGN_WRITE)


@positive("C03-double-free", "a block freed twice", lifecycle=(True,))
def double_free(s: Stage) -> None:
    """A host ledger names the second free at the call, before any byte is lost.

    Sources: vllm-project/vllm-ascend#14301, LMCache/LMCache#5005
    """
    s.fault()
    s.allocate([3], A)
    s.forward(Row(A, 0, s.page, [3]))
    s.free([3], A)
    with s.misuse("second free of block 3"):
        s.free([3], A)


@positive("C03-null-block", "the null block is freed", lifecycle=(True,))
def null_block(s: Stage) -> None:
    """Block lists of a window hold many placeholders, and one of them reaches the free list.

    Sources: ModelEngine-Group/unified-cache-management#1053
    """
    s.fault()
    s.allocate([3], A)
    with s.misuse("free of the reserved block 0"):
        s.free([0], A)
    with s.misuse("free of a block that is another's"):
        s.free([3], B)
    s.forward(Row(A, 0, s.page, [3]))


@positive("C03-own-hit", "an allocation evicts the request's own cache hit and hands it out again")
def own_hit(s: Stage) -> None:
    """Within one allocation, a block that the request hits is not yet counted as used, and comes back as a new one.

    Sources: vllm-project/vllm#44409, vllm-project/vllm#37164
    """
    page = s.page
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3]))
    s.free([3], A)
    s.share([3], B)
    with s.misuse("block 3 given out while B reads it"):
        s.allocate([3], B)
    s.fault()
    text = list(range(1000, 1000 + page)) + list(range(2000, 2000 + 2 * page))  # A's prefix, then B's own
    s.forward(Row(B, page, 2 * page, [3, 3], text=text))
    s.expect(B, s.of(3), Reason.POSITION | Reason.TOKEN)
