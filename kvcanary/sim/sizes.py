"""Which sizes and habits of an engine go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcanary.sim.engine import SimEngine


def window_of(model: object) -> int | None:
    """Keys that a query of the model sees, its own included; None = all."""
    window: int | None = getattr(getattr(model, "config", None), "window", None)
    return window


def power_of_two_buckets(max_requests: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `max_requests`, then `max_requests` itself."""
    return (*(1 << i for i in range((max_requests - 1).bit_length())), max_requests)


def check_sizes(engine: SimEngine) -> None:
    """Raise ValueError for sizes and habits of an engine that do not go together."""
    if engine.max_requests < 1 or engine.max_new_tokens < engine.max_requests:
        raise ValueError(
            f"max_requests {engine.max_requests} must be in 1..max_new_tokens ({engine.max_new_tokens}): "
            "every running request needs one token of the budget"
        )
    if engine.chunk < 1:
        raise ValueError(f"chunk is {engine.chunk}, must be >= 1 tokens, or None for the whole budget")
    buckets = engine.graph_buckets
    if list(buckets) != sorted(set(buckets)) or not buckets or buckets[0] < 1 or buckets[-1] != engine.max_requests:
        raise ValueError(f"graph_buckets {buckets} must rise from >= 1 to max_requests ({engine.max_requests})")
    _check_habits(engine)
    if engine.pad_slot not in (-1, 0):
        raise ValueError(f"pad_slot is {engine.pad_slot}, must be -1 (write nothing) or 0 (the reserved block)")


def _check_habits(engine: SimEngine) -> None:
    if engine.habits.n_draft:
        n_needed = engine.max_requests * (1 + engine.habits.n_draft)
        if engine.max_new_tokens < n_needed:
            raise ValueError(
                f"max_new_tokens {engine.max_new_tokens} must be >= {n_needed}: a token and "
                f"n_draft {engine.habits.n_draft} drafts of every running request"
            )
        if not hasattr(engine.model, "forward_all"):
            raise ValueError(
                f"n_draft is {engine.habits.n_draft}: {type(engine.model).__name__} has no forward_all "
                "to verify drafts with, choose 0"
            )
    if engine.habits.frees_window and window_of(engine.model) is None:
        raise ValueError("frees_window needs a model with a window: give its configuration one, or choose False")
    if engine.habits.draft_trees and not getattr(engine.model, "takes_trees", False):
        raise ValueError(f"draft_trees: {type(engine.model).__name__} attends to all that stands before a token")
