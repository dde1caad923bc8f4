"""C07: stale entries of the block table, or entries beyond its end, are followed after all."""

from __future__ import annotations

from kvcanary.sim.museum.rows import WIDTH, A, B, Row, X, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C07-recycled", "a table row keeps a block that was freed and recycled, and it is read")
def recycled(s: Stage) -> None:
    """The host frees the blocks behind the window, the worker's row keeps their ids; a backend without a window reads
    through them, after B has got the block.

    Sources: vllm-project/vllm#42273
    """
    page = s.page
    n = 2 * page + 1
    s.allocate([1, 2, 3], A)
    s.forward(Row(A, 0, n, [1, 2, 3]))
    s.forward(Row(A, n, n + 1, [1, 2, 3]))
    s.free([1], A)
    s.allocate([1], B)
    s.forward(Row(B, 0, page, [1]))
    s.fault()
    s.forward(Row(A, n + 1, n + 2, [1, 2, 3]))
    s.expect(A, s.of(1), Reason.TOKEN, lifecycle=Reason.STALE_EPOCH)
    s.expect_silence(B)


@positive(
    "C07-same-forward", "a recycled block is read in the forward in which its new owner fills it", lifecycle=(True,)
)
def same_forward(s: Stage) -> None:
    """The same, with both requests in one batch: whose block it is was known before the forward began, and the reader
    is not among those who may read it. B's text begins as A's, so that nothing else tells them apart.

    Sources: vllm-project/vllm#42273
    """
    page = s.page
    n = page + 1
    text = [*text_of(A)[:page], *text_of(B)]
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1], A)
    s.allocate([1, 3], B)
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2]), Row(B, 0, page + 1, [1, 3], text=text))
    s.expect(A, s.of(1), Reason.STALE_EPOCH)
    s.expect_silence(B)


@positive("C07-garbage", "a table row that was not filled to its length")
def garbage(s: Stage) -> None:
    """Only as many entries are uploaded as the request has blocks; the one behind holds what was in the memory.

    Sources: gittensor-ai-lab/sparkinfer#185
    """
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    s.fault()
    s.forward(Row(A, page, page + 1, [0x5A5A5A, 2], slots=s.at([1, 2], page)))
    s.expect(A, [0x5A5A5A], Reason.OUT_OF_RANGE)


@positive("C07-negative", "a table row with a cleared entry inside the request")
def negative_entry(s: Stage) -> None:
    """A replayed graph reads a row that the allocator has cleared to -1.

    Sources: gittensor-ai-lab/sparkinfer#150
    """
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page + 1, [1, 2]))
    s.fault()
    s.forward(Row(A, page + 1, page + 2, [-1, 2]))
    s.expect(A, [-1], Reason.UNWRITTEN)


@positive("C07-beyond", "draft tokens run past the end of the table row")
def beyond(s: Stage) -> None:
    """Fewer than K slots are left: the draft's positions lie beyond the last entry.

    Sources: vllm-project/vllm#16370
    """
    page = s.page
    table = [1, 2, 3, 4, 5, 6]
    n = WIDTH * page - 1
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.fault()
    s.forward(Row(A, n, n + 3, table, slots=[*s.at(table, n), *s.at([1], 0, 1)]))
    s.expect(A, [n + 3], Reason.OUT_OF_RANGE)


@positive("C07-padded-prefill", "a padded prefill writes through the table's stale tail")
def padded_prefill(s: Stage) -> None:
    """KV is written for every padded position, through columns that still hold the blocks of the row's previous user.

    Sources: tenstorrent/tt-metal#56324
    """
    page = s.page
    s.allocate([5, 6, 7], B)
    s.forward(Row(B, 0, 2 * page, [5, 6, 7]))
    s.allocate([1], A)
    s.fault()
    s.forward(Row(A, 0, page, [1, 6]), stray=s.of(6))
    s.forward(Row(B, 2 * page, 2 * page + 1, [5, 6, 7]))
    s.expect(B, s.of(6), Reason.DATA, latency=1, layers=s.layers)


@positive("C07-padded-stamped", "padded positions are taken for tokens, and written through the stale tail")
def padded_stamped(s: Stage) -> None:
    """The same where the padded positions are part of the batch: the guard is told of them as of tokens.

    Sources: tenstorrent/tt-metal#56324
    """
    page = s.page
    s.allocate([5, 6, 7], B)
    s.forward(Row(B, 0, 2 * page, [5, 6, 7]))
    s.allocate([1, 2], X)
    s.fault()
    padded = [*text_of(X)[: 2 * page], *[0] * page]
    s.forward(Row(X, 0, 3 * page, [1, 2, 6], text=padded, history=padded[: 2 * page]))
    s.forward(Row(B, 2 * page, 2 * page + 1, [5, 6, 7]))
    s.expect(X, s.of(6), lifecycle=Reason.FOREIGN_WRITE)
    s.expect(B, s.of(6), Reason.TOKEN | Reason.POSITION, latency=1, lifecycle=Reason.STALE_EPOCH)
