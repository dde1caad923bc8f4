"""C19: sliding windows and rings."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, C, Row, X
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason

WINDOWS = ("swa4", "swa8")
RINGS = ("ring4", "ring8")


@positive("C19-ring", "a prefix hit reads its window from a ring that nobody filled", shapes=WINDOWS)
def stale_ring(s: Stage) -> None:
    """The window's KV sits in a ring per request, outside the prefix cache: on a hit the ring holds its last user's.

    Sources: ROCm/ATOM#1417, sgl-project/sglang#30339
    """
    n = 2 * s.page
    s.allocate([5, 7], X)
    s.forward(Row(X, 0, n, [5, 7]))
    s.free([5, 7], X)
    s.allocate([5, 7, 6], C)
    s.fault()
    s.forward(Row(C, n, n + 1, [5, 7, 6]))
    window = s.pool.window or 0
    s.expect(C, s.at([5, 7], range(n - window + 1, n)), Reason.UNWRITTEN if s.lifecycle else Reason.TOKEN)


@positive("C19-evicted", "eviction removes tokens that are still inside the window", shapes=WINDOWS)
def evicted(s: Stage) -> None:
    """Blocks are freed by the size of a chunk, not of the window; another request fills them.

    Sources: sgl-project/sglang#8649, sgl-project/sglang#31486
    """
    n = 3 * s.page
    table = [1, 2, 3, 4]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.forward(Row(A, n, n + 1, table))
    s.free([3], A)
    s.allocate([3], B)
    s.forward(Row(B, 0, s.page, [3]))
    s.fault()
    s.forward(Row(A, n + 1, n + 2, table))
    window = s.pool.window or 0
    inside = range(max(2 * s.page, n + 1 - window + 1), n)
    s.expect(A, s.at(table, inside), Reason.TOKEN, lifecycle=Reason.STALE_EPOCH)


@positive("C19-mapping-cleared", "the entry of the window's mapping is cleared under the forward", shapes=("lut4",))
def mapping_cleared(s: Stage) -> None:
    """Result processing clears a running request's full-to-window entries before the forward in flight translates them.

    Sources: sgl-project/sglang#31687, sgl-project/sglang#26380
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.memory.set_lut(s.at([1, 2], n - 1), -1)
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.expect(A, [2], Reason.UNWRITTEN)


@positive("C19-mapping-stale", "reads through a mapping that was rebuilt for another request", shapes=("lut4",))
def mapping_stale(s: Stage) -> None:
    """A cached translation is not dropped when the mapping is rebuilt: the window is read from slots that are B's.

    Sources: sgl-project/sglang#25889, sgl-project/sglang#33656
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.allocate([3], B)
    s.forward(Row(A, 0, n, [1, 2]), Row(B, 0, s.page, [3]))
    s.fault()
    s.memory.set_lut(s.at([1, 2], n - 1), s.at([3], 1)[0])
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.expect(A, s.at([3], 1), Reason.TOKEN, lifecycle=Reason.STALE_EPOCH)


@positive("C19-wrap", "a ring wraps one slot too late", shapes=WINDOWS)
def wraps_late(s: Stage) -> None:
    """When the length reaches the window, the new token goes to the slot of the one before it.

    Sources: huggingface/transformers#37574, awslabs/keys_values#140, Blaizzy/mlx-vlm#1715
    """
    n = 2 * s.page
    table = [1, 2, 3]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.fault()
    s.forward(Row(A, n, n + 1, table, slots=s.at(table, n - 1)))
    s.forward(Row(A, n + 1, n + 2, table))
    s.expect(A, s.at(table, n - 1), Reason.WRITE_POSITION | Reason.POSITION | Reason.TOKEN)
    s.expect(A, s.at(table, n), Reason.UNWRITTEN)


@positive("C19-ring-reused", "a ring still holds what its last request wrote", shapes=RINGS)
def reused_ring(s: Stage) -> None:
    """The prefix comes from the cache, but the ring of the window is the request slot's: its last occupant is in it.

    Sources: sgl-project/sglang#30339, ROCm/ATOM#1417
    """
    table, window = [1, 2, 3], s.pool.window or 0
    n = 2 * s.pool.ring_length
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table, slots=s.at(table, range(n))))
    s.free(table, A)
    s.allocate(table, B)
    s.fault()
    s.forward(Row(B, n, n + 1, table, slots=s.at(table, n)))
    s.expect(B, s.at(table, range(n - window + 1, n)), Reason.UNWRITTEN if s.lifecycle else Reason.TOKEN)


@positive("C19-ring-full", "a write into a full ring goes to the place beside the oldest", shapes=RINGS)
def misplaced_in_ring(s: Stage) -> None:
    """The ring has gone round; the next token overwrites the second oldest, the oldest stays.

    Sources: awslabs/keys_values#140, Blaizzy/mlx-vlm#1715
    """
    table, n = [1, 2, 3], s.pool.ring_length + s.pool.sink
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table, slots=s.at(table, range(n))))
    s.fault()
    s.forward(Row(A, n, n + 1, table, slots=s.at(table, n + 1)))
    s.forward(Row(A, n + 1, n + 2, table, slots=s.at(table, n + 1)))
    s.expect(A, s.at(table, n + 1), Reason.WRITE_POSITION)
    s.expect(A, s.at(table, n), Reason.UNWRITTEN)


@positive("C19-sink", "a ring that wraps over the attention sinks", shapes=("ring4",))
def overwritten_sink(s: Stage) -> None:
    """The ring is taken for one over all places: its first token behind the wrap overwrites the first token of all.

    A variant, beside attention sinks, of a wrap at the wrong length. Sources: huggingface/transformers#37574
    """
    table, n = [1, 2, 3], s.pool.ring_length + s.pool.sink
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table, slots=s.at(table, range(n))))
    s.fault()
    s.forward(Row(A, n, n + 1, table, slots=s.at(table, 0)))
    s.forward(Row(A, n + 1, n + 2, table, slots=s.at(table, n + 1)))
    s.expect(A, s.at(table, 0), Reason.WRITE_POSITION | Reason.POSITION)
    s.expect(A, s.at(table, n), Reason.UNWRITTEN)


@positive("C19-pruned", "window pruning frees a block that a dispatched step still reads", shapes=WINDOWS)
def pruned_window(s: Stage) -> None:
    """The block behind the window is computed one step ahead, freed, and given to B while A's step still reads it.

    Sources: vllm-project/vllm-ascend#13501
    """
    n = 3 * s.page
    table = [1, 2, 3, 4]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.free([3], A)
    s.allocate([3], B)
    s.forward(Row(B, 0, s.page, [3]))
    s.fault()
    s.forward(Row(A, n, n + 1, table))
    read = range(n - (s.pool.window or 0) + 1, n)
    s.expect(A, s.at(table, read), Reason.TOKEN | Reason.POSITION, lifecycle=Reason.STALE_EPOCH)
    s.expect_silence(B)
