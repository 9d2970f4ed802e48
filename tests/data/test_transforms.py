"""Boxes and masks follow the image; training and prediction see one normalisation."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from torchive import transforms
from torchive.structures import Sample


def scene(height: int = 40, width: int = 60) -> Sample:
    """A bright rectangle on black, with its box and mask."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 10:20, 12:36] = 255
    masks = (image[:1] > 0).to(torch.uint8)
    target = {
        "boxes": torch.tensor([[12.0, 10.0, 36.0, 20.0]]),
        "labels": torch.tensor([2]),
        "masks": masks,
        "area": torch.tensor([240.0]),
        "iscrowd": torch.tensor([0]),
    }
    return Sample(image, target, "scene")


@pytest.mark.parametrize("augment", ["default", ["flip", "vflip"], ["iou_crop", "flip"]])
def test_boxes_and_masks_follow_the_image(augment: object) -> None:
    transform = transforms.build("detection", image_size=120, train=True, augment=augment)
    flips = 0
    for seed in range(12):
        torch.manual_seed(seed)
        sample = transform(scene())
        assert sample.image.dtype == torch.float32
        assert sample.image.max() <= 1
        assert len(sample.target["boxes"]) == 1  # a crop keeps an object's centre
        x0, y0, x1, y1 = sample.target["boxes"][0].round().int().tolist()
        bright = sample.image[0] > 0.3
        mask = sample.target["masks"][0].bool()
        inside = torch.zeros_like(bright)
        inside[y0:y1, x0:x1] = True
        assert (inside ^ mask).float().mean() < 0.02
        assert (bright ^ mask).float().mean() < 0.02
        assert sample.target["labels"].tolist() == [2]
        assert len(sample.target["iscrowd"]) == 1
        assert sample.target["area"].item() == mask.sum().item()
        flips += x0 > 36
    if augment == "default":
        assert 0 < flips < 12


def test_an_image_without_boxes_stays_one() -> None:
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 40, 60, dtype=torch.uint8),
    }
    for augment in ("default", ["iou_crop"]):
        transform = transforms.build("detection", image_size=30, train=True, augment=augment)
        result = transform(Sample(scene().image, target, "x"))
        assert result.image.shape == (3, 20, 30)
        assert result.target["boxes"].shape == (0, 4)
        assert result.target["masks"].shape == (0, 20, 30)


def test_a_crop_drops_every_row_of_a_lost_box() -> None:
    image = torch.zeros(3, 80, 80, dtype=torch.uint8)
    target = {
        "boxes": torch.tensor([[2.0, 2.0, 12.0, 12.0], [60.0, 60.0, 78.0, 78.0]]),
        "labels": torch.tensor([1, 2]),
        "iscrowd": torch.tensor([0, 0]),
        "area": torch.tensor([100.0, 324.0]),
    }
    transform = transforms.build("detection", image_size=None, train=True, augment=["iou_crop"])
    lost = 0
    for seed in range(30):
        torch.manual_seed(seed)
        result = transform(Sample(image, target, "x")).target
        assert len({len(value) for value in result.values()}) == 1
        lost += len(result["boxes"]) == 1
    assert lost


def test_segmentation_masks_follow_the_image() -> None:
    mask = (scene().image[0] > 0).long()
    mask[0, 0] = 255
    for train in (True, False):
        transform = transforms.build("segmentation", image_size=32, train=train)
        for seed in range(6):
            torch.manual_seed(seed)
            result = transform(Sample(scene().image, mask, "x"))
            assert result.image.shape == (3, 32, 32)
            assert result.target.shape == (32, 32)
            assert result.target.dtype == torch.int64
            assert set(result.target.unique().tolist()) <= {0, 1, 255}
            bright = transforms.denormalise(result.image, "segmentation")[0] > 0.35
            assert (bright ^ (result.target == 1)).float().mean() < 0.06


def test_classification_shapes_channels_and_normalisation() -> None:
    image = scene().image
    for train in (True, False):
        for channels in (1, 3):
            transform = transforms.build("classification", image_size=24, train=train, channels=channels)
            result = transform(Sample(image, 1, "x"))
            assert result.image.shape == (channels, 24, 24)
            assert result.image.dtype == torch.float32
    mean, deviation = transforms.normalisation("classification", 3)
    flat = torch.full((3, 24, 24), 51, dtype=torch.uint8)
    result = transforms.build("classification", image_size=24, train=False)(Sample(flat, 1, "x")).image
    assert torch.allclose(result[:, 0, 0], (0.2 - torch.tensor(mean)) / torch.tensor(deviation))
    assert torch.allclose(transforms.denormalise(result, "classification"), torch.full((3, 24, 24), 0.2))
    assert transforms.normalisation("detection", 3) == ((0.0,) * 3, (1.0,) * 3)


def test_evaluation_draws_nothing() -> None:
    for task in ("classification", "detection", "segmentation"):
        transform = transforms.build(task, image_size=32, train=False)
        before = torch.get_rng_state()
        transform(Sample(scene().image, None, "x"))
        assert torch.equal(before, torch.get_rng_state())


def test_prediction_needs_no_target_and_the_input_is_unchanged() -> None:
    for task in ("classification", "detection", "segmentation"):
        for train in (True, False):
            sample = Sample(scene().image, None, "x")
            copy = sample.image.clone()
            assert transforms.build(task, image_size=32, train=train)(sample).target is None
            assert torch.equal(sample.image, copy)


def test_evaluation_after_views_sees_the_whole_image() -> None:
    picture = scene(40, 40)
    plain = transforms.build("classification", image_size=16, train=False)(picture)
    after = transforms.build("selfsupervised", image_size=16, train=False, augment=lambda image: image)(picture)
    assert torch.equal(plain.image, after.image)


def test_views_and_other_transforms() -> None:
    def two(image: torch.Tensor) -> torch.Tensor:
        assert image.shape == (3, 24, 36)
        assert image.max() <= 1
        return torch.stack([image[:, :16, :16], image[:, -16:, -16:]])

    transform = transforms.build("selfsupervised", image_size=16, train=True, augment=two)
    assert transform(scene()).image.shape == (2, 3, 16, 16)
    own = transforms.build("classification", image_size=16, train=True, augment=["flip", v2.RandomErasing(1.0)])
    assert own(Sample(scene().image, 0, "x")).image.shape == (3, 16, 16)
    assert pickle.loads(pickle.dumps(own)).image_size == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "classify"}, "classification"),
        ({"image_size": 0}, "at least 1"),
        ({"channels": 2}, "1, 3 or None"),
        ({"augment": ["flop"]}, "did you mean 'flip'"),
        ({"augment": "defaults"}, "did you mean 'default'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transforms.build(**{"task": "classification", "image_size": 16, "train": False, **options})


def test_a_semantic_map_follows_boxes_and_masks() -> None:
    masks = torch.zeros(1, 40, 60, dtype=torch.uint8)
    masks[0, 10:30, 6:20] = 1
    semantic = torch.where(masks[0] > 0, 3, 0).long()
    target = {"boxes": torch.tensor([[6.0, 10, 20, 30]]), "labels": torch.tensor([3]), "masks": masks}
    sample = Sample(torch.zeros(3, 40, 60, dtype=torch.uint8), {**target, "semantic": semantic}, "one")
    for seed in range(4):
        torch.manual_seed(seed)
        done = transforms.build("detection", image_size=30, train=True, augment=["flip", "vflip", "iou_crop"])(
            sample
        ).target
        assert type(done["semantic"]) is torch.Tensor
        assert done["semantic"].dtype == torch.int64
        assert done["semantic"].shape == done["masks"].shape[1:]
        assert torch.equal(done["semantic"], done["masks"][0].long() * 3)


def marked(boxes: list[list[float]], *, height: int = 60, width: int = 80) -> Sample:
    """White rectangles on black with boxes, masks, a landmark at each middle, and a map of categories."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for row, (x0, y0, x1, y1) in enumerate(boxes):
        masks[row, int(y0) : int(y1), int(x0) : int(x1)] = 1
    image[:, masks.bool().any(0)] = 255
    found = torch.tensor(boxes).view(-1, 4)
    middles = torch.cat([(found[:, :2] + found[:, 2:]) / 2, torch.full((len(boxes), 1), 2.0)], 1)
    target = {
        "boxes": found,
        "labels": torch.arange(1, len(boxes) + 1),
        "masks": masks,
        "keypoints": middles[:, None],
        "semantic": torch.zeros(height, width, dtype=torch.int64),
        "image_labels": torch.ones(5),
    }
    return Sample(image, target, "marked")


def test_shift_and_scale_move_boxes_masks_and_landmarks_alike() -> None:
    transform = transforms.build("detection", image_size=None, train=True, augment=["shift_scale"])
    lost, sizes = 0, []
    for seed in range(40):
        torch.manual_seed(seed)
        result = transform(marked([[30, 20, 50, 36], [2, 2, 10, 8]]))
        target = result.target
        assert result.image.shape == (3, 60, 80)
        outside = target["semantic"] == 255
        mixed = (result.image[0, outside] - 0.5).abs() > 0.01  # the picture's own border, half grey
        assert mixed.sum() <= 60 + 80
        assert not outside.all()
        white = (result.image[0] > 0.51) & ~outside
        assert (white ^ target["masks"].bool().any(0)).float().mean() < 0.02
        assert len({len(target[key]) for key in ("boxes", "labels", "masks", "keypoints")}) == 1
        assert target["image_labels"].tolist() == [1] * 5
        for box, mask, label, point in zip(
            target["boxes"], target["masks"], target["labels"], target["keypoints"][:, 0], strict=True
        ):
            rows, columns = mask.bool().any(1).nonzero(), mask.bool().any(0).nonzero()
            edges = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).flatten()
            assert (box - edges).abs().max() <= 1
            if label == 1:  # always whole: its middle is the landmark
                assert torch.allclose(point, torch.tensor([*((box[:2] + box[2:]) / 2).tolist(), 2.0]), atol=1e-4)
                sizes.append(float(box[2] - box[0]) / 20)
            elif point[2] == 0:
                assert point.tolist() == [0, 0, 0]
        lost += len(target["boxes"]) == 1
    assert len(sizes) == 40
    assert 2 / 3 <= min(sizes) < 0.8
    assert 1.25 < max(sizes) <= 1.5
    assert 0 < lost < 20


def test_iou_crop_never_drops_all_boxes() -> None:
    """Of boxes down to a hundredth of a pixel, those stay whose centre is inside; without a crop all do."""
    crop = transforms.steps.RandomIoUCrop()
    place = torch.arange(10000.0).view(1, 100, 100)  # each pixel knows where it was
    whole = 0
    for seed in range(100):
        torch.manual_seed(seed)
        code = torch.rand(3, 4)
        centre, half = code[:, :2] * 100, torch.tensor([[25.0], [4.0], [0.02]]) * (0.25 + code[:, 2:])
        boxes = torch.cat([(centre - half).clamp(0), (centre + half).clamp(max=100)], 1)
        typed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(100, 100))
        image, target = crop(tv_tensors.Image(place), {"boxes": typed, "labels": torch.arange(3)})
        corner = int(image[0, 0, 0])
        low = torch.tensor([corner % 100, corner // 100])
        high = low + torch.tensor([image.shape[2], image.shape[1]])
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((middle > low) & (middle < high)).all(1)
        assert inside.any()
        assert target["labels"].tolist() == inside.nonzero()[:, 0].tolist()
        whole += image.shape == place.shape
    assert 5 < whole < 50


def test_zoom_out_moves_boxes_masks_and_landmarks_alike() -> None:
    sample = marked([[30.0, 20, 50, 36], [2, 2, 10, 8]])
    sample.target["keypoints"][1] = 0  # absent
    build = transforms.build
    shapes, changed = [], 0
    for seed in range(20):
        torch.manual_seed(seed)
        result = build("detection", image_size=None, train=True, augment=["zoom_out"])(sample)
        target, (height, width) = result.target, result.image.shape[-2:]
        assert 60 <= height <= 240
        assert width == pytest.approx(height * 80 / 60, abs=2)
        changed += height > 60
        inside = target["semantic"] == 0
        assert inside.sum() == 60 * 80
        assert (target["semantic"][~inside] == 255).all()
        assert torch.allclose(result.image[:, ~inside], torch.tensor(128 / 255))
        assert torch.equal((result.image[0] == 1) & inside, target["masks"].bool().any(0))
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.bool().any(1).nonzero(), mask.bool().any(0).nonzero()
            assert box.tolist() == [float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
        middle = (target["boxes"][0, :2] + target["boxes"][0, 2:]) / 2
        assert target["keypoints"][0, 0].tolist() == [*middle.tolist(), 2]
        assert target["keypoints"][1, 0].tolist() == [0, 0, 0]
        torch.manual_seed(seed)
        small = build("detection", image_size=80, train=True, augment=["zoom_out"])(sample)
        shapes.append(tuple(small.image.shape[-2:]))
        assert torch.allclose(small.target["boxes"], target["boxes"] * 80 / width, rtol=0.02, atol=0.1)
        assert small.target["masks"].shape[1:] == small.target["semantic"].shape == shapes[-1]
    assert 5 < changed < 15
    assert {side for shape in shapes for side in shape} <= {59, 60, 61, 80}
    plain = build("detection", image_size=None, train=True, augment=["zoom_out"])
    empty = marked([])
    assert plain(empty).target["boxes"].shape == (0, 4)
    assert plain(Sample(sample.image, None, "x")).image.shape[0] == 3
    with pytest.raises(ValueError, match=r"got 0.5, 0.5 and 0.5"):
        transforms.steps.RandomZoomOut(scale=0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_photometric_distortion_moves_nothing(channels: int) -> None:
    sample = marked([[30.0, 20, 50, 36]])
    transform = transforms.build("detection", image_size=None, train=True, augment=["photometric"], channels=channels)
    image = sample.image.clone()
    image[:, :, 60:] = torch.tensor([200, 90, 40], dtype=torch.uint8)[:, None, None]
    seen = []
    for seed in range(10):
        torch.manual_seed(seed)
        result = transform(Sample(image, sample.target, "x"))
        assert result.image.shape == (channels, 60, 80)
        for key, value in sample.target.items():
            assert torch.equal(result.target[key], value), key
        seen.append(result.image[:, 0, 70])
    assert (torch.stack(seen).std(0) > 0.03).all()


def test_shift_and_scale_without_boxes_and_without_a_target() -> None:
    transform = transforms.build("detection", image_size=None, train=True, augment=["shift_scale", "colour"])
    result = transform(marked([]))
    assert {key: tuple(value.shape) for key, value in result.target.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 60, 80),
        "keypoints": (0, 1, 3),
        "semantic": (60, 80),
        "image_labels": (5,),
    }
    assert transform(Sample(scene().image, None, "x")).image.shape == (3, 40, 60)
    with pytest.raises(ValueError, match=r"got 0.5, 0.2 and 0.5"):
        transforms.steps.RandomShiftScale(scale=0.5)


def test_colour_changes_colours_and_no_box() -> None:
    transform = transforms.build("detection", image_size=None, train=True, augment=["colour"])
    image = torch.tensor([200, 90, 40], dtype=torch.uint8)[:, None, None].expand(3, 20, 30).contiguous()
    target = {"boxes": torch.tensor([[3.0, 4.0, 9.0, 8.0]]), "labels": torch.tensor([1])}
    seen = []
    for seed in range(30):
        torch.manual_seed(seed)
        result = transform(Sample(image, target, "x"))
        assert torch.equal(result.target["boxes"], target["boxes"])
        seen.append(result.image[:, 0, 0])
    spread = torch.stack(seen).std(0)
    assert (spread > 0.03).all()
