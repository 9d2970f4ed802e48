"""Prediction on files of any kind: pictures, JSON, boxes in the source's pixels, and bad files told in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.toys import toy_recipe, toy_samples

from torchive.cli import main
from torchive.engine.predict import predict
from torchive.engine.predictions import run_lengths, to_source, values_of
from torchive.engine.recipe import RecipeError
from torchive.engine.run import open_run
from torchive.engine.train import train
from torchive.report.draw import draw_boxes, draw_class, draw_prediction, draw_regions, draw_target, grid
from torchive.structures import Classification, Detections, Panoptic, Segment, Segmentation


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    for task in ("classification", "detection", "segmentation", "selfsupervised"):
        train(toy_recipe(task), out / task, samples=toy_samples(task), progress=False)
    return out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels).resize((320, 240)).save(folder / "sub" / "a.jpg")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_folder_with_good_and_bad_files(task: str, runs: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = predict(runs / task, [str(photos)], out, progress=False)
    assert sorted(p.relative_to(out).as_posix() for p in found) == ["a.png", "grey.png", "sub/a.jpg"]
    assert found.exit_status == 2
    assert [line.partition(": ")[0].rpartition("/")[2] for line in found.errors] == ["broken.png", "empty.jpg"]
    assert all("\n" not in line for line in found.errors)
    index = json.loads((out / "predictions.json").read_text())
    assert len(index["predictions"]) == 3
    assert index["errors"] == found.errors
    for path in found:
        Image.open(path).load()
        values = json.loads(path.with_suffix(".json").read_text())
        width, height = values["width"], values["height"]
        assert values["task"] == task
        if task == "classification":
            assert values["class"] == max(values["scores"], key=values["scores"].get)
            assert sum(values["scores"].values()) == pytest.approx(1, abs=1e-4)
        elif task == "detection":
            (x0, y0, x1, y1) = values["objects"][0]["box"]
            assert 0 <= x0 <= x1 <= width
            assert 0 <= y0 <= y1 <= height
        else:
            mask = np.array(Image.open(out / values["mask"]))
            assert mask.shape == (height, width)
            assert values["shares"]["bright"] == pytest.approx((mask == 1).mean(), abs=1e-5)


def test_what_is_drawn_is_asked_for_on_the_command_line(runs: Path, photos: Path, tmp_path: Path) -> None:
    """Above every score the picture is the photograph; the JSON is the same."""
    drawn = {}
    for threshold in ("0", "1.1"):
        out = tmp_path / threshold
        words = ["predict", str(runs / "detection"), str(photos / "a.png"), "--out", str(out), "--threshold", threshold]
        assert main(words) == 0
        drawn[threshold] = (out / "a.png").read_bytes(), json.loads((out / "a.json").read_text())["objects"]
    assert drawn["0"][0] != drawn["1.1"][0]
    assert drawn["0"][1] == drawn["1.1"][1] != []


def test_files_globs_and_what_is_not_there(runs: Path, photos: Path, tmp_path: Path) -> None:
    sources = [str(photos / "a.png"), str(photos / "**" / "a.*"), str(photos / "*.bmp"), "nothing_here.png"]
    found = predict(runs / "classification", sources, tmp_path / "out", progress=False)
    assert sorted(p.name for p in found) == ["a-2.png", "a-3.jpg", "a.png"], "results overwrite each other"
    assert len(found.errors) == 2
    clean = predict(runs / "classification" / "last.safetensors", sources[:1], tmp_path / "out", progress=False)
    assert clean.exit_status == 0


def test_a_representation_cannot_be_drawn(runs: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is nothing to draw"):
        predict(runs / "selfsupervised", [str(photos)], tmp_path, progress=False)


def test_a_checkpoint_of_a_stopped_run_predicts_as_the_run_does(runs: Path) -> None:
    one, other = open_run(runs / "selfsupervised"), open_run(runs / "selfsupervised" / "last.safetensors")
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_predictions_go_back_to_the_source_pixels() -> None:
    boxes = torch.tensor([[1.0, 2, 5, 6], [8, 8, 11, 12]])
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[0, 2:6, 1:5] = True
    points = torch.tensor([[[1.0, 2]], [[5, 6]]])
    found = to_source(Detections(boxes, torch.ones(2), torch.ones(2), masks, points), (10, 10), (20, 30))
    assert isinstance(found, Detections)
    assert found.boxes.tolist() == [[3, 4, 15, 12], [24, 16, 30, 20]], "cut to the image"
    assert found.keypoints is not None
    assert found.keypoints.tolist() == [[[3, 4]], [[15, 12]]]
    assert found.masks is not None
    rows, columns = (found.masks[0].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    assert rows == list(range(4, 12))
    assert columns == list(range(3, 15))
    labels = torch.tensor([[0, 1], [2, 3]])
    for scores in (None, torch.nn.functional.one_hot(labels, 4).permute(2, 0, 1).float()):
        back = to_source(Segmentation(labels, scores), (2, 2), (4, 6))
        assert isinstance(back, Segmentation)
        assert back.labels[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 1, 2, 3]


def test_run_lengths_decode_to_the_mask() -> None:
    for mask in (torch.rand(7, 5) > 0.5, torch.ones(3, 2), torch.zeros(3, 2)):
        coded = run_lengths(mask)
        line = np.repeat(np.arange(len(coded["counts"])) % 2, coded["counts"])
        assert torch.equal(torch.from_numpy(line.reshape(coded["size"], order="F") == 1), mask.bool())


@pytest.mark.parametrize("channels", [1, 3])
def test_drawing_shows_what_is_there(channels: int) -> None:
    image = torch.full((channels, 100, 200), 0.5)
    kept = image.clone()
    plain = draw_target(image, None, ("a",))
    assert plain.shape == (3, 128, 256)
    classes = ("cat", "a very long name that does not fit below a small picture at all")
    named = draw_class(image, Classification(torch.tensor([0.2, 0.8])), classes, target=0)
    assert named.shape[1] > 128
    box = torch.tensor([[20.0, 10, 120, 90]])
    boxed = draw_boxes(image, box, torch.tensor([1]), ("cat", "dog"), scores=torch.tensor([0.7]), smallest=1)
    assert not torch.equal(boxed[:, 50, 20], boxed[:, 50, 60]), "no edge at the box's left side"
    small = torch.tensor([[190.0, 50, 198, 60]])  # a box narrower than its name, at the right border
    both = draw_boxes(image, small, torch.tensor([2]), ("a name", "another name"), smallest=1)
    assert (both[:, 36:49, 120:190] != plain[:, :1, :1]).any(), "no name above a narrow box"
    crowd = draw_boxes(image, small.expand(40, 4), torch.full((40,), 2), ("a name", "another name"), smallest=1)
    assert (crowd[:, 36:49, 120:190] == plain[:, :1, :1]).all(), "names of many small boxes cover the picture"
    steps = torch.arange(20)[:, None] * torch.tensor([3.0, 1, 3, 1])
    many = torch.tensor([[10.0, 60, 90, 90]]) + steps
    one, all_of_them = (
        draw_boxes(image, boxes, torch.ones(len(boxes), dtype=torch.int64), ("cat", "dog"), smallest=1)
        for boxes in (many[:1], many)
    )
    written = (slice(None), slice(46, 60), slice(10, 30))
    assert not torch.equal(one[written], plain[:, :1, :1].expand(3, 14, 20))
    assert torch.equal(all_of_them[written], one[written]), "a later box's name covers the first one's"
    labels = torch.zeros(100, 200, dtype=torch.int64)
    labels[:, :100] = 1
    tinted = draw_regions(image, labels, ("none", "some"), smallest=1)
    assert torch.equal(tinted[:, 50, 150], plain[:, 50, 150])
    assert not torch.equal(tinted[:, 50, 50], plain[:, 50, 50])
    weak = Detections(box, torch.tensor([1]), torch.tensor([0.1]))
    assert torch.equal(
        draw_prediction(image, weak, ("cat",), smallest=1)[:, :100], plain[:, :1, :1].expand(3, 100, 200)
    )
    assert torch.equal(image, kept)


def test_stuff_is_drawn_under_the_objects_and_named() -> None:
    image = torch.full((3, 60, 80), 0.5)
    objects = torch.zeros(1, 60, 80, dtype=torch.bool)
    objects[0, :30, :40] = True
    ids = torch.where(objects[0], 1, 2).to(torch.int32)
    ids[:, 70:] = 0
    found = Detections(
        torch.tensor([[0.0, 0, 40, 30]]),
        torch.tensor([1]),
        torch.tensor([0.9]),
        objects,
        panoptic=Panoptic(ids, (Segment(1, 1, True), Segment(2, 2, False))),
    )
    drawn = draw_prediction(image, found, ("cat", "grass"), smallest=1)
    inside, grass, nothing = drawn[:, 15, 20], drawn[:, 45, 20], drawn[:, 45, 75]
    assert len({tuple(part.tolist()) for part in (inside, grass, nothing)}) == 3
    assert tuple(nothing.tolist()) == (128, 128, 128)
    semantic = torch.where(objects[0], 1, 2)
    semantic[:, 70:] = 255
    target = {"boxes": found.boxes, "labels": found.labels, "masks": objects, "semantic": semantic}
    true = draw_target(image, target, ("cat", "grass"), smallest=1)
    assert torch.equal(true[:, 45, 20], grass)
    assert torch.equal(true[:, 45, 75], nothing)
    without = replace(found, panoptic=None)
    assert draw_prediction(image, without, ("cat", "grass"), smallest=1).shape[1] < drawn.shape[1], "no legend"


def test_a_grid_holds_all_its_pictures() -> None:
    cells = [torch.full((3, 10 + i, 20), i, dtype=torch.uint8) for i in range(5)]
    sheet = grid(cells, columns=2)
    assert all(int((sheet == i).all(0).sum()) == (10 + i) * 20 for i in range(5))
    with pytest.raises(ValueError, match="at least one picture"):
        grid([])


def test_a_panoptic_map_goes_to_the_source_and_into_the_file() -> None:
    ids = torch.tensor([[1, 1, 2, 2], [3, 1, 2, 2]], dtype=torch.int32)
    segments = (Segment(1, 2, True, score=0.75), Segment(2, 0, False, area=4), Segment(3, 5, False, area=1))
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    found = Detections(boxes, torch.tensor([2]), torch.tensor([0.75]), ids[None] == 1, panoptic=Panoptic(ids, segments))
    large = to_source(found, (2, 4), (4, 8)).panoptic
    assert torch.equal(large.ids, ids.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert [s.area for s in large.segments] == [None, 16, 4]
    small = to_source(found, (2, 4), (1, 2)).panoptic
    assert {s.id for s in small.segments} == set(small.ids.unique().tolist())
    assert values_of(found, ["cell", "worm"])["segments"] == [
        {"id": 1, "category": 2, "isthing": True, "score": 0.75, "class": "worm"},
        {"id": 2, "category": 0, "isthing": False, "area": 4, "class": "background"},
        {"id": 3, "category": 5, "isthing": False, "area": 1, "class": "stuff 5"},
    ]
