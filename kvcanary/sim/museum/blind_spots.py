"""What no guard of slots and bytes can see, played where it can be played: silence is what was promised."""

from __future__ import annotations

import numpy as np

from kvcanary.sim.museum.memory import fill
from kvcanary.sim.museum.rows import A, B, Row, padding, text_of
from kvcanary.sim.museum.scenario import blind
from kvcanary.sim.museum.stage import Stage


@blind("C09-attention", "a replay with a stale context length: attention is cut short, the cache is right")
def short_attention(s: Stage) -> None:
    """Only the reader's geometry is stale; every slot holds what it should.

    Sources: kekzl/imp#986
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2], noise=9))  # what it computes from half of its context is written as it comes


@blind("C10-null-block", "NaN in the reserved block that padding writes, without `check_reserved_every`")
def null_block(s: Stage) -> None:
    """Writes there are legal; readers that gather the null block are poisoned.

    Sources: vllm-project/vllm#57156, vllm-project/vllm#39444, sgl-project/sglang#32477
    """
    page = s.page
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, page, [1, 2]))
    s.fault()
    s.forward(padding(0))
    s.memory.edit(s.of(0), fill(0xFF))
    s.forward(Row(A, page, page + 1, [1, 2]))


@blind("C11-tail", "NaN in the never-written tail of a live block")
def unwritten_tail(s: Stage) -> None:
    """The kernel multiplies a weight of 0 with V = NaN; the slots are outside of what the request reads.

    Sources: vllm-project/vllm#936, flashinfer-ai/flashinfer#941, Dao-AILab/flash-attention#1745
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.memory.edit(s.at([1, 2], range(n + 1, 2 * s.page)), fill(0xFF))
    s.forward(Row(A, n, n + 1, [1, 2]))


@blind("C12-nowhere", "the KV kernel writes a token's bytes where nobody looks")
def written_nowhere(s: Stage) -> None:
    """The digest of the true slot is taken from what lies there; what never arrived was never known.

    Sources: tenstorrent/tt-metal#54742
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2], kv_slots=s.of(7)[:1]))
    s.forward(Row(A, n + 1, n + 2, [1, 2]))


@blind("C18-ignored", "a kernel ignores the scales of an intact cache", shapes=("scales4",))
def ignored_scales(s: Stage) -> None:
    """The reader is wrong, the cache is right.

    Sources: flashinfer-ai/flashinfer#4979
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.forward(Row(A, n, n + 1, [1, 2], noise=9))


@blind("C23-birth", "bytes that were wrong when they were written")
def poisoned_at_birth(s: Stage) -> None:
    """A layer's input was stale when K and V were computed: stamp and digest agree with what was written.

    Sources: ikawrakow/ik_llama.cpp#2083, vllm-project/vllm#47724
    """
    n = s.page + 2
    s.allocate([1, 2], A)
    s.fault()
    s.forward(Row(A, 0, n, [1, 2], noise=99))
    s.forward(Row(A, n, n + 1, [1, 2]))


@blind("C25-state", "recurrent state of the wrong boundary")
def recurrent_state(s: Stage) -> None:
    """State has a slot per request, not per token: it is in no pool of the guard.

    Sources: vllm-project/vllm#50630, FlashML-org/FreeToken#287, NVIDIA/TensorRT-LLM#13278
    """
    n = s.page + 2
    state = s.place.put(np.zeros((4, 16), np.float32))
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.fault()
    s.place.assign(state, np.full((4, 16), np.nan, np.float32))
    s.forward(Row(A, n, n + 1, [1, 2]))


@blind("C26-numerics", "not corruption: a batch of another composition gives another text")
def batch_numerics(s: Stage) -> None:
    """Rounding differs, the argmax flips, and the request goes on with another token: whatever it says, it is its own.

    Sources: vllm-project/vllm#39146
    """
    n = s.page + 2
    other = [*text_of(A)[:n], 4242, *text_of(A)[n + 1 :]]
    s.allocate([1, 2], A)
    s.allocate([5, 6], B)
    s.forward(Row(A, 0, n, [1, 2], text=other), Row(B, 0, n, [5, 6], text=text_of(A), noise=1))
    s.fault()
    for k in (n, n + 1):
        s.forward(Row(A, k, k + 1, [1, 2], text=other), Row(B, k, k + 1, [5, 6], text=text_of(A), noise=k))
