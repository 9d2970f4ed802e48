"""Every specification has a card, every card obeys the schema, and what is generated from them is fresh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torchive.catalogue.generate as generate
from torchive.catalogue.card import CARDS, Card, CardError, load_card
from torchive.catalogue.index import build_index, card_names, class_path_of, get_card
from torchive.catalogue.question import squash
from torchive.catalogue.words import TASKS

NAMES = (Path(__file__).parent / "names.txt").read_text(encoding="utf-8").split()
CHINESE = re.compile(r"[\u4e00-\u9fff]")

GOOD = """
name = "toy"
title = "A Toy"
kind = "losses"
contract = "loss"
tasks = ["detection"]
tags = ["toys"]
en = "Does little."
zh = "几乎什么都不做。"
claim = "None."
baseline = "Nothing."

[paper]
authors = "A. Author"
year = 2020
"""


def test_every_specification_has_its_card() -> None:
    assert len(NAMES) == 148
    assert sorted(path.stem for path in CARDS.glob("*.toml")) == NAMES


def test_generated_files_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_the_index_holds_what_the_files_say() -> None:
    assert list(build_index()) == card_names() == NAMES
    for name in NAMES:
        assert get_card(name) == load_card(CARDS / f"{name}.toml")


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_complete(name: str) -> None:
    card = get_card(name)
    assert len(CHINESE.findall(card.zh)) >= 8
    assert not CHINESE.search(card.en)
    assert card.en.endswith(".")
    assert card.zh.endswith("。")
    assert set(card.tasks) <= set(TASKS)
    assert len(card.tags) >= 3
    assert len(set(card.tags)) == len(card.tags)
    assert card.aliases
    assert len(card.paper.authors) > 3
    assert 1990 <= card.paper.year <= 2030
    for line in (card.title, card.en, card.zh, card.claim, card.baseline):
        assert line == line.strip()
        assert "\n" not in line


@pytest.mark.parametrize("name", [name for name in NAMES if get_card(name).paper.arxiv])
def test_an_arxiv_number_is_well_formed_and_of_its_time(name: str) -> None:
    paper = get_card(name).paper
    found = re.fullmatch(r"(\d\d)(0[1-9]|1[0-2])\.\d{4,5}", paper.arxiv)
    assert found
    assert 0 <= paper.year - (2000 + int(found[1])) <= 3


def test_no_two_cards_share_a_name_an_alias_or_a_preprint() -> None:
    owners: dict[str, str] = {}
    for name in NAMES:
        card = get_card(name)
        for alias in {squash(a) for a in (name, card.title, *card.aliases)} | {card.paper.arxiv} - {""}:
            assert owners.setdefault(alias, name) == name, f"{alias!r} belongs to {owners[alias]} and {name}"


def test_an_alias_leads_to_its_card() -> None:
    assert get_card("GC block").name == "gcnet"
    assert get_card("grad-cam").name == "grad_cam"
    with pytest.raises(KeyError, match="did you mean"):
        get_card("gcnett")


def test_a_planned_method_has_no_class() -> None:
    planned = next(name for name in NAMES if get_card(name).state == "planned")
    with pytest.raises(ValueError, match="planned"):
        class_path_of(planned)


def _load(folder: Path, text: str, name: str = "toy") -> Card:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load_card(path)


def test_the_smallest_good_card_loads(tmp_path: Path) -> None:
    card = _load(tmp_path, GOOD)
    assert (card.name, card.state, card.tasks, card.paper.citation) == (
        "toy",
        "planned",
        ("detection",),
        "A. Author, 2020",
    )


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('kind = "losses"', 'kind = "lossse"', "kind is 'lossse'; allowed"),
        ('contract = "loss"', 'contract = "lossy"', "contract is 'lossy'"),
        ('title = "A Toy"', 'title = "A Toy"\ncolour = "red"', "unknown key 'colour'"),
        ('title = "A Toy"', "", "'title' is missing"),
        ('title = "A Toy"', 'title = ""', "'title' is missing or empty"),
        ('title = "A Toy"', "title = 7", "'title' must be of type str, got 7"),
        ('tags = ["toys"]', 'tags = "toys"', "'tags' must be a list of strings"),
        ('tags = ["toys"]', "tags = [1]", "'tags' must be a list of strings"),
        ('tags = ["toys"]', 'tiny = "small"', "'tiny' must be of type dict"),
        ('title = "A Toy"', 'title = "A Toy"\nstate = "done"', "state is 'done'"),
        ('title = "A Toy"', 'title = "A Toy"\nstate = "built"', "a built card needs class"),
        ("year = 2020", "", "paper: .*year"),
        ("year = 2020", 'year = "2020"', "year must be a whole number"),
        ("year = 2020", "year = 2020\npages = 7", "paper: .*pages"),
        ('name = "toy"', 'name = "joy"', "name is 'joy', the file says 'toy'"),
        ('title = "A Toy"', "title = A Toy", r"toy\.toml: Invalid value"),
    ],
)
def test_a_bad_card_is_refused_with_file_and_reason(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in GOOD
    with pytest.raises(CardError, match=complaint) as caught:
        _load(tmp_path, GOOD.replace(old, new))
    assert str(caught.value).startswith("toy.toml: ")
