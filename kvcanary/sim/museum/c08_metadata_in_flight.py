"""C08: a metadata buffer is overwritten while the device still reads it."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, Row
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


def _swapped_row(s: Stage, history: list[int] | None) -> None:
    n = s.page + 1
    s.allocate([1, 2], A)
    s.allocate([3, 4], B)
    s.forward(Row(A, 0, n, [1, 2], history=history), Row(B, 0, n, [3, 4], history=history))
    s.forward(Row(A, n, n + 1, [1, 2], history=history), Row(B, n, n + 1, [3, 4], history=history))
    s.fault()
    s.forward(Row(A, n + 1, n + 2, [3, 4], history=history))
    s.forward(Row(A, n + 2, n + 3, [1, 2], history=history), Row(B, n + 1, n + 2, [3, 4], history=history))
    s.expect(A, s.at([3, 4], n), Reason.CHAIN, lifecycle=Reason.STALE_EPOCH)
    if history is None:
        s.expect(A, s.at([3, 4], range(n + 1)), Reason.TOKEN)
    s.expect(A, s.at([3, 4], n + 1), lifecycle=Reason.FOREIGN_WRITE)
    s.expect(A, s.at([1, 2], n + 1), Reason.UNWRITTEN, latency=1)


@positive("C08-row", "a step reads another request's block table row")
def swapped_row(s: Stage) -> None:
    """One pinned buffer for all iterations: the next one overwrites the block offsets before the copy has read them. A
    reads B's context and writes its token there; a step later its row is right again, and the token is missing.

    Sources: NVIDIA/TensorRT-LLM#15546, NVIDIA/TensorRT-LLM#16088, sgl-project/sglang#26380
    """
    _swapped_row(s, None)


@positive("C08-no-history", "a step reads another request's row, and no token history is there to compare with")
def no_history(s: Stage) -> None:
    """The expectation must not come from a buffer that may be clobbered too: the chain's anchor is the guard's own.

    Sources: NVIDIA/TensorRT-LLM#15546
    """
    _swapped_row(s, [-1])


@positive("C08-overwrites", "a step writes its token where another request's row says, after that request")
def overwrites(s: Stage) -> None:
    """The same, where B's token of that position is there already: B's context is damaged too.

    Sources: ggml-org/llama.cpp#28056, NVIDIA/TensorRT-LLM#16088
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.allocate([3, 4], B)
    s.forward(Row(A, 0, n, [1, 2]), Row(B, 0, n, [3, 4]))
    s.forward(Row(B, n, n + 1, [3, 4]))
    s.fault()
    s.forward(Row(A, n, n + 1, [3, 4]))
    s.forward(Row(A, n + 1, n + 2, [1, 2]), Row(B, n + 1, n + 2, [3, 4]))
    s.expect(A, s.at([3, 4], range(n)), Reason.TOKEN, lifecycle=Reason.STALE_EPOCH)
    s.expect(B, s.at([3, 4], n), Reason.CHAIN | Reason.TOKEN, latency=1, lifecycle=Reason.STALE_EPOCH)
    s.expect(A, s.at([1, 2], n), Reason.UNWRITTEN, latency=1)


@positive("C08-torn", "the table changes between HEAD and the model")
def torn(s: Stage) -> None:
    """The guard's first look and the kernels' look fall on two sides of the overwrite; TAIL looks through the table as
    it is then.

    Sources: sgl-project/sglang#26380, vllm-project/vllm-ascend#10245
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.allocate([3, 4], B)
    s.forward(Row(A, 0, n, [1, 2]), Row(B, 0, n, [3, 4]))
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2], late_table=[3, 4]), late_tables=True)
    s.expect(A, s.at([3, 4], range(n)), Reason.TOKEN, lifecycle=Reason.STALE_EPOCH)
    s.expect(A, s.at([3, 4], n), Reason.UNWRITTEN)


@positive("C08-kernel-only", "only the KV kernel sees the overwritten slot mapping")
def kernel_only(s: Stage) -> None:
    """Stamps go to the right slot, the bytes into another request's.

    Sources: ggml-org/llama.cpp#28056
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.allocate([3, 4], B)
    s.forward(Row(A, 0, n, [1, 2]), Row(B, 0, n, [3, 4]))
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2], kv_slots=s.at([3, 4], n - 1)))
    s.forward(Row(B, n, n + 1, [3, 4]))
    s.expect(B, s.at([3, 4], n - 1), Reason.DATA, latency=1, layers=s.layers)
