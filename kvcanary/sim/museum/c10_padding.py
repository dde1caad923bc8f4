"""C10: padding, dummy or capture rows write real memory."""

from __future__ import annotations

from kvcanary.sim.museum.memory import fill
from kvcanary.sim.museum.rows import A, B, C, Row, padding
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C10-unstamped", "a padded row with slot -1 is taken for the last slot of the pool")
def unstamped(s: Stage) -> None:
    """The kernel indexes with -1; the guard is told that the row writes nothing, and nothing is stamped.

    Sources: vllm-project/vllm#43810
    """
    page = s.page
    last = s.of(7)[-1]
    s.allocate([7, 6], B)
    s.forward(Row(B, 0, page, [7, 6]))
    s.fault()
    s.forward(padding(-1, kv_slot=last), padding(-1))
    s.forward(Row(B, page, page + 1, [7, 6]))
    s.expect(B, [last], Reason.DATA, latency=1, layers=s.layers)


@positive("C10-stamped", "a padded row is mapped to a live slot")
def stamped(s: Stage) -> None:
    """The slot mapping itself names the slot.

    Sources: m0at/rvllm#32, vllm-project/vllm#43810
    """
    page = s.page
    last = s.of(7)[-1]
    s.allocate([7, 6], B)
    s.forward(Row(B, 0, page, [7, 6]))
    s.fault()
    s.forward(padding(last), padding(-1))
    s.forward(Row(B, page, page + 1, [7, 6]))
    s.expect(0, [last], Reason.WRITE_POSITION, lifecycle=Reason.FOREIGN_WRITE)
    s.expect(B, [last], Reason.CHAIN | Reason.POSITION | Reason.TOKEN, latency=1, lifecycle=Reason.STALE_EPOCH)


def _finished(s: Stage, is_stamped: bool) -> None:
    page = s.page
    slots = s.at([2, 3], range(2, 4))
    s.allocate([2, 3], A)
    s.forward(Row(A, 0, page, [2, 3]))
    s.free([2, 3], A)
    s.allocate([2, 3], C)
    s.forward(Row(C, 0, page + 1, [2, 3]))
    s.fault()
    s.forward(*(padding(slot) if is_stamped else padding(-1, kv_slot=slot) for slot in slots))
    s.forward(Row(C, page + 1, page + 2, [2, 3]))
    if is_stamped:
        s.expect(0, slots, Reason.WRITE_POSITION, lifecycle=Reason.FOREIGN_WRITE)
        s.expect(C, slots, Reason.POSITION | Reason.TOKEN, latency=1, lifecycle=Reason.STALE_EPOCH)
    else:
        s.expect(C, slots, Reason.DATA, latency=1, layers=s.layers)


@positive("C10-finished", "a dummy forward writes through the slots of a finished request")
def finished(s: Stage) -> None:
    """The mapping is filled with -1 only after the metadata was built: the idle rank's dummy writes where its last
    request was, and that is C's by now.

    Sources: vllm-project/vllm-ascend#15417, vllm-project/vllm-ascend#15492
    """
    _finished(s, is_stamped=False)


@positive("C10-finished-stamped", "a dummy forward with the slot mapping of a finished request")
def finished_stamped(s: Stage) -> None:
    """The same, where the guard is handed the stale mapping too.

    Sources: vllm-project/vllm-ascend#15417
    """
    _finished(s, is_stamped=True)


@positive(
    "C10-null-block-checked",
    "a dummy forward leaves NaN in the reserved block",
    config={"check_reserved_every": 1},
    shapes=("nhd4", "hnd16", "latent8", "scales4"),
)
def null_block(s: Stage) -> None:
    """The write is legal; whatever gathers the block, for padding or an unused table entry, is poisoned.

    Sources: vllm-project/vllm#57156, vllm-project/vllm#39444, sgl-project/sglang#32477, huggingface/transformers#46765
    """
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    s.fault()
    s.forward(padding(0))
    s.memory.edit(s.of(0), fill(0xFF))
    s.forward(Row(A, page, page + 1, [1, 2]))
    s.expect(None, [0], Reason.NONFINITE_RESERVED, latency=1, layers=s.layers)
    s.expect_silence(A)
