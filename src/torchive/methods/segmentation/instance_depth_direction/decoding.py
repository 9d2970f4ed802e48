"""From logits to objects: what each pixel says, objects from it, and their boxes and masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchive.methods.segmentation.instance_depth_direction.encoding import direction_vectors
from torchive.methods.segmentation.instance_depth_direction.grouping import (
    Fields,
    fuse,
    join_leftovers,
    keep_largest_pieces,
    vote,
)
from torchive.methods.segmentation.instance_depth_direction.templates import (
    find_centres,
    match_templates,
    points_at,
)
from torchive.ops.components import connected_components
from torchive.structures import Detections


@dataclass(frozen=True)
class Instances:
    """Objects of one image, highest score first.

    ``ids`` (H, W) int64, the row from 1 of each pixel's object, 0 for none; ``labels`` (L,) from 1 to K; ``scores``
    (L,) in [0, 1]; ``depths`` (L,), mean of the object's pixels, in the unit of the encoding; ``semantic`` (H, W)
    int64, the object's label where there is one, otherwise what the semantic group says.
    """

    ids: Tensor
    labels: Tensor
    scores: Tensor
    depths: Tensor
    semantic: Tensor


def read_fields(raw: dict[str, Tensor], categories: Tensor) -> tuple[Fields, Tensor, Tensor]:
    """What each pixel of one image says, its class (H, W) and the score (H, W) of that class.

    Args:
        raw: logits (k, H, W) of each group.
        categories: (C,), the category of each class of the semantic group, 0 for what has no objects.
    """
    wide = {name: v.to(torch.promote_types(v.dtype, torch.float32)) for name, v in raw.items()}
    certainty, label = wide["semantic"].softmax(0).max(0)
    category = categories[label]
    vectors = wide["direction"]
    if vectors.shape[0] > 2:  # classes, the first of them for no object
        units = direction_vectors(vectors.shape[0] - 1, vectors)
        vectors = torch.einsum("khw,kc->chw", vectors.softmax(0)[1:], units)
    else:
        vectors = vectors / vectors.norm(dim=0).clamp(min=1)
    vectors = vectors * (category > 0)
    depth = wide["depth"][1:].max(0).indices if "depth" in wide else torch.zeros_like(label)
    return Fields(vectors, category, depth), label, certainty


def group_by_centres(
    fields: Fields,
    half: Tensor,
    sides: Tensor,
    largest: tuple[int, ...],
    *,
    score_threshold: float = 0.3,
    nms_radius: float = 1.0,
    tolerance: float = 22.5,
    reach: float = 1.5,
    depth_gap: int = 3,
    leftover: int = 16,
    bias: float = 0.4,
    candidates: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Ids (H, W) from 1, 0 for none, and the template score (M,) of each id: the whole post-processing of one image.

    Args:
        fields: what its pixels say.
        half: (G, D, 2), pixels of the template of each category and depth above and beside its middle.
        sides: (D,), side of an object in pixels at each depth.
        largest: template, above and beside its middle.
        score_threshold: of the template matching, for a centre.
        nms_radius: half sides of the box that a centre keeps free, as a multiple of its template's.
        tolerance: degrees by which a direction may miss a centre.
        reach: distance up to which a centre takes pixels, in sides of its objects.
        depth_gap: bins up to which two depths are similar.
        leftover: pixels by which objects grow over what no centre has taken.
        bias: length of the mean direction above which an object is only a part; 1 fuses nothing.
        candidates: maxima that are looked at.
    """
    score = match_templates(fields.directions, fields.categories, fields.depths, half, largest)
    centres = find_centres(
        score,
        fields.categories,
        fields.depths,
        half,
        score_threshold=score_threshold,
        nms_radius=nms_radius,
        depth_gap=depth_gap,
        candidates=candidates,
    )
    ids = vote(fields, centres, sides, tolerance=tolerance, reach=reach, depth_gap=depth_gap)
    ids = keep_largest_pieces(ids, centres.points.shape[0])
    ids = join_leftovers(ids, fields, centres.depth, depth_gap=depth_gap, leftover=leftover)
    return fuse(ids, fields, centres, bias=bias, depth_gap=depth_gap), centres.score.clamp(0, 1)


def group_by_contact(label: Tensor, category: Tensor) -> Tensor:
    """Ids (H, W) from 1, 0 for none: the connected pieces of the semantic map, the baseline."""
    pieces = connected_components(torch.where(category > 0, label, 0))
    names = pieces.unique()
    names = names[names > 0]
    ids = torch.bucketize(pieces, names) + 1
    return torch.where(pieces > 0, ids, 0)


def rank(
    ids: Tensor,
    trust: Tensor,
    label: Tensor,
    certainty: Tensor,
    depth: Tensor,
    *,
    num_classes: int,
    min_area: int = 1,
) -> Instances:
    """As many rows as ``trust`` has, the best first; those without ``min_area`` pixels come last, with score -1.

    The label is the most frequent one, the score the mean certainty of the semantic group times ``trust``, the depth
    the mean over the pixels.

    Args:
        ids: (H, W), 1 to M, 0 for none.
        trust: (M,), score of each id beside that of its pixels.
        label: (H, W), class of each pixel.
        certainty: (H, W), its score.
        depth: (H, W), distance that each pixel says.
        num_classes: K.
        min_area: pixels below which an object is dropped.
    """
    count, flat = trust.shape[0], ids.flatten()
    values = torch.stack([torch.ones_like(certainty), certainty, depth.to(certainty.dtype)]).flatten(1)
    area, sure, far = values.new_zeros(3, count + 1).index_add(1, flat, values)[:, 1:]
    votes = torch.zeros((count + 1) * (num_classes + 1), dtype=torch.int64, device=ids.device)
    pair = flat * (num_classes + 1) + torch.where(label <= num_classes, label, 0).flatten()
    votes = votes.scatter_add(0, pair, torch.ones_like(pair)).view(count + 1, -1)[1:, 1:]
    score = torch.where(area >= max(min_area, 1), (sure / area.clamp(min=1)) * trust, -1).clamp(max=1)
    exported = torch.compiler.is_compiling()  # ONNX has no stable sort
    score, order = score.sort(descending=True) if exported else score.sort(descending=True, stable=True)
    row = torch.arange(1, count + 1, device=ids.device)
    place = torch.zeros(count + 1, dtype=torch.int64, device=ids.device)
    place = place.scatter(0, order + 1, torch.where(score >= 0, row, 0))
    labels = votes.argmax(1)[order] + 1 if count else order
    return Instances(place[ids], labels, score, (far / area.clamp(min=1))[order], label)


def collect(ranked: Instances, *, max_detections: int = 1000) -> Instances:
    """The rows that are objects, ``max_detections`` at most; their pixels have their label."""
    count = min(int((ranked.scores >= 0).sum()), max_detections)
    ids = torch.where(ranked.ids <= count, ranked.ids, 0)
    labels = ranked.labels[:count]
    semantic = torch.where(ids > 0, torch.cat([labels.new_zeros(1), labels])[ids], ranked.semantic)
    return Instances(ids, labels, ranked.scores[:count], ranked.depths[:count], semantic)


def detections(found: Instances) -> Detections:
    """The objects as boxes and masks, in pixels of the map of ids."""
    count = len(found.scores)
    masks = found.ids == torch.arange(1, count + 1, device=found.ids.device)[:, None, None]
    return Detections(boxes_of(found.ids, count).to(found.scores.dtype), found.labels, found.scores, masks)


def boxes_of(ids: Tensor, count: int) -> Tensor:
    """Corners (``count``, 4) of the pixels of each id from 1 in a map (H, W)."""
    height, width = ids.shape
    flat = ids.flatten()
    x, y = points_at(torch.arange(height * width, device=flat.device), width).unbind(1)
    ends = []
    for value, start, how in ((x, width, "amin"), (y, height, "amin"), (x, -1, "amax"), (y, -1, "amax")):
        ends.append(flat.new_full((count + 1,), start).scatter_reduce(0, flat, value, how)[1:] + (how == "amax"))
    return torch.stack(ends, 1)
