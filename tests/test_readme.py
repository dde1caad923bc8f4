"""The README's embedding code runs as it stands there, and its words agree with the code."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from kvcanary import (
    PREFIX_CACHE,
    CanaryConfig,
    CanaryManager,
    KvPool,
    RankAgreement,
    Reason,
    SlotBundle,
    StepBatch,
    layouts,
)

README = Path(__file__).resolve().parents[1] / "README.md"
if not README.is_file():
    pytest.skip("README.md is not beside the tests", allow_module_level=True)
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
LOOP, CAPTURE, LAYOUTS, MOVES, OWNERS, METRICS, RANKS = BLOCKS
PAGE, ROWS, MAX_LEN = 16, 2, 64


def run(tamper_at: int | None) -> Any:
    """The README's loop over a toy model: two requests decode from an empty cache, one position a step."""
    rng = np.random.default_rng(0)
    k_layers, v_layers = ([rng.random((9, PAGE, 2, 8), np.float32) for _ in range(3)] for _ in range(2))
    table = np.arange(1, 9, dtype=np.int32).reshape(ROWS, 4)
    names: dict[str, Any] = {
        "k_layers": k_layers,
        "v_layers": v_layers,
        "block_table": table,
        "seq_lens": np.zeros(ROWS, np.int32),
        "query_start_loc": np.arange(ROWS + 1, dtype=np.int32),
        "input_ids": np.zeros(ROWS, np.int32),
        "slot_mapping": np.zeros(ROWS, np.int64),
        "request_slots": np.arange(ROWS, dtype=np.int32),
        "request_ids": np.arange(1, ROWS + 1, dtype=np.uint32),
        "token_history": np.full((8, MAX_LEN), -1, np.int32),
        "stream": None,
    }
    step = -1

    def serving() -> bool:
        nonlocal step
        step += 1
        names["seq_lens"][:] = step + 1
        names["input_ids"][:] = names["token_history"][:ROWS, step] = rng.integers(0, 1000, ROWS)
        names["slot_mapping"][:] = table[:, step // PAGE] * PAGE + step % PAGE
        if step == tamper_at:
            table[0], table[1] = table[1].copy(), table[0].copy()
        return step < 40

    def model(batch: StepBatch) -> None:
        for layer in (*k_layers, *v_layers):
            layer.reshape(-1, 2, 8)[batch.slot_mapping] = rng.random((ROWS, 2, 8), np.float32)

    def capture(_stream: object) -> AbstractContextManager[None]:
        return nullcontext()

    names |= {"serving": serving, "model": model, "capture": capture}
    exec(LOOP, names)
    exec(CAPTURE, names)
    return names["manager"]


def test_the_ten_lines_are_silent_over_an_honest_engine() -> None:
    manager = run(tamper_at=None)
    assert manager.step_number == 40
    assert manager.violations() == ()
    assert manager.prove is not None


def test_the_ten_lines_see_swapped_tables() -> None:
    found = run(tamper_at=20).violations()
    assert {v.request_id for v in found} == {1, 2}
    assert Reason.TOKEN in {r for v in found for r in Reason if r in v.reasons}


def test_the_layouts_are_there_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"layouts": layouts, "kv_caches": [np.zeros((9, 2, PAGE, 16), np.float16)]}
    exec(LAYOUTS, names)
    assert names["pool"].n_blocks == 9
    assert capsys.readouterr().out.startswith("pool 'full' (FULL): 9 blocks of 16 slots, 1 layer")
    for path in re.findall(
        r"`((?:[a-z]+_?[a-z]+)\.[a-z0-9_]+)`", TEXT[TEXT.index("| `layouts.` |") : TEXT.index("## In your stack")]
    ):
        module, name = path.split(".")
        assert callable(getattr(getattr(layouts, module), name)), path


def test_every_constructor_is_in_the_table() -> None:
    for module in (getattr(layouts, name) for name in layouts.__all__):
        for name, value in vars(module).items() if isinstance(module, ModuleType) else ():
            if callable(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                assert f"`{module.__name__.removeprefix('kvcanary.layouts.')}.{name}`" in TEXT


def test_the_moves_carry_what_is_known() -> None:
    manager = run(tamper_at=None)
    slots, copies, new = (list(range(start, start + 16)) for start in (16, 112, 128))
    lists = {"src": slots, "dst": copies, "slots": copies, "new_slots": new}
    exec(MOVES, {"manager": manager, "SlotBundle": SlotBundle, **lists})
    was, *found = (manager.export_slots(s) for s in (slots, copies, new))
    assert was.stamps["position"][0].tolist() == list(range(16))
    assert all(bundle == was for bundle in found)
    for name in re.findall(r"`(\w+_(?:slots|digests|arrays))\(", TEXT):
        assert hasattr(CanaryManager, name), name


def test_the_loop_is_about_ten_lines_and_gives_the_history() -> None:
    lines = [line for line in LOOP.splitlines() if line.strip()]
    assert len(lines) <= 12
    assert "token_history" in LOOP


def test_the_calls_about_blocks_do_what_their_comments_say() -> None:
    pool = KvPool(planes=(), page_size=PAGE, n_blocks=9)
    manager = CanaryManager(CanaryConfig(lifecycle=True, real_data="none"), [pool], 2, 8, backend="host")
    exec(OWNERS, {"manager": manager, "PREFIX_CACHE": PREFIX_CACHE})
    assert [manager.lifecycle.owners(block) for block in (4, 5, 6)] == [(PREFIX_CACHE,), (11,), (11,)]
    assert [manager.lifecycle.epoch(block) for block in (4, 5, 6)] == [1, 2, 2]


def test_the_metrics_are_served_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("prometheus_client", reason='pip install "kvcanary[metrics]"')
    registry = client.CollectorRegistry()
    monkeypatch.setattr(client, "REGISTRY", registry)
    start = client.start_http_server
    monkeypatch.setattr(
        client, "start_http_server", lambda port: servers.append(start(0, addr="127.0.0.1", registry=registry))
    )
    servers: list[Any] = []
    manager = run(tamper_at=20)  # held here: the metrics hold it weakly
    exec(METRICS, {"manager": manager})
    ((server, thread),) = servers
    try:
        with urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert 'kvcanary_steps_total{rank="0"} 40.0' in text
    assert any(float(n) > 0 for n in re.findall(r'kvcanary_violations_total\{.*reason="TOKEN"\} (\S+)', text))
    for name in re.findall(r"`(kvcanary_\w+)`", TEXT):
        assert f"# HELP {name} " in text, name


def test_the_agreement_is_attached() -> None:
    mpi = pytest.importorskip("mpi4py.MPI", reason='needs pip install "kvcanary[mpi]"')
    manager = run(tamper_at=None)
    names: dict[str, Any] = {"manager": manager, "comm": mpi.COMM_SELF, "RankAgreement": RankAgreement}
    exec(RANKS, names)
    assert (names["agreement"].every, names["agreement"].within) == (64, 32)
    manager.close()


def test_every_setting_and_reason_named_in_the_text_exists() -> None:
    settings = {f.name for owner in (CanaryConfig, KvPool) for f in fields(owner)}
    inputs = {f.name for f in fields(StepBatch)}
    for name in set(re.findall(r"`([a-z_]+)=[^`]*`", TEXT)) - {"blocks"}:
        assert name in settings, name
    for name in ("salts", "expected_tokens", "prefix_chain", "pending", "verify_all"):
        assert name in inputs
    for cell in re.findall(r"^\| (`[A-Z_]+`(?: / `[A-Z_]+`)?) \|", TEXT, re.MULTILINE):
        for name in re.findall(r"`([A-Z_]+)`", cell):
            assert name in Reason.__members__, name


def test_the_defaults_in_the_text_are_the_defaults() -> None:
    config = CanaryConfig()
    assert f"`verify_data_every` ({config.verify_data_every})" in TEXT
    assert f"`full_verify_min_tokens` ({config.full_verify_min_tokens})" in TEXT
    assert (config.stats_print_every_n_steps, config.health_check_every_n_steps) == (100, 100)
    assert config.health_check_warmup_steps == 100
