"""Objects from tables: ``{class_path, init_args}`` as in recipes."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def resolve(path: str) -> Any:
    """What ``package.module:Name`` or ``package.module.Name`` stands for.

    Raises:
        ValueError: the path has no module, or the module no such name.
    """
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module:
        raise ValueError(f"expected package.module:Name, got {path!r}")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from None


def construct(value: Any) -> Any:
    """The value with every table that has a ``class_path`` replaced by the object it describes, from the inside out."""
    if isinstance(value, dict):
        if "class_path" in value:
            return resolve(value["class_path"])(**construct(value.get("init_args", {})))
        return {key: construct(item) for key, item in value.items()}
    if isinstance(value, list):
        return [construct(item) for item in value]
    return value
