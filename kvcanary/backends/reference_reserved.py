"""The check of reserved blocks, in NumPy: what kernels/reserved.cu does."""

from __future__ import annotations

import numpy as np

from kvcanary.backends.reference_arrays import Array, PoolArrays
from kvcanary.backends.reference_records import new_records
from kvcanary.elements import Element
from kvcanary.layout import KvPool, Plane
from kvcanary.tags import Detail, Reason, Stage


def are_nonfinite(element: Element, bits: Array) -> Array:
    """Whether elements are NaN or Inf: bool[...], of their bits as unsigned integers."""
    found: Array = (bits & element.mask) == element.nonfinite
    return found


def judge_reserved(pool: PoolArrays, kv: KvPool, index: int, plane: Plane) -> Array:
    """NONFINITE_RESERVED of each reserved block in a plane of floats: VIOLATION[n], one for each that has some.

    Args:
        index: of the plane in `KvPool.ordered_planes`.
    """
    element = plane.element
    assert element is not None
    found = []
    for block in pool.reserved.tolist():
        data = np.ascontiguousarray(kv.host_bytes(plane)[block]).reshape(-1).view(f"<u{element.n_bytes}")
        bad = np.flatnonzero(are_nonfinite(element, data))
        if len(bad):
            slot, offset = divmod(int(bad[0]) * element.n_bytes, plane.n_bytes)
            found.append((block * pool.page_size + slot, offset, int(data[bad[0]])))
    v = new_records(len(found), pool, pool.tag(Stage.HEAD, plane.half))
    v["detail"], v["reasons"], v["plane"], v["position"] = Detail.RESERVED, Reason.NONFINITE_RESERVED, index, -1
    for record, (slot, offset, bits) in zip(v, found, strict=True):
        record["slot"], record["found_digest"], record["stored_digest"] = slot, offset, bits
    return v
