"""The protocols of the guard as small programs, and an explorer that runs all their interleavings.

The ring: writers on the device (`kernels/report.cuh`), a reader on the host (`kvcanary.violation_ring.RingReader`). A
writer's stores into host memory become visible there one by one, in any order, unless they are to one word or a fence
lies between; its atomics act on device memory at once. A load of a host word from the device sees the newest store or,
as it may come out of a cache or a queue, the one that it saw before. The host does its loads and stores in order, as
x86 does, and as any other processor does over the distance that Python puts between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

Word = tuple[
    str, int
]  # a word of host memory: ("commit", place), ("a", place), ("b", place), ("read", 0), ("alarm", 0)
A, B, COMMIT, READ, ALARM = "a", "b", "commit", "read", "alarm"
CLEAR, FENCE = "clear", "fence"  # a row is stored with a commit word of 0 in it


class RefutedError(AssertionError):
    """A state that the protocol must not reach; the text has the way there."""


@dataclass(frozen=True)
class Protocol:
    """What writers and reader do. The defaults are what the code does; `BROKEN` has the others.

    Attributes:
        stores: of a writer that has its place, in program order; a fence waits until all before it are visible.
        checks_room: None: not at all; else a record is dropped where claim - read is at least this much above capacity.
        is_signed: of that difference.
        compares: the claim is made by compare-and-swap; else by a plain store of what was read, plus one.
        counts_retries: what a lost compare-and-swap also adds to the dropped.
        commit_of: commit word of a claim.
        first_has_own_place: place 0 is record 0's alone.
        reads: of the reader, in order: the commit words, the rows, and the word that hands the places back.
    """

    stores: tuple[str, ...] = (CLEAR, A, B, FENCE, COMMIT, ALARM)
    checks_room: int | None = 0
    is_signed: bool = True
    compares: bool = True
    counts_retries: bool = False
    commit_of: Callable[[int], int] = lambda claim: claim + 1
    first_has_own_place: bool = True
    reads: tuple[str, ...] = ("commits", "rows", "publish")

    def place(self, claim: int, capacity: int) -> int:
        if not self.first_has_own_place:
            return claim % capacity
        return 0 if claim == 0 else 1 + (claim - 1) % capacity


CODE = Protocol()
BROKEN: dict[str, Protocol] = {
    "no fence": replace(CODE, stores=(CLEAR, A, B, COMMIT, ALARM)),
    "fence behind the commit word": replace(CODE, stores=(CLEAR, A, B, COMMIT, FENCE, ALARM)),
    "commit word before the row": replace(CODE, stores=(CLEAR, COMMIT, FENCE, A, B, ALARM)),
    "commit word in the row": replace(CODE, stores=(A, COMMIT, B, FENCE, ALARM)),
    "half of the row behind the fence": replace(CODE, stores=(CLEAR, A, FENCE, B, COMMIT, ALARM)),
    "no room check": replace(CODE, checks_room=None),
    "room check off by one": replace(CODE, checks_room=1),
    "unsigned room check": replace(CODE, is_signed=False),
    "claim not compared": replace(CODE, compares=False),
    "retries counted as dropped": replace(CODE, counts_retries=True),
    "one commit word for all laps": replace(CODE, commit_of=lambda _claim: 1),
    "record 0 in the ring": replace(CODE, first_has_own_place=False),
    "places handed back before the rows are copied": replace(CODE, reads=("commits", "publish", "rows")),
    "rows copied before the commit words": replace(CODE, reads=("rows", "commits", "publish")),
}


class Writer(NamedTuple):
    """A thread that reports: its place in `Protocol`'s program, what it holds, and its stores that nobody sees yet."""

    n_left: int
    at: str = "claim"  # claim, room, swap, or "0", "1", ...: the next of `Protocol.stores`
    claim: int = 0
    seen_read: int = 0
    pending: tuple[tuple[Word, int], ...] = ()

    @property
    def is_done(self) -> bool:
        return self.n_left == 0 and not self.pending


class Reader(NamedTuple):
    """The host's end; ``todo`` is what is left of a read, ``found`` the commit words, rows what was copied so far."""

    n_read: int = 0
    todo: tuple[tuple[str, int], ...] = ()
    n_complete: int = 0
    found: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


class State(NamedTuple):
    memory: tuple[tuple[Word, int], ...]  # host memory, sorted
    writers: tuple[Writer, ...]
    reader: Reader
    claimed: int = 0
    dropped: int = 0
    observations: int = 0
    delivered: tuple[tuple[int, int], ...] = ()  # (a, b) of each record


class Ring:
    """All states of some writers with some records each, one reader, and a ring of ``capacity``."""

    def __init__(self, protocol: Protocol, n_records: tuple[int, ...], capacity: int) -> None:
        self.protocol, self.capacity, self.n_records = protocol, capacity, n_records

    @property
    def start(self) -> State:
        return State((), tuple(Writer(n) for n in self.n_records), Reader())

    def explore(self) -> int:
        """Visit every state; the number of them. Raises `RefutedError`."""
        came_from: dict[State, tuple[State, str] | None] = {self.start: None}
        stack = [self.start]
        while stack:
            state = stack.pop()
            moves = list(self.moves(state))
            try:
                self.check(state, is_end=not moves)
            except AssertionError as error:
                raise RefutedError(f"{error}, after {' / '.join(_way(came_from, state))}") from None
            for name, after in moves:
                if after not in came_from:
                    came_from[after] = (state, name)
                    stack.append(after)
        return len(came_from)

    # ---- what may happen next ----------------------------------------------------------------------------------------
    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        for i, writer in enumerate(state.writers):
            for name, after in self._writer(state, i, writer):
                yield f"writer {i}: {name}", after
        for name, after in self._reader(state):
            yield f"reader: {name}", after

    def _writer(self, state: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        def step(w: Writer, **changes: object) -> State:
            writers = (*state.writers[:i], w, *state.writers[i + 1 :])
            return state._replace(writers=writers, **changes)  # type: ignore[arg-type]

        seen_words = set()
        for k, (word, value) in enumerate(w.pending):
            if word not in seen_words:  # stores to one word stay in order
                seen_words.add(word)
                rest = w._replace(pending=w.pending[:k] + w.pending[k + 1 :])
                yield f"{word} = {value} is visible", step(rest, memory=_stored(state.memory, word, value))
        if w.n_left == 0:
            return
        protocol = self.protocol
        if w.at == "claim":  # observations are counted first; then the claim is looked at
            after = w._replace(at="room", claim=state.claimed)
            yield f"sees claim {state.claimed}", step(after, observations=state.observations + 1)
        elif w.at == "room":
            yield from self._room(state, w, step)
        elif w.at == "swap":
            if not protocol.compares or state.claimed == w.claim:
                yield f"claims {w.claim}", step(w._replace(at="0"), claimed=w.claim + 1)
            else:
                again = w._replace(at="room", claim=state.claimed)
                yield "lost the claim", step(again, dropped=state.dropped + protocol.counts_retries)
        else:
            yield from self._store(w, step)

    def _room(self, state: State, w: Writer, step: Callable[..., State]) -> Iterator[tuple[str, State]]:
        protocol, newest = self.protocol, _load(state.memory, (READ, 0))
        for seen in sorted({newest, w.seen_read}):  # the newest, or a stale one that it had seen before
            room, w_seen = w.claim - seen, w._replace(seen_read=seen)
            is_full = protocol.checks_room is not None and room >= self.capacity + protocol.checks_room
            if not (is_full or (room < 0 and not protocol.is_signed)):
                yield f"has room (read {seen})", step(w_seen._replace(at="swap"))
                continue
            if state.claimed - seen < self.capacity:
                raise RefutedError(f"dropped with room: claim {w.claim}, read {seen}, claimed {state.claimed}")
            yield "drops", step(w_seen._replace(at="claim", n_left=w.n_left - 1), dropped=state.dropped + 1)

    def _store(self, w: Writer, step: Callable[..., State]) -> Iterator[tuple[str, State]]:
        protocol, k = self.protocol, int(w.at)
        if k == len(protocol.stores):
            yield "is through", step(w._replace(at="claim", n_left=w.n_left - 1))
            return
        what, forward = protocol.stores[k], w._replace(at=str(k + 1))
        if what == FENCE:
            if not w.pending:
                yield "fence", step(forward)
            return
        place = 0 if what == ALARM else protocol.place(w.claim, self.capacity)
        value = {CLEAR: 0, COMMIT: protocol.commit_of(w.claim)}.get(what, w.claim + 1)
        word = (COMMIT if what == CLEAR else what, place)
        yield f"stores {what}", step(forward._replace(pending=(*w.pending, (word, value))))

    def _reader(self, state: State) -> Iterator[tuple[str, State]]:
        r = state.reader
        if not r.todo:  # looks only where the next record is complete
            place = self.protocol.place(r.n_read, self.capacity)
            if _load(state.memory, (COMMIT, place)) == self.protocol.commit_of(r.n_read):
                n = range(r.n_read, r.n_read + self.capacity)
                todo = {
                    "commits": [(COMMIT, c) for c in n],
                    "rows": [(half, c) for c in n for half in (A, B)],
                    "publish": [("publish", 0)],
                }
                plan = tuple(x for phase in self.protocol.reads for x in todo[phase])
                yield "looks", state._replace(reader=Reader(r.n_read, plan))
            return
        (what, claim), todo = r.todo[0], r.todo[1:]
        place = self.protocol.place(claim, self.capacity)
        if what == COMMIT:
            is_whole = _load(state.memory, (COMMIT, place)) == self.protocol.commit_of(claim)
            found = (*r.found, int(is_whole))
            n_complete = found.index(0) if 0 in found else len(found)
            yield (
                f"commit of {claim}: {is_whole}",
                state._replace(reader=r._replace(todo=todo, found=found, n_complete=n_complete)),
            )
        elif what in (A, B):
            skipped = self.protocol.reads[0] != "rows" and claim >= r.n_read + r.n_complete
            value = 0 if skipped else _load(state.memory, (what, place))
            yield f"{what} of {claim}", self._finish(state, r._replace(todo=todo, rows=(*r.rows, value)))
        else:
            n_read = r.n_read + r.n_complete
            memory = _stored(state.memory, (READ, 0), n_read)
            yield f"hands back up to {n_read}", self._finish(state._replace(memory=memory), r._replace(todo=todo))

    @staticmethod
    def _finish(state: State, r: Reader) -> State:
        if r.todo:
            return state._replace(reader=r)
        rows = tuple(zip(r.rows[::2], r.rows[1::2], strict=True))[: r.n_complete]
        after = Reader(r.n_read + r.n_complete)
        return state._replace(reader=after, delivered=state.delivered + rows)

    # ---- what must hold ----------------------------------------------------------------------------------------------
    def check(self, state: State, is_end: bool) -> None:
        for claim, row in enumerate(state.delivered):
            assert row == (claim + 1, claim + 1), f"record {claim} was delivered as {row}"
        assert state.dropped <= state.observations - state.claimed, "more were dropped than found no room"
        if not is_end:
            return
        assert all(w.is_done for w in state.writers), "a writer waits for ever"
        assert len(state.delivered) == state.claimed, f"{state.claimed} claimed, {len(state.delivered)} delivered"
        assert state.observations == sum(self.n_records) == state.claimed + state.dropped, "the count is not exact"
        first = tuple(_load(state.memory, (half, 0)) for half in (A, B))
        assert first == (1, 1), f"the first record is {first} in the end"
        assert _load(state.memory, (READ, 0)) == state.claimed
        assert 0 < _load(state.memory, (ALARM, 0)) <= state.claimed, "the alarm word tells that there is a record"


def _stored(memory: tuple[tuple[Word, int], ...], word: Word, value: int) -> tuple[tuple[Word, int], ...]:
    return tuple(sorted({**dict(memory), word: value}.items()))


def _load(memory: tuple[tuple[Word, int], ...], word: Word) -> int:
    return dict(memory).get(word, 0)


def _way(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names: list[str] = []
    while (step := came_from[state]) is not None:
        state, name = step
        names.append(name)
    return names[::-1]
