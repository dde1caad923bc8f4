"""C20: drafts that are kept, written too far, one token off, or counted wrongly."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, C, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C20-kept", "rejected drafts stay in the length")
def kept(s: Stage) -> None:
    """Three drafts are written, one is accepted, the length stays where the last draft put it.

    Sources: ml-explore/mlx-lm#1109, openvinotoolkit/openvino.genai#4190
    """
    n = s.page + 2
    table = [1, 2, 3]
    truth = text_of(A)
    drafted = [*truth[: n + 1], 777, 778]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.forward(Row(A, n, n + 3, table, text=drafted))
    s.fault()
    s.forward(Row(A, n + 3, n + 4, table))
    s.expect(A, s.at(table, n + 1, n + 2), Reason.TOKEN)


@positive("C20-lookahead", "drafts of a prefix hit are written into the shared prefix")
def lookahead(s: Stage) -> None:
    """No lookahead block was allocated for a request with a prefix hit: its first draft pass writes into the shared
    blocks, under everybody who reads them.

    Sources: vllm-project/vllm#42971
    """
    page = s.page
    shared = s.of(3)[:2]
    s.allocate([3, 4], A)
    s.forward(Row(A, 0, page + 1, [3, 4]))
    s.share([3], B)
    s.allocate([5], B)
    text = [*text_of(A)[:page], *text_of(B)]
    s.fault()
    s.forward(Row(A, page + 1, page + 2, [3, 4]), Row(B, page, page + 2, [3, 5], text=text, slots=shared))
    s.forward(Row(A, page + 2, page + 3, [3, 4]), Row(B, page + 1, page + 2, [3, 5], text=text))
    s.expect(B, shared, Reason.WRITE_POSITION, lifecycle=Reason.FOREIGN_WRITE)
    s.expect(None, shared, Reason.TOKEN | Reason.POSITION, tainted=(A, B))


@positive(
    "C20-draft-pool", "the draft pool gets the target's prediction instead of the prompt's token", shapes=("draft4",)
)
def draft_pool(s: Stage) -> None:
    """A slot of the draft pool holds the token of the next position. At a chunk boundary that token is in the prompt,
    but the target's prediction is written.

    Sources: sgl-project/sglang#26329
    """
    n = s.page + 2
    shifted = text_of(A)[1:]
    wrong = [*shifted[: n - 1], 4711, *shifted[n:]]
    s.allocate([1, 2, 3], A)
    s.fault()
    s.forward(Row(A, 0, n, [1, 2, 3], text=wrong, history=text_of(A)))
    s.forward(Row(A, n, n + 1, [1, 2, 3], text=shifted, history=text_of(A)))
    s.expect(A, s.at([1, 2], n - 1), Reason.TOKEN, latency=1)


@positive("C20-count", "the count of processed tokens is one too high after a rejection")
def count_too_high(s: Stage) -> None:
    """The gate of the rollback stays closed: the next token goes one position too far, the one before is never written.

    Sources: openvinotoolkit/openvino.genai#4190, vllm-project/vllm#47466
    """
    n = s.page + 1
    table = [1, 2, 3]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.fault()
    s.forward(Row(A, n + 1, n + 2, table))
    s.expect(A, s.at(table, n), Reason.UNWRITTEN)


@positive("C20-extra-slot", "the slot behind the last token enters the prefix tree")
def last_slot(s: Stage) -> None:
    """Under overlap scheduling the committed length is one too high when a request ends: the slot behind its last token
    is inserted into the radix tree with the rest.

    Sources: sgl-project/sglang#24745
    """
    n = 2 * s.page - 1
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.share([1, 2], C)
    s.allocate([4], C)
    s.fault()
    s.forward(Row(C, n + 1, n + 2, [1, 2, 4], text=text_of(A)))
    s.expect(C, s.of(2)[-1:], Reason.UNWRITTEN)
