"""The transformer's kernels against NumPy's: on the CPU build, and the same tests again on a GPU where there is one."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from base import full_config
from simt.build import DEVICE_DIR, build, find_compiler
from simt.driver import SimtDriver
from simt.runner import SimtLibrary
from test_sim_model import N_BLOCKS, PAGE, SMALL, Row, make_arrays, shuffled_blocks

from kvcanary import CanaryManager, Reason
from kvcanary.backends import compile as kc
from kvcanary.backends.device import DeviceBackend
from kvcanary.errors import BackendError
from kvcanary.sim import cuda_model
from kvcanary.sim.cuda_model import CudaModel, CudaRunner
from kvcanary.sim.engine import NoGuard, SimEngine, StepInfo
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.sim.texts import load_texts

SOURCE = cuda_model.KERNELS_DIR / "sim.cu"
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}  # logits have unit scale; another order of the sums
N_GENERATED = 24
BUCKETS = (1, 2, 3)  # rows of the decode buckets of an engine for 3 requests, all used while 4 prompts are served
PROMPTS = [text[:n] for text, n in zip(load_texts().values(), (37, 90, 21, 60), strict=True)]


# ---- a CuPy for the CPU ----------------------------------------------------------------------------------------------
Work = tuple[str, Callable[[], object]]


class SimtStream:
    """Does what was submitted when somebody waits, and not before: who forgets to wait sees old contents."""

    def __init__(self, cupy: SimtCupy) -> None:
        self._cupy = cupy
        cupy.streams.append(self)
        self.ptr = len(cupy.streams)
        self.n_waits = 0
        self.done: list[str] = []  # what was executed, by name
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None

    def submit(self, name: str, work: Callable[[], object] = lambda: None) -> None:
        assert self._captured is None or not name.startswith("copy"), "a copy would be repeated at every replay"
        (self._queue if self._captured is None else self._captured).append((name, work))

    def run(self) -> None:
        while self._queue:
            name, work = self._queue.pop(0)
            work()
            self.done.append(name)

    def synchronize(self) -> None:
        assert self._captured is None, "waits inside a capture"
        self.n_waits += 1
        self.run()

    def begin_capture(self) -> None:
        self._captured = []

    def end_capture(self) -> SimtGraph:
        assert self._captured is not None
        graph, self._captured = SimtGraph(self._captured), None
        return graph

    def __enter__(self) -> None:
        self._cupy.entered.append(self)

    def __exit__(self, *exc: object) -> None:
        self._cupy.entered.pop()


class SimtGraph:
    def __init__(self, nodes: list[Work]) -> None:
        self._nodes = nodes

    def launch(self, stream: SimtStream) -> None:
        stream.submit("graph")
        for name, work in self._nodes:
            stream.submit(name, work)


class SimtEvent:
    def __init__(self, disable_timing: bool) -> None:
        self._stream: SimtStream | None = None

    def record(self, stream: SimtStream) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.run()


class SimtCupy:
    """As much of CuPy as the model uses; device memory is host memory."""

    zeros, asarray, asnumpy = staticmethod(np.zeros), staticmethod(np.array), staticmethod(np.array)
    memcpyHostToDevice, memcpyDeviceToHost = 1, 2  # noqa: N815
    Event = SimtEvent

    def __init__(self, library: SimtLibrary) -> None:
        self.library = library
        self.cuda = self.runtime = self
        self.streams: list[SimtStream] = []
        self.entered: list[SimtStream] = []

    def alloc_pinned_memory(self, n_bytes: int) -> bytearray:
        return bytearray(n_bytes)

    def memcpyAsync(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> None:  # noqa: N802
        name = {1: "copy to device", 2: "copy to host"}[kind]
        self.streams[stream - 1].submit(name, lambda: ctypes.memmove(target, source, n_bytes))

    def Stream(self, non_blocking: bool) -> SimtStream:  # noqa: N802
        assert non_blocking, "a capture and the default stream would get into each other's way"
        return SimtStream(self)

    def RawModule(self, code: str, options: tuple[str, ...]) -> SimtCupy:  # noqa: N802
        assert code == SOURCE.read_text()
        return self

    def get_function(self, name: str) -> SimtKernel:
        assert name in self.library.kernels
        return SimtKernel(self, name)


class SimtKernel:
    num_regs = 32

    def __init__(self, cupy: SimtCupy, name: str) -> None:
        self._cupy, self._name, self._n_launches = cupy, name, 0

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[np.void]) -> None:
        stream = self._cupy.entered[-1]  # fails on the default stream
        stream.submit(self._name, lambda: self._launch(grid[0], block[0], *args))

    def _launch(self, grid: int, block: int, params: np.void) -> None:
        self._n_launches += 1
        self._cupy.library.launch(self._name, grid, block, params, seed=self._n_launches)


# ---- set-up ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    return SimtLibrary(build(cuda_model.KERNELS_DIR, tmp_path_factory.mktemp("sim")))


@pytest.fixture
def simt(library: SimtLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """CudaModel runs on the CPU build."""
    monkeypatch.setattr(cuda_model, "import_cupy", lambda: SimtCupy(library))


@pytest.fixture(params=["simt", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where CudaModel runs in this test."""
    if request.param == "simt":
        request.getfixturevalue("simt")
    return str(request.param)


def both(config: ModelConfig = SMALL, n_blocks: int = N_BLOCKS, page: int = PAGE) -> tuple[NumpyModel, CudaModel]:
    return NumpyModel(config, n_blocks, page), CudaModel(config, n_blocks, page)


def host(array: Any) -> np.ndarray[Any, Any]:
    return array if isinstance(array, np.ndarray) else array.get()


def set_caches(model: CudaModel, expected: NumpyModel) -> None:
    """Bring what is in the caches of `expected` into those of `model`."""
    with model.stream:
        for mine, theirs in zip(model.k_cache + model.v_cache, expected.k_cache + expected.v_cache, strict=True):
            if isinstance(mine, np.ndarray):
                mine[...] = theirs
            else:
                mine.set(theirs)
    model.stream.synchronize()


def check_caches(model: CudaModel, expected: NumpyModel) -> None:
    for mine, theirs in zip(model.k_cache + model.v_cache, expected.k_cache + expected.v_cache, strict=True):
        np.testing.assert_allclose(host(mine), theirs, **CLOSE)


def check(model: CudaModel, expected: NumpyModel, arrays: StepArrays) -> None:
    """One forward of each: the same logits, next tokens and caches."""
    logits = expected.logits(arrays)
    np.testing.assert_allclose(model.logits(arrays), logits, **CLOSE)
    top = np.sort(logits, axis=-1)
    is_clear = top[:, -1] - top[:, -2] > 1e-3
    np.testing.assert_array_equal(model.forward(arrays)[is_clear], logits.argmax(axis=-1)[is_clear])
    check_caches(model, expected)


# ---- the forward -----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("config", [SMALL, ModelConfig(), ModelConfig(n_layers=1, n_heads=5, head_dim=36, vocab=300)])
@pytest.mark.parametrize("text", [b"a", b"page", b"a prompt over several pages, read"])
def test_prefill(config: ModelConfig, text: bytes) -> None:
    expected, model = both(config)
    check(model, expected, make_arrays([(text, len(text), shuffled_blocks(len(text), 1))]))


@pytest.mark.usefixtures("device")
def test_chunks_then_decode() -> None:
    text, blocks, ends = b"thirty bytes of prompt, or so.", shuffled_blocks(30, 2), (5, 6, 22, 28, 29, 30)
    expected, model = both(ModelConfig())
    for start, end in zip((0, *ends), ends, strict=False):
        check(model, expected, make_arrays([(text[:end], end - start, blocks)]))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("pad_slot", [-1, 0])
def test_many_rows_and_padding(pad_slot: int) -> None:
    expected, model = both()
    texts = [b"first", b"the second row is longer", b"3", b"and a fourth"]
    blocks = [[1, 2], [9, 3, 11, 4, 12, 5, 13], [6], [8, 7, 10, 14]]
    rows: list[Row] = [(t, len(t), b) for t, b in zip(texts, blocks, strict=True)]
    check(model, expected, make_arrays(rows))
    rows = [(t + b"!", 1, b) for t, b in zip(texts, blocks, strict=True)]
    check(model, expected, make_arrays(rows, n_padded=4, pad_slot=pad_slot))
    rows = [(t + b"!?", n, b) for t, n, b in zip(texts, (1, 4, 2, 1), blocks, strict=True)]
    check(model, expected, make_arrays(rows, n_padded=1, pad_slot=pad_slot))


@pytest.mark.usefixtures("device")
def test_rows_without_tokens_and_tokens_without_row() -> None:
    expected, model = both()
    arrays = make_arrays([(b"abc", 3, [2])], n_padded=2)
    arrays.pad_rows(one_token_each=False)
    arrays.slot_mapping[3:] = 7 * PAGE
    check(model, expected, arrays)
    assert not host(model.k_cache[0])[7].any()


@pytest.mark.usefixtures("device")
def test_indices_outside_are_skipped_or_clipped() -> None:
    expected, model = both()
    arrays = make_arrays([(b"abcdef", 6, [1, 2]), (b"xy", 2, [3])])
    arrays.block_table[0, :2] = [10_000, -3]
    arrays.slot_mapping[:2] = [-1, N_BLOCKS * PAGE]
    arrays.seq_lens[:] = [10_000, 1]  # beyond the table; shorter than the new tokens
    check(model, expected, arrays)


@pytest.mark.usefixtures("device")
def test_only_positions_below_the_length_are_read() -> None:
    expected, model = both()
    for cache in (*expected.k_cache, *expected.v_cache):
        cache[2, 2:] = np.nan
        cache[[0, *range(3, N_BLOCKS)]] = np.nan
    set_caches(model, expected)
    logits = model.logits(make_arrays([(b"abcdef", 6, [1, 2])]))
    np.testing.assert_allclose(logits, expected.logits(make_arrays([(b"abcdef", 6, [1, 2])])), **CLOSE)
    assert np.isfinite(logits).all()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_damage_spreads_as_in_numpy(value: float) -> None:
    expected, model = both()
    expected.forward(make_arrays([(b"abcdef", 6, [1, 2])]))
    for cache in (*expected.k_cache, *expected.v_cache):
        cache[1, 0] = value
    set_caches(model, expected)
    arrays = make_arrays([(b"abcdefg", 1, [1, 2])])
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(np.isnan(model.logits(arrays)), np.isnan(expected.logits(arrays)))
    np.testing.assert_array_equal(model.forward(arrays), expected.forward(arrays))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("length", [4096, 4065])
def test_long_context(length: int) -> None:
    """The whole table of two rows, one of them in disorder; keys at all positions matter as much as at the first."""
    page, n_pages, config = 16, 256, ModelConfig(n_layers=2, qk_scale=1.0)
    expected, model = both(config, 1 + 2 * n_pages, page)
    rng = np.random.default_rng(3)
    for cache in (*expected.k_cache, *expected.v_cache):
        cache[...] = rng.standard_normal(cache.shape, np.float32)
    set_caches(model, expected)
    arrays = StepArrays.allocate(2, 2, n_pages, np.zeros((2, 4096), np.int32))
    arrays.clear(-1)
    arrays.block_table[0] = np.arange(n_pages) + 1
    arrays.block_table[1] = rng.permutation(n_pages) + 1 + n_pages
    arrays.seq_lens[:], arrays.query_start_loc[:], arrays.input_ids[:] = length, (0, 1, 2), (65, 66)
    arrays.slot_mapping[:] = arrays.block_table[:, (length - 1) // page] * page + (length - 1) % page
    check(model, expected, arrays)


@pytest.mark.usefixtures("device")
def test_a_second_upload_waits_for_the_first() -> None:
    expected, model = both()
    for text in (b"one", b"two"):  # one bucket, nothing read back in between
        arrays = make_arrays([(text, 3, [1 + text[0] % 2])])
        expected.forward(arrays)
        model.launch(model.upload(arrays))
    model.stream.synchronize()
    check_caches(model, expected)


# ---- a step is a graph -----------------------------------------------------------------------------------------------
def serve(model: Any, runner: CudaRunner | None, guard: Any = None, hook: Any = None) -> tuple[list[bytes], list[bool]]:
    """What each prompt generated, and which steps ran in a decode bucket."""
    engine = SimEngine(
        model, max_requests=3, max_new_tokens=64, max_len=160, execute=runner.execute if runner else None
    )
    if hook is not None:
        engine.before_forward.append(hook)
    is_decode: list[bool] = []

    def note(info: StepInfo) -> None:
        is_decode.append(info.arrays.max_rows == info.arrays.max_tokens)

    return engine.run(PROMPTS, N_GENERATED, guard, note), is_decode


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("graph_builder", ["cupy", "none"])
def test_engine_serves_the_same_bytes(graph_builder: str) -> None:
    expected, model = both(ModelConfig(), 64, 16)
    runner = CudaRunner(model, graph_builder)
    outputs, is_decode = serve(model, runner)
    assert outputs == serve(expected, None)[0]
    assert sum(is_decode) > N_GENERATED
    assert runner.n_graph_launches == (sum(is_decode) if graph_builder == "cupy" else 0)
    assert runner.n_graphs == (len(BUCKETS) if graph_builder == "cupy" else 0)
    check_caches(model, expected)


@pytest.mark.gpu
def test_cuda_core_builds_the_same_graphs() -> None:
    model = CudaModel(ModelConfig(), 64, 16)
    runner = CudaRunner(model, "cuda.core")
    outputs, is_decode = serve(model, runner)
    assert outputs == serve(NumpyModel(ModelConfig(), 64, 16), None)[0]
    assert (runner.n_graph_launches, runner.n_graphs) == (sum(is_decode), len(BUCKETS))


@pytest.mark.gpu
def test_a_stream_of_cuda_core() -> None:
    from cuda.core import Device

    core_device = Device()
    core_device.set_current()
    model = CudaModel(ModelConfig(), 64, 16, core_device.create_stream())
    assert serve(model, CudaRunner(model))[0] == serve(NumpyModel(ModelConfig(), 64, 16), None)[0]


@pytest.mark.usefixtures("device")
def test_what_a_hook_does_to_the_host_arrays_reaches_the_graph() -> None:
    def strike(arrays: StepArrays) -> None:
        if arrays.max_rows == arrays.max_tokens and arrays.n_rows > 1:
            arrays.block_table[0] = arrays.block_table[1]

    expected, model = both(ModelConfig(), 64, 16)
    struck = serve(model, CudaRunner(model), hook=strike)[0]
    assert struck == serve(expected, None, hook=strike)[0]
    assert struck != serve(NumpyModel(ModelConfig(), 64, 16), None)[0]


class MarkingGuard:
    """Puts HEAD and TAIL on the stream, where a capture takes them up."""

    def __init__(self, stream: SimtStream) -> None:
        self.stream, self.n_forwards = stream, 0

    def step(self) -> AbstractContextManager[object]:
        return nullcontext()

    def blocks(self, calls: Any) -> None: ...

    @contextmanager
    def forward(self, arrays: Any) -> Iterator[None]:
        self.n_forwards += 1
        self.stream.submit("HEAD")
        yield
        self.stream.submit("TAIL")


@pytest.mark.usefixtures("simt")
def test_a_decode_step_is_one_graph_and_one_wait() -> None:
    model = CudaModel(SMALL, 64, 16)
    runner, stream, guard = CudaRunner(model), model.stream, MarkingGuard(model.stream)
    layer = ["kvc_sim_qkv", "kvc_sim_attend", "kvc_sim_mlp"]
    forward = ["HEAD", "kvc_sim_embed", *layer * SMALL.n_layers, "kvc_sim_sample", "TAIL"]
    engine = SimEngine(model, max_requests=3, max_new_tokens=64, max_len=160, execute=runner.execute)
    n_before, n_eager = stream.n_waits, 0

    def check_step(info: StepInfo) -> None:
        nonlocal n_eager
        is_decode = info.arrays.max_rows == info.arrays.max_tokens
        n_eager += not is_decode
        assert stream.done == ["copy to device"] * 2 + ["graph"] * is_decode + forward + ["copy to host"]
        assert stream.n_waits - n_before == info.step
        stream.done.clear()

    engine.run(PROMPTS, N_GENERATED, guard, check_step)
    assert guard.n_forwards == n_eager + runner.n_graphs == n_eager + len(BUCKETS)


@pytest.mark.usefixtures("simt")
def test_a_graph_belongs_to_its_guard() -> None:
    model = CudaModel(SMALL, N_BLOCKS, PAGE)
    runner, arrays = CudaRunner(model), make_arrays([(b"x", 1, [3])])
    first, second = MarkingGuard(model.stream), MarkingGuard(model.stream)
    for guard in (first, NoGuard(), second, first, NoGuard(), second):
        model.stream.done.clear()
        runner.execute(arrays, guard)
        assert ("HEAD" in model.stream.done) == (not isinstance(guard, NoGuard))
    assert (first.n_forwards, second.n_forwards, runner.n_graphs) == (1, 1, 3)


@pytest.mark.usefixtures("device")
def test_an_error_ends_the_capture() -> None:
    class Refusing(NoGuard):
        def forward(self, arrays: Any) -> AbstractContextManager[object]:
            raise LookupError("not today")

    model, arrays = CudaModel(SMALL, N_BLOCKS, PAGE), make_arrays([(b"x", 1, [3])])
    runner = CudaRunner(model)
    with pytest.raises(LookupError, match="not today"):
        runner.execute(arrays, Refusing())
    expected = NumpyModel(SMALL, N_BLOCKS, PAGE).forward(arrays)
    np.testing.assert_array_equal(runner.execute(arrays, NoGuard()), expected)


# ---- with the canary -------------------------------------------------------------------------------------------------
class StreamDriver(SimtDriver):
    """Its launches go where those of the model go, into a capture too."""

    def launch(self, kernel: str, grid: tuple[int, int], params: Any, stream: SimtStream) -> None:
        stream.submit(kernel, lambda: super(StreamDriver, self).launch(kernel, grid, params, stream))


@pytest.fixture(scope="session")
def guard_library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    return SimtLibrary(build(DEVICE_DIR, tmp_path_factory.mktemp("guard")))


@pytest.fixture
def make_guard(device: str, request: pytest.FixtureRequest) -> Callable[[CudaModel], CanaryGuard]:
    """A guard on the model's stream, by the kernels that run where the model does."""
    backend: Any = "cuda"
    if device == "simt":
        library = request.getfixturevalue("guard_library")

        def backend(*arguments: Any) -> DeviceBackend:
            return DeviceBackend("simt", StreamDriver(library), *arguments)

    def make(model: CudaModel) -> CanaryGuard:
        config = full_config(real_data="all", verify_data_every=1, ring_capacity=64)
        return CanaryGuard(CanaryManager(config, [pool_of(model)], 3, 64, backend), model.stream)

    return make


def test_the_canary_rides_in_the_graph(make_guard: Callable[[CudaModel], CanaryGuard]) -> None:
    model = CudaModel(ModelConfig(), 64, 16)
    guard, runner = make_guard(model), CudaRunner(model)
    outputs, is_decode = serve(model, runner, guard)
    assert outputs == serve(NumpyModel(ModelConfig(), 64, 16), None)[0]
    manager = guard.manager
    manager.synchronize()
    assert manager.violations() == ()
    runs = host(manager.state.kernel_run_counters)[0]
    assert np.count_nonzero(runs) == 4  # HEAD and TAIL, of K and of V
    assert not np.any(runs % len(is_decode)), "as often in a replayed step as in an eager one"
    assert runner.n_graph_launches == sum(is_decode)


def test_the_canary_in_the_graph_sees_a_flipped_bit(make_guard: Callable[[CudaModel], CanaryGuard]) -> None:
    model = CudaModel(ModelConfig(), 64, 16)
    guard, struck = make_guard(model), []

    def strike(arrays: StepArrays) -> None:
        if arrays.max_rows == arrays.max_tokens and arrays.n_rows == 3 and not struck:
            struck.append(int(arrays.block_table[1, 0]))
            with model.stream:
                model.v_cache[2].view(np.uint8)[struck[0], 5, 0, 0] ^= 1 << 3

    serve(model, CudaRunner(model), guard, strike)
    guard.manager.synchronize()
    seen = guard.manager.violations()
    assert struck
    assert {(v.reasons, v.slot, v.layer) for v in seen} == {(Reason.DATA, struck[0] * 16 + 5, 2)}


# ---- the sources -----------------------------------------------------------------------------------------------------
def test_parameters_are_the_kernels_struct(library: SimtLibrary) -> None:
    struct = re.search(r"struct SimParams \{(.*?)\};", SOURCE.read_text(), re.DOTALL)
    assert struct is not None
    fields = re.findall(r"^ +(?:const )?(\w+)(\*?) (\w+);", struct[1], re.MULTILINE)
    assert [(name, "u8" if star else "i4") for _, star, name in fields] == [
        (name, cuda_model.PARAMS[name].str[1:]) for name in cuda_model.PARAMS.names or ()
    ]
    kernels = [library.info[name] for name in kc.kernel_names(SOURCE.read_text())]
    assert {info.params_bytes for info in kernels} == {cuda_model.PARAMS.itemsize}
    assert {info.max_block for info in kernels} == {cuda_model.THREADS}


def test_limits_are_the_kernels() -> None:
    limits = dict(re.findall(r"constexpr u?int32_t SIM_(MAX_\w+|THREADS) = (\d+);", SOURCE.read_text()))
    assert limits == {name: str(getattr(cuda_model, name)) for name in limits}
    assert len(limits) == 4


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ModelConfig(n_heads=5, head_dim=104), "n_heads . head_dim is 520"),
        (ModelConfig(n_heads=4, head_dim=128, mlp_ratio=5), "mlp_ratio is 2560"),
        (ModelConfig(n_heads=1, head_dim=130), "head_dim is 130"),
    ],
)
def test_a_model_that_the_kernels_cannot_hold_is_refused(config: ModelConfig, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}, must be <= .*NumpyModel"):
        CudaModel(config, 4)


@pytest.mark.usefixtures("simt")
def test_the_largest_model() -> None:
    config = ModelConfig(n_layers=1, n_heads=4, head_dim=128, mlp_ratio=4)
    expected, model = both(config)
    check(model, expected, make_arrays([(b"large", 5, [1, 2])]))


@pytest.mark.usefixtures("simt")
def test_an_unknown_graph_builder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"graph_builder is 'torch', must be one of cupy, cuda\.core, none"):
        CudaRunner(CudaModel(SMALL, 4), "torch")


def test_without_a_gpu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_model, "check_driver", lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r'pip install "kvcanary\[cuda13\]"'):
        CudaModel(SMALL, 4)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_kernels_compile(tmp_path: Path, arch: str) -> None:
    reason = 'NVRTC missing: pip install "kvcanary[dev]"'
    bindings = pytest.importorskip("cuda.bindings.nvrtc", reason=reason)
    try:
        bindings.nvrtcVersion()
    except RuntimeError:  # the bindings are there, the library is not
        pytest.skip(reason)
    header = (cuda_model.KERNELS_DIR / "sim_math.cuh").read_text().replace("#pragma once", "")
    path = tmp_path / "sim.cu"
    path.write_text(SOURCE.read_text().replace('#include "sim_math.cuh"', header))
    compiled = kc.compile_file(path, arch)
    assert "warning" not in compiled.log
    assert sorted(use.name for use in compiled.usage()) == sorted(kc.kernel_names(SOURCE.read_text()))
    assert all(use.spill_bytes == 0 for use in compiled.usage())


def test_options_change_with_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cuda_model.compile_options()
    shutil.copytree(cuda_model.KERNELS_DIR, tmp_path / "kernels")
    monkeypatch.setattr(cuda_model, "KERNELS_DIR", tmp_path / "kernels")
    assert cuda_model.compile_options()[-1] == before[-1]
    with (tmp_path / "kernels" / "sim_math.cuh").open("a") as header:
        header.write("// changed")
    assert cuda_model.compile_options()[-1] != before[-1]
