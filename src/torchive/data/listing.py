"""What ``torchive data list`` shows."""

from __future__ import annotations

from torchive.data.sets.registry import SAMPLE_SETS


def data_list_rows() -> list[dict[str, str | bool | None]]:
    """One row for each sample set: what it is, its licence and origin, its packages, and whether the cache has them."""
    return [
        {
            "name": info.name,
            "task": info.task,
            "classes": ", ".join(info.classes),
            "size": info.size,
            "licence": info.licence,
            "commercial": info.commercial,
            "use": info.use,
            "origin": info.origin,
            "packages": ", ".join(map(str, info.packages)),
            "cached": all(package.path.exists() for package in info.packages),
            "description": info.description,
        }
        for info in SAMPLE_SETS.values()
    ]


def render_data_list() -> str:
    """The rows as text: three lines for each sample set."""
    lines = []
    for row in data_list_rows():
        state = "in the cache" if row["cached"] else f"fetched by `torchive data get {row['name']}`"
        lines.append(f"{row['name']:<17} {row['task']:<15} {row['size']}; {state}")
        lines.append(f"{'':<17} {row['description']}")
        lines.append(f"{'':<17} {row['licence']} ({row['use']}); {row['origin']}")
    return "\n".join(lines)
