"""Two methods apart and together: do their gains add?

Three comparisons against one baseline, with the same seeds: the first method, the second, and both in one network.
Where the baseline starts equal in two of them, it is trained once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchive.catalogue import get_card
from torchive.catalogue.card import Card
from torchive.engine.arms import Arm, ComparisonError, card_changes, make_arms, short_title, with_budget
from torchive.engine.checkpoint import write_atomically
from torchive.engine.comparison import REPORT, Comparison
from torchive.report.summary import SCHEMA
from torchive.report.together import TOGETHER, TogetherSummary, summarise_together


@dataclass(frozen=True)
class Together:
    """The three comparisons. Printing it shows the table and the report's path.

    Attributes:
        folder: of the whole; each comparison has a folder below it.
        comparisons: "first", "second" and "both".
    """

    folder: Path
    comparisons: dict[str, Comparison]

    @property
    def summary(self) -> TogetherSummary:
        """The three differences, and that of the sum, with their intervals."""
        return summarise_together(self.folder)

    @property
    def report(self) -> Path:
        """The HTML file."""
        return self.folder / REPORT

    def __str__(self) -> str:
        from torchive.report.terminal import together_text

        return together_text(self.folder, self.report)


def parse_together(text: str) -> tuple[str, str]:
    """The two names of "first+second". Raises ComparisonError."""
    names = [part.strip() for part in text.split("+")]
    if len(names) != 2 or not all(names):
        raise ComparisonError(f"two methods together are written like 'gcnet+dynamic_relu', got {text!r}")
    first, second = (get_card(name).name for name in names)
    if first == second:
        raise ComparisonError(f"two methods together must be different ones, got {text!r}")
    return first, second


def together_arms(
    names: tuple[str, str], *, recipe: str | None, data: str | None, overrides: Sequence[str]
) -> dict[str, tuple[Arm, Arm]]:
    """Baseline and method of "first", "second" and "both".

    A method contributes its own arm's changes where it is in, and its baseline's where it is not.

    Raises:
        ComparisonError: both set one field to different values. Otherwise as ``make_arms``.
    """
    cards = [get_card(name) for name in names]
    known = [str(card.comparison["recipe"]) for card in cards if card.comparison.get("recipe")]
    chosen = recipe or (known[0] if known else None)
    plain = [dict(card.comparison.get("baseline", {})) for card in cards]
    own = [card_changes(card) for card in cards]
    sides = {"first": (own[0], plain[1]), "second": (plain[0], own[1]), "both": (own[0], own[1])}
    baseline = merged(*plain, names=names)
    arms = {}
    for side, changes in sides.items():
        one, other = make_arms(
            cards[0].name,
            recipe=chosen,
            data=data,
            overrides=overrides,
            baseline=baseline,
            method_overrides=merged(*changes, names=names),
        )
        against = one.title.replace("without it", "without them") if side == "both" else one.title
        arms[side] = replace(one, title=against), replace(other, title=_title(side, cards))
    return arms


def _title(side: str, cards: Sequence[Card]) -> str:
    titles = [short_title(card) for card in cards]
    return {"first": titles[0], "second": titles[1], "both": " with ".join(titles)}[side]


def merged(
    one: Mapping[str, Any], other: Mapping[str, Any], *, names: tuple[str, str], where: str = ""
) -> dict[str, Any]:
    """Changes of both: lists one after the other, nested values together. Raises ComparisonError where they differ."""
    result = dict(one)
    for key, value in other.items():
        here = f"{where}.{key}" if where else key
        if key not in result or (result[key] == value and not isinstance(value, list)):
            result[key] = value
        elif isinstance(value, Mapping) and isinstance(result[key], Mapping):
            result[key] = merged(result[key], value, names=names, where=here)
        elif isinstance(value, list) and isinstance(result[key], list):
            result[key] = [*result[key], *value]
        else:
            raise ComparisonError(
                f"{names[0]} and {names[1]} cannot be joined: "
                f"{here} is {result[key]!r} for one and {value!r} for the other"
            )
    return result


def compare_together(
    method: str,
    *,
    command: str,
    recipe: str | None,
    data: str | None,
    seeds: Sequence[int],
    budget: str | None,
    overrides: Sequence[str],
    margin: float,
    out: Path | None,
    resume: bool,
    progress: bool,
) -> Together:
    """Run the three comparisons; raises as ``compare`` does."""
    from torchive.engine.compare import run_comparison
    from torchive.report import render_report

    names = parse_together(method)
    folder = out or Path("runs") / f"compare-{'+'.join(names)}-{len(seeds)}"
    arms = together_arms(names, recipe=recipe, data=data, overrides=overrides)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "kind": "together", "methods": list(names), "folders": list(arms), "command": command}
    write_atomically(folder / TOGETHER, json.dumps(content, indent=1).encode())
    comparisons: dict[str, Comparison] = {}
    for side, pair in arms.items():
        first, second = (replace(arm, recipe=with_budget(arm.recipe, budget)) for arm in pair)
        comparisons[side] = run_comparison(
            {"first": names[0], "second": names[1]}.get(side, "+".join(names)),
            (first, second),
            seeds,
            command=command,
            margin=margin,
            out=folder / side,
            resume=resume,
            progress=progress,
            setting=side,
            known=comparisons.get("first"),
        )
    render_report(folder)
    return Together(folder, comparisons)
