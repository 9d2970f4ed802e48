"""The model: three groups of logits, their losses, and objects from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.segmentation.instance_depth_direction.decoding import (
    Instances,
    boxes_of,
    collect,
    detections,
    group_by_centres,
    group_by_contact,
    rank,
    read_fields,
)
from torchive.methods.segmentation.instance_depth_direction.encoding import Encoding, encode
from torchive.methods.segmentation.instance_depth_direction.loss import encoding_loss
from torchive.methods.segmentation.instance_depth_direction.network import FCN8s
from torchive.ops.images import check_images, image_sizes, pad_batch, training_targets
from torchive.ops.masks import IGNORED, check_masks
from torchive.structures import Detections


class InstanceDepthDirection(nn.Module):
    """Instance segmentation without proposals: images (N, C, H, W), or a list of (C, H, W), to boxes and masks.

    A list is padded to one size, a multiple of the backbone's largest stride; so is a tensor. Boxes and masks go in and
    come out in pixels of the images given.

    Args:
        num_classes: K; labels run from 1 to K.
        stuff_classes: S, classes without objects beside the background; they have the labels above K.
        in_channels: C.
        backbone: "vgg16" (the paper's FCN-8s), ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        width: channels of the upsampling layers.
        finest: stride of the finest map that is read, 8 in the paper; 4 or 2 serve small objects.
        drop: share of the activations of VGG-16's last layers that are dropped in training.
        directions: number of direction classes; 0 learns x and y of the direction instead.
        depths: D, number of depth classes; 0 leaves depth out, so that all templates have one size.
        depth_range: first and last border between the bins of depth, in the unit of the targets' ``depth``.
        object_size: side in pixels of an object at depth 1; one at depth z has ``object_size / z``. Where targets have
            no ``depth``, it is taken from the objects' visible areas by this rule.
        categories: category of each class, from 1, to merge classes whose centres are sought together; None keeps each
            class for itself.
        template_aspects: height over width of each category's template; 1 if None. See ``mean_aspects``.
        nms_radius: half sides of the box that a centre keeps free of others, as a multiple of its template's.
        grouping: "centres", or "components": the baseline, connected pieces of the semantic map.

    Raises:
        ValueError: an argument outside the above.
    """

    task = "detection"

    def __init__(
        self,
        *,
        num_classes: int = 8,
        stuff_classes: int = 0,
        in_channels: int = 3,
        backbone: str | nn.Module = "vgg16",
        width: int = 100,
        finest: int = 8,
        drop: float = 0.5,
        directions: int = 8,
        depths: int = 19,
        depth_range: Sequence[float] = (1.0, 32.0),
        object_size: float = 256.0,
        categories: Sequence[int] | None = None,
        template_aspects: Sequence[float] | None = None,
        nms_radius: float = 1.0,
        grouping: Literal["centres", "components"] = "centres",
    ) -> None:
        super().__init__()
        if num_classes < 1 or stuff_classes < 0 or width < 1:
            raise ValueError(
                f"num_classes and width must be >= 1, stuff_classes >= 0, got {num_classes}, {width}, {stuff_classes}"
            )
        if num_classes + stuff_classes >= IGNORED:
            raise ValueError(f"expected fewer than {IGNORED} classes, got {num_classes} and {stuff_classes}")
        near, far = depth_range
        self.encoding = Encoding(directions=directions, depths=depths, depth_range=(near, far), object_size=object_size)
        self.num_classes, self.in_channels = num_classes, in_channels
        outputs = {"semantic": 1 + num_classes + stuff_classes}
        outputs |= {"depth": 1 + depths} if depths else {}
        outputs |= {"direction": 1 + directions if directions else 2}
        self.network = FCN8s(backbone, outputs, in_channels=in_channels, width=width, finest=finest, drop=drop)
        self.decoder = InstanceDecoder(
            self.encoding,
            num_classes=num_classes,
            stuff_classes=stuff_classes,
            categories=categories,
            template_aspects=template_aspects,
            nms_radius=nms_radius,
            grouping=grouping,
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Logits of each pixel of the padded batch: ``semantic`` (N, 1 + K + S, H, W), background first; ``depth``
        (N, 1 + D, H, W) and ``direction`` (N, 1 + directions, H, W), no object first; without direction classes
        ``direction`` (N, 2, H, W), x and y.
        """
        check_images(inputs, self.in_channels)
        raw: dict[str, Tensor] = self.network(pad_batch(inputs, self.network.divisor))
        return raw

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``semantic``, ``depth`` and ``direction``, equally weighted. Targets have ``masks`` (L, H, W), too.

        Optional: ``depth`` (L,) of each object or (H, W) of each pixel, ``semantic`` (H, W), ``iscrowd`` (L,), whose
        pixels count nowhere.

        Raises:
            ValueError: targets that do not fit; naming the image.
        """
        check_images(inputs, self.in_channels)
        sizes = image_sizes(inputs)
        targets = training_targets(targets, len(sizes), self.num_classes, crowds=True)
        check_masks(targets, sizes)
        for k, target in enumerate(targets):
            if "depth" in target:
                _check_depth(target["depth"], k, len(target["labels"]), sizes[k])
        raw = self(inputs)
        canvas = raw["semantic"].shape[2:]
        truth: dict[str, list[Tensor]] = {}
        for target, size in zip(targets, sizes, strict=True):
            for name, value in encode(target, size, self.encoding).items():
                full = value.new_full((*value.shape[:-2], *canvas), 0 if name in ("vectors", "ignored") else IGNORED)
                full[..., : size[0], : size[1]] = value
                truth.setdefault(name, []).append(full)
        return encoding_loss(raw, {name: torch.stack(values) for name, values in truth.items()})

    def instances(self, inputs: Tensor | Sequence[Tensor], **options: Any) -> list[Instances]:
        """The objects of each image as a map of ids with label, score and depth; options as those of ``predict``."""
        return self.decode_instances(self(inputs), image_sizes(inputs), **options)

    def decode_instances(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Instances]:
        """Raw outputs to objects; options as those of ``predict``."""
        found = []
        for k, (height, width) in enumerate(image_sizes):
            found.append(self.decoder.instances({n: v[k, :, :height, :width] for n, v in raw.items()}, **options))
        return found

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return [detections(one) for one in self.decode_instances(raw, image_sizes, **options)]

    @property
    def decodes_batches_of(self) -> int:
        """Images that ``decoded`` takes at a time: one, and none without centres."""
        return int(self.decoder.grouping == "centres")

    def decoded(self, raw: dict[str, Tensor], size: Sequence[int], **options: Any) -> dict[str, Tensor]:
        """Objects of one image of ``size`` (height, width) in fixed shapes, as ``InstanceDecoder``; for export."""
        found: dict[str, Tensor] = self.decoder({n: v[..., : size[0], : size[1]] for n, v in raw.items()}, **options)
        return found

    def predict(self, inputs: Tensor | Sequence[Tensor], **options: Any) -> list[Detections]:
        """One ``Detections`` per image, boxes and masks in pixels of the image that went in; masks do not overlap.

        Options: ``min_area`` (1) and ``max_detections`` (1000); with centres also those of
        ``decoding.group_by_centres``: ``score_threshold``, ``nms_radius``, ``tolerance``, ``reach``, ``depth_gap``,
        ``leftover``, ``bias`` and ``candidates``.
        """
        return self.decode(self(inputs), image_sizes(inputs), **options)


def _check_depth(depth: Tensor, image: int, count: int, size: tuple[int, int]) -> None:
    wanted = f"target {image}: expected depth ({count},) of the objects, all above zero, or {size} of the pixels"
    if tuple(depth.shape) not in ((count,), size):
        raise ValueError(f"{wanted}, got {tuple(depth.shape)}")
    if depth.ndim == 1 and not bool((depth > 0).all()):
        raise ValueError(f"{wanted}, got {int((~(depth > 0)).sum())} of {count} that are not")


class InstanceDecoder(nn.Module):
    """Logits of one image to its objects; it has no parameters.

    ``forward`` maps a dict of (1, k, H, W), as of ``InstanceDepthDirection.forward``, to ``boxes`` (1, M, 4),
    ``labels`` (1, M) and ``scores`` (1, M), best first, -1 and zeros in empty rows, and ``ids`` (1, H, W), 0 for none,
    otherwise the row from 1: shapes that do not depend on the data, so that it can be exported, for one image.

    Args:
        encoding: directions and depths.
        num_classes, stuff_classes, categories, template_aspects, nms_radius, grouping: as of the model.
        candidates: M, centres that are looked at in ``forward``.
    """

    extent: Tensor
    largest: tuple[int, ...]
    sides: Tensor
    middles: Tensor
    categories: Tensor

    def __init__(
        self,
        encoding: Encoding,
        *,
        num_classes: int,
        stuff_classes: int = 0,
        categories: Sequence[int] | None = None,
        template_aspects: Sequence[float] | None = None,
        nms_radius: float = 1.0,
        grouping: Literal["centres", "components"] = "centres",
        candidates: int = 100,
    ) -> None:
        super().__init__()
        kinds = list(range(1, num_classes + 1)) if categories is None else list(categories)
        if len(kinds) != num_classes or set(kinds) != set(range(1, max(kinds, default=0) + 1)):
            raise ValueError(f"expected a category from 1 on for each of {num_classes} classes, got {kinds}")
        aspects = [1.0] * max(kinds) if template_aspects is None else list(template_aspects)
        if len(aspects) != max(kinds) or min(aspects) <= 0:
            raise ValueError(f"expected {max(kinds)} template_aspects above zero, got {aspects}")
        if grouping not in ("centres", "components") or not nms_radius > 0:
            raise ValueError(
                f"grouping must be centres or components and nms_radius above zero, got {grouping!r} and {nms_radius}"
            )
        self.num_classes, self.nms_radius, self.grouping = num_classes, nms_radius, grouping
        self.max_candidates = candidates
        extent = [
            [[max(round((side * root - 1) / 2), 1) for root in (aspect**0.5, aspect**-0.5)] for side in encoding.sides]
            for aspect in aspects
        ]  # (G, D, 2), pixels above and beside the middle
        self.largest = tuple(max(pair[k] for row in extent for pair in row) for k in (0, 1))
        side = torch.tensor(encoding.sides, dtype=torch.float32)
        self.register_buffer("extent", torch.tensor(extent), persistent=False)
        self.register_buffer("sides", side, persistent=False)
        self.register_buffer("middles", torch.tensor(encoding.middles, dtype=torch.float32), persistent=False)
        table = torch.tensor([0, *kinds, *[0] * stuff_classes])
        self.register_buffer("categories", table, persistent=False)

    def forward(
        self, raw: dict[str, Tensor], *, min_area: int = 1, max_detections: int | None = None, **options: Any
    ) -> dict[str, Tensor]:
        if self.grouping != "centres" or raw["semantic"].shape[0] != 1:
            raise ValueError(
                f"expected grouping by centres and one image, got {self.grouping} and {raw['semantic'].shape[0]}"
            )
        fields, label, certainty = read_fields({name: value[0] for name, value in raw.items()}, self.categories)
        options = {"nms_radius": self.nms_radius, "candidates": self.max_candidates, **options}
        ids, trust = group_by_centres(fields, self.extent, self.sides, self.largest, **options)
        trust = torch.nn.functional.pad(trust, (0, options["candidates"] - trust.shape[0]))
        depth = self.middles[fields.depths]
        found = rank(ids, trust, label, certainty, depth, num_classes=self.num_classes, min_area=min_area)
        there = found.scores >= 0
        boxes = torch.where(there[:, None], boxes_of(found.ids, len(trust)), 0).to(found.scores.dtype)
        rows = slice(max_detections)
        ids = found.ids if max_detections is None else torch.where(found.ids <= max_detections, found.ids, 0)
        given = {
            "boxes": boxes[rows],
            "labels": torch.where(there, found.labels, 0)[rows],
            "scores": found.scores[rows],
        }
        return {name: value[None] for name, value in {**given, "ids": ids}.items()}

    def instances(
        self, raw: dict[str, Tensor], *, min_area: int = 1, max_detections: int = 1000, **options: Any
    ) -> Instances:
        """The objects of one image, logits (k, H, W) of each group."""
        fields, label, certainty = read_fields(raw, self.categories)
        if self.grouping == "centres":
            options = {"nms_radius": self.nms_radius, **options}
            ids, trust = group_by_centres(fields, self.extent, self.sides, self.largest, **options)
        else:
            if options:
                raise ValueError(f"connected components take min_area and max_detections alone, got {sorted(options)}")
            ids = group_by_contact(label, fields.categories)
            trust = torch.ones(int(ids.max()) if ids.numel() else 0, device=ids.device)
        depth = self.middles[fields.depths]
        ranked = rank(ids, trust, label, certainty, depth, num_classes=self.num_classes, min_area=min_area)
        return collect(ranked, max_detections=max_detections)
