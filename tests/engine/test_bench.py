"""The bench: both arms, every form, ratios of medians."""

from __future__ import annotations

import json

import pytest

from torchive.engine.bench import bench

SMALL = ["model.init_args.network=timm/test_resnet", "data.image_size=32"]


@pytest.mark.data
@pytest.mark.parametrize("forms", [["eager"], pytest.param(["eager", "onnx"], marks=pytest.mark.slow)])
def test_both_arms_in_each_form(forms: list[str]) -> None:
    report = bench("dynamic_relu", overrides=SMALL, forms=forms, batches=(1, 4), rounds=3)
    rows = [(t.form, t.batch, t.arm) for t in report.timings]
    assert rows == [(f, b, a) for f in forms for b in (1, 4) for a in ("baseline", "method")]
    for first, second in zip(report.timings[::2], report.timings[1::2], strict=True):
        assert first.ratio == 1
        assert second.ratio == pytest.approx(second.median_ms / first.median_ms)
    assert report.operations["method"] > report.operations["baseline"] > 0
    assert json.loads(json.dumps(report.as_dict()))["method"] == "dynamic_relu"
    assert "ratio" in str(report)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="got 'jit'"):
        bench("dynamic_relu", forms=["jit"])
