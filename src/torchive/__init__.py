"""Torchive: an archive of computer-vision papers in which every paper runs.

Every public class stands here by its name, resolved when first asked for; importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not TYPE_CHECKING:
    _VERBS = {
        "compare": "torchive.engine.compare:compare",
        "convert": "torchive.engine.convert:convert",
        "create_model": "torchive.engine.factory:create_model",
        "create_method": "torchive.engine.factory:create_method",
        "find": "torchive.catalogue.search:find",
        "list_methods": "torchive.catalogue.search:list_methods",
        "load_recipe": "torchive.engine.recipe:load_recipe",
        "load_run": "torchive.engine.run:load_run",
        "open_data": "torchive.data:open_data",
        "predict": "torchive.engine.predict:predict",
        "train": "torchive.engine.train:train",
    }

    def _paths() -> dict[str, str]:
        from torchive.catalogue.index import public_names

        return {**_VERBS, **public_names()}

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        path = _VERBS.get(name) or _paths().get(name)
        if path is None:
            raise AttributeError(f"torchive has no {name!r}; `torchive list` shows every method")
        module, _, attribute = path.partition(":")
        value = getattr(import_module(module), attribute)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_paths()})
