"""C22: a cached prefix that is one token off."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C22-doubled", "the last token of a cached prefix is doubled")
def doubled(s: Stage) -> None:
    """An off-by-one between the cached length and the text: everything behind sits one position too far, and nothing
    shows in the output.

    Sources: oobabooga/textgen#4145
    """
    n = s.page
    table = [1, 2, 3]
    truth = text_of(A)
    doubled_text = [*truth[:n], truth[n - 1], *truth[n:]]
    s.allocate(table, A)
    s.forward(Row(A, 0, n, table))
    s.fault()
    s.forward(Row(A, n, n + 3, table, text=doubled_text))
    s.forward(Row(A, n + 3, n + 4, table))
    s.expect(A, s.at(table, n, n + 1, n + 2), Reason.TOKEN, latency=1)
