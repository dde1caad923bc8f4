"""`kvcanary explain --plot`: the picture of a pool, and the map that it is drawn from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from engine import PAGE
from explain_boxes import three_runs, violation  # noqa: F401  a fixture

from kvcanary.box_reader import read_box
from kvcanary.cli import main
from kvcanary.cli.explain import PLOT_SUFFIXES
from kvcanary.cli.explain_plot import MAX_CELLS, OTHERS, RESERVED, UNKNOWN, map_pool, owners_of
from kvcanary.tags import Detail

POOL = {"name": "full", "kind": "FULL", "page_size": 16, "n_blocks": 40, "reserved_blocks": [0]}


class TestPlot:
    def test_a_picture_is_drawn(self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        image = pytest.importorskip("matplotlib.image", reason='pip install "kvcanary[plot]"')
        assert main(["explain", str(box), "--plot", str(tmp_path / "out.png")]) == 1
        pixels = image.imread(tmp_path / "out.png")
        assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
        red = (pixels[..., 0] > 0.95) & (pixels[..., 1] < 0.2) & (pixels[..., 2] < 0.2)
        assert red.sum() > 100, "the bad slots are marked"
        assert f"drawn: run {read_box(box).runs[2].run}" in capsys.readouterr().out

    def test_any_name_of_a_pool_is_drawn(self, box: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='pip install "kvcanary[plot]"')
        box.write_text(box.read_text().replace('"name":"full"', json.dumps({"name": "$x^$ \udcff\0"})[1:-1]))
        assert main(["explain", str(box), "--plot", str(tmp_path / "out.svg")]) == 1
        assert (tmp_path / "out.svg").stat().st_size > 1000

    def test_the_map_knows_owners_reserved_and_bad_slots(self) -> None:
        own = [violation(slot=s, stamp_owner=7, stamp_step=1, request_id=9) for s in (32, 33, 34)]
        block = violation(slot=50, block_owner=8, block_epoch=1)
        shown = map_pool(POOL, [*own, block])
        flat = shown.cells.reshape(-1)
        assert shown.per_cell == 1 and flat.size >= 640 and shown.owners == (7, 8)
        assert (flat[:16] == RESERVED).all() and (flat[16:32] == UNKNOWN).all()
        assert (
            (flat[32:35] == OTHERS + 1).all() and (flat[48:64] == OTHERS + 2).all() and (flat[64:640] == UNKNOWN).all()
        )
        columns = shown.cells.shape[1]
        assert columns % 16 == 0 and [r * columns + c for r, c in shown.bad] == [32, 33, 34, 50]

    def test_a_stamp_knows_better_than_a_block_and_late_better_than_early(self) -> None:
        found = owners_of(
            [
                violation(slot=4, block_owner=1, block_epoch=1),
                violation(slot=5, stamp_owner=2, stamp_step=1),
                violation(slot=5, stamp_owner=3, stamp_step=2),
                violation(slot=-3, stamp_owner=9, detail=Detail.TABLE_ENTRY),
            ],
            PAGE,
        )
        assert found == ({1: 1}, {5: 3})
        shown = map_pool(
            {**POOL, "page_size": PAGE}, [violation(slot=4, block_owner=1), violation(slot=5, stamp_owner=3)]
        )
        assert shown.cells.reshape(-1)[3:9].tolist() == [
            RESERVED,
            OTHERS + 1,
            OTHERS + 2,
            OTHERS + 1,
            OTHERS + 1,
            UNKNOWN,
        ]

    @pytest.mark.parametrize(
        ("page", "n_blocks"), [(16, 100_000), (1, 1_000_000), (4096, 64), (48, 5000), (1, 7), (100_003, 2)]
    )
    def test_a_map_of_any_pool_is_small_and_finds_its_slots(self, page: int, n_blocks: int) -> None:
        n_slots = page * n_blocks
        bad = sorted({0, n_slots // 3, n_slots - 1})
        pool = {**POOL, "page_size": page, "n_blocks": n_blocks}
        shown = map_pool(pool, [violation(slot=s, stamp_owner=5, stamp_step=1, reasons=1) for s in bad])
        rows, columns = shown.cells.shape
        assert rows * columns < 1.1 * MAX_CELLS + columns
        assert [(r * columns + c) * shown.per_cell for r, c in shown.bad] == [
            s // shown.per_cell * shown.per_cell for s in bad
        ]
        assert page % shown.per_cell == 0 or shown.per_cell % page == 0 or page == 100_003  # a prime
        assert (shown.cells >= 0).sum() == -(-n_slots // shown.per_cell)

    def test_many_owners_share_a_colour(self) -> None:
        owners = [violation(slot=16 + s, stamp_owner=100 + s, stamp_step=1) for s in range(30)]
        shown = map_pool(POOL, owners)
        assert len(shown.owners) == 18 and (shown.cells == OTHERS).sum() == 12

    def test_without_matplotlib_the_command_is_told(
        self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["explain", str(box), "--plot", str(tmp_path / "out.png")]) == 2
        assert 'pip install "kvcanary[plot]"' in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["p.xyz", "p", "png", ".png", "p.pgf", "p.png.gz"])
    def test_a_kind_of_picture_that_is_not_known_is_refused_before_anything_is_read(
        self, box: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(box), "--plot", str(tmp_path / name)]) == 2
        out = capsys.readouterr()
        assert f"{name}: the kind of picture is not known; end it in .png, .svg, .pdf, .jpg, .webp" in out.err
        assert not out.out and not (tmp_path / name).exists()

    @pytest.mark.parametrize("suffix", PLOT_SUFFIXES)
    def test_every_kind_that_is_named_is_drawn(self, box: Path, tmp_path: Path, suffix: str) -> None:
        pytest.importorskip("matplotlib", reason='pip install "kvcanary[plot]"')
        out = tmp_path / f"out{suffix.upper()}"
        assert main(["explain", str(box), "--plot", str(out)]) == 1
        assert out.stat().st_size > 1000

    def test_a_folder_that_is_not_there_is_named_before_anything_is_read(
        self, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(box), "--plot", str(tmp_path / "no" / "out.png")]) == 2
        assert "there is no directory" in capsys.readouterr().err
