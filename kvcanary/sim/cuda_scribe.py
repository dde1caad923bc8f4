"""The model that only writes, on a GPU: one launch a forward, and the host does not wait for what it samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvcanary.arrays import view_of
from kvcanary.sim import cuda_model
from kvcanary.sim.cuda_model import CAPTURES, KERNELS_DIR, THREADS, DeviceStepArrays, PinnedTwins, Tokens
from kvcanary.sim.engine import SimEngine
from kvcanary.sim.model import ModelConfig
from kvcanary.sim.protocols import Guard, NoGuard
from kvcanary.sim.scribe import row_ends, sampled_behind
from kvcanary.sim.step_arrays import StepArrays

# Twin of ScribeParams in kernels/scribe.cu.
ADDRESSES = ("query_start_loc", "input_ids", "slot_mapping", "caches")
PARAMS = np.dtype(
    [
        *((name, "u8") for name in ADDRESSES),
        *((name, "i4") for name in ("rows", "first_array", "n_arrays", "n_words")),
        ("n_slots", "i8"),
    ],
    align=True,
)


class CudaScribe:
    """`ScribeModel` with its cache on the GPU; `stream` and the caches are as those of `CudaModel`.

    Raises:
        BackendError: CuPy or the GPU is missing.
    """

    takes_trees = True

    def __init__(self, config: ModelConfig, n_blocks: int, page_size: int = 16) -> None:
        self.config, self.n_blocks, self.page_size = config, n_blocks, page_size
        self.before_layer: Callable[[int], None] | None = None
        self._cupy = cupy = cuda_model.import_cupy()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        shape = (n_blocks, page_size, config.n_heads, config.head_dim)
        with self.stream:
            self.k_cache = [cupy.zeros(shape, np.float32) for _ in range(config.n_layers)]
            self.v_cache = [cupy.zeros(shape, np.float32) for _ in range(config.n_layers)]
            pairs = zip(self.k_cache, self.v_cache, strict=True)
            self._caches = cupy.asarray(np.array([view_of(a).pointer for pair in pairs for a in pair], np.uint64))
        self.stream.synchronize()
        module = cupy.RawModule(code=(KERNELS_DIR / "scribe.cu").read_text(), options=cuda_model.compile_options())
        self._kernel = module.get_function("kvc_sim_scribe")
        n_registers = self._kernel.num_regs  # asking loads it: inside a capture it would be too late
        assert n_registers
        self._history: PinnedTwins | None = None
        self._buckets: dict[tuple[int, int], DeviceStepArrays] = {}
        self._params: dict[tuple[DeviceStepArrays, int, int], Any] = {}

    def forward(self, arrays: StepArrays) -> Tokens:
        """Write the new tokens' K and V; returns the next token i32[rows] of every row, without waiting."""
        return row_ends(arrays, self.forward_all(arrays))

    def forward_all(self, arrays: StepArrays) -> Tokens:
        """The same forward, returning what comes behind every new token that a row owns."""
        self.launch(self.upload(arrays))
        return sampled_behind(arrays)

    def upload(self, arrays: StepArrays) -> DeviceStepArrays:
        """The twins of this bucket with its contents, made at the first upload of its size; for one engine."""
        key = (arrays.max_rows, arrays.max_tokens)
        if key not in self._buckets:
            with self.stream:
                if self._history is None:
                    self._history = PinnedTwins(self._cupy, {"token_history": arrays.token_history})
                self._buckets[key] = DeviceStepArrays(self._cupy, arrays, self._history)
        self._buckets[key].upload(arrays, self.stream)
        return self._buckets[key]

    def launch(self, device: DeviceStepArrays) -> None:
        """Write all layers, in one launch unless something is to happen before each; may run inside a capture."""
        n_layers = self.config.n_layers
        if self.before_layer is None:
            self._launch(device, 0, n_layers)
            return
        for layer in range(n_layers):
            self.before_layer(layer)
            self._launch(device, layer, 1)

    def _launch(self, device: DeviceStepArrays, layer: int, n_layers: int) -> None:
        key = (device, layer, n_layers)
        if key not in self._params:
            params = np.zeros((), PARAMS)
            for name, value in (vars(device) | {"caches": self._caches}).items():
                if name in ADDRESSES:
                    params[name] = view_of(value).pointer
            params["rows"], params["first_array"], params["n_arrays"] = device.max_rows, 2 * layer, 2 * n_layers
            params["n_words"] = self.config.n_heads * self.config.head_dim
            params["n_slots"] = self.n_blocks * self.page_size
            self._params[key] = params[()]
        with self.stream:
            self._kernel((device.max_tokens,), (THREADS,), (self._params[key],))


class ScribeRunner:
    """Runs a `CudaScribe` for an engine: a decode step is one graph, but for one that loads layer by layer."""

    def __init__(self, model: CudaScribe) -> None:
        self.model = model
        self.engine: SimEngine | None = None  # set once it is made
        self._graphs: dict[tuple[DeviceStepArrays, Guard | None], Callable[[], None]] = {}

    def execute(self, arrays: StepArrays, guard: Guard) -> Tokens:
        """One guarded forward, which need not have run when this returns."""
        assert self.engine is not None
        device = self.model.upload(arrays)
        is_loading = self.engine.habits.loads_by_layer and self.engine.mover.is_loading
        if device.max_rows != device.max_tokens or is_loading:
            self._forward(device, guard)
        else:
            self._graph_of(device, guard)()
        sampled = sampled_behind(arrays)
        return sampled if self.engine.habits.n_draft else row_ends(arrays, sampled)

    def _forward(self, device: Any, guard: Guard) -> None:
        assert self.engine is not None
        with guard.forward(device), self.engine.loading(device, guard):
            self.model.launch(device)

    def _graph_of(self, device: DeviceStepArrays, guard: Guard) -> Callable[[], None]:
        key = (device, None if isinstance(guard, NoGuard) else guard)  # what does nothing is captured alike
        if key not in self._graphs:
            capture = CAPTURES["cupy"]
            assert capture is not None
            self._graphs[key] = capture(self.model.stream, partial(self._forward, device, guard))
        return self._graphs[key]
