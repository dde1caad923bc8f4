"""tinygrad's own LLM with its KV cache, guarded: HEAD and TAIL around the call of its JIT.

On DEV=CUDA tinygrad works on the NULL stream of a context of its own; the guard finds that context by the memory of the
cache. With the cache in host memory (DEV=CPU, DEV=PYTHON), the guard runs on the host backend.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, UOp, nn

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts

if importlib.util.find_spec("tinygrad.llm.kernels") is None:  # the wheel of 0.14.0 lacks them; they are AMD's alone
    kernels: Any = SimpleNamespace(Linear=nn.Linear, gated_delta_prefill=None, flash_attention=None)
    kernels.amd_custom_kernels_supported = lambda _device: False
    sys.modules |= {"tinygrad.llm.kernels": kernels, "tinygrad.llm.kernels.amd": kernels}
from tinygrad.llm.model import Transformer, TransformerConfig

MAX_LEN, DIM, HEADS, STEPS = 32, 16, 1, 8
ON_GPU = Device.DEFAULT == "CUDA"


def raw(tensor: Any) -> tuple[Any, ...]:
    """A realized tensor as the guard takes it: address, shape, strides (contiguous), bytes of an element, device."""
    buffer = tensor.uop.base.buffer.ensure_allocated()
    if ON_GPU:
        return int(buffer._buf.value), tuple(tensor.shape), None, tensor.dtype.itemsize, "cuda:0"
    memory = np.frombuffer(buffer.as_memoryview(force_zero_copy=True), np.uint8)
    return int(memory.ctypes.data), tuple(tensor.shape), None, tensor.dtype.itemsize, "cpu"


class Guarded:
    def __init__(self) -> None:
        Tensor.manual_seed(0)
        config = TransformerConfig(
            num_blocks=2, dim=DIM, hidden_dim=32, n_heads=HEADS, n_kv_heads=HEADS, norm_eps=1e-5, vocab_size=64,
            head_dim=DIM, rope_theta=1e4, rope_dim=DIM, v_head_dim=DIM, max_context=MAX_LEN,
        )  # fmt: skip
        self.model = Transformer(config)
        for block in self.model.blk:
            block._init_state(Tensor.zeros(1, 1, DIM))
            block.cache_kv = block.cache_kv.contiguous().realize()  # half[2, 1, heads, max_context, dim]
        pool = layouts.tinygrad.cache_kv([raw(block.cache_kv) for block in self.model.blk], dtype="float16")
        self.manager = CanaryManager(CanaryConfig.from_env(verify_data_every=1), [pool], 1, 1)
        self.arrays = [Tensor([0], dtype="int32").contiguous().realize() for _ in range(3)]
        self.history = Tensor.full((1, MAX_LEN), -1, dtype="int32").contiguous().realize()
        self.constant = [Tensor(x, dtype="int32").contiguous().realize() for x in ([0, 1], [0], [2])]
        starts, rows, names = map(raw, self.constant)
        length, token, slot = map(raw, self.arrays)
        self.batch = StepBatch(  # a static cache: no table, the one row has block 0
            seq_lens=length, query_start_loc=starts, input_ids=token, slot_mapping=slot, request_slots=rows,
            request_ids=names, token_history=raw(self.history),
        )  # fmt: skip
        self.start_pos, self.temperature = UOp.variable("start_pos", 0, MAX_LEN - 1), Tensor([0.0]).realize()
        self.tokens = [5]

    def step(self) -> None:
        """The next token, on tinygrad's own stream, which the guard calls None."""
        p = len(self.tokens) - 1
        for array, value in zip(self.arrays, (p + 1, self.tokens[p], p), strict=True):
            array.assign(Tensor([value], dtype="int32")).realize()
        self.history.assign(Tensor([self.tokens + [-1] * (MAX_LEN - p - 1)], dtype="int32")).realize()
        with self.manager.step(), self.manager.forward(self.batch):
            inputs = Tensor([[self.tokens[p]]], dtype="int32")
            out = self.model(inputs, self.start_pos.bind(p), self.temperature).realize()
        self.tokens.append(int(out.item()))


def main() -> None:
    guarded = Guarded()
    for _ in range(STEPS):
        guarded.step()
    guarded.manager.synchronize()
    assert guarded.manager.violations() == ()
    print(f"silent over {guarded.manager.step_number} steps on {Device.DEFAULT}")
    changed = (cache := guarded.model.blk[1].cache_kv).numpy()
    changed[0, 0, 0, 4, 3] += 1  # K of layer 1 at position 4
    cache.assign(Tensor(changed)).realize()
    guarded.step()
    guarded.manager.synchronize()
    (found,) = guarded.manager.violations()
    assert (found.request_id, found.position, found.layer) == (2, 4, 1)
    print("caught:", found.summary())


if __name__ == "__main__":
    main()
