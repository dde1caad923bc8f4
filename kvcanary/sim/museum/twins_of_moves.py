"""Legal twins with moves: copies, stores and loads that carry stamps and digests."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, D, Row, text_of
from kvcanary.sim.museum.scenario import negative
from kvcanary.sim.museum.stage import Stage


@negative("N02", "copy-on-write: the shared tail is copied with its stamps and digests, then each branch writes")
def copy_on_write(s: Stage) -> None:
    """Twin of C21. Sources: xLLM-AI/xllm#1984, sgl-project/sglang#26972"""
    n = s.page + 2
    texts = {r: [*text_of(A)[:n], 100 * r, 100 * r + 1] for r in (A, B)}
    s.allocate([1, 3], A)
    s.forward(Row(A, 0, n, [1, 3]))
    s.share([1], B)
    s.allocate([5], B)
    s.copy(s.at([1, 3], range(s.page, n)), s.at([1, 5], range(s.page, n)))
    for k in (n, n + 1):
        s.forward(Row(A, k, k + 1, [1, 3], text=texts[A]), Row(B, k, k + 1, [1, 5], text=texts[B]))


@negative("N36", "copy-on-write by reference counts: the last branch claims the tail and writes it in place")
def last_branch(s: Stage) -> None:
    """Twin of C21. Source: xLLM-AI/xllm#1984"""
    n = s.page + 2
    text = [*text_of(A)[:n], 901, 902]
    s.allocate([1, 3], A)
    s.forward(Row(A, 0, n, [1, 3]))
    s.share([1, 3], B)
    s.free([1, 3], A)
    s.claim([3], B)
    s.forward(Row(B, n, n + 1, [1, 3], text=text))
    s.forward(Row(B, n + 1, n + 2, [1, 3], text=text))


@negative("N13", "offload and restore into other blocks, stamps and digests carried")
def offload(s: Stage) -> None:
    """Twin of C13 and C16. Source: sgl-project/sglang#32476"""
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([1, 2], B)
    s.forward(Row(B, 0, n, [1, 2]))
    s.allocate([5, 6, 7], D)
    s.restore(stored, s.of(5, 6))
    s.forward(Row(D, n, n + 1, [5, 6, 7], text=text_of(A)))
    s.forward(Row(D, n + 1, n + 2, [5, 6, 7], text=text_of(A)))


@negative("N26", "layer by layer load: the later layers are not there when the forward begins")
def layer_by_layer(s: Stage) -> None:
    """The row is pending at HEAD; each layer is judged where it is read, after it has arrived. Twin of C15."""
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([5, 6, 7], D)
    s.restore(stored, s.of(5, 6))
    late = s.memory.save(s.of(5, 6), s.memory.planes([2]))
    s.memory.edit(s.of(5, 6), lambda data: data * 0, s.memory.planes([2]))
    s.forward(
        Row(D, n, n + 1, [5, 6, 7], text=text_of(A), pending=True),
        verify_layers=s.layers,
        arrives=(late, s.of(5, 6)),
    )
    s.forward(Row(D, n + 1, n + 2, [5, 6, 7], text=text_of(A)))
