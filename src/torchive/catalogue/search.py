"""Finding methods: filters, words of the problem, aliases, typing errors."""

from __future__ import annotations

from fnmatch import fnmatch

from torchive.catalogue.card import Card
from torchive.catalogue.index import card_names, get_card


def list_methods(pattern: str = "*", **filters: object) -> list[str]:
    """Names that match a shell pattern, such as ``"*pool*"``; stub until the search is written."""
    return [name for name in card_names() if fnmatch(name, pattern)]


def find(words: str, limit: int = 10) -> list[Card]:
    """Cards that answer words of a problem, best first."""
    return [get_card(n) for n in card_names() if words in n][:limit]
