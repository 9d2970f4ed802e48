"""What a user asks for: words to stems, and a question to concepts with the phrases that may answer each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from torchive.catalogue.words import ALSO, CHINESE, EMPTY, SAME

Phrase = tuple[str, ...]

SYNONYM, PREFIX, CORRECTED = 0.8, 0.7, 0.85  # what is left of a hit that is not literal
PROBLEM, GENERIC = 1.5, 0.5  # weights of words that name a problem, and of words such as "image"
_WORD = re.compile(r"[a-z0-9]+")
_CHINESE = re.compile(r"[\u3400-\u9fff]+")
_ENDINGS = re.compile(
    r"((?<=if)(ications?|iers?|ies|ied|y)|isations?|izations?|ations?|itions?|ions?|ised|ized|ising|izing|isers?|izers?|ises|izes|ise|ize"
    r"|ings?|ers?|ors?|ed|es|s|e)$"
)


@dataclass(frozen=True)
class Concept:
    """One idea of a question.

    Attributes:
        literal: the user's words.
        answers: stems that a card may hold instead, and what a hit on them is worth, 0 to 1.
        chinese: Chinese characters to look for in the Chinese line; empty for others.
        corrected: the known word that an unknown one was taken for; empty where nothing was corrected.
        weight: what the concept counts beside its rarity: ``PROBLEM`` where its words are the name of a problem.
    """

    literal: str
    answers: tuple[tuple[Phrase, float], ...]
    chinese: str = ""
    corrected: str = ""
    weight: float = 1.0


def words_of(text: str) -> list[str]:
    """Latin words and numbers in lower case; ``++`` counts as the word ``pp``."""
    return _WORD.findall(text.lower().replace("++", " pp"))


def squash(text: str) -> str:
    """A name without spaces, marks and capitals, so that "Grad-CAM", "gradcam" and "grad_cam" are one."""
    return "".join(words_of(text))


@lru_cache(maxsize=8192)
def stem(word: str) -> str:
    """The word without its ending, so that plurals and forms of one verb meet: recognise, recognition, recogniser."""
    if len(word) < 4 or word.endswith("ss") or not word.isalpha() or word == "matter":  # which is no mat, nor matte
        return word
    bare = _ENDINGS.sub("", word)
    if bare == word or (word.endswith("ies") and not bare.endswith("if")):
        bare = re.sub("(ies|y)$", "i", word)
    if len(bare) < 3:
        return word
    return bare[:-1] if len(bare) > 4 and bare[-1] == bare[-2] and bare[-1] in "lmnptg" else bare


def stems(text: str) -> Phrase:
    """The stems of a text, in order."""
    return tuple(stem(word) for word in words_of(text))


def concepts_of(question: str, vocabulary: Mapping[str, str]) -> list[Concept]:
    """The concepts of a question, in order; the longest known phrases first.

    Args:
        question: English or Chinese words, mixed as one likes.
        vocabulary: stems of cards and synonyms -> a word that has each, or "" where nobody means it by mistake.
    """
    found = []
    for run in _CHINESE.findall(question):
        found += _chinese_concepts(run)
    tokens = [word for word in words_of(question) if word not in EMPTY]
    known, table, i = [stem(word) for word in tokens], _synonyms(), 0
    problems = {_phrase(p) for group in SAME for p in group}
    while i < len(tokens):
        for n in range(min(5, len(tokens) - i), 0, -1):
            phrase = tuple(known[i : i + n])
            if phrase in table:
                others = tuple((p, SYNONYM) for p in table[phrase])
                found.append(
                    Concept(
                        " ".join(tokens[i : i + n]),
                        ((phrase, 1.0), *others),
                        weight=PROBLEM if phrase in problems else GENERIC,
                    )
                )
                break
        else:
            n = 1
            found.append(_single(tokens[i], vocabulary))
        i += n
    return found


def synonym_words() -> list[str]:
    """Every word of the synonyms."""
    return [word for group in (*SAME, *ALSO) for phrase in group for word in words_of(phrase)]


def _single(token: str, vocabulary: Mapping[str, str]) -> Concept:
    bare = stem(token)
    if bare in vocabulary:
        return Concept(token, (((bare,), 1.0),))
    longer = [s for s in vocabulary if len(bare) >= 4 and s.startswith(bare)]
    if longer:
        return Concept(token, tuple(((s,), PREFIX) for s in longer))
    surfaces = {word: s for s, word in vocabulary.items() if word[:1] == token[0] and abs(len(word) - len(token)) < 3}
    close = get_close_matches(token, surfaces, n=1, cutoff=0.82) if len(token) >= 4 else []
    if not close:
        return Concept(token, ())
    right = surfaces[close[0]]
    others = tuple((p, CORRECTED * SYNONYM) for p in _synonyms().get((right,), ()))
    return Concept(token, (((right,), CORRECTED), *others), corrected=close[0])


def _chinese_concepts(run: str) -> list[Concept]:
    found, rest, i = [], "", 0
    while i < len(run):
        for n in range(min(6, len(run) - i), 1, -1):
            known = run[i : i + n]
            if known in CHINESE:
                phrase = stems(CHINESE[known])
                others = tuple((p, SYNONYM) for p in _synonyms().get(phrase, ()))
                found.append(Concept(known, ((phrase, 0.9), *others), chinese=known, weight=PROBLEM))
                break
        else:
            n = 1
            rest += run[i]
        i += n
    return [*found, Concept(rest, (), chinese=rest)] if len(rest) > 1 else found


@lru_cache(maxsize=1)
def _synonyms() -> dict[Phrase, tuple[Phrase, ...]]:
    table: dict[Phrase, tuple[Phrase, ...]] = {}
    for group in (*SAME, *ALSO):
        phrases = tuple(dict.fromkeys(map(_phrase, group)))
        for phrase in phrases:
            table[phrase] = (*table.get(phrase, ()), *(p for p in phrases if p != phrase))
    return table


def _phrase(text: str) -> Phrase:
    return tuple(stem(word) for word in words_of(text) if word not in EMPTY)
