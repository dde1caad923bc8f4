"""What the check of reserved blocks looks at: planes of floats, which NaN or Inf in a reserved block would spoil."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.config import CanaryConfig
from kvcanary.layout import KvPool, Plane


def checked_planes(config: CanaryConfig, pool: KvPool) -> list[tuple[int, Plane]]:
    """(index in `KvPool.ordered_planes`, plane) of each plane whose elements are judged; none if that is off."""
    if not config.check_reserved_every or not pool.reserved_blocks:
        return []
    return [(i, plane) for i, plane in enumerate(pool.ordered_planes) if plane.element is not None]


def plane_table(config: CanaryConfig, pool: KvPool) -> npt.NDArray[Any]:
    """FLOAT_PLANE[n] of `checked_planes`: all their bytes, whatever ``real_data`` says."""
    checked = checked_planes(config, pool)
    records = np.zeros(len(checked), abi.FLOAT_PLANE)
    for record, (index, plane) in zip(records, checked, strict=True):
        element = plane.element
        assert element is not None
        record["plane"] = pool.plane_record(plane, plane.chunk_bytes)
        record["index"], record["half"] = index, int(plane.half)
        record["element_bytes"], record["mask"], record["nonfinite"] = element.n_bytes, element.mask, element.nonfinite
        record["piece_bytes"] = max(element.n_bytes, int(record["plane"]["load_bytes"]))
    return records
