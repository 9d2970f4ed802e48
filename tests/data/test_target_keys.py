"""What a target may hold is said where targets are described."""

from __future__ import annotations

from torchive.ops import images
from torchive.structures import batch


def test_each_key_that_is_handled_is_described() -> None:
    told = batch.__doc__ or ""
    assert [key for key in (*images._ROWS, "ignored", "semantic", "has_boxes") if f"``{key}``" not in told] == []
