"""The step loop of the small engine: schedule, fill the batch buffers, run the guarded model, book what it sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.blocks import BlockAllocator
from kvcanary.sim.habits import Habits
from kvcanary.sim.scheduler import BlockCall, Request, Scheduler, Share
from kvcanary.sim.step_arrays import StepArrays


class Model(Protocol):
    """What the engine asks of a model: the size of its cache and the forward over it."""

    n_blocks: int
    page_size: int

    def forward(self, arrays: StepArrays) -> NDArray[np.int32]:
        """Next token i32[rows] of every row, padding included."""


class VerifyingModel(Model, Protocol):
    """What the engine asks besides of a model that verifies drafts."""

    def forward_all(self, arrays: StepArrays) -> NDArray[np.int32]:
        """The same forward; next token i32[tokens] behind every new token."""


class Guard(Protocol):
    """What the engine asks of a guard: one context around the step, one around each forward inside it.

    Before the forward it is told who owns which blocks.
    """

    def step(self) -> AbstractContextManager[object]:
        """The host phases of one outer step."""

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        """Blocks that were taken and given back since the last step, in order."""

    def forward(self, arrays: StepArrays) -> AbstractContextManager[object]:
        """HEAD on entry, TAIL on exit, for the batch in `arrays`."""


class NoGuard:
    """A guard that does nothing."""

    def step(self) -> AbstractContextManager[object]:
        """Nothing around the step."""
        return nullcontext()

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        """Nothing to know."""

    def forward(self, arrays: StepArrays) -> AbstractContextManager[object]:
        """Nothing around the forward."""
        return nullcontext()


Execute = Callable[[StepArrays, Guard], NDArray[np.int32]]


@dataclass(frozen=True)
class StepInfo:
    """What one step did; row i of `arrays` was `shares[i].request`, with `shares[i].n_new` new tokens."""

    step: int  # the engine's own count, the first is 1
    arrays: StepArrays
    shares: tuple[Share, ...]
    finished: tuple[Request, ...]


def window_of(model: object) -> int | None:
    """Keys that a query of the model sees, its own included; None = all."""
    window: int | None = getattr(getattr(model, "config", None), "window", None)
    return window


def power_of_two_buckets(max_requests: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `max_requests`, then `max_requests` itself."""
    return (*(1 << i for i in range((max_requests - 1).bit_length())), max_requests)


class SimEngine:
    """Serves byte prompts in continuous batches through persistent buffers, one bucket per (rows, tokens) size.

    A step whose rows bring one token each runs in the smallest of `graph_buckets` that holds them, padded with rows of
    one token; any other step runs in the one bucket of `max_requests` rows and `max_new_tokens` tokens, padded
    with rows of none. `execute` replaces the eager guarded forward, for a model that replays captured graphs; with
    drafts it returns what `VerifyingModel.forward_all` does.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_requests: int = 8,
        max_new_tokens: int = 256,
        max_len: int = 1024,
        chunk: int | None = None,
        graph_buckets: Sequence[int] | None = None,
        prefix_sharing: bool = True,
        pad_slot: int = -1,
        execute: Execute | None = None,
        habits: Habits | None = None,
    ) -> None:
        self.model = model
        self.habits = habits or Habits()
        self.max_requests = max_requests
        self.max_new_tokens = max_new_tokens
        self.max_len = max_len
        self.chunk = max_new_tokens if chunk is None else chunk
        self.max_blocks = -(-max_len // model.page_size)
        self.graph_buckets = tuple(power_of_two_buckets(max_requests) if graph_buckets is None else graph_buckets)
        self.pad_slot = pad_slot
        self._check_sizes()
        self.allocator = BlockAllocator(model.n_blocks, model.page_size)
        self.scheduler = Scheduler(
            self.allocator,
            max_requests=max_requests,
            max_new_tokens=max_new_tokens,
            chunk=self.chunk,
            prefix_sharing=prefix_sharing,
            habits=self.habits,
            window=window_of(model),
        )
        self.token_history: NDArray[np.int32] = np.full((max_requests, max_len), -1, np.int32)
        self.before_forward: list[Callable[[StepArrays], None]] = []
        self.after_step: list[Callable[[StepInfo], None]] = []
        self.n_steps = 0
        self._execute = execute or self._run_eagerly
        self._buckets: dict[tuple[int, int], StepArrays] = {}
        self._last_id = 0

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def arrays_for(self, rows: int, tokens: int) -> StepArrays:
        """The bucket of exactly this size, made on first use and then kept at its addresses."""
        key = (rows, tokens)
        if key not in self._buckets:
            self._buckets[key] = StepArrays.allocate(rows, tokens, self.max_blocks, self.token_history)
        return self._buckets[key]

    def add_request(self, prompt: bytes, max_tokens: int, end_byte: int | None = None) -> Request:
        """Queue a prompt for at most `max_tokens` bytes more; raises ValueError if it could never be served."""
        if not prompt or max_tokens < 1:
            raise ValueError(f"{len(prompt)} prompt bytes and max_tokens {max_tokens}: both must be >= 1")
        if len(prompt) + max_tokens > self.max_len:
            raise ValueError(
                f"prompt of {len(prompt)} bytes + max_tokens {max_tokens} > max_len {self.max_len}: raise max_len"
            )
        request = Request.create(self._last_id + 1, prompt, max_tokens, end_byte)
        n_needed = self.scheduler.n_blocks_needed(request)
        if n_needed > self.model.n_blocks - 1:
            n_blocks = self.model.n_blocks
            raise ValueError(f"{n_needed} blocks needed, the pool has {n_blocks - 1}: raise the model's n_blocks")
        self._last_id = request.id
        self.scheduler.waiting.append(request)
        return request

    def step(self, guard: Guard | None = None) -> StepInfo:
        """Run one outer step; without work it is an idle step in the smallest bucket, all padding."""
        guard = guard or NoGuard()
        shares = self.scheduler.plan()
        arrays = self._fill(shares)
        for hook in self.before_forward:
            hook(arrays)
        with guard.step():
            guard.blocks(self.scheduler.take_block_calls())
            sampled = self._execute(arrays, guard)
        self.n_steps += 1
        for row, share in enumerate(shares):
            self._book(share, self._choices(arrays, sampled, row, len(share.drafts)))
        finished = tuple(share.request for share in shares if share.request.is_finished)
        info = StepInfo(self.n_steps, arrays, tuple(shares), finished)
        for after in self.after_step:
            after(info)
        return info

    def run(
        self,
        prompts: Sequence[bytes],
        max_tokens: int | Sequence[int],
        guard: Guard | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        end_byte: int | None = None,
    ) -> list[bytes]:
        """Serve `prompts` to the end and return what each generated, in their order."""
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        requests = [self.add_request(p, limit, end_byte) for p, limit in zip(prompts, limits, strict=True)]
        while not all(request.is_finished for request in requests):
            info = self.step(guard)
            if on_step is not None:
                on_step(info)
        return [request.output for request in requests]

    def _run_eagerly(self, arrays: StepArrays, guard: Guard) -> NDArray[np.int32]:
        with guard.forward(arrays):
            if self.habits.n_draft:
                model: VerifyingModel = self.model  # type: ignore[assignment]  # checked at construction
                return model.forward_all(arrays)
            return self.model.forward(arrays)

    def _choices(self, arrays: StepArrays, sampled: NDArray[np.int32], row: int, n_drafts: int) -> list[int]:
        """The model's choices after the row's last known token and after each of its drafts."""
        if not self.habits.n_draft:
            return [int(sampled[row])]
        end = int(arrays.query_start_loc[row + 1])
        return [int(token) for token in sampled[end - 1 - n_drafts : end]]

    def _book(self, share: Share, choices: list[int]) -> None:
        request, history = share.request, self.token_history[share.request.slot]
        n_gained = self.scheduler.complete(share, choices)
        gained = slice(request.n_known - n_gained, request.n_known)
        history[gained] = request.tokens[gained]
        if share.drafts:
            history[request.n_known :] = -1  # the rejected ones

    def _fill(self, shares: Sequence[Share]) -> StepArrays:
        is_decode = all(share.n_new == 1 for share in shares)
        if is_decode:
            rows = next(bucket for bucket in self.graph_buckets if bucket >= len(shares))
            arrays = self.arrays_for(rows, rows)
        else:
            arrays = self.arrays_for(self.max_requests, self.max_new_tokens)
        arrays.clear(self.pad_slot)
        for share in shares:
            self._fill_row(arrays, share)
        arrays.pad_rows(one_token_each=is_decode)
        return arrays

    def _fill_row(self, arrays: StepArrays, share: Share) -> None:
        request, n_new, drafts = share
        row, start, prefix = arrays.n_rows, arrays.n_tokens, request.n_computed
        if prefix == request.n_shared_tokens:  # its first step in this request slot
            self.token_history[request.slot] = -1
            self.token_history[request.slot, : request.n_known] = request.known
        tokens = np.concatenate((request.known, np.array(drafts, np.int32)))
        if drafts and self.habits.history_drafts:
            self.token_history[request.slot, request.n_known : len(tokens)] = drafts
        arrays.block_table[row, : len(request.blocks)] = request.blocks
        arrays.seq_lens[row] = prefix + n_new
        arrays.request_slots[row] = request.slot
        arrays.request_ids[row] = request.id
        positions = np.arange(prefix, prefix + n_new)
        page = self.model.page_size
        new = slice(start, start + n_new)
        arrays.input_ids[new] = tokens[positions]
        arrays.slot_mapping[new] = arrays.block_table[row, positions // page].astype(np.int64) * page + positions % page
        arrays.n_rows, arrays.n_tokens = row + 1, start + n_new
        arrays.query_start_loc[row + 1] = arrays.n_tokens

    def _check_sizes(self) -> None:
        if self.max_requests < 1 or self.max_new_tokens < self.max_requests:
            raise ValueError(
                f"max_requests {self.max_requests} must be in 1..max_new_tokens ({self.max_new_tokens}): "
                "every running request needs one token of the budget"
            )
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}, must be >= 1 tokens, or None for the whole budget")
        buckets = self.graph_buckets
        if list(buckets) != sorted(set(buckets)) or not buckets or buckets[0] < 1 or buckets[-1] != self.max_requests:
            raise ValueError(f"graph_buckets {buckets} must rise from >= 1 to max_requests ({self.max_requests})")
        self._check_habits()
        if self.pad_slot not in (-1, 0):
            raise ValueError(f"pad_slot is {self.pad_slot}, must be -1 (write nothing) or 0 (the reserved block)")

    def _check_habits(self) -> None:
        if self.habits.n_draft:
            n_needed = self.max_requests * (1 + self.habits.n_draft)
            if self.max_new_tokens < n_needed:
                raise ValueError(
                    f"max_new_tokens {self.max_new_tokens} must be >= {n_needed}: a token and "
                    f"n_draft {self.habits.n_draft} drafts of every running request"
                )
            if not hasattr(self.model, "forward_all"):
                raise ValueError(
                    f"n_draft is {self.habits.n_draft}: {type(self.model).__name__} has no forward_all "
                    "to verify drafts with, choose 0"
                )
        if self.habits.frees_window and window_of(self.model) is None:
            raise ValueError("frees_window needs a model with a window: give its configuration one, or choose False")
