"""The examples of the pages run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

DOCS = Path(__file__).parents[1] / "docs"


def run_blocks(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_a_loop_of_your_own_trains_both_detectors() -> None:
    names = run_blocks("detectors.md")
    for key in ("detector", "theirs"):
        model: nn.Module = names[key]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients
        assert all(bool(torch.isfinite(g).all()) for g in gradients)
        assert any(bool(g.any()) for g in gradients)
    assert [found.masks.shape[1:] for found in names["found"]] == [(160, 200), (128, 128)]
