"""Rewrite what is generated from the cards: the index, the typed stub of the lazy names, the README's table and
the page of the compatibility matrix.

``python -m torchive.catalogue.generate`` writes; ``--check`` only says what is stale, with exit status 1.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from torchive.catalogue.evidence import evidence_of, steps_reached
from torchive.catalogue.index import INDEX, build_index
from torchive.catalogue.matrix import page_text

PACKAGE = Path(__file__).parents[1]
README = PACKAGE.parents[1] / "README.md"
MATRIX_PAGE = PACKAGE.parents[1] / "docs" / "matrix.md"
BEGIN, END = "<!-- built: generated, see `make generate` -->", "<!-- /built -->"


def index_text() -> str:
    """The index as it should stand in the file."""
    return json.dumps(build_index(), indent=0, ensure_ascii=False, sort_keys=True) + "\n"


def stub_text() -> str:
    """The typed stub of ``torchive/__init__.py``."""
    names = []
    for card in build_index().values():
        if card["state"] == "built":
            module, _, cls = card["class_path"].partition(":")
            names += [f"from {module} import {public} as {public}" for public in (cls, *card.get("exports", ()))]
    fixed = [
        "from torchive.catalogue.search import find as find",
        "from torchive.catalogue.search import list_methods as list_methods",
        "from torchive.data import open_data as open_data",
        "from torchive.engine.compare import compare as compare",
        "from torchive.engine.convert import convert as convert",
        "from torchive.engine.factory import create_model as create_model",
        "from torchive.engine.factory import create_method as create_method",
        "from torchive.engine.predict import predict as predict",
        "from torchive.engine.recipe import load_recipe as load_recipe",
        "from torchive.engine.run import load_run as load_run",
        "from torchive.engine.train import train as train",
    ]
    head = '"""Generated from the cards by `make generate`; do not edit."""\n\n'
    return head + "\n".join([*sorted(fixed), *sorted(names)]) + "\n\n__version__: str\n"


def table_text() -> str:
    """The README's table of what is built, with the steps of proof each method has reached."""
    cards = build_index()
    rows = ["| method | kind | proof | verdict | what it does |", "|---|---|---|---|---|"]
    for name, card in cards.items():
        if card["state"] == "built":
            record = evidence_of(name)
            proof = ", ".join(steps_reached(record)) or "none yet"
            verdict = record.get("verdict", {}).get("verdict", "-")
            rows.append(f"| `{name}` | {card['kind']} | {proof} | {verdict} | {card['en']} |")
    states = Counter(card["state"] for card in cards.values())
    return "\n".join(
        [f"{states['built']} of {len(cards)} methods are built; the rest stand in the catalogue as planned.", "", *rows]
    )


def readme_text() -> str:
    """The README with a fresh table between its marks."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table_text()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write the generated files, or check them with ``--check``."""
    check = "--check" in (sys.argv[1:] if arguments is None else arguments)
    targets = {INDEX: index_text(), PACKAGE / "__init__.pyi": stub_text()}
    if README.exists() and BEGIN in README.read_text(encoding="utf-8"):
        targets[README] = readme_text()
        targets[MATRIX_PAGE] = page_text()
    stale = [p for p, text in targets.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'stale' if check else 'wrote'}: {path.name}")
        if not check:
            path.write_text(targets[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
