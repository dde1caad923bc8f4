"""What real engines do beyond continuous batching: preempt, draft and roll back, share early, offload, run ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_DRAFTS = 15  # the guard keeps its chain at the last 16 lengths: a longer rollback is anchored elsewhere

DraftRule = Callable[[NDArray[np.int32], int], Sequence[int]]


def ngram_drafts(known: NDArray[np.int32], n: int) -> list[int]:
    """At most `n` tokens that followed the last two of `known: i32[any]`, or its last one, where they stood before."""
    for size in (2, 1):
        if len(known) > size:
            windows = np.lib.stride_tricks.sliding_window_view(known[:-1], size)
            found = np.flatnonzero((windows == known[-size:]).all(axis=1))
            if len(found):
                start = int(found[-1]) + size
                return [int(token) for token in known[start : start + n]]
    return []


@dataclass(frozen=True)
class Habits:
    """What an engine does besides; everything is off by default, and nothing of it changes what it says."""

    overcommit: bool = (
        False  # admit by what the next step needs; when blocks run out, the youngest request is preempted
    )
    n_draft: int = 0  # most draft tokens of a decode row; the model must have `forward_all`
    draft_rule: DraftRule = ngram_drafts  # what proposes them: (known tokens, most drafts) -> drafts
    history_drafts: bool = True  # drafts stand in `token_history` during their forward; False: -1 until accepted
    frees_window: bool = False  # blocks wholly before the window of the next query are freed; the model must have one
    keeps_stale_ids: bool = False  # their block-table entries stay as they were; False: 0, the reserved block
    hits_window: bool = False  # with frees_window, a prefix hit needs only the blocks in the window of the next query
    shares_early: bool = False  # blocks may be shared in the same forward that writes them
    cache_owns: bool = False  # the prefix cache holds references of its own, which it gives back when it evicts
    zeroes: bool = False  # fresh blocks are zeroed
    draft_trees: bool = False  # with n_draft, the most nodes: each draft has a rival; the accepted path is moved home
    n_offload: int = 0  # evicted blocks that are kept in host memory, to be loaded again where a prompt goes on there
    loads_by_layer: bool = False  # a layer's KV is loaded right before the layer reads it
    claims_tails: bool = False  # a fork whose parent is gone writes the tail where it is, instead of copying it
    in_flight: bool = False  # a step is planned and launched before the tokens of the one before are seen

    def __post_init__(self) -> None:
        if not 0 <= self.n_draft <= MAX_DRAFTS:
            raise ValueError(f"n_draft is {self.n_draft}, must be in 0..{MAX_DRAFTS}: choose fewer drafts")
        if self.draft_trees and self.n_draft < 2:
            raise ValueError(f"draft_trees with n_draft {self.n_draft}: a draft and its rival are 2, choose 2 or more")
        if self.in_flight and self.n_draft:
            raise ValueError(f"in_flight with n_draft {self.n_draft}: what was accepted is not known in time, choose 0")
        if self.hits_window and not self.frees_window:
            raise ValueError("hits_window without frees_window: a hit would have to keep blocks it did not ask for")
