"""Finding methods: filters, words of the problem, aliases, typing errors. Reads the generated index alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import pairwise
from math import log
from typing import Any

from torchive.catalogue.card import KINDS, STATES, Card
from torchive.catalogue.evidence import evidence_of
from torchive.catalogue.index import get_card, index
from torchive.catalogue.question import (
    PROBLEM,
    Concept,
    Phrase,
    concepts_of,
    squash,
    stem,
    synonym_words,
    words_of,
)
from torchive.catalogue.words import TASKS

VERDICTS = ("ship", "build", "watch")
#: How much a hit in each field of a card is worth.
FIELDS = {
    "name": 0.8,
    "alias": 0.8,
    "tag": 0.9,
    "title": 0.75,
    "task": 0.6,
    "en": 0.6,
    "kind": 0.4,
    "authors": 0.4,
    "claim": 0.35,
}
RARITY = 0.35  # what rarity adds to the weight of a concept
UNKNOWN = 0.4  # weight of an unknown word beside a known problem
LEAST_SHARE = 0.45  # share of a question's weight that a card must answer
LEAST_NAMED = 0.34  # the same where the question names a problem
LEAST_SCORE, LEAST_OF_BEST = 0.3, 0.3  # scores below this, or this share of the best, are not shown
NEAR, BUILT = 0.15, 0.02  # added where the whole question stands in one text, and where the method is built


@dataclass(frozen=True)
class Match:
    """A card that answers a question.

    Attributes:
        card: the method.
        score: about 1 for a full literal answer, about 2 for a name or alias.
        why: the words of the card that answer.
    """

    card: Card
    score: float
    why: str

    def __str__(self) -> str:
        return f"{self.card.name}: {self.card.en} ({self.why})"


def list_methods(
    pattern: str = "*",
    *,
    kind: str | None = None,
    task: str | None = None,
    state: str | None = None,
    verdict: str | None = None,
    year: int | str | None = None,
) -> list[str]:
    """Names of methods, in alphabetical order.

    Args:
        pattern: shell pattern over names, such as ``"*pool*"``.
        kind: folder under ``methods/``, such as ``"blocks"``. task: one of ``words.TASKS``. state: planned or built.
        verdict: ship, build or watch. year: 2019 or ``"2018-2020"``, both ends included.

    Raises:
        ValueError: a filter's value that no card can have; the message offers close ones.
    """
    for what, value, allowed in (
        ("kind", kind, KINDS),
        ("task", task, TASKS),
        ("state", state, STATES),
        ("verdict", verdict, VERDICTS),
    ):
        if value is not None and value not in allowed:
            close = get_close_matches(str(value), allowed, n=2)
            raise ValueError(
                f"{what} is {value!r}; " + (f"did you mean {' or '.join(close)}?" if close else _one_of(allowed))
            )
    years = None if year is None else _years(year)
    return [
        name
        for name, card in index().items()
        if fnmatchcase(name, pattern.lower())
        and kind in (None, card["kind"])
        and (task is None or task in card["tasks"])
        and state in (None, card["state"])
        and (years is None or card["paper"]["year"] in years)
        and (verdict is None or verdict_of(name) == verdict)
    ]


def verdict_of(name: str) -> str:
    """The recorded verdict of a method: ship, build or watch; empty where none was recorded."""
    recorded = evidence_of(name).get("verdict", {})
    return str(recorded.get("verdict", "")) if isinstance(recorded, dict) else str(recorded)


def find(words: str, limit: int = 10) -> list[Match]:
    """Methods that answer words of a problem, a name, an alias or Chinese words, best first; empty if nothing fits.

    Raises:
        ValueError: ``limit`` below one.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    concepts = _concepts(words)
    corpus = _corpus()
    answers = [[_answer(entry, concept) for concept in concepts] for entry in corpus]
    importance = _importance(concepts, answers)
    whole = squash(words)
    near = _near_names(whole) if any(c.corrected or not c.answers for c in concepts) else {}
    scored = []
    for entry, given in zip(corpus, answers, strict=True):
        score, why = _score(entry, concepts, importance, given)
        if whole and whole in entry.names:
            score, why = score + 1.0 if score else 2.0, ["name or alias"]
        elif entry.name in near:
            score, why = score + 0.8, [f"close to {near[entry.name]}"]
        if score:
            scored.append((score, entry.name, why))
    scored.sort(key=lambda s: (-s[0], s[1]))
    least = max(LEAST_OF_BEST * scored[0][0], LEAST_SCORE) if scored else 0.0
    return [Match(get_card(n), round(s, 3), ", ".join(why)) for s, n, why in scored[:limit] if s >= least]


def did_you_mean(words: str) -> str | None:
    """The question with its unknown words corrected; none where every word is known or nothing is close."""
    right = {c.literal: c.corrected for c in _concepts(words) if c.corrected}
    return " ".join(right.get(word, word) for word in words_of(words)) if right else None


@dataclass(frozen=True)
class _Entry:
    """What a card says, as stems."""

    name: str
    built: bool
    names: frozenset[str]  # name, title and aliases without spaces and marks
    texts: tuple[tuple[str, str, Phrase], ...]  # field, text, stems
    fields: dict[str, str]  # stem -> the weightiest field that holds it
    words: dict[str, str]  # stem -> the first word that has it, "" if an author's name
    zh: str


@lru_cache(maxsize=1)
def _corpus() -> tuple[_Entry, ...]:
    return tuple(_entry(name, card) for name, card in index().items())


def _entry(name: str, card: dict[str, Any]) -> _Entry:
    aliases = card.get("aliases", [])
    texts = [("name", name), ("title", card["title"]), ("en", card["en"]), ("kind", card["kind"])]
    texts += [("authors", card["paper"]["authors"]), ("claim", card["claim"])]
    texts += [("alias", alias) for alias in aliases]
    texts += [("tag", tag) for tag in card.get("tags", ())]
    texts += [("task", task) for task in card["tasks"]]
    words: dict[str, str] = {}
    stemmed = []
    for kind, text in texts:
        said = words_of(text)
        phrase = tuple(map(stem, said))
        stemmed.append((kind, text, phrase))
        for s, word in zip(phrase, said, strict=True):
            words.setdefault(s, word if kind != "authors" else "")
    fields: dict[str, str] = {}
    for kind, _, phrase in stemmed:
        joined = ["".join(pair) for pair in pairwise(phrase)] if kind in ("name", "alias", "tag") else []
        for s in (*phrase, *joined):
            if FIELDS[kind] > FIELDS.get(fields.get(s, ""), 0.0):
                fields[s] = kind
    names = frozenset(squash(n) for n in (name, card["title"], *aliases))
    return _Entry(name, card["state"] == "built", names, tuple(stemmed), fields, words, card["zh"])


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, str]:
    """Every stem of the cards and of the synonyms -> a word that has it."""
    known: dict[str, str] = {}
    for entry in _corpus():
        for s, word in entry.words.items():
            known.setdefault(s, word)
    for word in synonym_words():
        known.setdefault(stem(word), word)
    for entry in _corpus():
        for s in entry.fields:
            known.setdefault(s, s)
    return known


def _near_names(whole: str) -> dict[str, str]:
    """Methods of which a name is like the question as a whole -> that name."""
    owners = {name: entry.name for entry in _corpus() for name in entry.names}
    close = get_close_matches(whole, owners, n=3, cutoff=0.88) if len(whole) > 4 else []
    return {owners[name]: name for name in reversed(close)}


@lru_cache(maxsize=64)
def _concepts(words: str) -> tuple[Concept, ...]:
    return tuple(concepts_of(words, _vocabulary()))


def _importance(concepts: Sequence[Concept], answers: Sequence[Sequence[tuple[float, str]]]) -> list[float]:
    """What each concept counts: rare ones more, names of problems more, unknown words less once a problem is named."""
    held = [sum(given[k][0] > 0.3 for given in answers) for k in range(len(concepts))]
    named = any(c.weight == PROBLEM and n for c, n in zip(concepts, held, strict=True))
    return [
        (1 + RARITY * log((len(answers) + 1) / (n + 1))) * (c.weight if n or not named else UNKNOWN)
        for c, n in zip(concepts, held, strict=True)
    ]


def _score(
    entry: _Entry, concepts: Sequence[Concept], importance: list[float], answers: Sequence[tuple[float, str]]
) -> tuple[float, list[str]]:
    total = sum(importance)
    got = share = 0.0
    why: list[str] = []
    for weight, (value, reason) in zip(importance, answers, strict=True):
        if value:
            got += weight * value
            share += weight
            if reason not in why:
                why.append(reason)
    if not total or share < total * (LEAST_NAMED if any(c.weight == PROBLEM for c in concepts) else LEAST_SHARE):
        return 0.0, []
    literal = tuple(s for c in concepts if c.answers for s in c.answers[0][0])
    near = NEAR if len(concepts) > 1 and any(_holds(phrase, literal) for _, _, phrase in entry.texts) else 0.0
    return got / total * (0.5 + 0.5 * share / total) + near + (BUILT if entry.built else 0.0), why


def _answer(entry: _Entry, concept: Concept) -> tuple[float, str]:
    """How well a card answers a concept, 0 to about 1, and the words that do."""
    best, reason = 0.0, ""
    hits = set()
    for phrase, worth in concept.answers:
        value, text = _hit(entry, phrase)
        if value:
            hits.add(text)
        if worth * value > best:
            best, reason = worth * value, text
    if concept.chinese:
        pairs = ["".join(pair) for pair in pairwise(concept.chinese)]
        value = 0.85 * sum(pair in entry.zh for pair in pairs) / len(pairs)
        if value > max(best, 0.5):
            best, reason = value, concept.chinese
    return best + min(0.03 * (len(hits) - 1), 0.12) if hits else best, reason


def _hit(entry: _Entry, phrase: Phrase) -> tuple[float, str]:
    """What a card's best text with all stems of the phrase is worth, more where they stand together or alone."""
    if any(s not in entry.fields for s in phrase):
        return 0.0, ""
    best, reason, several = 0.0, "", -1
    for kind, text, held in entry.texts:
        if _holds(held, phrase):
            value = FIELDS[kind] * (1.1 if len(held) == len(phrase) else 1.0)
        elif len(phrase) > 1 and set(phrase) <= set(held):
            value = FIELDS[kind] * 0.6
        else:
            continue
        several += 1
        if value > best:
            best, reason = value, text if kind in ("tag", "alias", "name") else " ".join(phrase)
    if not best and len(phrase) == 1:  # two words of a name or tag, written as one
        return FIELDS[entry.fields[phrase[0]]], phrase[0]
    return best + min(0.03 * several, 0.12) if best else 0.0, reason


def _holds(held: Phrase, phrase: Phrase) -> bool:
    n = len(phrase)
    return bool(n) and any(held[i : i + n] == phrase for i in range(len(held) - n + 1))


def _years(year: int | str) -> range:
    parts = re.fullmatch(r"\s*(\d{4})\s*(?:-\s*(\d{4})\s*)?", str(year))
    if not parts or (parts[2] and int(parts[2]) < int(parts[1])):
        raise ValueError(f"year is {year!r}; expected a year such as 2019 or a span such as 2018-2020")
    return range(int(parts[1]), int(parts[2] or parts[1]) + 1)


def _one_of(allowed: tuple[str, ...]) -> str:
    return f"expected one of {', '.join(allowed)}"
