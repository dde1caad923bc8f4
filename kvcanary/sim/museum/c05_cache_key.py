"""C05: the key of the prefix cache is too small, or collides."""

from __future__ import annotations

from kvcanary.sim.museum.rows import A, B, C, Row, text_of
from kvcanary.sim.museum.scenario import positive
from kvcanary.sim.museum.stage import Stage
from kvcanary.tags import Reason


@positive("C05-adapter", "a hit across adapters: the same tokens, another model")
def across_adapters(s: Stage) -> None:
    """The key leaves the adapter out. Tokens and positions are equal; only the chain, which starts at the salt, is not.

    Sources: vllm-project/vllm#44250, vllm-project/vllm#30931, vllm-project/vllm#54342
    """
    page = s.page
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3], salt=7))
    s.free([3], A)
    s.share([3], B)
    s.allocate([4], B)
    s.fault()
    s.forward(Row(B, page, page + 1, [3, 4], text=text_of(A), salt=8))
    s.expect(B, s.of(3)[:1], Reason.CHAIN)
    s.expect(B, s.of(3)[-1:], Reason.CHAIN)


@positive("C05-collision", "a hit by a hash collision: the last token differs")
def collision(s: Stage) -> None:
    """A block is known by its hash alone, and nobody compares the tokens.

    Sources: openvinotoolkit/openvino.genai#3722
    """
    page = s.page
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3]))
    s.free([3], A)
    s.share([3], C)
    s.allocate([4], C)
    s.fault()
    text = [*text_of(A)[: page - 1], 999, *text_of(C)]
    s.forward(Row(C, page, page + 1, [3, 4], text=text))
    s.expect(C, s.of(3)[-1:], Reason.TOKEN | Reason.CHAIN)


@positive("C05-image", "a hit with the same text around another image")
def other_image(s: Stage) -> None:
    """The key has the placeholder's token id, not the image. The guard's tokens hold a hash of the image there.

    Sources: LMCache/LMCache#4086, NVIDIA/TensorRT-LLM#12306
    """
    page = s.page
    first, second = (text_of(A)[:1] + [image] * 2 + text_of(A)[3:] for image in (0x1234567, 0x7654321))
    s.allocate([3], A)
    s.forward(Row(A, 0, page, [3], text=first))
    s.free([3], A)
    s.share([3], B)
    s.allocate([4], B)
    s.fault()
    s.forward(Row(B, page, page + 1, [3, 4], text=second))
    s.expect(B, s.of(3)[1:3], Reason.TOKEN)
    s.expect(B, s.of(3)[-1:], Reason.CHAIN)
