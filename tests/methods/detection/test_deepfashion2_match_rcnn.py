"""Match R-CNN: the released evaluation, torchvision's heads on copied weights, the laws of landmarks and pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from tests.nn.torchvisions import LEVELS, assert_same, detect, mask_predictor, of_parts
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypointrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from torchive.engine.export import OnnxModel, write_onnx
from torchive.methods.detection.deepfashion2_match_rcnn import (
    LandmarkHead,
    MatchingNetwork,
    MatchRCNN,
    decode_landmarks,
    landmark_loss,
    sample_pairs,
)
from torchive.methods.detection.deepfashion2_match_rcnn.losses import landmark_targets
from torchive.nn.landmark_precision import landmark_precision
from torchive.nn.regions import Regions
from torchive.nn.retrieval import retrieval
from torchive.structures import Detections
from torchive.structures.landmarks import DEEPFASHION2
from torchive.testing.targets import draw_targets

SIZES = [[8.0], [16.0], [32.0], [64.0], [128.0]]
SMALL = {
    "num_classes": 3,
    "landmarks": (3, 2, 4),
    "backbone": "timm/test_efficientnet",
    "channels": 8,
    "hidden": 16,
    "landmark_channels": 8,
    "embedding_dim": 16,
    "anchor_sizes": SIZES,
    "before_nms": (200, 100),
    "after_nms": (100, 50),
    "rois_per_image": 64,
}
TARGET = {"kind": "boxes", "num_classes": 3, "masks": True, "landmarks": [3, 2, 4], "pairs": True}


def drawn(seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96))) -> tuple[list[Tensor], list[dict]]:
    g = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=g) for size in sizes]
    return images, draw_targets(TARGET, [image.shape for image in images], g)


def rows_of(values: dict[str, Tensor], kind: str, names: tuple[str, ...], images: int) -> list[dict[str, Tensor]]:
    """Stored rows, image by image."""
    owner = values[f"{kind}.image"]
    return [{name: values[f"{kind}.{name}"][owner == k] for name in names} for k in range(images)]


def test_equals_the_released_evaluation(record, parity) -> None:
    """Retrieval at five ranks, and landmarks' average precision of each class at each threshold."""
    stored = {key: v.long() if v.dtype == torch.int32 else v for key, v in parity("deepfashion2_match_rcnn").items()}
    found, targets, counts = [], [], DEEPFASHION2.counts
    for kind, out in (("found", found), ("truth", targets)):
        labels = stored[f"{kind}.label"]
        points = stored[f"{kind}.points"].split([counts[label - 1] for label in labels.tolist()])
        whole = torch.zeros(len(labels), 294, points[0].shape[1], dtype=torch.float64)
        for row, (label, own) in enumerate(zip(labels.tolist(), points, strict=True)):
            whole[row, DEEPFASHION2.span(label)] = own
        for k in range(8):
            mine = stored[f"{kind}.image"] == k
            if kind == "found":
                score = stored["found.score"][mine]
                out.append(Detections(torch.zeros(len(score), 4), labels[mine], score, keypoints=whole[mine]))
            else:
                out.append({"boxes": stored["truth.box"][mine], "labels": labels[mine], "keypoints": whole[mine]})
    gap = 0.0
    for name, visible in (("vis", True), ("all", False)):
        got = landmark_precision(found, targets, DEEPFASHION2, visible_only=visible)
        theirs = stored[f"oks.{name}"]
        gap = max(gap, (torch.tensor(list(got.values()), dtype=torch.float64) - theirs).abs().max().item())
        assert 0.2 < theirs[0] < 0.8
        for label in range(1, 14):
            truth = [{key: v[t["labels"] == label] for key, v in t.items()} for t in targets]
            mine = landmark_precision(found, truth, DEEPFASHION2, visible_only=visible)["map"]
            gap = max(gap, abs(mine - float(stored[f"oks.{name}.class"][label - 1].mean())))

    queries = rows_of(stored, "q", ("box", "label", "style", "pair"), 14)
    shown = rows_of(stored, "g", ("box", "style", "pair"), 16)
    asked = rows_of(stored, "qd", ("box", "label", "score", "rows"), 14)
    kept = rows_of(stored, "gd", ("box",), 16)
    figures = retrieval(
        [Detections(one["box"], one["label"], one["score"]) for one in asked],
        [{"boxes": q["box"], "labels": q["label"], "style": q["style"], "pair_id": q["pair"]} for q in queries],
        [one["rows"] for one in asked],
        [Detections(one["box"], torch.ones(len(one["box"])), torch.ones(len(one["box"]))) for one in kept],
        [{"boxes": g["box"], "style": g["style"], "pair_id": g["pair"]} for g in shown],
    )
    top = torch.tensor([figures[f"top_{k}"] for k in (1, 5, 10, 15, 20)], dtype=torch.float64)
    gap = max(gap, (top - stored["top"]).abs().max().item())
    assert figures["queries"] == stored["counts"][0]
    assert 0 < top[0] < top[1] < top[4] < 1
    assert gap < 1e-12
    record(
        "deepfashion2_match_rcnn",
        "matched",
        repository="switchablenorms/DeepFashion2",
        commit="fdf5ac3235578f55867c882595a57532d19329ec",
        largest_difference=gap,
        output=gap,
        note="the released evaluation of landmarks and of retrieval on drawn annotations; the model was not released",
    )


def wide(module: nn.Module, std: float = 0.3) -> None:
    """Weights that let scores lie apart."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)


def torchvisions(net: MatchRCNN, kind: type, **heads: object) -> nn.Module:
    """torchvision's network with this one's parts."""
    return of_parts(kind, net, sizes=SIZES, box_head=net.boxes.box_head, box_predictor=net.boxes.box_predictor, **heads)


def test_boxes_and_masks_are_torchvisions_mask_rcnn() -> None:
    """With copied weights: boxes of each class, scores, labels and mask probabilities."""
    net = MatchRCNN(**SMALL).eval()
    for module in (net.boxes.box_predictor, net.rpn.head.cls_logits, net.masks.mask_predictor):
        wide(module)
    predictor = mask_predictor(net.masks.mask_predictor, 3)
    pool = MultiScaleRoIAlign(LEVELS, 14, 2)
    heads = {"mask_roi_pool": pool, "mask_head": net.masks.mask_head, "mask_predictor": predictor}
    theirs = torchvisions(net, MaskRCNN, **heads)
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        expected, _ = detect(theirs, images)
        raw = net(images)
    assert_same(raw, expected)


def test_landmarks_are_torchvisions_keypoint_rcnn() -> None:
    """With copied weights and one class: boxes, heatmaps and their loss."""
    options = {"num_classes": 1, "landmarks": (5,), "masks": False, "matching": None}
    net = MatchRCNN(**{**SMALL, **options}).eval()
    wide(net.boxes.box_predictor)
    wide(net.rpn.head.cls_logits)
    wide(net.landmarks, 0.1)
    pool = MultiScaleRoIAlign(LEVELS, 14, 2)
    head, predictor = net.landmarks.convs, net.landmarks.predictor
    theirs = torchvisions(net, KeypointRCNN, keypoint_roi_pool=pool, keypoint_head=head, keypoint_predictor=predictor)
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        expected, features = detect(theirs, images)
        found = net.predict(images)
        boxes = [one.boxes for one in found]
        pooled = pool(features, boxes, [(128, 192)] * 2)
        logits = predictor(head(pooled))
        mine = net.landmarks(head(pooled), torch.ones(len(pooled), dtype=torch.int64))
    assert torch.equal(mine, logits)
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other["boxes"]) > 5
        torch.testing.assert_close(one.boxes, other["boxes"], rtol=0, atol=1e-4)

    truth = torch.rand(len(boxes[0]), 5, 3)
    truth[..., :2] = boxes[0][:, None, :2] + truth[..., :2] * (boxes[0][:, None, 2:] - boxes[0][:, None, :2])
    truth[..., 2] = (truth[..., 2] > 0.3).float()
    rows = torch.arange(len(boxes[0]))
    regions = Regions(boxes[0], torch.zeros_like(rows), torch.ones_like(rows), rows, boxes[0])
    target = {"keypoints": truth}
    cells, counts = landmark_targets(regions, [target], torch.tensor([[128.0, 192.0]]), [(128, 192)], net.landmarks, 56)
    ours = landmark_loss(logits[: len(rows)], cells, counts)
    reference = keypointrcnn_loss(logits[: len(rows)], [boxes[0]], [truth], [rows])
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


def test_points_lie_where_the_peaks_are() -> None:
    """Of smooth peaks at known places the parabola errs less than maps enlarged to the box, torchvision's way."""
    corner = torch.rand(40, 2) * 50
    boxes = torch.cat([corner, corner + 60 + torch.rand(40, 2) * 200], 1)
    truth = boxes[:, None, :2] + (0.1 + 0.8 * torch.rand(40, 3, 2)) * (boxes[:, 2:] - boxes[:, :2])[:, None]
    place = (truth - boxes[:, None, :2]) / (boxes[:, 2:] - boxes[:, :2])[:, None] * 56
    cells = torch.arange(56) + 0.5
    far = (cells - place[..., 1, None]).square()[..., :, None] + (cells - place[..., 0, None]).square()[..., None, :]
    logits = -far / 8
    ours = decode_landmarks(logits, boxes)
    theirs, _ = heatmaps_to_keypoints(logits, boxes)
    mine = (ours[..., :2] - truth).norm(dim=-1).mean().item()
    other = (theirs[..., :2] - truth).norm(dim=-1).mean().item()
    assert mine < 0.01 < other < 2
    total = logits.flatten(2).softmax(-1).amax(-1)
    torch.testing.assert_close(ours[..., 2], total)


def test_landmark_branch_equals_its_formula(double, record) -> None:
    """Targets, loss, decoded points and pair scores by explicit loops."""
    head = LandmarkHead(4, (2, 3), width=6, depth=1)
    labels = torch.tensor([2, 1, 2])
    boxes = torch.tensor([[2.0, 1.0, 20.0, 13.0], [0.0, 0.0, 8.0, 8.0], [5.0, 5.0, 9.0, 21.0]])
    features = torch.randn(3, 6, 3, 3)
    logits = head(features, labels)
    low = head.predictor.kps_score_lowres(features).detach()
    truth = torch.rand(2, 5, 3) * 9 + 2
    truth[..., 2] = torch.tensor([[2, 0, 1, 1, 2], [1, 1, 2, 0, 1]])
    regions = Regions(boxes, torch.zeros(3, dtype=torch.int64), labels, torch.tensor([1, 0, 1]), boxes)
    target, size = {"keypoints": truth / 2}, torch.tensor([[32.0, 32.0]])  # the image came half as large
    cells, counts = landmark_targets(regions, [target], size, [(16, 16)], head, 12)
    total, number, gap = 0.0, 0, 0.0
    points = decode_landmarks(logits, boxes)
    for r in range(3):
        start, many = (0, 2) if labels[r] == 1 else (2, 3)
        for slot in range(many):
            plane = torch.nn.functional.interpolate(low[r : r + 1, start + slot : start + slot + 1], scale_factor=2.0,
                                                    mode="bilinear")[0, 0]  # fmt: skip
            x, y, seen = truth[regions.matched[r], start + slot].tolist()
            x1, y1, x2, y2 = boxes[r].tolist()
            if seen > 0 and x1 <= x <= x2 and y1 <= y <= y2:
                column = min(int((x - x1) / (x2 - x1) * 12), 11)
                row = min(int((y - y1) / (y2 - y1) * 12), 11)
                norm = math.log(sum(math.exp(float(v)) for v in plane.flatten()))
                total += norm - float(plane[row, column])
                number += 1
                assert counts[r, slot]
                assert cells[r, slot] == row * 12 + column
            else:
                assert not counts[r, slot]
            best = max(range(144), key=lambda k: float(plane[k // 12, k % 12]))
            i, j = best // 12, best % 12
            at = [j + 0.5, i + 0.5]
            for axis, (place, step) in enumerate(((j, (0, 1)), (i, (1, 0)))):
                if 0 < place < 11:
                    a, b, c = (float(plane[i + s * step[0], j + s * step[1]]) for s in (-1, 0, 1))
                    at[axis] += max(min((c - a) / (2 * (2 * b - a - c)), 0.5), -0.5)
            expected = torch.tensor([x1 + at[0] / 12 * (x2 - x1), y1 + at[1] / 12 * (y2 - y1)])
            gap = max(gap, (points[r, slot, :2] - expected).abs().max().item())
        assert not counts[r, many:].any()
    assert number >= 3
    gap = max(gap, abs(landmark_loss(logits, cells, counts).item() - total / number))

    network = MatchingNetwork(4, width=5, depth=2, embedding_dim=3)
    a, b = torch.randn(4, 3), torch.randn(2, 3)
    scores = network.match(a, b).detach()
    weight, bias = network.decision.weight.detach(), network.decision.bias.detach()
    for q in range(4):
        for k in range(2):
            both = [
                float(bias[c]) + sum(float(weight[c, e]) * (float(a[q, e]) - float(b[k, e])) ** 2 for e in range(3))
                for c in range(2)
            ]
            expected = math.exp(both[1]) / (math.exp(both[0]) + math.exp(both[1]))
            gap = max(gap, abs(float(scores[q, k]) - expected))
    assert gap < 1e-11
    record(
        "deepfashion2_match_rcnn",
        "referenced",
        largest_difference=gap,
        dtype="float64",
        what="landmarks' cells, loss and decoding, and the score of a pair",
    )


def test_no_gradient_outside_the_class() -> None:
    """Exactly zero: in the maps, and in the last layer's weights of every channel of another class."""
    head = LandmarkHead(4, (3, 2, 4), width=6, depth=1)
    features = torch.randn(5, 6, 7, 7)
    labels = torch.full((5,), 2)
    cells, counts = torch.randint(0, 28 * 28, (5, 4)), head.valid(labels)
    assert counts.sum() == 10
    low = []
    head.predictor.kps_score_lowres.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), low.append(out))[1])
    landmark_loss(head(features, labels), cells, counts).backward()
    gradient = low[0].grad
    assert gradient[:, 3:5].abs().amax((0, 2, 3)).min() > 0
    assert gradient[:, :3].abs().max() == 0
    assert gradient[:, 5:].abs().max() == 0
    weight = head.predictor.kps_score_lowres.weight.grad
    assert weight[:, 3:5].abs().max() > 0
    assert weight[:, :3].abs().max() == weight[:, 5:].abs().max() == 0
    head.zero_grad()
    nothing = landmark_loss(head(features, labels), cells, counts & False)
    nothing.backward()
    assert nothing.item() == 0


def test_a_pair_is_symmetric_and_equal_items_depend_on_the_bias_alone() -> None:
    network = MatchingNetwork(4, width=5, embedding_dim=8)
    a, b = network(torch.randn(6, 4, 14, 14)), network(torch.randn(6, 4, 14, 14))
    assert torch.equal(network.pair_logits(a, b), network.pair_logits(b, a))
    torch.testing.assert_close(network.match(a, b), network.match(b, a).T)
    assert torch.equal(network.pair_logits(a, a), network.decision.bias.expand(6, 2))
    bias = (network.decision.bias[1] - network.decision.bias[0]).sigmoid()
    torch.testing.assert_close(network.match(a, a).diagonal(), bias.expand(6))
    direct = network.pair_logits(a[:, None].expand(-1, 6, -1), b[None].expand(6, -1, -1)).softmax(-1)[..., 1]
    torch.testing.assert_close(network.match(a, b), direct)
    far = 1000 + 3 * torch.randn(2, 50, 8)  # far from zero: squares alone would lose the differences
    torch.testing.assert_close(network.match(*far), network.double().match(*far.double()).float(), rtol=0, atol=1e-4)


def test_pairs_of_a_batch() -> None:
    pair_id = torch.tensor([1, 1, 1, 1, 2, 2, 2])
    style = torch.tensor([1, 0, 1, 0, 1, 1, 2])
    source = torch.tensor([1, 1, 0, 0, 0, 1, 1])  # users' items are 0, 1, 5, 6
    user, shop, same = sample_pairs(pair_id, style, source, negatives=100)
    assert {(u, s) for u, s in zip(user.tolist(), shop.tolist(), strict=True)} == {
        (u, s) for u in (0, 1, 5, 6) for s in (2, 3, 4)
    }
    positive = {(u, s) for u, s, one in zip(user.tolist(), shop.tolist(), same.tolist(), strict=True) if one}
    assert positive == {(0, 2), (5, 4)}  # 1 and 3 have style 0, 6 has another style
    _, _, same = sample_pairs(pair_id, style, source, negatives=1)
    assert same.tolist() == [1, 1, 0, 0]
    _, _, same = sample_pairs(pair_id, style * 0, source)
    assert same.tolist() == [0, 0, 0]
    assert len(sample_pairs(pair_id, style, source * 0)[2]) == 0
    assert len(sample_pairs(pair_id[:0], style[:0], source[:0])[2]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"matching": "class", "masks": False, "landmarks": ()},
        {"matching": "pose", "masks": False},
        {"matching": "mask", "landmarks": ()},
        {"matching": "pose+class"},
        {"matching": "mask+class", "image_size": 96},
        {"matching": None},
        {"matching": None, "masks": False, "landmarks": ()},
    ],
)
def test_variants(options: dict) -> None:
    net = MatchRCNN(**{**SMALL, **options})
    images, targets = drawn()
    targets = [{key: torch.cat([v, v]) for key, v in target.items()} for target in targets]
    for k, target in enumerate(targets):
        target |= {"pair_id": torch.arange(4) % 2, "style": torch.ones(4).long(), "source": torch.full((4,), k)}
    losses = net.losses(images, targets)
    wanted = {"loss_mask": net.masks, "loss_keypoint": net.landmarks, "loss_pair": net.matching}
    assert {name for name in wanted if name in losses} == {name for name, part in wanted.items() if part is not None}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    for image, found in zip(images, net.eval().predict(images, score_threshold=0.01), strict=True):
        assert len(found) > 0
        assert (found.masks is None) == (net.masks is None)
        assert (found.features is None) == (net.matching is None)
        if net.landmarks is not None:
            own = torch.zeros(len(found), 9, dtype=torch.bool)
            for row, label in enumerate(found.labels.tolist()):
                own[row, net.landmarks.space.span(label)] = True
            assert (found.keypoints[~own] == 0).all()
            assert (found.keypoints[own] != 0).all()
            assert (found.keypoints <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-3).all()


def test_a_search_from_images_to_figures() -> None:
    """Features of detections are those of their boxes; the best rows are the highest scores; the protocol runs."""
    net = MatchRCNN(**{**SMALL, "image_size": 96}).eval()
    images, targets = drawn()
    with torch.no_grad():
        found = net.predict(images, score_threshold=0.01)
        again = net.describe(images, [one.boxes for one in found])
        for one, vectors in zip(found, again, strict=True):
            torch.testing.assert_close(one.features, vectors, rtol=1e-4, atol=1e-5)
        query, gallery = found[0].features, torch.cat([one.features for one in found])
        scores, rows = net.retrieve(query, gallery, k=7)
        whole = net.match(query, gallery)
    torch.testing.assert_close(scores, whole.topk(7, 1).values)
    torch.testing.assert_close(whole.gather(1, rows), scores)
    assert net.retrieve(query, gallery[:3])[0].shape == (len(query), 3)
    target = {**targets[0], "style": torch.tensor([1, 0]), "pair_id": torch.tensor([4, 4])}
    figures = retrieval(found[:1], [target], [rows], found, [target, {**targets[1], "style": torch.zeros(2)}])
    assert figures["queries"] == 1
    assert [v.shape for v in net.describe(images, [torch.zeros(0, 4), torch.rand(2, 4).cumsum(1)])] == [
        (0, 16),
        (2, 16),
    ]


@pytest.mark.parametrize("count", [0, 1000])
def test_empty_and_crowded_images(count: int) -> None:
    net = MatchRCNN(**SMALL)
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=g) * 60
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=g) * 3 + 1], 1)  # down to a pixel
    none = draw_targets({**TARGET, "per_image": 0}, [(3, 64, 48)], g)[0]
    crowd = draw_targets({**TARGET, "per_image": count}, [(3, 64, 64)], g)[0] | {"boxes": boxes}
    losses = net.losses([torch.rand(3, 64, 64), torch.rand(3, 64, 48)], [crowd, none])
    assert all(v.isfinite() for v in losses.values())
    assert all((losses[key].item() == 0) == (count == 0) for key in ("loss_mask", "loss_pair"))
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_what_is_refused() -> None:
    for options, words in (
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"landmarks": "deepfashion"}, "landmarks must be counts, one for each class, or deepfashion2, got 'deepfash"),
        ({"landmarks": "deepfashion2"}, r"for each of 3 classes, got 13; landmarks=\(\) does without"),
        ({"matching": "poses"}, r"matching must be one of class, pose, mask, pose\+class.* or None, got 'poses'"),
        ({"matching": "mask", "masks": False}, "matching='mask' reads the mask branch, which is switched off"),
        ({"landmarks": ()}, r"matching='pose\+class' reads the pose branch, which is switched off"),
    ):
        with pytest.raises(ValueError, match=words):
            MatchRCNN(**{**SMALL, **options})
    net = MatchRCNN(**SMALL)
    for key, words in (
        ("masks", "target 1: expected masks beside the boxes"),
        ("keypoints", r"target 1: expected keypoints \(2, 9, 3\); landmarks=\(\) trains without them"),
        ("style", "target 1: expected style"),
    ):
        images, targets = drawn()
        del targets[1][key]
        with pytest.raises(ValueError, match=words):
            net.losses(images, targets)
    images, targets = drawn()
    targets[0]["source"] = torch.tensor(1)
    with pytest.raises(ValueError, match=r"target 0: expected source \(2,\), got \(\)"):
        net.losses(images, targets)
    plain = MatchRCNN(**{**SMALL, "matching": None})
    with pytest.raises(ValueError, match="built with matching=None; it must be one of class, pose"):
        plain.match(torch.zeros(1, 16), torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"expected vectors \(Q, E\) and \(G, E\), got \(1, 16\) and \(2, 8\)"):
        net.match(torch.zeros(1, 16), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="expected boxes of 2 images, got 1"):
        net.describe(images, [torch.zeros(0, 4)])


@pytest.mark.slow
def test_one_onnx_file_serves_every_size(tmp_path) -> None:
    """Up to the masks, landmarks and vectors of the chosen detections."""
    net = MatchRCNN(**SMALL).eval()
    wide(net.rpn.head.cls_logits, 1.0)  # scores that lie apart and below 1, so that rounding keeps their order
    wide(net.boxes.box_predictor.cls_score, 0.5)
    wide(net.landmarks.predictor, 0.5)
    write_onnx(net, torch.randn(2, 3, 64, 64), tmp_path / "whole.onnx")
    exported = OnnxModel(tmp_path / "whole.onnx")
    for size in [(2, 3, 64, 64), (3, 3, 70, 100)]:
        x = torch.randn(size)
        with torch.no_grad():
            raw = net(x)
        for (name, expected), got in zip(raw.items(), exported(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3, msg=f"{name} at {size}")


#: Outlines in the unit square, whose corners are the landmarks: a top, trousers, a dress.
OUTLINES = (
    [(0.3, 0.0), (0.7, 0.0), (1.0, 0.3), (0.85, 0.45), (0.72, 0.32), (0.72, 1.0), (0.28, 1.0), (0.28, 0.32),
     (0.15, 0.45), (0.0, 0.3)],
    [(0.2, 0.0), (0.8, 0.0), (0.95, 1.0), (0.6, 1.0), (0.5, 0.35), (0.4, 1.0), (0.05, 1.0)],
    [(0.35, 0.0), (0.65, 0.0), (0.65, 0.4), (1.0, 1.0), (0.0, 1.0), (0.35, 0.4)],
)  # fmt: skip


def garment(label: int, look: Tensor, user: bool, size: int, g: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """An image and a target: striped as ``look`` says, upright on white for a shop; turned, lit otherwise, partly
    hidden and on noise for a user.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    corner = torch.tensor(OUTLINES[label - 1])
    angle = (rand(1) - 0.5) * (0.8 if user else 0.1)
    side = size * (0.45 + 0.35 * rand(1)) if user else size * (0.7 + 0.1 * rand(1))
    turn = torch.stack([torch.cat([angle.cos(), -angle.sin()]), torch.cat([angle.sin(), angle.cos()])])
    centre = size / 2 + (rand(2) - 0.5) * (size - side) * 0.7
    points = (corner - 0.5) @ turn.T * side + centre
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    u, v = ((torch.stack([x, y], -1) - centre) @ turn / side + 0.5).unbind(-1)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corner.tolist(), corner.roll(-1, 0).tolist(), strict=True):
        if ay != by:
            mask ^= ((v >= ay) != (v >= by)) & (u < ax + (v - ay) / (by - ay) * (bx - ax))
    first, second, (slope, often) = look[:3], look[3:6], look[6:]
    stripes = ((u * (slope * math.pi).cos() + v * (slope * math.pi).sin()) * (2 + 5 * often)).frac() < 0.5
    cloth = torch.where(stripes, first[:, None, None], second[:, None, None])
    image = torch.where(mask, cloth, torch.full((3, size, size), 0.95))
    seen = torch.full((len(corner),), 2.0)
    if user:
        noise = torch.nn.functional.interpolate(rand(1, 3, 8, 8), size=(size, size), mode="bilinear")[0]
        image = torch.where(mask, cloth * (0.7 + 0.5 * rand(1)) * (0.9 + 0.2 * rand(3, 1, 1)), noise)
        at, wide = centre + (rand(2) - 0.5) * side, side * 0.25
        hidden = ((x - at[0]).abs() < wide / 2) & ((y - at[1]).abs() < wide / 2)
        image = torch.where(hidden, rand(3, 1, 1), image)
        mask = mask & ~hidden
        seen[((points - at).abs() < wide / 2).all(1)] = 1
    image = (image + 0.03 * torch.randn(3, size, size, generator=g)).clamp(0, 1)
    counts = [len(outline) for outline in OUTLINES]
    keypoints = torch.zeros(1, sum(counts), 3)
    start = sum(counts[: label - 1])
    keypoints[0, start : start + len(corner)] = torch.cat([points, seen[:, None]], 1)
    box = torchvision.ops.masks_to_boxes(mask[None]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return image, {
        "boxes": box,
        "labels": torch.tensor([label]),
        "masks": mask[None].to(torch.uint8),
        "keypoints": keypoints,
        "style": torch.ones(1, dtype=torch.int64),
        "source": torch.tensor([int(user)]),
    }


def garments(pairs: int, size: int, g: torch.Generator) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """For each pair a user's and a shop's image of one garment: its shape is its class, its stripes are its own."""
    images, targets = [], []
    for k in range(pairs):
        label, look = int(torch.randint(1, 4, (1,), generator=g)), torch.rand(8, generator=g)
        for user in (True, False):
            image, target = garment(label, look, user, size, g)
            images.append(image)
            targets.append({**target, "pair_id": torch.tensor([k])})
    return images, targets


def retrieval_of(matching: str, *, steps: int, pairs: int = 4, size: int = 64, seed: int = 0) -> dict[str, float]:
    """Train on fresh pairs, then seek 60 users' garments of stripes never seen among 60 shops', all of three shapes.

    ``true_1`` and ``true_5`` are of the true boxes, ``top_1`` and ``top_5`` of detected ones.
    """
    torch.manual_seed(seed)
    net = MatchRCNN(
        num_classes=3,
        landmarks=[len(outline) for outline in OUTLINES],
        backbone="timm/resnet10t",
        matching=matching,
        channels=32,
        hidden=64,
        landmark_channels=32,
        embedding_dim=32,
        anchor_sizes=SIZES,
        before_nms=(200, 100),
        after_nms=(100, 20),
        rois_per_image=8,
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    g = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps):
        images, targets = garments(pairs, size, g)
        loss = sum(net.losses(images, targets).values())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    net.eval()
    images, targets = garments(60, size, torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = [net.predict([image])[0] for image in images]
        vectors = torch.cat(net.describe(images, [target["boxes"] for target in targets]))
        shown = torch.cat([one.features for one in found[1::2]])
        rows = [net.retrieve(one.features, shown)[1] for one in found[::2]]
        best = net.retrieve(vectors[::2], vectors[1::2], k=5)[1]
    figures = retrieval(found[::2], targets[::2], rows, found[1::2], targets[1::2], ks=(1, 5))
    right = best == torch.arange(60)[:, None]
    return {
        "true_1": right[:, 0].float().mean().item(),
        "true_5": right.any(1).float().mean().item(),
        **figures,
    }


@pytest.mark.slow
def test_garments_never_seen_are_found_in_the_other_domain() -> None:
    """Among the first five, of true boxes, above chance in the mean of three trainings, each of a branch and a seed.

    Seeds differ more than branches and one alone may be at chance (the card has all nine). By chance the mean is 0.083,
    with a deviation of 0.021.
    """
    figures = {k: retrieval_of(k, steps=300, seed=seed) for seed, k in enumerate(("class", "pose", "mask"))}
    assert sum(one["true_5"] for one in figures.values()) / 3 > 0.083 + 3 * 0.021, figures
