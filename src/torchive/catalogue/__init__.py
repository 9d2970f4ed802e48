"""The cards, the evidence, the search and the verdict. Nothing here imports torch."""

from torchive.catalogue.card import Card, CardError, load_card
from torchive.catalogue.evidence import evidence_of, record_evidence
from torchive.catalogue.index import card_names, class_path_of, get_card, index, public_names
from torchive.catalogue.search import find, list_methods

__all__ = [
    "Card",
    "CardError",
    "card_names",
    "class_path_of",
    "evidence_of",
    "find",
    "get_card",
    "index",
    "list_methods",
    "load_card",
    "public_names",
    "record_evidence",
]
