"""The examples of the pages run as they stand."""

from __future__ import annotations

import importlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchive.testing import check, checks_of

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(page: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found
    return found


def test_a_loop_of_your_own_trains_both_detectors() -> None:
    (loop,) = (block for block in blocks_of("detectors.md") if "balance_losses" in block)
    names: dict[str, Any] = {}
    exec(compile(loop, "detectors.md", "exec"), names)
    for key in ("detector", "theirs"):
        model: nn.Module = names[key]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients
        assert all(bool(torch.isfinite(g).all()) for g in gradients)
        assert any(bool(g.any()) for g in gradients)
    assert [found.masks.shape[1:] for found in names["found"]] == [(160, 200), (128, 128)]


def test_the_detector_of_forty_lines_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module of one's own; without the costly checks of compilers and exports, and without learning."""
    (block,) = (block for block in blocks_of("detectors.md") if "class OneSquare" in block)
    (tmp_path / "one_square.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    cls = importlib.import_module("one_square").OneSquare
    check(
        partial(cls, num_classes=3, backbone="timm/test_resnet"),
        kind="system",
        only=[c.name for c in checks_of("system") if not c.costly and c.name != "learns"],
        images=[[3, 64, 64], [3, 64, 96]],
        target={"kind": "boxes", "num_classes": 3, "masks": False},
    )
