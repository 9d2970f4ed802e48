"""The suite as a tool: errors, exemptions, instances, cards, texts, the command."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from broken.blocks import BLOCK, HasADeadParameter, IsNotBuildable, LeaksAcrossTheBatch, SoundBlock
from broken.others import LOSS, PlainLoss
from torchive import testing
from torchive.catalogue import evidence
from torchive.testing import __main__ as command
from torchive.testing import running
from torchive.testing.construct import construct, resolve
from torchive.testing.targets import draw_targets

QUICK = [c.name for c in testing.checks_of("block") if not c.costly]


def test_a_failure_is_an_assertion_error_that_lists_every_failed_check() -> None:
    with pytest.raises(testing.ConformanceError, match="batch_independence: row 0") as caught:
        testing.check(LeaksAcrossTheBatch, only=QUICK, **BLOCK)
    assert isinstance(caught.value, AssertionError)
    assert {row.check for row in caught.value.report.failed} == {"batch_independence", "nan_stays"}


def test_a_report_has_a_row_for_each_check_and_a_table() -> None:
    report = testing.check(SoundBlock, only=QUICK, **BLOCK)
    assert [row.check for row in report.rows] == QUICK
    assert report.row("variants").outcome == "not applicable"
    assert all(row.seconds >= 0 and (row.outcome == "passed" or row.reason) for row in report.rows)
    lines = report.table().splitlines()
    assert len(lines) == len(QUICK) + 1
    assert lines[0].startswith(f"SoundBlock as block: {report.counts()['passed']} passed")
    with pytest.raises(KeyError, match="onnx"):
        report.row("onnx")


def test_an_exemption_is_run_and_must_still_be_needed() -> None:
    reason = {"parameter_gradients": "the parameter is kept for old files"}
    report = testing.check(HasADeadParameter, only=QUICK, exempt=reason, **BLOCK)
    row = report.row("parameter_gradients")
    assert row.outcome == "exempt"
    assert "the parameter is kept for old files" in row.reason
    assert "unused" in row.reason  # what failed is told, too
    with pytest.raises(testing.ConformanceError, match="remove the exemption"):
        testing.check(SoundBlock, only=QUICK, exempt=reason, **BLOCK)


def test_an_exemption_of_what_does_not_apply_is_refused() -> None:
    with pytest.raises(testing.ConformanceError, match=r"not applicable.*remove the exemption"):
        testing.check(SoundBlock, only=["too_small"], exempt={"too_small": "it has no smallest size"}, **BLOCK)


def test_an_instance_is_copied_and_stays_as_it_was() -> None:
    block = SoundBlock().train()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    report = testing.check(block, only=QUICK, **BLOCK)
    assert block.training
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    assert report.row("meta_device").outcome == report.row("seeded_weights").outcome == "not applicable"
    testing.check(PlainLoss("mean"), "loss", only=["reductions"], **LOSS)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    testing.check(SoundBlock, only=QUICK, **BLOCK)
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_be_built_fails_everywhere_and_crashes_nowhere() -> None:
    report = testing.check(IsNotBuildable, only=QUICK, raises=False, **BLOCK)
    assert report.row("builds").outcome == "failed"
    assert "TypeError: always" in report.row("builds").reason
    assert not report.counts()["passed"]


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*'blok'"):
        testing.check(SoundBlock, "blok", **BLOCK)
    with pytest.raises(ValueError, match="unknown checks no_such; known: builds"):
        testing.check(SoundBlock, only=["no_such"], **BLOCK)
    with pytest.raises(ValueError, match="unknown checks no_such"):
        testing.check(SoundBlock, exempt={"no_such": "why not"}, **BLOCK)
    with pytest.raises(KeyError):
        testing.check_method("no_such_method")
    report = testing.check(SoundBlock, only=["forward_contract"], raises=False)
    assert "no inputs are declared" in report.rows[0].reason


def test_a_module_of_another_kind_is_told_what_it_lacks() -> None:
    with pytest.raises(testing.ConformanceError, match="SoundBlock lacks losses, predict, task, which a system has"):
        testing.check(SoundBlock, "system", only=["builds"], **BLOCK)


def test_tables_become_objects() -> None:
    made = construct(
        {"act": {"class_path": "torch.nn.LeakyReLU", "init_args": {"negative_slope": 0.3}}, "widths": [1, 2]}
    )
    assert isinstance(made["act"], nn.LeakyReLU)
    assert made["act"].negative_slope == 0.3
    assert made["widths"] == [1, 2]
    assert resolve("torchive.testing.models:SmallNetwork")(num_classes=2)(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    for path in ("NoModule", "torch.nn.NoSuchLayer", "no_such_package:X"):
        with pytest.raises(ValueError, match=path.rpartition(":")[0] or path):
            resolve(path)


def test_drawn_truths_are_legal() -> None:
    g = torch.Generator().manual_seed(0)
    classes = draw_targets({"kind": "classes", "num_classes": 4}, (8, 16), g, batch=8)
    assert classes.bincount().tolist() == [2, 2, 2, 2]
    objects = draw_targets({"kind": "boxes", "num_classes": 3, "masks": True, "per_image": 5}, [(3, 40, 64)], g)[0]
    x1, y1, x2, y2 = objects["boxes"].unbind(1)
    assert bool(((x1 >= 0) & (y1 >= 0) & (x2 <= 64) & (y2 <= 40) & (x2 > x1) & (y2 > y1)).all())
    assert bool(((objects["labels"] >= 1) & (objects["labels"] <= 3)).all())
    assert objects["masks"].shape == (5, 40, 64)
    assert bool(objects["masks"].flatten(1).any(1).all())
    with pytest.raises(ValueError, match="'boxen'"):
        draw_targets({"kind": "boxen"}, (1,), g)


def _dynamic_relu(**changes: Any) -> testing.Subject:
    subject = testing.subject_of("dynamic_relu")
    assert subject.card is not None
    return replace(subject, card=replace(subject.card, **changes))


@pytest.mark.parametrize(
    ("check", "changes", "fault"),
    [
        ("card", {"kind": "losses"}, "kind and name say torchive.methods.losses.dynamic_relu"),
        ("card", {"exports": ("NoSuchClass",)}, "NoSuchClass"),
        ("card", {"exemptions": {"no_such": "for no reason at all"}}, "unknown checks: no_such"),
        ("card", {"exemptions": {"onnx": "no"}}, "without a reason: onnx"),
        ("card", {"host": {"mode": "insert"}}, "no from_channels"),
        ("card", {"host": {"replace": [{"old": "torch.nn.NoSuchLayer"}]}}, "NoSuchLayer"),
        (
            "variants",
            {"variants": {"b": {"args": {"channels": 8}, "parameters": 1}}},
            "has 73 parameters, the card says 1",
        ),
    ],
)
def test_a_card_that_disagrees_with_its_class_is_caught(check: str, changes: dict[str, Any], fault: str) -> None:
    report = testing.run(_dynamic_relu(**changes), only=[check])
    assert report.rows[0].outcome == "failed"
    assert fault in report.rows[0].reason


def test_a_text_without_source_or_arguments_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = testing.subject_of("dynamic_relu")
    cls = resolve("torchive.methods.blocks.dynamic_relu:DynamicReLU")
    module = sys.modules[cls.__module__]
    with monkeypatch.context() as patch:
        patch.setattr(module, "__doc__", (module.__doc__ or "").replace("2003.10027", ""))
        assert "lacks arXiv:2003.10027" in testing.run(subject, only=["docstring"]).rows[0].reason
    with monkeypatch.context() as patch:
        patch.setattr(cls, "__doc__", cls.__doc__.replace("pieces", "lines"))
        assert "does not document 'pieces'" in testing.run(subject, only=["docstring"]).rows[0].reason


def test_the_command_prints_a_table_and_records_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "EVIDENCE", tmp_path)
    quick = {c.name: c for c in testing.CHECKS if not c.costly}
    monkeypatch.setattr(running, "checks_of", lambda kind: tuple(c for c in quick.values() if kind in c.kinds))
    assert command.main(["dynamic_relu", "--record"]) == 0
    assert "dynamic_relu as block" in capsys.readouterr().out
    built = evidence.evidence_of("dynamic_relu", folder=tmp_path)["built"]
    assert built["passed"] > 25
    assert built["command"] == "python -m torchive.testing dynamic_relu --record"
    assert command.main(["dynamic_relu", "--only", "builds"]) == 0
    assert command.main(["no_such_method"]) == 2
    with pytest.raises(SystemExit):
        command.main(["dynamic_relu", "--only", "builds", "--record"])
