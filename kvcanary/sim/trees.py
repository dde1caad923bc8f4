"""Draft trees: two branches of drafts in one row, of which the accepted path is moved to where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvcanary.sim.requests import Move, Rows, Share, slots_of


def draft_tree(drafts: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nodes and their parents (0 = the last known token, i = node i - 1) for `drafts`, each with a rival beside it.

    The nodes stand in the row depth by depth, the rival first: so the path of `drafts` never lies in place.
    """
    nodes: list[int] = []
    parents: list[int] = []
    parent = 0
    for draft in drafts:
        nodes += [draft ^ 1, draft]
        parents += [parent, parent]
        parent = len(nodes)
    return tuple(nodes), tuple(parents)


def depths(share: Share) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """i32[n_new]: the depth of each new token of a tree, its root's is 0."""
    found = [0]
    for parent in share.parents:
        found.append(found[parent] + 1)
    return np.array(found, np.int32)


class Path(NamedTuple):
    """What was accepted of a row: indices into (last known token, *drafts), and the model's word behind each."""

    share: Share
    nodes: list[int]
    choices: list[int]

    @classmethod
    def of(cls, share: Share, choices: list[int]) -> Path:
        """The path of a tree that the model would have said, `choices` being its word behind each node.

        Of a row without a tree it is the whole row: how much of that counts is decided elsewhere.
        """
        if not share.parents:
            return cls(share, list(range(1 + len(share.drafts))), choices)
        nodes = [0]
        while True:
            children = [i + 1 for i, parent in enumerate(share.parents) if parent == nodes[-1]]
            right = [child for child in children if share.drafts[child - 1] == choices[nodes[-1]]]
            if not right:
                return cls(share, nodes, [choices[node] for node in nodes])
            nodes.append(right[0])

    @property
    def as_line(self) -> Share:
        """The share of a row that had drafted just this path."""
        share, drafts = self.share, tuple(self.share.drafts[node - 1] for node in self.nodes[1:])
        return share._replace(n_new=share.n_new - len(share.drafts) + len(drafts), drafts=drafts, parents=())


def commit(paths: Sequence[Path], page_size: int) -> Move:
    """The move of accepted KV to the slots behind each row's prefix; its rows as `commit_slots` wants them."""
    sources, targets, starts = [], [], [0]
    for path in paths:
        request, n = path.share.request, len(path.nodes)
        row = slots_of(request.blocks, page_size, request.n_computed, request.n_computed + max(path.nodes) + 1)
        sources.append(row[path.nodes])
        targets.append(row[:n])
        starts.append(starts[-1] + n)
    rows = Rows(starts, [p.share.request.n_computed for p in paths], [p.share.request.slot for p in paths])
    return Move("commit", np.concatenate(sources), np.concatenate(targets), rows)
