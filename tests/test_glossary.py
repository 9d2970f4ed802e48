"""One word for one idea: the constructors of all public classes of the methods speak one glossary."""

from __future__ import annotations

import inspect

import pytest

from torchive.catalogue import get_card
from torchive.testing import built_methods
from torchive.testing.construct import resolve
from torchive.testing.glossary import GLOSSARY


def _classes(name: str) -> list[type]:
    card = get_card(name)
    module = card.class_path.partition(":")[0]
    found = [resolve(f"{module}:{public}") for public in (card.class_name, *card.exports)]
    return [cls for cls in found if inspect.isclass(cls)]


@pytest.mark.parametrize("name", built_methods())
def test_constructor_words_are_in_the_glossary(name: str) -> None:
    for cls in _classes(name):
        words = [word for word in inspect.signature(cls).parameters if word not in GLOSSARY]
        assert not words, (
            f"{cls.__name__} takes {', '.join(words)}. Is there a word for it in src/torchive/testing/glossary.py? "
            "Then use that; else add a line there that says what it means."
        )


@pytest.mark.parametrize("name", built_methods())
def test_options_are_given_by_name(name: str) -> None:
    """At most the first argument is given by position; it has no default, or is the network."""
    for cls in _classes(name):
        kinds = inspect.Parameter
        given = [p for p in inspect.signature(cls).parameters.values() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
        with_default = [p.name for p in given[1:] if p.default is not kinds.empty]
        assert not with_default, f"{cls.__name__}: {', '.join(with_default)} should be keyword-only"


def test_every_line_of_the_glossary_says_something() -> None:
    short = [word for word, meaning in GLOSSARY.items() if len(meaning.split()) < 2]
    assert not short, f"no meaning: {', '.join(short)}"
    assert len(set(GLOSSARY.values())) == len(GLOSSARY), "two words have one meaning"
