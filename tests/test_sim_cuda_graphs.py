"""A decode step of the transformer is one CUDA graph, and the canary rides in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from base import full_config
from sim_cupy import SimtStream, both, check_caches, host, sim_library, simt, where  # noqa: F401  fixtures
from simt.build import DEVICE_DIR, build
from simt.driver import SimtDriver
from simt.runner import SimtLibrary
from test_sim_model import N_BLOCKS, PAGE, SMALL, make_arrays

from kvcanary import CanaryManager, Reason
from kvcanary.backends.device import DeviceBackend
from kvcanary.sim.cuda_model import CudaModel, CudaRunner
from kvcanary.sim.engine import NoGuard, SimEngine, StepInfo
from kvcanary.sim.guard import CanaryGuard, pool_of
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.sim.texts import load_texts

N_GENERATED = 24
BUCKETS = (1, 2, 3)  # rows of the decode buckets of an engine for 3 requests, all used while 4 prompts are served
PROMPTS = [text[:n] for text, n in zip(load_texts().values(), (37, 90, 21, 60), strict=True)]


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
