"""A Hugging Face Llama (random weights) with a static cache, guarded; on a GPU inside ``torch.cuda.graph``.

A static cache has no block table: row r has block r, and its slots are r * max_len + position.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts

PROMPT, STEPS, VOCABULARY = 8, 40, 500
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


def stream() -> int | None:
    return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None


class Decoder:
    """All rows advance together; every tensor keeps its address, so that one graph serves all steps."""

    def __init__(self, rows: int = 4, max_len: int = 64, shape: dict[str, int] = SHAPE, **guard: Any) -> None:
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        self.rows, self.max_len = rows, max_len
        llama = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=max_len, **shape)
        self.model = LlamaForCausalLM(llama).to(DEVICE, torch.bfloat16).eval()
        self.cache = StaticCache(llama, max_cache_len=max_len)
        self.cache.early_initialization(rows, 2, llama.head_dim, torch.bfloat16, torch.device(DEVICE))
        keys, values = ([getattr(layer, name) for layer in self.cache.layers] for name in ("keys", "values"))
        pool = layouts.transformers.static_cache(keys, values)
        self.history = torch.full((rows, max_len), -1, dtype=torch.int32, device=DEVICE)
        self.prefill = self.inputs(torch.randint(VOCABULARY, (rows, PROMPT), device=DEVICE))
        self.decode = self.inputs(torch.zeros((rows, 1), dtype=torch.int64, device=DEVICE))
        self.manager = CanaryManager(CanaryConfig.from_env(**guard), [pool], rows, rows * PROMPT)

    def inputs(self, ids: Any) -> dict[str, Any]:
        """Tensors of one forward, and the batch that shows them to the guard."""
        n = ids.shape[1]
        rows = torch.arange(self.rows, device=DEVICE, dtype=torch.int32)
        positions = torch.arange(n, device=DEVICE).repeat(self.rows, 1)
        slots, lengths = torch.zeros_like(ids), torch.zeros_like(rows)
        starts = torch.arange(0, self.rows * n + 1, n, device=DEVICE, dtype=torch.int32)
        batch = StepBatch(
            seq_lens=lengths, query_start_loc=starts, input_ids=ids.view(-1), slot_mapping=slots.view(-1),
            request_slots=rows, request_ids=rows + 1, token_history=self.history,
        )  # fmt: skip
        return {"ids": ids, "positions": positions, "slots": slots, "lengths": lengths, "batch": batch}

    def forward(self, new: dict[str, Any]) -> None:
        """A guarded forward and greedy sampling; nothing here waits, so it may be captured."""
        new["slots"].copy_(torch.arange(self.rows, device=DEVICE)[:, None] * self.max_len + new["positions"])
        new["lengths"].copy_(new["positions"][:, -1] + 1)
        self.history.scatter_(1, new["positions"], new["ids"].int())
        with self.manager.forward(new["batch"], stream()):
            out = self.model(new["ids"], position_ids=new["positions"], past_key_values=self.cache)
        self.decode["positions"].copy_(new["positions"][:, -1:] + 1)
        self.decode["ids"].copy_(out.logits[:, -1:].argmax(-1))

    def launch(self) -> None:
        self.forward(self.decode)

    def start(self) -> None:
        self.step(lambda: self.forward(self.prefill))
        self.step(self.launch)
        if DEVICE == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.launch()
            self.launch = graph.replay

    def step(self, launch: Any) -> None:
        with self.manager.step(stream()):
            launch()


def main() -> None:
    decoder = Decoder(verify_data_every=1)
    decoder.start()
    for _ in range(STEPS):
        decoder.step(decoder.launch)
    decoder.manager.synchronize()
    assert decoder.manager.violations() == ()
    print(f"silent over {decoder.manager.step_number} steps on {DEVICE}")
    decoder.cache.layers[2].keys.view(torch.int16)[1, 0, 9, 3] ^= 4  # row 1 is request 2
    decoder.step(decoder.launch)
    decoder.manager.synchronize()
    (found,) = decoder.manager.violations()
    assert (found.request_id, found.position, found.layer) == (2, 9, 2)
    print("caught:", found.summary())


if __name__ == "__main__":
    main()
