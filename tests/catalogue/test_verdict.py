"""The verdict follows from the evidence and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from torchive.catalogue import card_names, get_card
from torchive.catalogue.verdict import (
    adjusted_p,
    judge,
    render_verdicts,
    scale_text,
    update_verdicts,
    verdict_rows,
    verdicts,
)


def measurement(**changes: Any) -> dict[str, Any]:
    entry = {
        "metric": "accuracy",
        "unit": "points",
        "higher_is_better": True,
        "seeds": [0, 1, 2],
        "difference": {"mean": 0.02, "low": 0.01, "high": 0.03, "p": 0.004},
        "ratios": {"latency_1": 1.1, "latency_16": 1.2},
        "export": {"gap": 2e-6},
        "scale": {"data": "solar", "image_size": 64, "network": "timm/resnet18", "budget": "400 steps"},
        "command": "torchive compare x",
    }
    return {**entry, **changes}


PROVED = {"referenced": {"largest_difference": 0.0}}
CARD = get_card("dynamic_relu")


def test_all_of_it_ships() -> None:
    found = judge(CARD, PROVED, [(measurement(), 0.01)])
    assert found.verdict == "ship"
    assert found.why == ("accuracy +2.0 [+1.0, +3.0] points", "latency x 1.20")
    assert found.scale == "solar, 64 px, timm/resnet18, 400 steps, 3 seeds"


def test_the_exported_files_latency_decides_where_it_was_measured() -> None:
    ratios = {"latency_1": 1.5, "latency_16": 1.4}
    quick = {"gap": 2e-6, "latency_ratios": {"latency_1": 1.0, "latency_16": 1.1}}
    slow = {"gap": 2e-6, "latency_ratios": {"latency_1": 1.3, "latency_16": 1.1}}
    assert judge(CARD, PROVED, [(measurement(ratios=ratios, export=quick), 0.01)]).verdict == "ship"
    assert judge(CARD, PROVED, [(measurement(ratios=ratios, export=slow), 0.01)]).why == ("latency x 1.30",)


def test_a_detectors_decoding_counts_where_the_files_leave_it_out() -> None:
    """Both arms of a method that decodes in another way may have the same file."""
    ratios = {"latency_1": 1.1, "latency_16": 1.28}
    file = {"gap": 2e-6, "latency_ratios": {"latency_1": 1.0, "latency_16": 1.0}}
    whole = {**file, "decoded": True}
    for detects in ({"metric": "mask_map", "others": {"map": [0.1, 0.0, 0.2]}}, {"metric": "map"}):
        found = judge(CARD, PROVED, [(measurement(ratios=ratios, export=file, **detects), 0.01)])
        assert found.verdict == "build"
        assert found.why == ("latency x 1.28 of predict, 1.00 of the files, which leave decoding out",)
        assert judge(CARD, PROVED, [(measurement(ratios=ratios, export=whole, **detects), 0.01)]).verdict == "ship"
        assert judge(CARD, PROVED, [(measurement(ratios={}, export=file, **detects), 0.01)]).verdict == "ship"
    slow = {"gap": 2e-6, "latency_ratios": {"latency_1": 1.3, "latency_16": 1.0}}
    assert judge(CARD, PROVED, [(measurement(metric="map", export=slow), 0.01)]).why == ("latency x 1.30",)
    assert judge(CARD, PROVED, [(measurement(ratios=ratios, export=file), 0.01)]).verdict == "ship"


def test_a_setting_where_the_arms_were_identical_says_nothing() -> None:
    idle = {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    worse = {"mean": -0.02, "low": -0.03, "high": -0.01, "p": 0.01}
    found = judge(CARD, PROVED, [(measurement(difference=idle), 1.0), (measurement(difference=worse), 0.01)])
    assert found.why == ("loss: accuracy -2.0 [-3.0, -1.0] points",)


@pytest.mark.parametrize(
    ("changes", "adjusted", "reason"),
    [
        ({"difference": {"mean": 0.01, "low": -0.01, "high": 0.03, "p": 0.2}}, 0.2, "gain unclear"),
        ({"difference": {"mean": -0.02, "low": -0.03, "high": -0.01, "p": 0.01}}, 0.01, "loss"),
        ({"higher_is_better": False}, 0.01, "loss"),
        ({}, 0.06, "luck"),
        ({"export": {"gap": 2e-4}}, 0.01, "2.0e-04"),
        ({"export": {"gap": float("nan")}}, 0.01, "differs"),
        ({"export": {"impossible": "no ONNX form"}}, 0.01, "no ONNX form"),
        ({"export": None}, 0.01, "not exported"),
        ({"ratios": {"latency_1": 1.0, "latency_16": 1.26}}, 0.01, "latency x 1.26"),
        ({"ratios": {}}, 0.01, "latency not measured"),
        ({"restricted": "weights for research only"}, 0.01, "research only"),
    ],
)
def test_one_thing_missing_is_build_with_proof_and_watch_without(
    changes: dict[str, Any], adjusted: float, reason: str
) -> None:
    entry = measurement(**changes)
    found = judge(CARD, PROVED, [(entry, adjusted)])
    assert found.verdict == "build"
    assert len(found.why) == 1
    assert reason in found.why[0]
    assert judge(CARD, {}, [(entry, adjusted)]).verdict == "watch"


def test_a_lower_metric_can_ship() -> None:
    entry = measurement(
        higher_is_better=False, difference={"mean": -0.02, "low": -0.03, "high": -0.01, "p": 0.004}, unit=""
    )
    assert judge(CARD, {}, [(entry, 0.01)]).verdict == "ship"


def test_without_a_comparison_proof_decides() -> None:
    assert judge(CARD, PROVED, []).verdict == "build"
    assert judge(CARD, {"matched": {"largest_difference": 0.0}}, []).verdict == "build"
    assert judge(CARD, {"matched": {"impossible": "no release"}}, []).verdict == "watch"


def test_benjamini_hochberg_equals_scipy() -> None:
    values = np.random.default_rng(0).beta(0.4, 1.0, 40).tolist()
    assert adjusted_p(values) == pytest.approx(false_discovery_control(values).tolist())
    assert adjusted_p([]) == []


def write(folder: Path, name: str, **record: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")


def test_one_lucky_interval_among_many_does_not_ship(tmp_path: Path) -> None:
    names = card_names()[:30]
    for name in names:
        write(tmp_path, name, **PROVED, measured=[measurement(difference={"mean": 0, "low": -1, "high": 1, "p": 0.7})])
    lucky = {"mean": 0.02, "low": 0.001, "high": 0.04, "p": 0.04}
    write(tmp_path, names[3], **PROVED, measured=[measurement(difference=lucky)])
    real = {"mean": 0.05, "low": 0.04, "high": 0.06, "p": 1e-4}
    write(tmp_path, names[7], **PROVED, measured=[measurement(difference=real)])
    found = {v.name: v.verdict for v in verdicts(folder=tmp_path)}
    assert found[names[3]] == "build"
    assert found[names[7]] == "ship"


def test_verdicts_are_written_once_and_shown(tmp_path: Path) -> None:
    write(tmp_path, "dynamic_relu", **PROVED, measured=[measurement()])
    assert "dynamic_relu" in [v.name for v in update_verdicts(folder=tmp_path)]
    assert update_verdicts(folder=tmp_path) == []
    record = json.loads((tmp_path / "dynamic_relu.json").read_text(encoding="utf-8"))
    assert record["verdict"]["verdict"] == "ship"
    assert record["verdict"]["scale"] == scale_text(measurement())
    rows = verdict_rows(folder=tmp_path)
    assert rows[0]["name"] == "dynamic_relu"
    assert "+2.0 [+1.0, +3.0] points" in render_verdicts(rows)
