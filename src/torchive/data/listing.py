"""What ``torchive data list`` shows."""

from __future__ import annotations

from torchive.data.sets.registry import SAMPLE_SETS


def data_list_rows() -> list[dict[str, str | bool]]:
    """One row for each sample set: what it is, its licence and origin, its packages, and whether the cache has them."""
    return [
        {
            "name": info.name,
            "task": info.task,
            "classes": ", ".join(info.classes),
            "size": info.size,
            "licence": info.licence,
            "commercial": info.commercial,
            "origin": info.origin,
            "packages": ", ".join(map(str, info.packages)),
            "cached": all(package.path.exists() for package in info.packages),
            "description": info.description,
        }
        for info in SAMPLE_SETS.values()
    ]
