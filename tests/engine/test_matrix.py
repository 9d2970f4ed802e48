"""The recorded compatibility matrix is whole, and a sample of its cells is what measuring gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchive.catalogue.matrix import recorded_matrix
from torchive.engine.matrix import GAP, NETWORKS, Cell, blocks, measure_cell, record_matrix

#: One network for each block, another for the next one; one of them is measured among the fast tests.
FAST = "emanet"
SAMPLE = [
    pytest.param(method, list(NETWORKS)[place % len(NETWORKS)], marks=[] if method == FAST else [pytest.mark.slow])
    for place, method in enumerate(blocks())
]


def test_every_block_stands_in_it_with_every_network_and_none_fails() -> None:
    recorded = recorded_matrix()
    assert sorted(recorded) == sorted(blocks())
    for method, row in recorded.items():
        assert list(row) == list(NETWORKS), method
        for network, cell in row.items():
            assert cell["state"] in ("works", "unsteady", "no sense"), (method, network, cell)
            if cell["state"] != "no sense":
                assert (cell["loss"][1] < cell["loss"][0]) == (cell["state"] == "works")
                assert cell.get("gap", 0.0) < GAP or cell["gap"] < 2 * cell.get("rounding", 0.0)
            assert cell["state"] == "works" or cell["why"]
    assert sum(cell["state"] == "unsteady" for row in recorded.values() for cell in row.values()) <= len(recorded) // 10


@pytest.mark.parametrize(("method", "network"), SAMPLE)
def test_a_sample_is_measured_again(method: str, network: str) -> None:
    known, found = recorded_matrix()[method][network], measure_cell(method, network)
    if known["state"] == "unsteady":  # which rounding decides
        assert found.state in ("works", "unsteady")
    else:
        assert (found.state, found.why) == (known["state"], known.get("why", ""))
    if found.state != "no sense":
        assert found.places == known["places"]
        assert list(found.parameters) == known["parameters"]
        assert found.loss[0] == pytest.approx(known["loss"][0], rel=0.02)  # the same start, on any processor
        assert found.gap < GAP or found.gap < 2 * found.rounding
        assert found.keeps == known.get("keeps", False)


def test_a_network_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"network must be one of ResNet-18.*'resnet'"):
        measure_cell("gcnet", "resnet")


def test_cells_are_laid_over_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps({"gcnet": {"ResNet-18": {"state": "fails", "why": "x"}}, "gone": {}}))
    cell = Cell("works", places=2, parameters=(100, 110), loss=(1.0, 0.5), gap=1e-6)
    other = Cell(
        "unsteady", why="y", places=2, parameters=(100, 110), loss=(1.0, 1.5), gap=2.0, rounding=2.0, keeps=True
    )
    text = record_matrix({"gcnet": {"U-Net": cell, "ResNet-50": other}}, path)
    assert list(json.loads(path.read_text())) == ["gcnet"]
    assert "| `gcnet` | **fails** | 2 · ×1.10 · 1e-06 | 2 · ×1.10 · 2e+00 · = · ~ · * |" in text
    assert "- `gcnet`, ResNet-18: x" in text
