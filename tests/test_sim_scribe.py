"""The model that only writes: on the host, and its kernel on the CPU build and on a GPU."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from sim_cupy import SimtCupy, host, sim_library  # noqa: F401  a fixture
from simt.runner import SimtLibrary
from test_sim_model import N_BLOCKS, PAGE, SMALL, make_arrays

from kvcanary.sim import cuda_model
from kvcanary.sim.behaviours import BEHAVIOURS
from kvcanary.sim.cuda_scribe import PARAMS, CudaScribe, ScribeRunner
from kvcanary.sim.engine import SimEngine
from kvcanary.sim.habits import Habits
from kvcanary.sim.scribe import OF_MIX, OF_SLOT, OF_TOKEN, OF_WORD, ScribeModel, kv_words, next_tokens
from kvcanary.sim.soak import soak
from kvcanary.sim.texts import load_texts

SOURCE = (cuda_model.KERNELS_DIR / "scribe.cu").read_text()
PROMPTS = [text[:n] for text, n in zip(load_texts().values(), (37, 90, 21, 60), strict=True)]


class ScribeCupy(SimtCupy):
    """The fake CuPy, for the other source."""

    def RawModule(self, code: str, options: tuple[str, ...]) -> ScribeCupy:  # noqa: N802
        assert code == SOURCE
        return self


@pytest.fixture(params=["simt", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CudaScribe runs in this test."""
    if request.param == "simt":
        built = request.getfixturevalue("library")
        monkeypatch.setattr(cuda_model, "import_cupy", lambda: ScribeCupy(built))


def check_caches(model: CudaScribe, expected: ScribeModel) -> None:
    model.stream.synchronize()
    for mine, theirs in zip(model.k_cache + model.v_cache, expected.k_cache + expected.v_cache, strict=True):
        assert host(mine).tobytes() == theirs.tobytes()


# ---- what it writes --------------------------------------------------------------------------------------------------
def test_words_by_hand() -> None:
    mask = (1 << 32) - 1
    for token, slot, array, word in ((65, 7, 0, 0), (255, 1 << 20, 3, 5)):
        value = (token * OF_TOKEN & mask) ^ (slot * OF_SLOT & mask) ^ ((array * 8 + word + 1) * OF_WORD & mask)
        value = (value ^ value >> 15) * OF_MIX & mask
        assert kv_words(np.array([token], np.int32), np.array([slot]), 8, array)[0, word] == value


def test_bytes_tell_tokens_slots_and_arrays_apart() -> None:
    rows = [kv_words(np.array([t], np.int32), np.array([s]), 32, a) for t in (1, 2) for s in (8, 9) for a in (0, 1)]
    assert len({row.tobytes() for row in rows}) == 8
    sampled = next_tokens(np.arange(256, dtype=np.int32), np.zeros(256, np.int32))
    assert sampled.min() >= 32 and sampled.max() < 127 and len(set(sampled.tolist())) > 60


def test_only_tokens_of_a_row_with_a_slot_inside_are_written() -> None:
    model = ScribeModel(SMALL, N_BLOCKS, PAGE)
    arrays = make_arrays([(b"abc", 3, [2])], n_padded=2)
    arrays.pad_rows(one_token_each=False)
    arrays.slot_mapping[1] = N_BLOCKS * PAGE
    arrays.slot_mapping[3:] = 7 * PAGE
    model.forward(arrays)
    written = np.flatnonzero(model.v_cache[1].reshape(N_BLOCKS * PAGE, -1).any(axis=1))
    assert written.tolist() == [2 * PAGE, 2 * PAGE + 2]


# ---- the kernel ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("device")
def test_kernel_writes_the_same() -> None:
    expected, model = ScribeModel(SMALL, N_BLOCKS, PAGE), CudaScribe(SMALL, N_BLOCKS, PAGE)
    layers: list[int] = []
    for text, before_layer in ((b"abcdef", None), (b"xyz", layers.append)):
        arrays = make_arrays([(text, len(text), [1 + len(layers), 4]), (b"q", 1, [3])], n_padded=2)
        arrays.pad_rows(one_token_each=False)
        arrays.slot_mapping[0] = [-1, N_BLOCKS * PAGE][len(text) % 2]
        model.before_layer = before_layer
        assert model.forward(arrays).tolist() == expected.forward(arrays).tolist()
        check_caches(model, expected)
    assert layers == list(range(SMALL.n_layers))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "habits",
    [Habits(), Habits(n_draft=3), Habits(in_flight=True, shares_early=True)],
    ids=["plain", "drafts", "in flight"],
)
def test_engine_says_and_writes_the_same(habits: Habits) -> None:
    expected, model = ScribeModel(SMALL, 64, 16), CudaScribe(SMALL, 64, 16)
    runner = ScribeRunner(model)
    sizes: Any = {"max_requests": 3, "max_new_tokens": 64, "max_len": 160, "habits": habits}
    engine = SimEngine(model, execute=runner.execute, **sizes)
    runner.engine = engine
    assert engine.run(PROMPTS, 24) == SimEngine(expected, **sizes).run(PROMPTS, 24)
    check_caches(model, expected)
    assert runner._graphs


@pytest.mark.usefixtures("device")
def test_layer_by_layer_is_never_a_graph() -> None:
    model = CudaScribe(SMALL, 64, 16)
    runner = ScribeRunner(model)
    engine = runner.engine = SimEngine(model, execute=runner.execute, habits=Habits(loads_by_layer=True))
    engine.mover._late.append((np.zeros(0, np.int64), None))  # type: ignore[arg-type]
    arrived: list[int] = []

    def load_layer(layer: int) -> None:
        arrived.append(layer)

    engine.mover.load_layer = load_layer  # type: ignore[method-assign]
    engine.add_request(b"a", 2)
    engine.step()
    assert arrived == [0, 1] and not runner._graphs


def test_numbers_agree_with_the_source(library: SimtLibrary) -> None:
    for name, value in {"OF_TOKEN": OF_TOKEN, "OF_SLOT": OF_SLOT, "OF_WORD": OF_WORD, "OF_MIX": OF_MIX}.items():
        assert f"{name} = 0x{value:08X}u" in SOURCE
    assert f"SCRIBE_THREADS = {cuda_model.THREADS};" in SOURCE
    info = library.info["kvc_sim_scribe"]
    assert (info.params_bytes, info.max_block) == (PARAMS.itemsize, cuda_model.THREADS)
    struct = re.search(r"struct ScribeParams \{(.*?)\};", SOURCE, re.DOTALL)
    assert struct is not None
    fields = re.findall(r"^\s*(.*?)(\w+);", struct[1], re.MULTILINE)
    of_type = {"int32_t": "<i4", "int64_t": "<i8"}
    assert [(n, "<u8" if "*" in kind else of_type[kind.strip()]) for kind, n in fields] == [
        (name, PARAMS[name].str) for name in PARAMS.names or ()
    ]


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_soak_on_a_gpu() -> None:
    did: Counter[str] = sum((Counter(soak(seed, 300, backend="cuda").did) for seed in range(20)), Counter())
    assert [name for name in BEHAVIOURS if not did[name]] == []
