"""Draft trees: two branches of drafts in one row, of which the accepted path is moved to where it belongs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcanary.sim.requests import Move, Request, Share, slots_of


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


def accepted_path(share: Share, choices: Sequence[int]) -> list[int]:
    """Indices into (root, *nodes) of the path that the model would have said, `choices` being its word behind each."""
    path = [0]
    while True:
        children = [i + 1 for i, parent in enumerate(share.parents) if parent == path[-1]]
        right = [child for child in children if share.drafts[child - 1] == choices[path[-1]]]
        if not right:
            return path
        path.append(right[0])


def as_line(share: Share, choices: Sequence[int], path: Sequence[int]) -> tuple[Share, list[int]]:
    """The share and the choices of a row that had drafted just this path."""
    drafts = tuple(share.drafts[node - 1] for node in path[1:])
    return Share(share.request, len(path), drafts), [choices[node] for node in path]


def commit(request: Request, prefix: int, path: Sequence[int], page_size: int) -> Move:
    """The move of the accepted KV to the slots behind the `prefix`, its row and the request's register told to it."""
    end = prefix + max(path) + 1
    row = slots_of(request.blocks, page_size, prefix, end)
    return Move("commit", row[list(path)], row[: len(path)], (prefix, request.slot))
