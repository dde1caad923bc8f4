"""What the guard adds to a decode step of a Hugging Face Llama of random weights: microseconds and percent.

``python bench/bench_llama.py [--rows 8] [--steps 2000] [--layers 8] [--hidden 1024]``, with torch and transformers.
On a GPU both steps are captured by ``torch.cuda.graph``; steps with and without the guard alternate in blocks, at the
same lengths. No time is printed unless the guard was silent, and then named a flipped bit in every layer's K and V.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from torch_llama import DEVICE, PROMPT, Decoder

BLOCK = 50  # steps in a row of one kind
HEAD_DIM = 128


def timed(decoder: Any, n: int) -> float:
    """Microseconds of each of ``n`` steps, one after the other, the host's part included."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(n):
        decoder.step(decoder.launch)
    wait()
    return (time.perf_counter() - start) / n * 1e6


def name_flips(decoder: Any) -> int:
    """Flip a bit in K and V of every layer, one after the other; returns how many were named as what they were."""
    manager, n = decoder.manager, 0
    for layer, cached in enumerate(decoder.cache.layers):
        for half, tensor in (("k", cached.keys), ("v", cached.values)):
            row, position = (layer + 1) % decoder.rows, 3 + layer
            bits = tensor.view(torch.int16)
            bits[row, 1, position, 5] ^= 16
            known = len(manager.violations())
            decoder.step(decoder.launch)
            manager.synchronize()
            bits[row, 1, position, 5] ^= 16
            found = [(v.layer, v.plane_name, v.position, v.request_id) for v in manager.violations()[known:]]
            n += found == [(layer, half, position, row + 1)]
    return n


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("steps", 2000), ("layers", 8), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    heads = max(2, given.hidden // HEAD_DIM)
    shape = {"hidden_size": given.hidden, "intermediate_size": 2 * given.hidden, "num_attention_heads": heads}
    shape["num_hidden_layers"] = given.layers
    n_flips = 2 * given.layers
    max_len = PROMPT + 1 + given.steps + n_flips + 1
    guarded, bare = (Decoder(given.rows, max_len, shape, mode=mode) for mode in ("log", "off"))
    times: dict[bool, list[float]] = {True: [], False: []}
    for decoder in (guarded, bare):
        decoder.start()
    for first in range(0, given.steps, BLOCK):
        for decoder in (guarded, bare):
            times[decoder is guarded].append(timed(decoder, min(BLOCK, given.steps - first)))
    guarded.manager.synchronize()
    found = guarded.manager.violations()
    if found:
        print(f"not silent: {found[0].summary()}")
        return 1
    n_tokens = given.steps * given.rows
    print(f"{DEVICE}: {n_tokens} tokens of {given.rows} requests, {given.layers} layers of {given.hidden}: no report")
    checked = Decoder(given.rows, max_len, shape, verify_data_every=1)
    checked.start()
    for _ in range(min(given.steps, 2 * BLOCK)):
        checked.step(checked.launch)
    n_named = name_flips(checked)
    print(f"flipped bits named with layer, half, position and request: {n_named} of {n_flips}")
    if n_named < n_flips:
        return 1
    with_guard, without = (float(np.median(times[is_guarded])) for is_guarded in (True, False))
    added = with_guard - without
    print(
        f"step: {without:.1f} us without, {with_guard:.1f} us with the guard: {added:+.1f} us ({added / without:+.2%})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
