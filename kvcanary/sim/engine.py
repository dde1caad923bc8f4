"""The step loop of the small engine: schedule, fill the batch buffers, run the guarded model, book what it sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim import trees
from kvcanary.sim.blocks import BlockAllocator
from kvcanary.sim.habits import Habits
from kvcanary.sim.in_flight import InFlight
from kvcanary.sim.memory import Mover
from kvcanary.sim.offload import Stored
from kvcanary.sim.protocols import Guard, LayeredModel, Model, NoGuard, VerifyingModel
from kvcanary.sim.requests import BlockCall, Call, Move, Request, Share, slots_of
from kvcanary.sim.scheduler import Scheduler
from kvcanary.sim.sizes import check_sizes, power_of_two_buckets, window_of
from kvcanary.sim.step_arrays import StepArrays

__all__ = ["Guard", "Model", "NoGuard", "SimEngine", "StepInfo", "VerifyingModel", "power_of_two_buckets", "window_of"]


Execute = Callable[[StepArrays, Guard], NDArray[np.int32]]


@dataclass(frozen=True)
class StepInfo:
    """What one step did; row i of `arrays` was `shares[i].request`, with `shares[i].n_new` new tokens."""

    step: int  # the engine's own count, the first is 1
    arrays: StepArrays
    shares: tuple[Share, ...]
    finished: tuple[Request, ...]


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
        check_sizes(self)
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
        self.in_flight = InFlight(self.scheduler, self.token_history)
        self._mover: Mover | None = None

    @property
    def mover(self) -> Mover:
        """What moves the KV of this engine; made on first use."""
        if self._mover is None:
            self._mover = Mover(self.model, self.habits.loads_by_layer)
        return self._mover

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

    def add_request(self, prompt: bytes, max_tokens: int, end_byte: int | None = None, salt: int = 0) -> Request:
        """Queue a prompt for at most `max_tokens` bytes more; raises ValueError if it could never be served."""
        if not prompt or max_tokens < 1:
            raise ValueError(f"{len(prompt)} prompt bytes and max_tokens {max_tokens}: both must be >= 1")
        if len(prompt) + max_tokens > self.max_len:
            raise ValueError(
                f"prompt of {len(prompt)} bytes + max_tokens {max_tokens} > max_len {self.max_len}: raise max_len"
            )
        request = Request.create(self._last_id + 1, prompt, max_tokens, end_byte, salt)
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
            self._tell(guard, self.scheduler.take_block_calls())
            if self.habits.in_flight:
                self.in_flight.fill_in(arrays.input_ids, shares, arrays.query_start_loc)
            sampled = self._execute(arrays, guard)
        self.n_steps += 1
        finished = self._book_all(shares, arrays, sampled)
        info = StepInfo(self.n_steps, arrays, tuple(shares), finished)
        for after in self.after_step:
            after(info)
        return info

    def fork(self, parent: Request, token: int) -> Request | None:
        """A new request that goes on with `token` in place of the parent's last one; None if that cannot be now."""
        if not self.habits.overcommit or not self.scheduler.forks.can_fork(parent):
            return None
        self._last_id += 1
        return self.scheduler.forks.fork(parent, self._last_id, token)

    def refresh(self, request: Request) -> None:
        """Change the bytes of what a running request has computed, on purpose, and say so, before the next forward."""
        first = request.n_passed * self.model.page_size
        if request.n_computed > first:
            slots = slots_of(request.blocks, self.model.page_size, first, request.n_computed)
            self.scheduler.note_move(Move("refresh", slots))

    def reload(self) -> None:
        """New weights: all KV is worthless, everything is computed anew."""
        self.scheduler.preempt_all()
        self.allocator.forget_all()
        self.scheduler.store.clear()
        self.scheduler.note_move(Move("reset", np.zeros(0, np.int64)))

    def receive(self, request: Request, arrival: Stored, first_token: int) -> None:
        """A request that was added and waits brings the KV of its prompt along, and the token sampled after it."""
        request.append(first_token)
        request.arrival = arrival

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
        if self.habits.in_flight:
            self.in_flight.resolve()
        return [request.output for request in requests]

    def _tell(self, guard: Guard, calls: Sequence[Call]) -> None:
        """Tell the guard who owns what, and move KV in between, in order."""
        if not any(isinstance(call, Move) for call in calls):
            guard.blocks([call for call in calls if isinstance(call, BlockCall)])
            return
        for _, run in groupby(calls, key=lambda call: isinstance(call, BlockCall)):
            together = list(run)
            owners = [call for call in together if isinstance(call, BlockCall)]
            if owners:
                guard.blocks(owners)
            for move in together:
                if isinstance(move, Move):
                    self.mover.do(move, guard)

    def _run_eagerly(self, arrays: StepArrays, guard: Guard) -> NDArray[np.int32]:
        with guard.forward(arrays), self.loading(arrays, guard):
            if self.habits.n_draft:
                model: VerifyingModel = self.model  # type: ignore[assignment]  # checked at construction
                return model.forward_all(arrays)
            return self.model.forward(arrays)

    @contextmanager
    def loading(self, arrays: StepArrays, guard: Guard) -> Iterator[None]:
        """Around the model's launches: what is loaded layer by layer arrives, and is verified before it is read."""
        if self._mover is None or not self._mover.is_loading:
            yield
            return
        model: LayeredModel = self.model  # type: ignore[assignment]  # a model whose cache can be moved

        def before_layer(layer: int) -> None:
            self.mover.load_layer(layer)
            guard.verify_layer(arrays, layer)

        model.before_layer = before_layer
        try:
            yield
        finally:
            model.before_layer = None

    def _choices(self, arrays: StepArrays, sampled: NDArray[np.int32], row: int, n_drafts: int) -> list[int]:
        """The model's choices after the row's last known token and after each of its drafts."""
        if not self.habits.n_draft:
            return [int(sampled[row])]
        end = int(arrays.query_start_loc[row + 1])
        return [int(token) for token in sampled[end - 1 - n_drafts : end]]

    def _book_all(self, shares: Sequence[Share], arrays: StepArrays, sampled: NDArray[np.int32]) -> tuple[Request, ...]:
        choices = [self._choices(arrays, sampled, row, len(share.drafts)) for row, share in enumerate(shares)]
        if self.habits.in_flight:
            ended = self.in_flight.resolve()
            self.in_flight.launched(list(shares), [tokens[-1] for tokens in choices])
            return tuple(ended)
        if self.habits.draft_trees:
            shares, choices = self._commit_trees(shares, choices)
        for share, tokens in zip(shares, choices, strict=True):
            self._book(share, tokens)
        return tuple(share.request for share in shares if share.request.is_finished)

    def _commit_trees(
        self, shares: Sequence[Share], choices: list[list[int]]
    ) -> tuple[Sequence[Share], list[list[int]]]:
        """Have the accepted paths moved home; the shares and choices of rows that had drafted just these."""
        found = [trees.Path.of(share, tokens) for share, tokens in zip(shares, choices, strict=True)]
        moved = [path for path in found if path.share.parents]
        if moved:
            self.scheduler.note_move(trees.commit(moved, self.model.page_size))
        return [path.as_line for path in found], [path.choices for path in found]

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
        if self.habits.loads_by_layer and (late := self.scheduler.blocks_to_load()):
            for row, share in enumerate(shares):
                arrays.pending[row] = not late.isdisjoint(share.request.blocks[share.request.n_passed :])
        arrays.pad_rows(one_token_each=is_decode)
        return arrays

    def _fill_row(self, arrays: StepArrays, share: Share) -> None:
        request, n_new, drafts, parents = share
        row, start, prefix = arrays.n_rows, arrays.n_tokens, request.n_computed
        if prefix == request.n_shared_tokens:  # its first step in this request slot
            self.token_history[request.slot] = -1
            self.token_history[request.slot, : request.n_known] = request.known
        tokens = np.concatenate((request.known, np.array(drafts, np.int32)))
        if drafts and self.habits.history_drafts and not parents:
            self.token_history[request.slot, request.n_known : len(tokens)] = drafts
        arrays.block_table[row, : len(request.blocks)] = request.blocks
        arrays.seq_lens[row] = prefix + n_new
        arrays.request_slots[row] = request.slot
        arrays.request_ids[row] = request.id
        arrays.salts[row] = request.salt
        positions = np.arange(prefix, prefix + n_new)
        page = self.model.page_size
        new = slice(start, start + n_new)
        if parents:
            arrays.depths[new] = trees.depths(share) - np.arange(n_new)
        arrays.input_ids[new] = tokens[positions]
        arrays.slot_mapping[new] = arrays.block_table[row, positions // page].astype(np.int64) * page + positions % page
        arrays.n_rows, arrays.n_tokens = row + 1, start + n_new
        arrays.query_start_loc[row + 1] = arrays.n_tokens
