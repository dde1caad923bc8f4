"""C18: quantisation scales are lost or wiped; the digest covers them as it covers K and V."""

from __future__ import annotations

from kvcanary.sim.museum.memory import fill
from kvcanary.sim.museum.rows import A, D, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason

SCALES = "k_scale v_scale"


@positive("C18-wiped", "the scales of live tokens are wiped", shapes=("scales4",))
def wiped(s: Stage) -> None:
    """A lazy set-up of views clears the scale pool under the first batch.

    Sources: vllm-project/vllm#50702
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.memory.edit(s.at([1, 2], range(n)), fill(0), s.memory.planes(names=SCALES))
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.expect(A, s.at([1, 2], range(n)), Reason.DATA, layers=s.layers, names=SCALES)


@positive("C18-not-restored", "K and V are restored, the scales of their blocks are not", shapes=("scales4",))
def not_restored(s: Stage) -> None:
    """The file of the prefix cache holds K and V but not the scale pool.

    Sources: kekzl/imp#1189
    """
    n = 2 * s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    stored = s.export(s.of(1, 2))
    s.free([1, 2], A)
    s.allocate([3, 4, 5], D)
    scales = s.memory.save(s.of(3, 4), s.memory.planes(names=SCALES))
    s.fault()
    s.restore(stored, s.of(3, 4))
    s.memory.load(scales, s.of(3, 4))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A)))
    s.expect(D, s.of(3, 4), Reason.DATA, layers=s.layers, names=SCALES)
