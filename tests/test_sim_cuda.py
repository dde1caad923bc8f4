"""The transformer's kernels against NumPy's: on the CPU build, and the same tests again on a GPU where there is one."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sim_cupy import CLOSE, SOURCE, both, check_caches, host, sim_library, simt, where  # noqa: F401  fixtures
from simt.runner import SimtLibrary
from test_sim_model import N_BLOCKS, PAGE, SMALL, Row, make_arrays, shuffled_blocks

from kvcanary.backends import compile as kc
from kvcanary.errors import BackendError
from kvcanary.sim import cuda_model
from kvcanary.sim.cuda_model import CudaModel, CudaRunner
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.step_arrays import StepArrays


def set_caches(model: CudaModel, expected: NumpyModel) -> None:
    """Bring what is in the caches of `expected` into those of `model`."""
    with model.stream:
        for mine, theirs in zip(model.k_cache + model.v_cache, expected.k_cache + expected.v_cache, strict=True):
            if isinstance(mine, np.ndarray):
                mine[...] = theirs
            else:
                mine.set(theirs)
    model.stream.synchronize()


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
