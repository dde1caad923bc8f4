"""The engine's schedule, buffers and hooks; the transformer must say the same however it is batched."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvcanary.ledger import BlockLedger
from kvcanary.sim.engine import Guard, SimEngine, StepInfo, power_of_two_buckets
from kvcanary.sim.habits import Habits
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.scheduler import BlockCall
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.sim.texts import load_texts

TEXTS = list(load_texts().values())
N_TOKENS = 24


class EchoModel:
    """A cache of one token per slot; checks at every forward that the table leads each row to its own tokens.

    The next token is a hash of the whole sequence, so one wrong byte shows in the output.
    """

    def __init__(self, n_blocks: int, page_size: int) -> None:
        self.n_blocks, self.page_size = n_blocks, page_size
        self.cache = np.full(n_blocks * page_size, -1, np.int32)

    def forward(self, arrays: StepArrays) -> NDArray[np.int32]:
        n_tokens = int(arrays.query_start_loc[-1])
        inside = arrays.slot_mapping[:n_tokens] >= 0
        self.cache[arrays.slot_mapping[:n_tokens][inside]] = arrays.input_ids[:n_tokens][inside]
        sampled = np.zeros(arrays.max_rows, np.int32)
        for row in range(arrays.n_rows):
            seen = self.read(arrays, row)
            assert seen.tolist() == arrays.token_history[arrays.request_slots[row], : len(seen)].tolist()
            sampled[row] = echo(bytes(seen.astype(np.uint8)))
        return sampled

    def read(self, arrays: StepArrays, row: int) -> NDArray[np.int32]:
        positions = np.arange(arrays.seq_lens[row])
        slots = arrays.block_table[row, positions // self.page_size] * self.page_size + positions % self.page_size
        seen: NDArray[np.int32] = self.cache[slots]
        return seen


def echo(text: bytes) -> int:
    return sum((i + 1) * (byte + 3) for i, byte in enumerate(text)) * 2654435761 % 2**32 >> 24


def echo_output(prompt: bytes, n: int, end_byte: int | None = None) -> bytes:
    text = prompt
    while len(text) < len(prompt) + n and (text == prompt or text[-1] != end_byte):
        text += bytes([echo(text)])
    return text[len(prompt) :]


class RecordingGuard:
    """Writes down in which order the engine enters and leaves it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.calls: list[BlockCall] = []

    @contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        self.log.append(f"{name} in")
        yield
        self.log.append(f"{name} out")

    def step(self) -> AbstractContextManager[object]:
        return self._scope("step")

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        self.log.append("blocks")
        self.calls += calls

    def forward(self, arrays: StepArrays) -> AbstractContextManager[object]:
        return self._scope("forward")


def serve(prompts: list[bytes], **options: object) -> list[bytes]:
    return SimEngine(NumpyModel(ModelConfig(), 160), **options).run(prompts, N_TOKENS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one_by_one() -> list[bytes]:
    """Each text alone, whole prompt at once, nothing shared."""
    return [serve([text], max_new_tokens=1024, prefix_sharing=False)[0] for text in TEXTS]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"chunk": 50}, id="chunked"),
        pytest.param({"chunk": 7, "max_new_tokens": 20}, id="small-chunks"),
        pytest.param({"prefix_sharing": False}, id="no-sharing"),
        pytest.param({"max_new_tokens": 2048}, id="whole-prompts"),
        pytest.param({"max_requests": 2}, id="queueing"),
        pytest.param({"pad_slot": 0, "graph_buckets": (8,)}, id="padding-writes-slot-0"),
    ],
)
def test_output_does_not_depend_on_the_batching(options: dict[str, object], one_by_one: list[bytes]) -> None:
    assert serve(TEXTS, **options) == one_by_one


def test_prefix_is_shared_between_requests_and_the_last_token_is_not(one_by_one: list[bytes]) -> None:
    engine = SimEngine(NumpyModel(ModelConfig(), 160))
    first = engine.run([TEXTS[0]], N_TOKENS)
    shared: dict[int, int] = {}

    def note(info: StepInfo) -> None:
        shared.update({share.request.id: share.request.n_shared_tokens for share in info.shares})

    page_aligned = TEXTS[0][:64]
    engine.run([TEXTS[0], TEXTS[1], page_aligned], N_TOKENS, on_step=note)
    assert first == one_by_one[:1]
    assert shared == {2: (len(TEXTS[0]) - 1) // 16 * 16, 3: 112, 4: 48}


def test_decode_bucket_conventions() -> None:
    engine = SimEngine(EchoModel(64, 4), max_len=64)
    seen: list[StepInfo] = []
    engine.run([b"abcde", b"xyz", b"12345678"], 3, on_step=seen.append)
    arrays = seen[-1].arrays
    assert arrays is engine.arrays_for(4, 4)
    assert (arrays.n_rows, arrays.n_tokens) == (3, 3)
    assert arrays.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert arrays.seq_lens.tolist() == [7, 5, 10, 1]
    assert arrays.slot_mapping[3] == -1
    assert arrays.slot_mapping[:3].min() >= 4
    assert arrays.request_ids.tolist() == [1, 2, 3, 0]
    assert arrays.request_slots.tolist() == [0, 1, 2, 0]
    assert not arrays.block_table[3].any()
    assert arrays.token_history is engine.token_history
    assert bytes(engine.token_history[1, :6].astype(np.uint8)) == b"xyz" + echo_output(b"xyz", 3)
    assert engine.token_history[1, 6] == -1


def test_prefill_bucket_conventions() -> None:
    engine = SimEngine(EchoModel(64, 4), max_requests=4, max_new_tokens=10, max_len=64, pad_slot=0)
    engine.add_request(b"abcdef", 2)
    arrays = engine.step().arrays
    assert arrays is engine.arrays_for(4, 10)
    assert arrays.query_start_loc.tolist() == [0, 6, 6, 6, 6]
    assert arrays.seq_lens.tolist() == [6, 0, 0, 0]
    assert arrays.slot_mapping[6:].tolist() == [0] * 4
    assert bytes(arrays.input_ids.astype(np.uint8)) == b"abcdef" + bytes(4)


def test_buffers_keep_their_addresses() -> None:
    engine = SimEngine(EchoModel(64, 4), max_len=64)
    addresses: dict[tuple[int, int], set[tuple[int, ...]]] = {}

    def note(info: StepInfo) -> None:
        a = info.arrays
        fields = (a.block_table, a.seq_lens, a.query_start_loc, a.input_ids, a.slot_mapping, a.request_slots)
        key = (a.max_rows, a.max_tokens)
        addresses.setdefault(key, set()).add(tuple(f.ctypes.data for f in (*fields, a.request_ids, a.token_history)))

    engine.run([b"abc", b"defg", b"hi"], [4, 9, 12], on_step=note)
    assert set(addresses) == {(8, 256), (4, 4), (2, 2), (1, 1)}
    assert all(len(found) == 1 for found in addresses.values())


def test_decode_goes_before_prefill_and_prefill_before_admission() -> None:
    engine = SimEngine(EchoModel(64, 4), max_requests=3, max_new_tokens=8, max_len=64)
    for prompt in (b"abc", b"0123456789abcdef", b"zz"):
        engine.add_request(prompt, 4)
    plans = [[(share.request.id, share.n_new) for share in engine.step().shares] for _ in range(4)]
    assert plans == [[(1, 3), (2, 5)], [(1, 1), (2, 7)], [(1, 1), (2, 4), (3, 2)], [(1, 1), (2, 1), (3, 1)]]


def test_request_waits_until_all_its_blocks_are_there() -> None:
    engine = SimEngine(EchoModel(6, 4), max_len=32)  # 5 blocks of 4
    engine.add_request(b"abcdefgh", 5)  # 12 positions: 3 blocks
    engine.add_request(b"ijklmnop", 5)
    runs = [sorted(share.request.id for share in engine.step().shares) for _ in range(10)]
    assert runs == [[1]] * 5 + [[2]] * 5
    assert not engine.has_work


def test_cached_hits_are_not_counted_as_room() -> None:
    engine = SimEngine(EchoModel(6, 4), max_len=32)  # 5 blocks of 4
    prompts, limits = [b"abcdefgh", b"ijkl", b"abcdefghi"], [5, 5, 5]  # 3, 2 and 4 blocks
    first = engine.run(prompts[:1], limits[:1])
    assert (engine.allocator.n_cached, engine.allocator.n_available) == (3, 5)
    outputs = first + engine.run(prompts[1:], limits[1:])  # the third hits 2 of the 3 cached: 1 left, it needs 2
    assert outputs == [echo_output(p, n) for p, n in zip(prompts, limits, strict=True)]


def test_slots_are_reused_and_ids_are_not() -> None:
    engine = SimEngine(EchoModel(64, 4), max_requests=2, max_len=64)
    seen: set[tuple[int, int]] = set()
    engine.run(
        [b"aa", b"bb", b"cc"],
        [2, 6, 3],
        on_step=lambda i: seen.update((s.request.id, s.request.slot) for s in i.shares),
    )
    engine.run([b"dd"], 1, on_step=lambda i: seen.update((s.request.id, s.request.slot) for s in i.shares))
    assert seen == {(1, 0), (2, 1), (3, 0), (4, 0)}
    assert engine.token_history[0].tolist() == [*b"dd", echo(b"dd"), *[-1] * 61]


def test_end_byte_ends_a_request() -> None:
    whole = echo_output(b"prompt", 20)
    end = whole[7]
    expected = echo_output(b"prompt", 20, end)
    assert len(expected) <= 8
    assert expected[-1] == end
    assert SimEngine(EchoModel(64, 4), max_len=64).run([b"prompt"], 20, end_byte=end) == [expected]


def test_idle_step_is_all_padding() -> None:
    engine = SimEngine(NumpyModel(ModelConfig(n_layers=1), 4), max_len=32)
    info = engine.step()
    assert (info.shares, info.arrays.n_rows, info.arrays.max_rows) == ((), 0, 1)
    assert not engine.model.k_cache[0].any()  # type: ignore[attr-defined]


def test_hooks_and_guard_in_order() -> None:
    guard, engine = RecordingGuard(), SimEngine(EchoModel(64, 4), max_len=64)
    guarded: Guard = guard
    engine.before_forward.append(lambda arrays: guard.log.append(f"before {arrays.n_rows}"))
    engine.after_step.append(lambda info: guard.log.append(f"after {info.step} {len(info.finished)}"))
    engine.run([b"abc"], 2, guard=guarded, on_step=lambda info: guard.log.append("on_step"))
    inner = ["step in", "blocks", "forward in", "forward out", "step out"]
    assert guard.log == ["before 1", *inner, "after 1 0", "on_step", "before 1", *inner, "after 2 1", "on_step"]


class LedgerGuard(RecordingGuard):
    """Keeps a ledger of what it is told, which must be what the allocator knows."""

    def __init__(self, engine: SimEngine) -> None:
        super().__init__()
        self.allocator = engine.allocator
        self.ledger = BlockLedger(self.allocator.n_blocks, (0,))

    def blocks(self, calls: Sequence[BlockCall]) -> None:
        super().blocks(calls)
        for kind, blocks, owner in calls:
            getattr(self.ledger, kind)(blocks, owner)
        references = [self.ledger.n_references(block) for block in range(self.allocator.n_blocks)]
        assert references == self.allocator.ref_counts.tolist()


@pytest.mark.parametrize("habits", [Habits(), Habits(overcommit=True), Habits(overcommit=True, shares_early=True)])
def test_the_guard_is_told_who_owns_which_blocks(habits: Habits) -> None:
    engine = SimEngine(EchoModel(14, 4), max_len=40, max_requests=3, max_new_tokens=16, habits=habits)
    guard = LedgerGuard(engine)
    engine.run([b"a shared beginning " + end for end in (b"1", b"22", b"three", b"1", b"22 or more", b"1")], 8, guard)
    assert {call.kind for call in guard.calls} == {"allocate", "share", "free"}
    engine.step(guard)
    assert guard.ledger.n_live == 0, "all requests have ended"


def test_execute_replaces_the_eager_forward() -> None:
    calls: list[tuple[int, Guard]] = []
    guard = RecordingGuard()

    def execute(arrays: StepArrays, guard: Guard) -> NDArray[np.int32]:
        calls.append((arrays.n_rows, guard))
        return np.full(arrays.max_rows, 65, np.int32)

    assert SimEngine(EchoModel(64, 4), max_len=64, execute=execute).run([b"abc"], 2, guard=guard) == [b"AA"]
    assert calls == [(1, guard), (1, guard)]
    assert "forward in" not in guard.log


def test_step_that_raised_can_be_repeated() -> None:
    engine = SimEngine(EchoModel(64, 4), max_len=64)
    request = engine.add_request(b"abcdefg", 4)
    engine.step()

    def fail(arrays: StepArrays) -> None:
        raise RuntimeError("broken hook")

    engine.before_forward.append(fail)
    with pytest.raises(RuntimeError, match="broken hook"):
        engine.step()
    engine.before_forward.clear()
    while engine.has_work:
        engine.step()
    assert request.output == echo_output(b"abcdefg", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_requests": 0}, "max_requests 0"),
        ({"max_requests": 8, "max_new_tokens": 4}, "one token of the budget"),
        ({"chunk": 0}, "chunk is 0"),
        ({"graph_buckets": (1, 2)}, r"graph_buckets \(1, 2\)"),
        ({"graph_buckets": (8, 4)}, "must rise"),
        ({"pad_slot": 3}, "pad_slot is 3"),
    ],
)
def test_sizes_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimEngine(EchoModel(64, 4), **options)  # type: ignore[arg-type]


def test_requests_that_never_fit_are_refused() -> None:
    engine = SimEngine(EchoModel(4, 4), max_len=32)
    for prompt, n in ((b"", 1), (b"a", 0)):
        with pytest.raises(ValueError, match="both must be >= 1"):
            engine.add_request(prompt, n)
    with pytest.raises(ValueError, match="max_len 32"):
        engine.add_request(b"a" * 20, 13)
    with pytest.raises(ValueError, match="the pool has 3"):
        engine.add_request(b"a" * 10, 4)
    assert engine.add_request(b"a" * 10, 3).id == 1


def test_default_buckets() -> None:
    assert [power_of_two_buckets(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


prompts = st.lists(st.tuples(st.text("ab", min_size=1, max_size=20), st.integers(1, 8)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    work=prompts,
    page_size=st.sampled_from([1, 2, 4]),
    max_requests=st.integers(1, 4),
    extra_budget=st.integers(0, 12),
    chunk=st.one_of(st.none(), st.integers(1, 6)),
    spare_blocks=st.integers(0, 20),
    prefix_sharing=st.booleans(),
)
def test_any_schedule_gives_each_request_its_own_tokens(
    work: list[tuple[str, int]],
    page_size: int,
    max_requests: int,
    extra_budget: int,
    chunk: int | None,
    spare_blocks: int,
    prefix_sharing: bool,
) -> None:
    engine = SimEngine(
        EchoModel(28 // page_size + 2 + spare_blocks, page_size),
        max_requests=max_requests,
        max_new_tokens=max_requests + extra_budget,
        max_len=28,
        chunk=chunk,
        prefix_sharing=prefix_sharing,
    )

    def check(arrays: StepArrays) -> None:
        written = arrays.slot_mapping[: arrays.n_tokens]
        assert len(set(written.tolist())) == arrays.n_tokens, "two tokens in one slot"
        assert (engine.allocator.ref_counts[written // page_size] == 1).all(), "a shared block is written"
        ids, slots = arrays.request_ids[: arrays.n_rows], arrays.request_slots[: arrays.n_rows]
        assert len(set(ids.tolist())) == len(set(slots.tolist())) == arrays.n_rows

    engine.before_forward.append(check)
    texts = [text.encode() for text, _ in work]
    limits = [limit for _, limit in work]
    assert engine.run(texts, limits) == list(itertools.starmap(echo_output, zip(texts, limits, strict=True)))
    assert not engine.allocator.ref_counts.any()
