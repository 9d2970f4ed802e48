"""The report: one file that loads nothing, says the answer first, and is made from the records alone."""

from __future__ import annotations

import copy
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from records import comparison

from torchive.report import render_report
from torchive.report.figures import curves_figure, interval_figure, paired_figure, ratio_strip, strip
from torchive.report.html import comparison_html
from torchive.report.summary import summarise
from torchive.report.svg import Axis, tick_text
from torchive.report.terminal import comparison_text, dial_text
from torchive.report.units import quantity, signed, unit_of

TASKS = ("classification", "segmentation", "detection")


def write(folder: Path, record: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


class Balanced(HTMLParser):
    """Counts tags that are not closed in order."""

    empty = frozenset(("meta", "link", "img", "br", "hr", "rect", "circle", "line", "path", "image"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        if tag not in self.empty:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.empty:
            assert self.open.pop() == tag


def text_of(page: str) -> str:
    body = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.mark.parametrize("task", TASKS)
def test_a_report_is_whole_small_and_loads_nothing(tmp_path: Path, task: str) -> None:
    path = render_report(write(tmp_path, comparison(task=task)))
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "<script" not in page
    assert "url(" not in page
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.headings[0] == "h1"
    assert parser.headings.count("h1") == 1


def test_the_answer_comes_first_and_all_parts_follow() -> None:
    record = comparison()
    text = text_of(comparison_html(record))
    sentence = summarise(record).sentence
    parts = (
        sentence,
        "Paired differences",
        "Training",
        "Cost",
        "Predictions side by side",
        "Only Dynamic ReLU is right 31",
        "CC-BY-NC-SA-4.0",
        "this page may not be used commercially",
        "What was done",
        "Written down before the first run",
        "start equal in each of 3 pairs",
        "Left out nothing",
        "torch",
        "The command that repeats it torchive compare dynamic_relu --seeds 3",
    )
    places = [text.find(part) for part in parts]
    assert -1 not in places, dict(zip(parts, places, strict=True))
    assert places[0] == min(places)


def test_the_sentence_says_what_was_found() -> None:
    better = summarise(comparison())
    assert re.fullmatch(
        r"On the solar data, Dynamic ReLU changed accuracy by \+1\.26 points \[\+0\.87, \+1\.65\] "
        r"over 3 paired seeds: better\.",
        better.sentence,
    )
    unclear = summarise(comparison(effect=0.0, noise=0.02))
    assert unclear.verdict == "cannot tell"
    estimate = unclear.deciding.estimate
    assert estimate is not None
    could = re.search(r"3 seeds with this scatter could have shown a difference of ([\d.]+) points", unclear.sentence)
    assert could is not None
    assert float(could[1]) == pytest.approx(100 * estimate.half_width, abs=0.06)
    same = comparison(effect=0.0, noise=0.0)
    assert summarise(same).sentence.endswith("by exactly zero in each of 3 paired seeds: identical.")
    for run in same["runs"]:
        run["test"] = dict.fromkeys(run["test"], 0.0)
    assert summarise(same).sentence.endswith("identical; both stayed at zero, as with a budget too short to learn.")


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    first = render_report(write(tmp_path / "a", comparison())).read_bytes()
    assert render_report(write(tmp_path / "b", comparison())).read_bytes() == first


def test_words_of_the_user_are_escaped() -> None:
    record = comparison()
    evil = "<img src=x onerror=alert(1)>"
    record["data"]["name"] = record["plan"]["title"] = record["plan"]["command"] = evil
    record["examples"]["items"][0]["truth"]["label"] = evil
    record["examples"]["items"][0]["id"] = '"><script>'
    record["data"]["left_out"] = [{"split": "train", "id": evil, "reason": evil}]
    page = comparison_html(record)
    assert "<img src=x" not in page
    assert "<script>" not in page
    assert "1 faulty samples" in page


def test_an_unfinished_comparison_has_a_report_of_what_is_there() -> None:
    record = comparison(seeds=5)
    record["runs"] = record["runs"][:5]  # two pairs and a half
    for key in ("examples", "costs", "finished"):
        del record[key]
    assert "over 2 paired seeds of 5 planned" in summarise(record).sentence
    assert "Paired differences" in comparison_html(record)
    record["runs"] = record["runs"][:2]
    assert "an interval needs more" in text_of(comparison_html(record))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no comparison.json"),
        ("{", "comparison.json"),
        ('{"schema": 99}', "schema 99"),
        ("\x00", "comparison.json"),
    ],
)
def test_records_that_cannot_be_read_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "comparison.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        render_report(tmp_path)


def test_no_finished_pair_is_said() -> None:
    record = comparison()
    record["runs"] = record["runs"][:1]
    with pytest.raises(ValueError, match="no pair"):
        summarise(record)


def figures() -> dict[str, str]:
    metric = summarise(comparison()).deciding
    curves = {"baseline": [[(1, 0.1), (2, 0.3)]], "method": [[(1, 0.2), (2, 0.4)]]}
    return {
        "paired": paired_figure(metric, 0.01),
        "curves": curves_figure("Accuracy", curves, unit="%", factor=100),
        "interval": interval_figure("Difference", [("2", 1.0, -0.5, 2.5), ("4", 0.1, -0.2, 0.4)]),
        "ratio": ratio_strip(1.2),
    }


@pytest.mark.parametrize("name", ["paired", "curves", "interval", "ratio"])
def test_figures_are_well_formed_described_and_follow_the_theme(name: str) -> None:
    svg = figures()[name]
    tree = ElementTree.fromstring(svg)
    assert tree.get("role") == "img"
    title, description = tree.find("title"), tree.find("desc")
    assert title is not None
    assert title.text
    assert description is not None
    assert description.text
    assert f"{title.get('id')} {description.get('id')}" == tree.get("aria-labelledby")
    assert not re.search(r"#[0-9a-f]{3,6}|rgb\(|style=", svg)
    width = float(tree.get("viewBox", "").split()[2])
    for node in tree.iter("circle"):
        assert 0 <= float(node.get("cx", "")) <= width


def test_the_paired_figure_shows_each_seed_where_it_lies() -> None:
    metric = summarise(comparison(seeds=4)).deciding
    tree = ElementTree.fromstring(paired_figure(metric))
    dots = [float(node.get("cx", "")) for node in tree.iter("circle") if node.get("class") == "dot"]
    order = sorted(range(4), key=lambda i: metric.differences[i])
    assert sorted(range(4), key=lambda i: dots[i]) == order


def test_curves_without_two_points_give_no_figure() -> None:
    assert curves_figure("Accuracy", {"baseline": [[(1, 0.1)]], "method": [[]]}) == ""


def test_a_dial_has_a_table_two_figures_and_links(tmp_path: Path) -> None:
    sizes = [2, 4, 8, 16]
    folders = [f"train.micro_batch={size}" for size in sizes]
    for size, name in zip(sizes, folders, strict=True):
        render_report(write(tmp_path / name, comparison(effect=0.1 / size - 0.012, noise=0.004)))
    long = "model.init_args.network.micro_batch"
    dial = {"schema": 1, "kind": "dial", "setting": long, "values": sizes, "folders": folders}
    (tmp_path / "dial.json").write_text(json.dumps(dial), encoding="utf-8")
    page = render_report(tmp_path).read_text(encoding="utf-8")
    assert page.count('class="fig "') == 2
    for name in folders:
        assert f'href="{name}/report.html"' in page
    assert "as micro_batch changes: " in text_of(page)
    assert "is better at 2 and 4" in text_of(page)
    assert long not in text_of(page)  # a path would not fit a narrow page; the command tells it
    told = dial_text(tmp_path, tmp_path / "report.html")
    assert all(word in told for word in ("micro_batch", "16", "better", "report.html"))


def test_strips_of_one_table_share_a_scale() -> None:
    """An interval half as wide is drawn half as wide."""
    wide, narrow = (summarise(comparison(effect=0.0, noise=noise)).deciding for noise in (0.02, 0.01))

    def length(svg: str) -> float:
        found = re.search(r'<line x1="([\d.]+)" y1="10(?:\.0)?" x2="([\d.]+)"[^>]*interval', svg)
        assert found, svg
        return float(found[2]) - float(found[1])

    widths = [m.estimate.high - m.estimate.low for m in (wide, narrow) if m.estimate]
    drawn = [length(strip(m, [wide, narrow])) for m in (wide, narrow)]
    assert drawn[1] / drawn[0] == pytest.approx(widths[1] / widths[0], rel=0.02)
    assert length(strip(narrow)) > drawn[1]


def test_the_terminal_says_the_same_as_the_page() -> None:
    record = comparison()
    told = comparison_text(record, Path("runs/x/report.html"))
    assert summarise(record).sentence in told
    assert "runs/x/report.html" in told
    assert "× 1.19" in told
    assert "p95" in told


def test_the_records_are_not_changed() -> None:
    record = comparison()
    before = copy.deepcopy(record)
    comparison_html(record)
    assert record == before


@pytest.mark.parametrize(
    ("metric", "label", "value", "higher"),
    [
        ("accuracy", "accuracy", "81.3 %", True),
        ("map_50", "mAP 50", "81.3 %", True),
        ("mean_iou", "mean IoU", "81.3 %", True),
        ("log_loss", "log loss", "0.8", False),
        ("recall/intact", "recall intact", "81.3 %", True),
        ("map/Großer_Kern", "mAP Großer_Kern", "81.3 %", True),
        ("map/weight_loss", "mAP weight_loss", "81.3 %", True),
        ("false/background", "false background", "81.3 %", False),
        ("epe", "epe", "0.8", True),
    ],
)
def test_units(metric: str, label: str, value: str, higher: bool) -> None:
    unit = unit_of(metric)
    assert (unit.label, unit.value(0.8132), unit.higher_is_better) == (label, value, higher)


def test_numbers_for_people() -> None:
    assert signed(-0.04, 1) == "0.0"
    assert signed(-1.25, 2) == "−1.25"
    assert [quantity(v) for v in (950, 11_170_000, 1.82e9)] == ["950", "11.2 M", "1.82 G"]
    assert Axis(0, 10, 0, 100).ticks() == [0, 2, 4, 6, 8, 10]
    assert [tick_text(v, 0.25) for v in (-0.25, 0.0, 0.5)] == ["−0.25", "0.00", "0.50"]
