"""Annotations as text."""

from __future__ import annotations


def voc_xml(number: int, box: tuple[int, ...], name: str = "cat") -> str:
    """An annotation with one object, which stands in line 4."""
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return (
        f"<annotation>\n<filename>{number}.png</filename>\n<size><width>16</width><height>12</height></size>\n"
        f"<object>\n<name>{name}</name><bndbox>{sides}</bndbox></object>\n</annotation>\n"
    )
