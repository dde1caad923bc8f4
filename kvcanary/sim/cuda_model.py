"""The transformer on a GPU (CuPy), and the runner that makes a decode step and its guard one captured CUDA graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary.arrays import view_of
from kvcanary.backends.compile import kernels_dir, source_hash
from kvcanary.backends.cuda import check_driver, import_cuda
from kvcanary.sim.engine import Guard, NoGuard
from kvcanary.sim.model import ROPE_BASE, ModelConfig, Weights
from kvcanary.sim.step_arrays import StepArrays

KERNELS_DIR = Path(__file__).resolve().parent / "kernels"
THREADS = 128
MAX_WIDTH, MAX_MLP, MAX_HEAD_DIM = 512, 2048, 128  # elements, what the kernels' shared memory and registers hold
ALIGNMENT = 256  # bytes, of each array in a packed buffer

# Twin of SimParams in kernels/sim.cu, where each field is explained: addresses, then sizes.
ADDRESSES = (
    *("block_table", "seq_lens", "query_start_loc", "input_ids", "slot_mapping"),
    *("embed", "frequencies", "qkv", "out", "up", "down", "head", "logit_bias", "k_cache", "v_cache"),
    *("row_of", "positions", "turns", "x", "q", "logits", "next_tokens"),
)
SIZES = ("rows", "tokens", "max_blocks", "n_blocks", "page_size", "n_heads", "head_dim", "mlp", "vocab")
PARAMS = np.dtype([*((name, "u8") for name in ADDRESSES), *((name, "i4") for name in SIZES)], align=True)

Tokens = npt.NDArray[np.int32]


def import_cupy() -> Any:
    """CuPy, once a GPU is known to be there; raises BackendError."""
    check_driver()
    return import_cuda()[0]


def compile_options() -> tuple[str, ...]:
    """Options for NVRTC; CuPy's disk cache does not look into included headers, so that their hash is one of them."""
    headers = hashlib.sha256(source_hash().encode())
    for path in sorted(KERNELS_DIR.glob("*.cuh")):
        headers.update(path.read_bytes())
    return "-std=c++17", f"-I{kernels_dir()}", f"-I{KERNELS_DIR}", f"-DKVC_SOURCES_{headers.hexdigest()[:16]}"


def _pinned(cupy: Any, n_bytes: int) -> npt.NDArray[np.uint8]:
    """Page-locked host memory u8[n_bytes], which the view keeps alive."""
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(n_bytes), np.uint8, n_bytes)


class PinnedTwins:
    """Device twins of host arrays, all in one device buffer, filled by one asynchronous copy from one pinned buffer."""

    def __init__(self, cupy: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        ends = np.cumsum([-(-a.nbytes // ALIGNMENT) * ALIGNMENT for a in arrays.values()]).tolist()
        starts = dict(zip(arrays, (0, *ends), strict=False))
        self._n_bytes = ends[-1]
        buffer, staging = cupy.zeros(self._n_bytes, np.uint8), _pinned(cupy, self._n_bytes)
        self._target, self._source = view_of(buffer).pointer, view_of(staging).pointer
        self._sent = cupy.cuda.Event(disable_timing=True)
        self._runtime = cupy.cuda.runtime

        def views(of: Any) -> dict[str, Any]:
            return {n: of[starts[n] : starts[n] + a.nbytes].view(a.dtype).reshape(a.shape) for n, a in arrays.items()}

        self.on_device, self._on_host = views(buffer), views(staging)

    def upload(self, arrays: Mapping[str, npt.NDArray[Any]], stream: Any) -> None:
        """Copy the contents, ordered on the stream; waits only while the copy before is still reading the staging."""
        self._sent.synchronize()
        for name, staged in self._on_host.items():
            np.copyto(staged, arrays[name], casting="no")
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(self._target, self._source, self._n_bytes, kind, stream.ptr)
        self._sent.record(stream)


class DeviceStepArrays:
    """The twins of one bucket of `StepArrays`: CuPy arrays of the same names and shapes, at fixed addresses.

    `token_history` has one twin for all buckets, as it has one array on the host, and is uploaded whole.
    """

    BUCKET = (
        *("block_table", "seq_lens", "query_start_loc", "input_ids", "slot_mapping"),
        *("request_slots", "request_ids", "salts", "pending"),
    )
    block_table: Any
    seq_lens: Any
    query_start_loc: Any
    input_ids: Any
    slot_mapping: Any
    request_slots: Any
    request_ids: Any
    salts: Any
    pending: Any

    def __init__(self, cupy: Any, arrays: StepArrays, history: PinnedTwins) -> None:
        self._twins = PinnedTwins(cupy, {name: getattr(arrays, name) for name in self.BUCKET})
        self._history = history
        vars(self).update(self._twins.on_device)
        self.token_history = history.on_device["token_history"]
        self.max_rows, self.max_tokens = arrays.max_rows, arrays.max_tokens

    def upload(self, arrays: StepArrays, stream: Any) -> None:
        """Copy the contents of a bucket of the same size; must not run inside a capture, a replay would repeat it."""
        self._twins.upload(vars(arrays), stream)
        self._history.upload(vars(arrays), stream)


@dataclass(frozen=True, eq=False)
class BoundForward:
    """The launches of a forward over one bucket, packed once, and the memory between them."""

    launches: tuple[tuple[Any, tuple[int], Any], ...]  # kernel, grid in blocks, parameters
    scratch: Mapping[str, Any]
    next_tokens: Tokens  # pinned, [rows]
    read_back: tuple[int, int, int]  # its address, that of its twin on the device, bytes


class CudaModel:
    """The transformer of `NumpyModel`, same weights and arithmetic, with its cache on the GPU.

    Everything runs on `stream`, by default one of its own that does not wait for the default stream: whoever touches
    the cache from elsewhere does so under ``with model.stream`` or synchronises. `k_cache` and `v_cache` hold one CuPy
    array f32[n_blocks, page_size, n_heads, head_dim] per layer.

    Raises:
        ValueError: a configuration beyond what the kernels hold.
        BackendError: CuPy or the GPU is missing.
    """

    def __init__(self, config: ModelConfig, n_blocks: int, page_size: int = 16, stream: Any = None) -> None:
        _check_sizes(config)
        self.config = config
        self.n_blocks = n_blocks
        self.page_size = page_size
        self.weights = Weights.random(config)
        self._cupy = cupy = import_cupy()
        self.stream = self._stream_of(stream) if stream is not None else cupy.cuda.Stream(non_blocking=True)
        shape = (n_blocks, page_size, config.n_heads, config.head_dim)
        with self.stream:
            self.k_cache = [cupy.zeros(shape, np.float32) for _ in range(config.n_layers)]
            self.v_cache = [cupy.zeros(shape, np.float32) for _ in range(config.n_layers)]
            self._common = {name: cupy.asarray(value) for name, value in _common_weights(self.weights, config).items()}
            self._layers = [{n: cupy.asarray(w) for n, w in vars(layer).items()} for layer in self.weights.layers]
        self.stream.synchronize()
        module = cupy.RawModule(code=(KERNELS_DIR / "sim.cu").read_text(), options=compile_options())
        names = ("embed", "qkv", "attend", "mlp", "sample")
        self._kernels = {name: module.get_function(f"kvc_sim_{name}") for name in names}
        # Asking for the registers loads a kernel, lazy loading or not: inside a capture it would be too late.
        self.registers = {name: int(kernel.num_regs) for name, kernel in self._kernels.items()}
        self._histories: dict[tuple[int, ...], PinnedTwins] = {}
        self._buckets: dict[tuple[tuple[int, ...], ...], DeviceStepArrays] = {}
        self._bound: dict[DeviceStepArrays, BoundForward] = {}

    def forward(self, arrays: StepArrays) -> Tokens:
        """Write the new tokens' K and V, and return the greedy next token i32[rows] of every row (padding included)."""
        device = self.upload(arrays)
        self.launch(device)
        return self.next_tokens(device)

    def logits(self, arrays: StepArrays) -> npt.NDArray[np.float32]:
        """The same forward, returning f32[rows, vocab] at each row's last new token."""
        device = self.upload(arrays)
        self.launch(device)
        self.stream.synchronize()
        with self.stream:
            logits: npt.NDArray[np.float32] = self._cupy.asnumpy(self._bound[device].scratch["logits"])
        return logits

    def upload(self, arrays: StepArrays) -> DeviceStepArrays:
        """The twins of this bucket with its contents, made and bound at the first upload of its size."""
        key = (arrays.block_table.shape, arrays.input_ids.shape, arrays.token_history.shape)
        if key not in self._buckets:
            self._buckets[key] = self._make_bucket(arrays)
        device = self._buckets[key]
        device.upload(arrays, self.stream)
        return device

    def launch(self, device: DeviceStepArrays, stream: Any = None) -> None:
        """Launch the kernels of one forward over twins from `upload`; may run inside a capture."""
        with self.stream if stream is None else self._stream_of(stream):
            for kernel, grid, params in self._bound[device].launches:
                kernel(grid, (THREADS,), (params,))

    def next_tokens(self, device: DeviceStepArrays) -> Tokens:
        """What the last forward over these twins sampled, i32[rows]; waits for the stream."""
        bound, runtime = self._bound[device], self._cupy.cuda.runtime
        runtime.memcpyAsync(*bound.read_back, runtime.memcpyDeviceToHost, self.stream.ptr)
        self.stream.synchronize()
        return bound.next_tokens.copy()

    def _stream_of(self, stream: Any) -> Any:
        return self._cupy.cuda.Stream.from_external(stream)

    def _make_bucket(self, arrays: StepArrays) -> DeviceStepArrays:
        history = arrays.token_history
        with self.stream:
            if history.shape not in self._histories:
                self._histories[history.shape] = PinnedTwins(self._cupy, {"token_history": history})
            device = DeviceStepArrays(self._cupy, arrays, self._histories[history.shape])
            self._bound[device] = self._bind(device)
        return device

    def _bind(self, device: DeviceStepArrays) -> BoundForward:
        c, rows, tokens = self.config, device.max_rows, device.max_tokens
        scratch = {
            "row_of": self._cupy.zeros(tokens, np.int32),
            "positions": self._cupy.zeros(tokens, np.int32),
            "turns": self._cupy.zeros((tokens, c.head_dim), np.float32),
            "x": self._cupy.zeros((tokens, c.width), np.float32),
            "q": self._cupy.zeros((tokens, c.width), np.float32),
            "logits": self._cupy.zeros((rows, c.vocab), np.float32),
            "next_tokens": self._cupy.zeros(rows, np.int32),
        }
        params = np.zeros((), PARAMS)
        for name, value in (self._common | scratch | vars(device)).items():
            if name in ADDRESSES:
                params[name] = view_of(value).pointer
        sizes = (rows, tokens, device.block_table.shape[1], self.n_blocks, self.page_size)
        for name, size in zip(SIZES, (*sizes, c.n_heads, c.head_dim, c.width * c.mlp_ratio, c.vocab), strict=True):
            params[name] = size
        launches = [("embed", tokens, params[()])]
        for k, v, weights in zip(self.k_cache, self.v_cache, self._layers, strict=True):
            layer = params.copy()
            for name, value in (weights | {"k_cache": k, "v_cache": v}).items():
                layer[name] = view_of(value).pointer
            launches += [(name, tokens, layer[()]) for name in ("qkv", "attend", "mlp")]
        launches.append(("sample", rows, params[()]))
        next_tokens = _pinned(self._cupy, 4 * rows).view(np.int32)
        return BoundForward(
            tuple((self._kernels[name], (n_blocks,), packed) for name, n_blocks, packed in launches),
            scratch,
            next_tokens,
            (next_tokens.ctypes.data, view_of(scratch["next_tokens"]).pointer, next_tokens.nbytes),
        )


def _check_sizes(config: ModelConfig) -> None:
    mlp = config.width * config.mlp_ratio
    if config.window is not None:
        raise ValueError(f"window is {config.window}; the GPU model attends to all keys: window=None, or NumpyModel")
    for name, value, high in (
        ("n_heads * head_dim", config.width, MAX_WIDTH),
        ("n_heads * head_dim * mlp_ratio", mlp, MAX_MLP),
        ("head_dim", config.head_dim, MAX_HEAD_DIM),
    ):
        if value > high:
            raise ValueError(f"{name} is {value}, must be <= {high} on the GPU: choose a smaller model, or NumpyModel")


def _common_weights(weights: Weights, config: ModelConfig) -> dict[str, npt.NDArray[Any]]:
    """What is not of a layer; the frequencies are float64, as the angles of NumpyModel are."""
    frequencies = ROPE_BASE ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    return {
        "embed": weights.embed,
        "head": weights.head,
        "logit_bias": weights.logit_bias,
        "frequencies": frequencies,
    }


Launch = Callable[[], None]


def _capture_with_cupy(stream: Any, launch: Launch) -> Launch:
    """Capture what `launch` puts on the stream; returns what launches the graph there."""
    stream.begin_capture()
    try:
        launch()
    except BaseException:
        with suppress(Exception):  # the capture may be invalid by now; the stream must leave it all the same
            stream.end_capture()
        raise
    return partial(stream.end_capture().launch, stream)


def _capture_with_cuda_core(stream: Any, launch: Launch) -> Launch:
    """The same through a graph builder of cuda.core on the same stream."""
    from cuda.core import Stream

    core_stream = Stream.from_handle(stream.ptr)
    builder = core_stream.create_graph_builder().begin_building()
    try:
        launch()
    except BaseException:
        with suppress(Exception):
            builder.close()
        raise
    return partial(builder.end_building().complete().launch, core_stream)


CAPTURES = {"cupy": _capture_with_cupy, "cuda.core": _capture_with_cuda_core, "none": None}


class CudaRunner:
    """Runs a `CudaModel` for `SimEngine(execute=runner.execute)`: a decode step is one graph launch, others are eager.

    A graph holds HEAD, the model and TAIL; it is captured at the first step of a bucket under a guard and kept for that
    guard. The guard must launch on `model.stream`, where the capture is.

    Args:
        graph_builder: what captures: "cupy", "cuda.core", or "none", with which all steps are eager.
    """

    def __init__(self, model: CudaModel, graph_builder: str = "cupy") -> None:
        if graph_builder not in CAPTURES:
            raise ValueError(f"graph_builder is {graph_builder!r}, must be one of {', '.join(CAPTURES)}")
        self.model = model
        self.n_graph_launches = 0
        self._capture = CAPTURES[graph_builder]
        self._graphs: dict[tuple[DeviceStepArrays, Guard | None], Launch] = {}

    @property
    def n_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def execute(self, arrays: StepArrays, guard: Guard) -> Tokens:
        """One guarded forward; waits for the stream once, for the tokens."""
        device = self.model.upload(arrays)
        if self._capture is None or device.max_rows != device.max_tokens:  # a decode bucket has one token per row
            self._forward(device, guard)
        else:
            self._graph_of(device, guard)()
            self.n_graph_launches += 1
        return self.model.next_tokens(device)

    def _forward(self, device: DeviceStepArrays, guard: Guard) -> None:
        with guard.forward(device):  # type: ignore[arg-type]  # the twins have the names that a guard reads
            self.model.launch(device)

    def _graph_of(self, device: DeviceStepArrays, guard: Guard) -> Launch:
        key = (device, None if type(guard) is NoGuard else guard)  # the engine makes a NoGuard per step
        if key not in self._graphs:
            assert self._capture is not None
            self._graphs[key] = self._capture(self.model.stream, partial(self._forward, device, guard))
        return self._graphs[key]
