"""One world: pools, a configuration, guards on both sides, and runs of which each is one call of noise."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from agree import PoolSpec, Side, SimtSide
from agree_pools import random_pools
from agree_twins import Twins
from simt.runner import SimtLibrary

from kvcanary import KvCanaryError

from . import calls
from .batches import Shape
from .planes import hostile_pool
from .values import Noise

N_RUNS = 40  # of a world
MAX_LEN = 32
_CALLS: tuple[tuple[str, Callable[[Twins, Noise, int], str], float], ...] = (
    ("sweep", calls.sweep, 0.08),
    ("move", calls.move_on_device, 0.1),
    ("host move", calls.move_by_host, 0.04),
    ("bundle", calls.import_noise, 0.03),
    ("ownership", calls.ownership, 0.08),
)


def play(seed: int, library: SimtLibrary, beat: Callable[[], None] = lambda: None) -> Counter[str]:
    """The world of a seed; what happened in its runs, counted.

    Args:
        beat: called before every run.

    Raises:
        Exception: a finding: the sides disagree, a law is broken, or something raised that is no error of kvcanary's.
    """
    did: Counter[str] = Counter()
    rng = random.Random(seed)
    while (world := World.of(rng, library, seed)) is None:
        beat()
        did["refused planes"] += 1
        if did.total() == N_RUNS:
            return did
    while did.total() < N_RUNS and not world.is_over:
        beat()
        did[world.run()] += 1
    return did


class World:
    """Guards over pools; `run` is one hostile call."""

    def __init__(self, rng: random.Random, library: SimtLibrary, seed: int, specs: list[PoolSpec]) -> None:
        self.rng = rng
        self.is_over = False
        max_requests, self.max_tokens = rng.choice((1, 2, 4, 8)), rng.choice((8, 40, 70))
        self.reached = np.zeros(max_requests, np.int64)
        has_lut = any("lut" in spec.buffers for spec in specs)
        config: dict[str, Any] = {
            "real_data": rng.choice(("all", "all", "partial", "none")),
            "verify_data_every": rng.choice((1, 2, 9, 127)),
            "full_verify_min_tokens": rng.choice((0, 4, 16)),
            "on_unwritten": rng.choice(("violation", "violation", "adopt")),
            "check_write_position": rng.random() < 0.8,
            "check_reserved_every": rng.choice((0, 1, 1, 2)),
            "ring_capacity": rng.choice((1, 64, 1024)),
            "lifecycle": rng.random() < 0.5 and not has_lut,
        }
        if config["lifecycle"]:
            config["scrub_bytes_per_step"] = rng.choice((0, 1, 1 << 20))
        sides: list[Side] = [Side(), SimtSide(library, rng.choice((1, 1, 3)), seed % 9999)]
        self.twins = Twins(specs, sides, max_requests, self.max_tokens, **config)
        pools = self.twins.pools
        luts = [p.lut_view.shape[0] for p in pools if p.lut_view is not None]
        self.noise = Noise(rng.getrandbits(32), [n for p in pools for n in (p.n_slots, p.n_blocks)] + luts)
        self.shapes: list[tuple[Shape, Noise, list[Any]]] = []
        self.n_layers = {u.layer for p in pools for u in p.digest_units(config["real_data"])}

    @classmethod
    def of(cls, rng: random.Random, library: SimtLibrary, seed: int) -> World | None:
        """A world, or None where its pools were refused."""
        if rng.random() < 0.3:
            spec = hostile_pool(rng)
            if spec is None:
                return None
            try:
                return cls(rng, library, seed, [spec])
            except KvCanaryError:
                return None
        specs = random_pools(rng, 4, MAX_LEN, rng.random() < 0.15, is_odd=True)
        return cls(rng, library, seed, specs[: rng.choice((1, 1, 3))])

    def run(self) -> str:
        """One call; what became of it."""
        rng, twins = self.rng, self.twins
        self._disturb()
        chance = rng.random()
        for name, call, share in _CALLS:
            chance -= share
            if chance < 0 and (name != "ownership" or twins.config.lifecycle):
                done = call(twins, self.noise, rng.randrange(len(twins.pools)))
                self.is_over = done == "racy"
                return done
        if rng.random() < 0.02:
            return self._prove()
        return self._forward()

    def _disturb(self) -> None:
        """What lies in memory changes: look-up tables, KV bytes; and the guard is paused or reset."""
        rng, twins = self.rng, self.twins
        for buffers in twins.buffers:
            if "lut" in buffers and rng.random() < 0.2:
                lut = buffers["lut"]
                lut[...] = self.noise.fill(lut.shape, lut.dtype, np.arange(len(lut)))
        if rng.random() < 0.02:
            twins.set_paused(not twins.is_paused)
        if rng.random() < 0.01:
            twins.reset(rng.choice((None, rng.randrange(len(twins.pools)))))

    # ---- forwards ----------------------------------------------------------------------------------------------------
    def _shape(self) -> tuple[Shape, Noise, list[Any]]:
        """A batch that is bound already, or a new one."""
        rng, twins = self.rng, self.twins
        if len(self.shapes) >= 2 and rng.random() < 0.85:
            return rng.choice(self.shapes)
        n = len(twins.pools)
        chosen = rng.choice([list(range(n)), [rng.randrange(n)]])
        shape = Shape(rng, twins.pools, chosen, self.reached, self.max_tokens)
        noise = Noise(rng.getrandbits(32), shape.near)
        found = shape, noise, twins.bind(shape.plausible(noise))
        self.shapes = [*self.shapes[-3:], found]
        return found

    def _forward(self) -> str:
        rng, twins = self.rng, self.twins
        shape, noise, batches = self._shape()
        plausible = shape.plausible(noise)
        arrays = shape.spoiled(noise, plausible) if rng.random() < 0.7 else plausible
        late = shape.spoiled(noise, arrays) if rng.random() < 0.15 else None
        has_all = len(shape.chosen) == len(twins.pools)

        def model() -> None:
            pool = rng.choice(shape.chosen)
            n_slots = twins.pools[pool].n_slots
            if rng.random() < 0.5:
                slots = noise.rng.permutation(n_slots)[: rng.choice((1, 8, n_slots))]
                twins.write_kv(pool, slots, noise.rng)
            if "pending" in shape.optional and self.n_layers and has_all and rng.random() < 0.5:
                twins.verify_layer(batches, rng.choice(sorted(self.n_layers)))

        twins.forward(
            arrays,
            model=model,
            between=None if late is None else {k: v for k, v in late.items() if v is not arrays[k]},
            index=int(rng.random() < 0.2),
            pools=None if has_all else shape.chosen,
            has_tail=rng.random() < 0.9,
            batches=batches,
        )
        return "reported" if len(twins.records) or twins.is_dropping else "silent"

    def _prove(self) -> str:
        shape, noise, _ = self._shape()
        if len(shape.chosen) < len(self.twins.pools):
            return "nothing"
        arrays = shape.spoiled(noise, shape.plausible(noise))
        self.twins.publish()
        batches = dict(zip(map(id, self.twins.sides), self.twins.bind(arrays), strict=True))
        by_manager = {id(side.manager): batches[id(side)] for side in self.twins.sides}
        _, error = calls.attempt(self.twins, lambda manager: manager.prove(by_manager[id(manager)]))
        self.twins._check("prove()")
        return "refused proof" if error else "proof"
