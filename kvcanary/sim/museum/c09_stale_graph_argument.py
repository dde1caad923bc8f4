"""C09: a replayed CUDA graph uses an argument of the step in which it was captured."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, Row
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C09-slot", "a replay writes the new token at the captured offset")
def captured_slot(s: Stage) -> None:
    """The graph was captured when A had one block of tokens; A now has two, and the token goes to the home of the first
    position behind the captured length.

    Sources: gittensor-ai-lab/sparkinfer#150, kekzl/imp#1709
    """
    n = 2 * s.page
    table = [1, 2, 3]
    home, stale = s.at(table, n), s.at(table, s.page)
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.fault()
    s.forward(Row(A, n, n + 1, table, slots=stale))
    s.forward(Row(A, n + 1, n + 2, table))
    s.expect(A, home, Reason.UNWRITTEN)
    s.expect(A, stale, Reason.WRITE_POSITION | Reason.CHAIN | Reason.POSITION | Reason.TOKEN)


@positive("C09-batch", "a replay with the slots of the step before, in a batch of several")
def step_before(s: Stage) -> None:
    """Every row writes once more where it wrote last.

    Sources: vllm-project/vllm#48534, kekzl/imp#1709
    """
    n = s.page + 1
    s.allocate([1, 2], A)
    s.allocate([3, 4], B)
    s.forward(Row(A, 0, n, [1, 2]), Row(B, 0, n, [3, 4]))
    s.fault()
    again = [s.at([1, 2], n - 1), s.at([3, 4], n - 1)]
    s.forward(Row(A, n, n + 1, [1, 2], slots=again[0]), Row(B, n, n + 1, [3, 4], slots=again[1]))
    for request, table, stale in ((A, [1, 2], again[0]), (B, [3, 4], again[1])):
        s.expect(request, s.at(table, n), Reason.UNWRITTEN)
        s.expect(request, stale, Reason.WRITE_POSITION)
