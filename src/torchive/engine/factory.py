"""Models and methods by name."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torchive.catalogue import class_path_of, get_card


def create_model(name: str, **options: Any) -> Any:
    """A model by name: a built system (``"ssd"``), ``timm/NAME`` or ``torchvision/NAME``.

    Args:
        name: the system's name or alias, or a network of timm or torchvision (random weights).
        options: arguments of its class, such as ``backbone``, ``num_classes`` and ``in_channels``.

    Raises:
        KeyError: no such method. ValueError: it is planned, or a part rather than a model.
        TypeError: an option that its class does not take; the message offers close names.
    """
    if "/" in name:
        from torchive.nn import build_network

        return build_network(name, **{"num_classes": 1000, **options})
    card = get_card(name)
    if card.contract not in ("system", "two_players", "procedure") and card.state == "built":
        how = "torchive.convert" if card.contract == "block" else f"torchive.{card.class_name}"
        raise ValueError(f"{card.name} is a {card.contract}, not a model; use {how}")
    return create_method(name, **options)


def create_method(name: str, **options: Any) -> Any:
    """An instance of any built method's class, by name or alias. Raises as ``create_model`` does."""
    module, _, cls_name = class_path_of(name).partition(":")
    cls = getattr(import_module(module), cls_name)
    signature = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        for option in options:
            if option not in signature:
                close = get_close_matches(option, signature, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"{cls_name} takes no {option!r}{hint} It takes: {', '.join(signature)}")
    return cls(**options)
