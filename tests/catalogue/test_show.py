"""What ``list``, ``find`` and ``show`` say, as values and as text, and that they say it without torch and at once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import torchive
from torchive.catalogue import evidence, show
from torchive.catalogue.index import card_names, get_card
from torchive.catalogue.search import list_methods

VERBS = (
    ["list"],
    ["list", "*pool*", "--json"],
    ["find", "long", "tail"],
    ["show", "dynamic_relu"],
    ["show", "eql", "--json"],
)


@pytest.fixture
def evidence_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evidence, "EVIDENCE", tmp_path)
    return tmp_path


def test_list_filters() -> None:
    assert list_methods() == card_names()
    assert {"attentional_pooling", "svm_pooling"} == set(list_methods("*POOL*"))
    assert set(list_methods(kind="losses")) >= {"eql", "focal_loss", "arcface"}
    assert all("matting" in get_card(name).tasks for name in list_methods(task="matting"))
    assert {get_card(name).state for name in list_methods(state="planned")} == {"planned"}
    assert list_methods(year=1999) == list_methods(year="1990-2003") == ["morphable_model_3dmm"]
    assert len(list_methods(year="2018-2020")) == sum(len(list_methods(year=y)) for y in (2018, 2019, 2020))
    assert list_methods("no such name") == []


@pytest.mark.parametrize(
    ("filters", "complaint"),
    [
        ({"kind": "loss"}, "kind is 'loss'; did you mean losses"),
        ({"task": "mating"}, "task is 'mating'; did you mean matting"),
        ({"state": "done"}, "state is 'done'; expected one of planned, built"),
        ({"verdict": "shop"}, "verdict is 'shop'; did you mean ship"),
        ({"year": "last"}, "year is 'last'; expected a year"),
        ({"year": "2020-2018"}, "year is '2020-2018'"),
    ],
)
def test_list_refuses_values_that_no_card_has(filters: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        list_methods(**filters)  # type: ignore[arg-type]


def test_verdict_and_proof_come_from_the_evidence(evidence_folder: Path) -> None:
    evidence.record_evidence("dynamic_relu", "referenced", "pytest a", largest_difference=1.25e-15)
    evidence.record_evidence("dynamic_relu", "measured", "torchive compare a", difference=1.5, interval=[0.5, 2.5])
    evidence.record_evidence("dynamic_relu", "verdict", "torchive verdict", verdict="ship")
    assert list_methods(verdict="ship") == ["dynamic_relu"]
    assert list_methods(verdict="watch") == []
    assert show.list_rows("dynamic_relu")[0]["proof"] == ["referenced", "measured"]
    text = show.render_show(show.show_values("dynamic_relu"))
    for line in (
        "verdict        ship",
        "largest difference 1.25e-15",
        "interval [0.5, 2.5]",
        "pytest a",
        "matched        not yet",
    ):
        assert line in text


def test_empty_tables_are_left_out(evidence_folder: Path) -> None:
    evidence.record_evidence("dynamic_relu", "built", "python -m a", exemptions={}, passed=33, exempt=0, sizes=[])
    evidence.record_evidence("dynamic_relu", "referenced", "pytest a", by_type={})
    text = show.render_show(show.show_values("dynamic_relu"))
    assert "built          passed 33, exempt 0 (" in text
    assert "referenced     yes (" in text
    assert "{}" not in text
    assert "[]" not in text
    evidence.record_evidence("dynamic_relu", "built", "python -m a", exemptions={"onnx": "no form"}, passed=32)
    assert "exemptions {onnx: no form}, passed 32" in show.render_show(show.show_values("dynamic_relu"))


def test_a_match_that_cannot_be_had_is_shown_with_its_reason(evidence_folder: Path) -> None:
    (evidence_folder / "dynamic_relu.json").write_text('{"matched": {"impossible": "no release"}}')
    values = show.show_values("dynamic_relu")
    assert values["proof"] == []
    assert "matched        impossible no release" in show.render_show(values)


def test_a_comparison_is_told_as_a_sentence(evidence_folder: Path) -> None:
    evidence.record_evidence(
        "dynamic_relu",
        "measured",
        "torchive compare dynamic_relu",
        metric="accuracy",
        unit="points",
        baseline_title="ReLU",
        seeds=[0, 1, 2],
        baseline=[0.70, 0.71, 0.72],
        method=[0.72, 0.73, 0.74],
        difference={"mean": 0.02, "low": 0.0125, "high": 0.0275},
        outcome="better",
        scale={"data": "solar", "train_samples": 1842, "image_size": 64, "batch_size": 32},
        ratios={"parameters": 1.08, "latency_1": 1.4},
        export={"gap": 2e-6, "latency_ratios": {"latency_1": 1.1}},
    )
    text = " ".join(show.render_show(show.show_values("dynamic_relu")).split())
    for part in (
        "accuracy +2 points [+1.25, +2.75], from 71 to 73, over 3 seeds: better",
        "against ReLU; solar, 1842 samples, 64 px, batch 32",
        "parameters × 1.08, latency × 1.40, ONNX gap 2e-06, ONNX latency × 1.10",
    ):
        assert part in text


@pytest.mark.parametrize("name", card_names())
def test_every_method_can_be_shown(name: str) -> None:
    values = show.show_values(name)
    json.dumps(values)
    text = show.render_show(values)
    assert values["title"] in text
    assert values["zh"] in text
    assert ("\nUse\n" in text) == (values["state"] == "built")
    compile("\n".join(values["use"].get("python", [])), name, "exec")


@pytest.mark.parametrize("name", list_methods(state="built"))
def test_the_shown_lines_make_an_instance(name: str) -> None:
    line = next(x for x in show.show_values(name)["use"]["python"] if f"torchive.{get_card(name).class_name}(" in x)
    made = line.partition(" = ")[2].partition(".explain(")[0]
    assert type(eval(made, {"torchive": torchive})).__name__ == get_card(name).class_name


def test_rows_are_plain_and_the_table_has_a_line_for_each() -> None:
    rows = show.list_rows(kind="matting")
    json.dumps(rows)
    lines = show.render_list(rows).splitlines()
    assert [line.split()[0] for line in lines[1 : len(rows) + 1]] == [row["name"] for row in rows]
    assert lines[-1].startswith(f"{len(rows)} methods: ")
    assert show.render_list([]) == "No method passes these filters."


def test_a_terminal_gets_lines_of_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "72")
    lines = show.render_list(show.list_rows()).splitlines()
    assert max(len(line) for line in lines[1:]) == 72
    assert lines[1].endswith("…")


def test_find_says_what_it_corrected_and_when_it_found_nothing() -> None:
    values = show.find_rows("dynamc relu")
    assert values["did_you_mean"] == "dynamic relu"
    assert show.render_find(values).startswith("Did you mean: dynamic relu?")
    assert show.find_rows("long tail")["did_you_mean"] is None
    assert show.find_rows("brew coffee")["matches"] == []
    assert "Nothing answers 'brew coffee'" in show.render_find(show.find_rows("brew coffee"))
    assert "长尾" in show.render_find(show.find_rows("长尾"))


@pytest.mark.parametrize("arguments", VERBS, ids=" ".join)
def test_no_verb_of_the_catalogue_imports_torch(arguments: list[str]) -> None:
    code = (
        "import sys, torchive\nfrom torchive.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'torchvision', 'timm'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_list_and_find_answer_at_once() -> None:
    bare = _fastest([sys.executable, "-c", "pass"])
    for arguments in (["list"], ["find", "unlabelled", "photographs"]):
        code = f"from torchive.cli import main; main({arguments!r})"
        assert _fastest([sys.executable, "-c", code]) - bare < 0.3


def _fastest(command: list[str]) -> float:
    """Processor seconds of the quickest of five runs; the clock on the wall would count other programs too."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("condinst", "coco:annotations.json,images/"),
        ("faster_rcnn", "coco:annotations.json,images/"),
        ("attention_unet", "masks:images/,masks/"),
        ("simclr", "folder:my_images"),
    ],
)
def test_the_shown_commands_name_data_that_the_method_takes(name: str, data: str) -> None:
    lines = [line for line in show.show_values(name)["use"]["shell"] if " train " in line or " compare " in line]
    assert lines
    assert all(line.endswith(f"--data {data}") for line in lines)
