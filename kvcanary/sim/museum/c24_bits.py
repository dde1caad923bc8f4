"""C24: bits change in memory, in the published patterns (see `kvcanary.sim.sdc`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvcanary.sim.museum.memory import Bytes, fill, flip
from kvcanary.sim.museum.rows import A, B, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


def _strike(s: Stage, change: Callable[[Bytes], Any], layer: int = 1, half: str = "k") -> None:
    n = s.page + 2
    slot = s.at([1], 2)
    s.allocate([1, 2], A)
    s.forward(Row(A, 0, n, [1, 2]))
    s.forward(Row(A, n, n + 1, [1, 2]))
    s.fault()
    s.memory.edit(slot, change, s.memory.planes([layer], half))
    s.forward(Row(A, n + 1, n + 2, [1, 2]))
    s.expect(A, slot, Reason.DATA, layers=[layer], tainted=(A,))


def _strided(stride: int) -> Callable[[Bytes], Bytes]:
    """The same bit of every ``stride``-th element of two bytes: an XOR of all would not see an even number of them."""

    def change(data: Bytes) -> Bytes:
        elements = data.view(np.uint16) if data.flags.c_contiguous else np.ascontiguousarray(data).view(np.uint16)
        elements[:, ::stride] ^= np.uint16(1 << 9)
        return elements.view(np.uint8)

    return change


def _exchange(data: Bytes) -> Bytes:
    """Two words trade places: a sum without weights would not see it."""
    data[:, :4], data[:, 4:8] = data[:, 4:8].copy(), data[:, :4].copy()
    return data


@positive("C24-bit", "one bit of one layer flips")
def one_bit(s: Stage) -> None:
    """The lowest bit of a byte of slot 6, layer 1.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, flip())


@positive("C24-sign", "the highest bit of the last byte flips, in the last layer")
def sign(s: Stage) -> None:
    """The sign of a value; most bit positions give coherent but altered text.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, flip(-1, 0x80), layer=2)


@positive("C24-value", "a bit of V flips, in the first layer", shapes=("nhd4", "crowd", "hnd16", "scales4"))
def value_plane(s: Stage) -> None:
    """The other half.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, flip(3, 0x10), layer=0, half="v")


@positive("C24-null", "a slot of one layer becomes zero")
def nullified(s: Stage) -> None:
    """Half of the published corruptions are nullifications.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, fill(0))


@positive("C24-nan", "a slot of one layer becomes NaN")
def nan(s: Stage) -> None:
    """One in a hundred of the published corruptions: a check for NaN sees only these.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, fill(0xFF))


@positive("C24-stride-2", "the same bit of every second element flips")
def stride_2(s: Stage) -> None:
    """Warp-aligned periodicity: an even number of equal flips.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, _strided(2))


@positive("C24-stride-4", "the same bit of every fourth element flips")
def stride_4(s: Stage) -> None:
    """Warp-aligned periodicity.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, _strided(4))


@positive("C24-burst", "all bits of neighbouring bytes flip")
def burst(s: Stage) -> None:
    """Multi-bit upsets at rest are mostly contiguous in bytes.

    Sources: local-inference-lab/vllm-backport#62
    """

    def change(data: Bytes) -> Bytes:
        data[:, 5:8] ^= np.uint8(0xFF)
        return data

    _strike(s, change)


@positive("C24-exchange", "two words of a slot change places")
def exchange(s: Stage) -> None:
    """Every sum of the words is as before; only their places are not.

    Sources: local-inference-lab/vllm-backport#62
    """
    _strike(s, _exchange)


@positive("C24-shared", "a bit flips in a prefix that two requests share")
def shared(s: Stage) -> None:
    """The finding is reported once; the rows of both readers are tainted.

    Sources: local-inference-lab/vllm-backport#62
    """
    page = s.page
    slot = s.of(3)[1:2]
    text = [*text_of(A)[:page], *text_of(B)]
    s.allocate([3, 4], A)
    s.forward(Row(A, 0, page, [3, 4]))
    s.share([3], B)
    s.allocate([5], B)
    s.forward(Row(A, page, page + 1, [3, 4]), Row(B, page, page + 1, [3, 5], text=text))
    s.fault()
    s.memory.edit(slot, flip(2, 4), s.memory.planes([1], "k"))
    s.forward(Row(A, page + 1, page + 2, [3, 4]), Row(B, page + 1, page + 2, [3, 5], text=text))
    s.expect(None, slot, Reason.DATA, layers=[1], tainted=(A, B))


@positive(
    "C24-sampled", "a bit flips, and each live byte is looked at every fifth forward", config={"verify_data_every": 5}
)
def sampled(s: Stage) -> None:
    """In service the bytes are verified in shares: the flip is found within so many of the request's own forwards.

    Sources: local-inference-lab/vllm-backport#62
    """
    n = s.page + 2
    slot = s.at([1], 2)
    s.allocate([1, 2, 3], A)
    s.forward(Row(A, 0, n, [1, 2, 3]))
    s.forward(Row(A, n, n + 1, [1, 2, 3]))
    s.fault()
    s.memory.edit(slot, flip(), s.memory.planes([1], "k"))
    for k in range(n + 1, n + 6):
        s.forward(Row(A, k, k + 1, [1, 2, 3]))
    s.expect(A, slot, Reason.DATA, within=4, layers=[1])


@positive("C24-sweep", "a bit flips in a cached prefix that nobody reads", config={"sweep_interval": 1})
def swept(s: Stage) -> None:
    """No row of any batch reads the block; the sweep over the resident slots of the prefix cache does.

    Sources: local-inference-lab/vllm-backport#62
    """
    page = s.page
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3]))
    s.allocate([5], B)
    s.keep_resident([3], page, text_of(A))
    s.forward(Row(B, 0, 2, [5]))
    s.fault()
    s.memory.edit(s.of(3)[2:3], flip(), s.memory.planes([1], "k"))
    s.forward(Row(B, 2, 3, [5]))
    s.expect(None, s.of(3)[2:3], Reason.DATA, layers=[1])
    s.expect_silence(B)


@positive(
    "C24-patrol",
    "a bit flips in a block of a request that waits",
    config={"scrub_bytes_per_step": 1 << 20},
    lifecycle=(True,),
)
def patrolled(s: Stage) -> None:
    """A holds its blocks and is in no batch; the patrol in the graph comes by.

    Sources: local-inference-lab/vllm-backport#62
    """
    page = s.page
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3]))
    s.allocate([5], B)
    s.forward(Row(B, 0, 1, [5]))
    s.fault()
    s.memory.edit(s.of(3)[2:3], flip(), s.memory.planes([1], "k"))
    for k in range(1, 4):
        s.forward(Row(B, k, k + 1, [5]))
    s.expect(None, s.of(3)[2:3], Reason.DATA, within=2, layers=[1])
    s.expect_silence(B)
