"""The index of all cards: one generated JSON file, so that a listing need not parse 148 TOML files."""

from __future__ import annotations

import json
from dataclasses import asdict
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchive.catalogue.card import CARDS, Card, load_card, parse_card

INDEX = Path(__file__).with_name("index.json")


def build_index() -> dict[str, dict[str, Any]]:
    """All cards as plain values, by name, read from the TOML files."""
    return {card.name: _plain(card) for card in map(load_card, sorted(CARDS.glob("*.toml")))}


def _plain(card: Card) -> dict[str, Any]:
    values = {key: value for key, value in asdict(card).items() if value not in ("", (), {}, [])}
    return json.loads(json.dumps(values))


@lru_cache(maxsize=1)
def index() -> dict[str, dict[str, Any]]:
    """The generated index: name -> the card's non-empty fields."""
    return json.loads(INDEX.read_text(encoding="utf-8"))


def card_names() -> list[str]:
    """Every method's name, in alphabetical order."""
    return list(index())


@lru_cache(maxsize=256)
def get_card(name: str) -> Card:
    """The card of a method, by its name or an alias.

    Raises:
        KeyError: no such method; the message offers close names.
    """
    entries = index()
    key = name if name in entries else _by_alias(name)
    if key is None:
        close = get_close_matches(_fold(name), [*entries, *_aliases()], n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(dict.fromkeys(_aliases().get(c, c) for c in close))}?" if close else ""
        raise KeyError(f"no method is called {name!r}{hint}")
    return parse_card(dict(entries[key]), f"{key}.toml")


def _fold(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    return {
        _fold(alias): name
        for name, card in index().items()
        for alias in (name, card["title"], *card.get("aliases", ()))
    }


def _by_alias(name: str) -> str | None:
    return _aliases().get(_fold(name))


def public_names() -> dict[str, str]:
    """Public class or function name -> ``module:name``, for the lazy names of ``torchive``."""
    names: dict[str, str] = {}
    for card in index().values():
        path = card.get("class_path", "")
        if path and card["state"] == "built":
            module, _, cls = path.partition(":")
            for public in (cls, *card.get("exports", ())):
                if public in names:
                    raise ValueError(f"two cards export {public}: {names[public]} and {module}")
                names[public] = f"{module}:{public}"
    return names


def class_path_of(name: str) -> str:
    """``module:Class`` of a built method.

    Raises:
        KeyError: no such method. ValueError: it is planned, not built.
    """
    card = get_card(name)
    if card.state != "built":
        raise ValueError(f"{card.name} is planned, not built; `torchive show {card.name}` tells what is known")
    return card.class_path
