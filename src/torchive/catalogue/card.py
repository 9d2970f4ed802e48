"""A method's data sheet: a TOML file read into a frozen ``Card``, and the rules it must obey."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

CARDS = Path(__file__).with_name("cards")

#: The folders of ``methods/``; a card's ``kind``.
KINDS = (
    "blocks",
    "backbones",
    "losses",
    "classification",
    "detection",
    "segmentation",
    "matting",
    "video",
    "language",
    "faces",
    "pose",
    "text",
    "synthesis",
    "recommendation",
    "training",
    "search",
    "explanation",
    "metrics",
)
CONTRACTS = ("block", "backbone", "loss", "system", "two_players", "procedure", "search", "explanation", "metric")
STATES = ("planned", "built")


class CardError(ValueError):
    """A card breaks the schema; the message names the file, the key and the rule."""


@dataclass(frozen=True)
class Paper:
    """Where the method was published; ``arxiv`` is the bare number, empty where there is none."""

    authors: str
    year: int
    venue: str = ""
    arxiv: str = ""

    @property
    def citation(self) -> str:
        """Authors, venue and year in one line."""
        where = f"{self.venue} {self.year}" if self.venue else str(self.year)
        return f"{self.authors}, {where}" + (f", arXiv:{self.arxiv}" if self.arxiv else "")


@dataclass(frozen=True)
class Card:
    """One method. Planned cards fill the first block; built ones all that applies.

    Attributes:
        name: the stem of the module, the card, the test and the specification.
        kind: the folder under ``methods/``; one of ``KINDS``.
        contract: one of ``CONTRACTS``.
        tags: words of the problems it addresses ("long tail", "tiny batch"), for the search.
        en, zh: what it does, one line in English and one in Chinese.
        claim: the paper's headline as a testable statement; baseline: what it is measured against.
        class_path: ``package.module:Class`` of the public class.
        exports: further public names of the module.
        tiny: arguments and inputs of a test-sized instance (see ``torchive.testing``).
        host: how it enters a known network (see ``torchive.convert``).
        variants: named networks of the paper: their arguments and parameter counts.
        comparison: the recipe and the two arms of its comparison.
        deviations: what departs from the paper, one sentence each.
        exemptions: conformance check -> reason; each is run to prove that it still fails.
        findings: what was found by running, including answers to lines marked (unconfirmed).
        code_origin, code_licence: the authors' release, for facts and parity only.
    """

    name: str
    title: str
    kind: str
    contract: str
    tasks: tuple[str, ...]
    paper: Paper
    en: str
    zh: str
    claim: str
    baseline: str
    state: str = "planned"
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    class_path: str = ""
    exports: tuple[str, ...] = ()
    tiny: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    exemptions: dict[str, str] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    code_origin: str = ""
    code_licence: str = ""

    @property
    def class_name(self) -> str:
        """The public class's bare name; empty while planned."""
        return self.class_path.rpartition(":")[2]


_TUPLES = {"tasks", "aliases", "tags", "exports", "deviations", "findings"}
_RENAMED = {"class": "class_path"}
_PLAIN = {"str": str, "dict[str, Any]": dict, "dict[str, str]": dict}  # annotations that one isinstance can check


def parse_card(values: dict[str, Any], source: str) -> Card:
    """Build and check a card from parsed TOML.

    Raises:
        CardError: an unknown or missing key, a wrong type, or a value outside its list.
    """
    known = {f.name: f for f in fields(Card)}
    values = {_RENAMED.get(key, key): value for key, value in values.items()}
    for key in values:
        if key not in known:
            raise CardError(f"{source}: unknown key {key!r}")
    required = ("name", "title", "kind", "contract", "tasks", "paper", "en", "zh", "claim", "baseline")
    for key in required:
        if not values.get(key):
            raise CardError(f"{source}: {key!r} is missing or empty")
    for key, value in values.items():
        wanted = _PLAIN.get(str(known[key].type))
        if wanted and not isinstance(value, wanted):
            raise CardError(f"{source}: {key!r} must be of type {wanted.__name__}, got {value!r}")
    for key in _TUPLES & set(values):
        if not isinstance(values[key], list) or not all(isinstance(item, str) for item in values[key]):
            raise CardError(f"{source}: {key!r} must be a list of strings")
        values[key] = tuple(values[key])
    try:
        values["paper"] = Paper(**values["paper"])
    except TypeError as error:
        raise CardError(f"{source}: paper: {error}") from None
    if not isinstance(values["paper"].year, int):
        raise CardError(f"{source}: paper: year must be a whole number, got {values['paper'].year!r}")
    card = Card(**values)
    for key, allowed in (("kind", KINDS), ("contract", CONTRACTS), ("state", STATES)):
        if getattr(card, key) not in allowed:
            raise CardError(f"{source}: {key} is {getattr(card, key)!r}; allowed: {', '.join(allowed)}")
    if card.state == "built" and not card.class_path.startswith("torchive.methods."):
        raise CardError(
            f"{source}: a built card needs class = 'torchive.methods.KIND.MODULE:Class', got {card.class_path!r}"
        )
    return card


def load_card(path: Path) -> Card:
    """Read one card file; its stem must be its name.

    Raises:
        CardError: the file is not TOML or breaks the schema.
    """
    import tomllib  # the catalogue's index needs none

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise CardError(f"{path.name}: {error}") from None
    card = parse_card(values, path.name)
    if card.name != path.stem:
        raise CardError(f"{path.name}: name is {card.name!r}, the file says {path.stem!r}")
    return card
