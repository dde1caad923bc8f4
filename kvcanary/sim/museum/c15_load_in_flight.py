"""C15: a load that is still in flight when attention reads."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, D, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.sim.museum.stored import stored_prefix
from kvcanary.tags import Reason


@positive("C15-last-layer", "attention of the last layer starts before its load has arrived")
def last_layer(s: Stage) -> None:
    """Layers 0 and 1 are there, layer 2 is late. Judged where each layer is read: at the end of the forward everything
    has arrived, and a check there says nothing.

    Sources: sgl-project/sglang#38217, vllm-project/vllm#48534, local-inference-lab/rtx6kpro#47
    """
    n = 2 * s.page
    stored = stored_prefix(s)
    last = s.layers[-1]
    late = s.memory.save(s.of(3, 4), s.memory.planes([last]))
    s.fault()
    s.restore(stored, s.of(3, 4))
    s.memory.load(late, s.of(3, 4))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A), pending=True), verify_layers=s.layers)
    s.expect(D, s.of(3, 4), Reason.DATA, layers=[last])


@positive(
    "C15-one-component", "one component of a layer is read without the wait that the others have", shapes=("scales4",)
)
def one_component(s: Stage) -> None:
    """Keys and values were waited for, what lies beside them was not.

    Sources: sgl-project/sglang#22811
    """
    n = 2 * s.page
    stored = stored_prefix(s)
    late = s.memory.save(s.of(3, 4), s.memory.planes([1], "k_scale"))
    s.fault()
    s.restore(stored, s.of(3, 4))
    s.memory.load(late, s.of(3, 4))
    s.forward(Row(D, n, n + 1, [3, 4, 5], text=text_of(A), pending=True), verify_layers=s.layers)
    s.expect(D, s.of(3, 4), Reason.DATA, layers=[1], names="k_scale")
