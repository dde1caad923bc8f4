"""C13: a store or restore with the wrong layout or strides."""

from __future__ import annotations

from kvcanary.sim.museum.memory import permute
from kvcanary.sim.museum.rows import A, D, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C13-permuted", "restored blocks hold permuted bytes")
def permuted(s: Stage) -> None:
    """The fused K and V layout is read as another one of the same shape; no exception. The digest was taken before the
    store and travels with the data: recomputed behind the copy it would launder the damage.

    Sources: LMCache/LMCache#4463, LMCache/LMCache#4247, novitalabs/pegaflow#305
    """
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([3, 4, 5], D)
    s.fault()
    s.restore(stored, s.of(3, 4))
    s.memory.edit(s.of(3, 4), permute)
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(3, 4), Reason.DATA, layers=s.layers)


@positive("C13-halves", "K and V exchanged in a restore", shapes=("nhd4", "crowd", "hnd16"))
def halves(s: Stage) -> None:
    """The axis of K and V is read in the other order.

    Sources: LMCache/LMCache#4463
    """
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([3, 4, 5], D)
    s.fault()
    s.restore(stored, s.of(3, 4))
    for layer in s.layers:
        k, v = s.memory.planes([layer])
        saved = s.memory.save(s.of(3, 4), [k, v])
        for plane, name in ((k, f"v{layer}"), (v, f"k{layer}")):
            s.memory.load({f"{plane.name}{layer}": saved[name]}, s.of(3, 4))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(3, 4), Reason.DATA, layers=s.layers, names="k v")
