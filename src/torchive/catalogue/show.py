"""What ``torchive list``, ``find`` and ``show`` say: plain values for ``--json``, and their text for people."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from shutil import get_terminal_size
from textwrap import fill
from typing import Any

from torchive.catalogue.card import Card
from torchive.catalogue.evidence import evidence_of, steps_reached
from torchive.catalogue.index import get_card, index
from torchive.catalogue.proof import proof_lines
from torchive.catalogue.search import did_you_mean, find, list_methods, verdict_of


def list_rows(
    pattern: str = "*",
    *,
    kind: str | None = None,
    task: str | None = None,
    state: str | None = None,
    verdict: str | None = None,
    year: int | str | None = None,
) -> list[dict[str, Any]]:
    """One row for each method that passes the filters of ``list_methods``; raises as it does."""
    names = list_methods(pattern, kind=kind, task=task, state=state, verdict=verdict, year=year)
    return [_row(name) for name in names]


def find_rows(words: str, limit: int = 10) -> dict[str, Any]:
    """The question, its correction where a word was unknown, and the matches, best first."""
    matches = [{**_row(m.card.name), "score": m.score, "why": m.why} for m in find(words, limit)]
    return {"question": words, "did_you_mean": did_you_mean(words), "matches": matches}


def show_values(name: str) -> dict[str, Any]:
    """All that is known of one method, by its name or an alias.

    Raises:
        KeyError: no such method; the message offers close names.
    """
    card = get_card(name)
    record = evidence_of(card.name)
    values = {key: value for key, value in asdict(card).items() if value not in ("", (), {}, [])}
    values["paper"]["citation"] = card.paper.citation
    if card.paper.arxiv:
        values["paper"]["url"] = f"https://arxiv.org/abs/{card.paper.arxiv}"
    return {
        **values,
        "proof": steps_reached(record),
        "evidence": record,
        "verdict": verdict_of(card.name),
        "use": {"python": _python_lines(card), "shell": _shell_lines(card)} if card.state == "built" else {},
    }


def render_list(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, one line a method, and their count."""
    states = Counter(row["state"] for row in rows)
    count = f"{len(rows)} method{'s' * (len(rows) != 1)}: {states['built']} built, {states['planned']} planned"
    if not rows:
        return "No method passes these filters."
    heads = ("method", "kind", "year", "state", "what it does")
    cells = [(r["name"], r["kind"], str(r["year"]), r["verdict"] or r["state"], r["en"]) for r in rows]
    widths = [max(map(len, column)) for column in zip(heads[:-1], *(c[:-1] for c in cells), strict=True)]
    lines = ["  ".join([*(t.ljust(w) for t, w in zip(c, widths, strict=False)), c[-1]]) for c in (heads, *cells)]
    if sys.stdout.isatty():  # one line a method; a pipe gets the whole text
        lines = [line if len(line) <= _width() else line[: _width() - 1] + "…" for line in lines]
        lines[0] = _bold(lines[0])
    return "\n".join([*lines, "", count])


def render_find(values: Mapping[str, Any]) -> str:
    """The matches with what they do and why they match."""
    lines = []
    if values["did_you_mean"]:
        lines += [f"Did you mean: {values['did_you_mean']}?", ""]
    if not values["matches"]:
        lines.append(f"Nothing answers {values['question']!r}. `torchive list` shows all {len(index())} methods.")
    chinese = re.search(r"[\u3400-\u9fff]", values["question"])
    for match in values["matches"]:
        lines.append(f"{_bold(match['name'])}  {match['kind']}, {match['state']}, {match['year']}")
        lines.append(_wrapped(match["zh"] if chinese else match["en"]))
        lines.append(_wrapped(f"matches: {match['why']}"))
    return "\n".join(lines)


def render_show(values: Mapping[str, Any]) -> str:
    """The card, the steps of proof with their figures, the verdict, what departs, what was found, and how to use it."""
    paper = values["paper"]
    lines = [_bold(f"{values['name']}: {values['title']}"), fill(paper["citation"], _width())]
    lines += [paper["url"]] if "url" in paper else []
    lines += ["", fill(values["en"], _width()), values["zh"], ""]
    facts = {
        "state": values["state"],
        "kind": f"{values['kind']} ({values['contract']})",
        "tasks": ", ".join(values["tasks"]),
        "for": ", ".join(values.get("tags", ())),
        "also called": ", ".join(values.get("aliases", ())),
        "claim": values["claim"],
        "baseline": values["baseline"],
        "verdict": ": ".join(filter(None, (values["verdict"] or "none yet", _reasons(values["evidence"])))),
        "authors' code": ", licence ".join(filter(None, (values.get("code_origin"), values.get("code_licence")))),
        "comparison": values.get("comparison", {}).get("recipe", ""),
    }
    lines += [_fact(key, text) for key, text in facts.items() if text]
    if values["state"] == "built":
        lines += ["", _bold("Proof"), *(_fact(*line) for line in proof_lines(values["evidence"]))]
    for head, key in (("Departs from the paper", "deviations"), ("Found by running it", "findings")):
        if values.get(key):
            lines += ["", _bold(head), *(_item(item) for item in values[key])]
    if values.get("exemptions"):
        lines += ["", _bold("Exempt from")]
        lines += [_item(f"{check}: {reason}") for check, reason in values["exemptions"].items()]
    if values["use"]:
        lines += ["", _bold("Use"), *(f"  {line}" for line in values["use"]["python"])]
        lines += ["", *(f"  $ {line}" for line in values["use"]["shell"])]
    else:
        lines += ["", "Planned: this method is not built yet."]
    return "\n".join(lines)


def _row(name: str) -> dict[str, Any]:
    card = index()[name]
    return {
        "name": name,
        "title": card["title"],
        "kind": card["kind"],
        "contract": card["contract"],
        "tasks": card["tasks"],
        "state": card["state"],
        "year": card["paper"]["year"],
        "proof": steps_reached(evidence_of(name)),
        "verdict": verdict_of(name),
        "en": card["en"],
        "zh": card["zh"],
    }


def _python_lines(card: Card) -> list[str]:
    """Lines that run as they stand, but for the user's own ``model``, ``images`` and ``targets``."""
    plain = {key: value for key, value in card.tiny.get("args", {}).items() if not isinstance(value, dict)}
    options = ", ".join(f"{key}={value!r}" for key, value in plain.items())
    made = f"torchive.{card.class_name}({options})"
    by_contract = {
        "block": [f"layer = {made}"],
        "backbone": [f"backbone = {made}"],
        "loss": [f"loss = {made}", "value = loss(prediction, target)"],
        "system": [f"model = {made}", "losses = model.losses(images, targets)", "found = model.predict(images)"],
        "two_players": [f"networks = {made}", "losses = networks.losses(images, targets, player)"],
        "procedure": [f"procedure = {made}", "losses = procedure.losses(batch)", "model = procedure.deployable()"],
        "search": [f"search = {made}", "architecture = search.ask()", "search.tell(architecture, score)"],
        "explanation": [f"maps = {made}.explain(model, images, target)"],
        "metric": [f"metric = {made}", "metric.update(prediction, target)", "value = metric.compute()"],
    }
    convert = [f'report = torchive.convert(model, "{card.name}")  # any timm, torchvision or own network']
    return ["import torchive", *(convert if card.host else []), *by_contract[card.contract]]


def _shell_lines(card: Card) -> list[str]:
    lines, data = ["pip install torchive"], _data_of(card)
    if card.contract in ("system", "two_players", "procedure"):
        lines.append(f"torchive train {card.name} --data {data}")
    if card.comparison:
        lines.append(f"torchive compare {card.name} --data {data}")
    return lines


def _data_of(card: Card) -> str:
    """Data of the user as the method's recipe takes them."""
    task = str((card.comparison or {}).get("recipe", "")).partition("/")[0]
    if task == "detection" or {"detection", "instance-segmentation"} & set(card.tasks[:1]):
        return "coco:annotations.json,images/"
    return "masks:images/,masks/" if task == "segmentation" else "folder:my_images"


def _reasons(record: Mapping[str, Any]) -> str:
    verdict = record.get("verdict", {})
    return "; ".join(filter(None, (*verdict.get("why", ()), verdict.get("scale", ""))))


def _fact(key: str, text: str) -> str:
    return fill(text, _width(), initial_indent=key.ljust(15), subsequent_indent=" " * 15, break_on_hyphens=False)


def _wrapped(text: str) -> str:
    return fill(text, _width(), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _item(text: str) -> str:
    return fill(text, _width(), initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _width() -> int:
    return max(get_terminal_size((100, 24)).columns, 40) if sys.stdout.isatty() else 100


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
