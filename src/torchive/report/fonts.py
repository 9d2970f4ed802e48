"""A font that has the letters of a text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageFont

#: Looked for, in this order, where the font that matplotlib brings lacks a letter: Chinese, Japanese, Korean.
FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "SimHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)


def font_for(text: str, size: int) -> Any:
    """A font of ``size`` pixels for Pillow that has the letters of ``text``, if there is one on this machine.

    Latin, Greek and Cyrillic letters are always there.
    """
    return _opened(_file(frozenset(ord(letter) for letter in text)), size)


@lru_cache(maxsize=512)
def _file(letters: frozenset[int]) -> str:
    import matplotlib

    usual = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    if letters <= _letters(usual):
        return usual
    from matplotlib import font_manager

    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    found = [installed[family] for family in FAMILIES if family in installed]
    return next((path for path in found if letters <= _letters(path)), usual)


@lru_cache(maxsize=16)
def _letters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


@lru_cache(maxsize=64)
def _opened(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size)
