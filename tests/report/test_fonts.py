"""Names of classes are drawn with their letters, in any alphabet that a font on this machine has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchive.report import fonts
from torchive.report.draw import draw_boxes

MISSING = "\uffff"


def drawn(letter: str, text: str | None = None) -> bytes:
    return bytes(fonts.font_for(text or letter, 20).getmask(letter))


@pytest.mark.parametrize("text", ["Großer Kern", "débris", "ядро", "πυρήνας", "Łódź"])
def test_letters_of_european_alphabets_are_there(text: str) -> None:
    hole = drawn(MISSING, text)
    assert any(hole)
    assert all(drawn(letter, text) != hole for letter in text)
    assert fonts.font_for(text, 20).size == 20


def test_another_font_is_taken_for_what_the_usual_one_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "FAMILIES", ("No Such Font", "STIXGeneral"))
    fonts._file.cache_clear()
    letter = "\u20dd"  # a circle around
    found = fonts.font_for(f"{letter} b", 16)
    assert found.getname()[0] == "STIXGeneral"
    assert drawn(letter) != drawn(MISSING, letter)
    assert fonts.font_for("a b", 16).getname()[0] == "DejaVu Sans"
    fonts._file.cache_clear()


def test_what_no_font_has_is_drawn_as_a_box_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "FAMILIES", ())
    fonts._file.cache_clear()
    assert fonts.font_for("\U000e0fff", 12).getname()[0] == "DejaVu Sans"
    fonts._file.cache_clear()


def test_a_picture_shows_two_names_apart() -> None:
    """Where a letter was missing, both gave the same box."""
    image, box = torch.zeros(3, 300, 300), torch.tensor([[20.0, 60.0, 280.0, 280.0]])
    pictures = [draw_boxes(image, box, torch.tensor([1]), [name, "x"]) for name in ("ß", "д")]
    assert not np.array_equal(*pictures)
