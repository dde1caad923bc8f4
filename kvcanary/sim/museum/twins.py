"""Legal twins of the faults: the guard must be silent over all of them."""

from __future__ import annotations

from kvcanary.sim.museum.memory import fill
from kvcanary.sim.museum.rows import A, B, C, D, Row, X, padding, text_of
from kvcanary.sim.museum.scenario import negative
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@negative("N01", "prefix sharing: B reads A's block, its own behind it")
def prefix_sharing(s: Stage) -> None:
    """Ordinary. Source: vllm-project/vllm#9668"""
    page = s.page
    text = [*text_of(A)[:page], *text_of(B)]
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3]))
    s.share([3], B)
    s.allocate([4], B)
    s.forward(Row(B, page, page + 1, [3, 4], text=text))
    s.forward(Row(B, page + 1, page + 2, [3, 4], text=text))
    s.free([3], A)
    s.forward(Row(B, page + 2, page + 3, [3, 4], text=text))


@negative("N03", "preemption and recompute: A's blocks go to B, A is computed anew elsewhere")
def preemption(s: Stage) -> None:
    """Twin of C01. Source: vllm-project/vllm#45357"""
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.allocate([1, 2, 3], B)
    s.forward(Row(B, 0, 2 * s.page, [1, 2, 3]))
    s.allocate([5, 6], A)
    s.forward(Row(A, 0, n, [5, 6]))
    s.forward(Row(A, n, n + 1, [5, 6]), Row(B, 2 * s.page, 2 * s.page + 1, [1, 2, 3]))


@negative("N37", "preempted twice: a request comes back to a request slot after it has gone on in another")
def back_in_a_slot(s: Stage) -> None:
    """What was drafted in the slot and rejected is no evidence against what was said elsewhere. Twin of C20."""
    n, elsewhere = s.page + 2, 9
    said, drafted = [*text_of(A)[:n], 901, 902, 903, 904], [*text_of(A)[:n], 911, 912]
    s.allocate([1, 2, 3], A)
    s.forward(Row(A, 0, n + 2, [1, 2, 3], text=drafted))
    s.forward(Row(A, n, n + 2, [1, 2, 3], text=said, request_slot=elsewhere))
    s.forward(Row(A, n + 2, n + 3, [1, 2, 3], text=said))
    s.forward(Row(A, n + 3, n + 4, [1, 2, 3], text=said))


@negative("N04", "block reuse after a free, in another order")
def reuse(s: Stage) -> None:
    """Ordinary."""
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.allocate([2, 1, 3], B)
    s.forward(Row(B, 0, n, [2, 1, 3]))
    s.forward(Row(B, n, n + 1, [2, 1, 3]))


@negative("N06", "rejected drafts stay behind the length and are rewritten later")
def rejected_drafts(s: Stage) -> None:
    """Ordinary speculative decoding; the history says -1 where nothing is known yet. Twin of C20."""
    n = s.page + 2
    table = [1, 2, 3]
    drafted = [*text_of(A)[: n + 1], 777, 778]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.forward(Row(A, n, n + 3, table, text=drafted, history=text_of(A)[:n]))
    s.forward(Row(A, n + 1, n + 3, table))
    s.forward(Row(A, n + 3, n + 4, table))


@negative("N07", "blocks behind the window belong to others", shapes=("swa4", "swa8"))
def behind_the_window(s: Stage) -> None:
    """Harmless unless dereferenced. Twin of C19. Source: vllm-project/vllm#42273"""
    n = 3 * s.page
    table = [1, 2, 3, 4]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.free([1], A)
    s.allocate([1], B)
    s.forward(Row(B, 0, s.page, [1]))
    s.forward(Row(A, n, n + 1, table))
    s.forward(Row(A, n + 1, n + 2, table))


@negative("N35", "a ring goes round: in one prefill, and token by token, beside its sinks", shapes=("ring4", "ring8"))
def goes_round(s: Stage) -> None:
    """The newest token takes the place of the oldest. Twin of C19. Source: awslabs/keys_values#140"""
    table, n = [1, 2, 3], 2 * s.pool.ring_length + 3
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table, slots=s.at(table, range(n))))
    for start in range(n, n + 2 * s.pool.ring_length):
        s.forward(Row(A, start, start + 1, table, slots=s.at(table, start)))


@negative("N08", "padding rows write the reserved block, or nothing")
def padded(s: Stage) -> None:
    """Twin of C10. Sources: vllm-project/vllm#43869, sgl-project/sglang#32477"""
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    s.forward(padding(0), padding(-1))
    s.forward(Row(A, page, page + 1, [1, 2]), padding(2), padding(-1))


@negative("N09", "chunked prefill, a chunk ends inside a block")
def chunks(s: Stage) -> None:
    """Ordinary."""
    page = s.page
    table = [1, 2, 3]
    s.allocate(table, A)
    s.forward(Row(A, 0, page + 1, table))
    s.forward(Row(A, page + 1, 2 * page + 2, table))
    s.forward(Row(A, 2 * page + 2, 2 * page + 3, table))


@negative("N11", "stale table entries past the length")
def stale_tail(s: Stage) -> None:
    """Another request's blocks, and garbage, where nobody looks. Twin of C07. Sources: vllm-project/vllm#42494,
    gittensor-ai-lab/sparkinfer#185"""
    page = s.page
    s.allocate([5, 6], B)
    s.forward(Row(B, 0, 2 * page, [5, 6]))
    s.allocate([1], A)
    s.forward(Row(A, 0, page - 1, [1, 6, 0x5A5A5A, -7]))
    s.forward(Row(A, page - 1, page, [1, 5, -1]))


@negative("N12", "fresh blocks are zeroed before the write")
def zeroed_before(s: Stage) -> None:
    """Twin of C17. Sources: vllm-project/vllm-ascend#13503, vllm-project/vllm#50283"""
    n = s.page + 2
    s.allocate([1, 2], X)
    s.forward(Row(X, 0, n, [1, 2]))
    s.free([1, 2], X)
    s.allocate([1, 2], A)
    s.memory.edit(s.of(1, 2), fill(0))
    s.forward(Row(A, 0, n, [1, 2]))
    s.forward(Row(A, n, n + 1, [1, 2]))


@negative("N15", "late write of an ended request into a freed block that nobody owns yet")
def late_write(s: Stage) -> None:
    """Deferred frees make this the normal case. A first chunk reads nothing, so there is nothing to say. Twin of C01.
    Sources: vllm-project/vllm#45357, vllm-project/vllm-ascend#16315"""
    page = s.page
    s.allocate([1], A)
    s.free([1], A)
    s.forward(Row(A, 0, 2, [1]))
    s.allocate([5], B)
    s.forward(Row(B, 0, page, [5]))
    s.allocate([1], B)
    s.forward(Row(B, page, page + 1, [5, 1]))


@negative(
    "N15-reading", "such a write of a request that still reads its freed blocks: only that is told, as it is true"
)
def late_write_reading(s: Stage) -> None:
    """With ownership the read of a freed block is a finding of its own (C01-read-early), tied to the step that nobody
    waits for. Source: vllm-project/vllm#45357"""
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.allow(A, Reason.STALE_EPOCH)
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.allocate([5], B)
    s.forward(Row(B, 0, s.page, [5]))


@negative("N17", "one text under two adapters, in separate blocks")
def two_adapters(s: Stage) -> None:
    """Twin of C05. Source: vllm-project/vllm#44250"""
    s.allocate([1], A)
    s.allocate([2], B)
    for n in range(s.page):
        s.forward(Row(A, n, n + 1, [1], salt=1), Row(B, n, n + 1, [2], text=text_of(A), salt=2))


@negative("N20", "a failed load with the policy recompute")
def recompute(s: Stage) -> None:
    """The forward ends in an exception, the request is computed from its first token. Source: LMCache/LMCache#4816"""
    n = s.page + 2
    s.allocate([1, 2, 3], A)
    s.forward(Row(A, 0, n, [1, 2, 3]), raises=True)
    s.forward(Row(A, 0, n, [1, 2, 3]))
    s.forward(Row(A, n, n + 1, [1, 2, 3]))


@negative("N21", "batch composition: other rounding in other batches")
def numerics(s: Stage) -> None:
    """The bytes of a recomputed prefix differ in the last bits; a digest is compared with what was written into its own
    slot, never with another run's. Twin of C24. Sources: vllm-project/vllm#39146, kekzl/imp#1314"""
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.allocate([5, 6], A)
    s.forward(Row(A, 0, n, [5, 6], noise=1))
    s.forward(Row(A, n, n + 1, [5, 6], noise=2))


@negative("N22", "warm-up, capture and idle dummy forwards, all slots -1")
def dummies(s: Stage) -> None:
    """Twin of C10. Sources: vllm-project/vllm#39444, vllm-project/vllm-ascend#15417"""
    page = s.page
    s.forward(padding(), padding(), padding())
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    s.forward(padding(), padding(), padding())
    s.forward(Row(A, page, page + 1, [1, 2]))


@negative("N23", "weights are reloaded: the cache is flushed, and everything computed anew")
def reload(s: Stage) -> None:
    """Sources: vllm-project/vllm#47724, vllm-project/vllm#44950"""
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.flush()
    s.memory.edit(s.of(1, 2, 3), fill(0))
    s.free([1, 2], A)
    s.allocate([2, 1], B)
    s.forward(Row(B, 0, n, [2, 1], noise=3))
    s.forward(Row(B, n, n + 1, [2, 1], noise=3))


@negative("N24", "one prefix admitted twice in the same forward: one row writes it, the other reads it")
def same_forward(s: Stage) -> None:
    """Hashes are committed before the forward. Twin of C06. Source: vllm-project/vllm#29387"""
    page = s.page
    text = [*text_of(A)[:page], 900, 901]
    s.allocate([3], X)
    s.forward(Row(X, 0, page, [3]))
    s.free([3], X)
    s.allocate([3, 5], A)
    s.share([3], B)
    s.allocate([4], B)
    s.forward(Row(B, page, page + 1, [3, 4], text=text), Row(A, 0, page + 1, [3, 5]))
    s.forward(Row(A, page + 1, page + 2, [3, 5]), Row(B, page + 1, page + 2, [3, 4], text=text))


@negative("N25", "a write launched before the free, on the same stream; then the block is reused")
def ordered_free(s: Stage) -> None:
    """Stream order makes it legal. Twin of C01."""
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.free([1, 2], A)
    s.allocate([1, 2], B)
    s.forward(Row(B, 0, n, [1, 2]))
    s.forward(Row(B, n, n + 1, [1, 2]))


@negative("N27", "one text prefix shared by requests with different images behind it")
def images_behind(s: Stage) -> None:
    """Images enter as tokens, so the text before them is the same chain. Twin of C05."""
    page = s.page
    texts = {r: [*text_of(A)[:page], 0x1000000 + r, 0x1000000 + r, *text_of(r)] for r in (A, B)}
    s.allocate([3, 4], A)
    s.forward(Row(A, 0, page + 3, [3, 4], text=texts[A]))
    s.share([3], B)
    s.allocate([5], B)
    s.forward(Row(B, page, page + 3, [3, 5], text=texts[B]))
    s.forward(*(Row(r, page + 3, page + 4, [3, b], text=texts[r]) for r, b in ((A, 4), (B, 5))))


@negative("N28", "placeholders in the scheduler's token lists")
def placeholders(s: Stage) -> None:
    """Async scheduling does not know the last tokens yet."""
    n = s.page + 2
    known = [*text_of(A)[:n], -1, -1, -1]
    s.allocate([1, 2], A)
    for start, end in ((0, n), (n, n + 1), (n + 1, n + 2)):
        s.forward(Row(A, start, end, [1, 2], history=known))


@negative(
    "N29",
    "zeroing of freed blocks that still carry digests, while blocks are patrolled",
    config={"scrub_bytes_per_step": 1 << 20},
    lifecycle=(True,),
)
def zeroed_after_free(s: Stage) -> None:
    """Twin of C17. Source: vllm-project/vllm-ascend#13503"""
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.free([1, 2], A)
    s.memory.edit(s.of(1, 2), fill(0))
    s.allocate([5, 6], B)
    s.forward(Row(B, 0, s.page, [5, 6]))
    for k in range(s.page, 2 * s.page):
        s.forward(Row(B, k, k + 1, [5, 6]))


@negative("N30", "draft pool: each slot holds the next position's token", shapes=("draft4",))
def draft_pool(s: Stage) -> None:
    """Twin of C20. Source: sgl-project/sglang#26813"""
    n = s.page + 2
    shifted = text_of(D)[1:]
    s.allocate([1, 2], D)
    for start, end in ((0, n), (n, n + 1)):
        s.forward(Row(D, start, end, [1, 2], text=shifted, history=text_of(D)))


@negative("N31", "many requests come and go, blocks change hands every step")
def turnover(s: Stage) -> None:
    """Ordinary."""
    n = s.page + 1
    for i, (request, blocks) in enumerate(((A, [1, 2]), (B, [2, 1]), (C, [3, 1]), (D, [1, 3]))):
        s.allocate(blocks, request)
        s.forward(Row(request, 0, n, blocks))
        s.forward(Row(request, n, n + 1, blocks), padding(i % 2 - 1))
        s.free(blocks, request)


@negative(
    "N32",
    "padding rows leave finite values in the reserved block, while it is looked through for NaN",
    config={"check_reserved_every": 1},
    shapes=("nhd4", "hnd16", "latent8", "scales4"),
)
def finite_padding(s: Stage) -> None:
    """Twin of C10. Sources: vllm-project/vllm#39444, sgl-project/sglang#32477"""
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    for k in range(page, page + 3):
        s.memory.edit(s.of(0), fill(0x7E - k % 2))  # the largest that fp8 has, and ordinary ones of the other types
        s.forward(Row(A, k, k + 1, [1, 2]), padding(-1))
