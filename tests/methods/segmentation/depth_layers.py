"""For the tests of depth layering: ellipses, discs, the Rand index, and slow references, one pixel after the other."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchive.methods.segmentation.instance_depth_direction import Encoding


def draw_ellipses(seed: int, count: int, *, gap: int, largest: float, size: tuple[int, int] = (112, 144)) -> Tensor:
    """Masks (L, H, W) of random ellipses that do not overlap, at least ``gap`` pixels apart."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    taken, masks = np.zeros(size, dtype=bool), []
    for _ in range(300):
        a = draw.uniform(4, largest)
        b, turn = a * draw.uniform(0.5, 1), draw.uniform(0, math.pi)
        cx, cy = draw.uniform(a, size[1] - a), draw.uniform(a, size[0] - a)
        u = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
        v = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
        mask = (u / a) ** 2 + (v / b) ** 2 <= 1
        wide = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * gap + 1, 1, gap)[0].numpy() > 0
        if not (wide & taken).any():
            masks.append(mask)
            taken |= mask
        if len(masks) == count:
            break
    return torch.from_numpy(np.stack(masks)).to(torch.uint8)


def target_of(masks: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return {"masks": masks, "labels": torch.ones(len(masks), dtype=torch.int64), **more}


def rand_index(first: Tensor, second: Tensor) -> float:
    """The adjusted one (Hubert and Arabie, 1985), the background being a cluster."""
    pairs = Counter(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    rows, columns = Counter(first.flatten().tolist()), Counter(second.flatten().tolist())
    both, a, b = (sum(math.comb(n, 2) for n in counts.values()) for counts in (pairs, rows, columns))
    chance = a * b / math.comb(first.numel(), 2)
    return (both - chance) / ((a + b) / 2 - chance)


def slow_encoding(target: dict[str, Tensor], encoding: Encoding) -> dict[str, np.ndarray]:
    """Pixel by pixel, from the words of the paper."""
    masks, labels = target["masks"].numpy(), target["labels"].numpy()
    crowd = target["iscrowd"].numpy().astype(bool)
    height, width = masks.shape[1:]
    edges = encoding.edges
    owner = np.full((height, width), -1)
    for y, x, k in itertools.product(range(height), range(width), range(len(masks))):
        if masks[k, y, x] and not crowd[k]:
            owner[y, x] = k
    maps = {name: np.zeros((height, width), dtype=np.int64) for name in ("semantic", "depth", "direction")}
    maps["vectors"] = np.zeros((2, height, width))
    for k in range(len(masks)):
        places = [(y, x) for y in range(height) for x in range(width) if owner[y, x] == k]
        if not places:
            continue
        cy, cx = (sum(p[i] for p in places) / len(places) for i in (0, 1))
        depth = encoding.object_size / math.sqrt(len(places))
        for y, x in places:
            angle = math.degrees(math.atan2(cy - y, cx - x)) if math.hypot(cy - y, cx - x) > 1e-6 else 0.0
            maps["direction"][y, x] = int(((angle + 22.5) % 360) // 45) + 1
            maps["depth"][y, x] = sum(depth >= edge for edge in edges) + 1
            length = math.hypot(cy - y, cx - x)
            maps["vectors"][:, y, x] = ((cx - x) / length, (cy - y) / length) if length > 1e-6 else (0, 0)
            maps["semantic"][y, x] = labels[k]
    for y, x in itertools.product(range(height), range(width)):
        if owner[y, x] < 0 and any(masks[k, y, x] for k in range(len(masks)) if crowd[k]):
            for name in ("semantic", "depth", "direction"):
                maps[name][y, x] = 255
    return maps


def slow_score(field: np.ndarray, kind: np.ndarray, depth: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Normalised cross-correlation, window by window."""
    height, width = kind.shape
    score = np.full((height, width), -1.0)
    for y, x in itertools.product(range(height), range(width)):
        if kind[y, x] == 0:
            continue
        ry, rx = half[kind[y, x] - 1, depth[y, x]]
        product = energy = cells = 0.0
        for i, j in itertools.product(range(max(y - ry, 0), min(y + ry + 1, height)), range(max(x - rx, 0), width)):
            if j > x + rx or (i, j) == (y, x):
                energy += (i, j) == (y, x) and float((field[:, i, j] ** 2).sum())
                continue
            cells += 1
            if kind[i, j] == kind[y, x]:
                length = math.hypot(i - y, j - x)
                product += (field[0, i, j] * (x - j) + field[1, i, j] * (y - i)) / length
                energy += float((field[:, i, j] ** 2).sum())
        score[y, x] = product / math.sqrt(max(energy * cells, 1e-6))
    return score.clip(-1, 1)


def slow_pieces(ids: np.ndarray) -> np.ndarray:
    """Each id's largest piece by a flood fill over eight neighbours, the first one of equals."""
    height, width = ids.shape
    seen, kept = np.zeros(ids.shape, dtype=bool), np.zeros_like(ids)
    best: dict[int, list[tuple[int, int]]] = {}
    for start in itertools.product(range(height), range(width)):
        if ids[start] == 0 or seen[start]:
            continue
        piece, todo = [], [start]
        seen[start] = True
        while todo:
            y, x = todo.pop()
            piece.append((y, x))
            for i, j in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if 0 <= i < height and 0 <= j < width and ids[i, j] == ids[start] and not seen[i, j]:
                    seen[i, j] = True
                    todo.append((i, j))
        if len(piece) > len(best.get(int(ids[start]), [])):
            best[int(ids[start])] = piece
    for name, piece in best.items():
        for place in piece:
            kept[place] = name
    return kept


def slow_grouping(
    field: np.ndarray, kind: np.ndarray, depth: np.ndarray, score: np.ndarray, half: np.ndarray, sides: list[float]
) -> np.ndarray:
    """Post-processing one maximum, one pixel and one pair of parts after the other; the defaults of the module."""
    height, width = kind.shape
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]

    def beside(y: int, x: int) -> list[tuple[int, int]]:
        return [(y + i, x + j) for i, j in around if 0 <= y + i < height and 0 <= x + j < width]

    maxima = [
        (y, x)
        for y, x in itertools.product(range(height), range(width))
        if score[y, x] > 0.3 and all(score[place] <= score[y, x] for place in beside(y, x))
    ]
    maxima.sort(key=lambda place: -score[place])
    alive: list[tuple[int, int]] = []
    names = {}
    for k, (y, x) in enumerate(maxima):
        rivals = []
        for i, j in alive:
            ry, rx = half[kind[i, j] - 1, depth[i, j]]
            near = abs(y - i) <= ry and abs(x - j) <= rx
            rivals.append(near and kind[i, j] == kind[y, x] and abs(int(depth[i, j]) - int(depth[y, x])) <= 3)
        if not any(rivals):
            alive.append((y, x))
            names[(y, x)] = k + 1
    ids = np.zeros_like(kind)
    for y, x in itertools.product(range(height), range(width)):
        nearest = math.inf
        for i, j in alive:
            if kind[y, x] == 0 or kind[i, j] != kind[y, x] or abs(int(depth[i, j]) - int(depth[y, x])) > 3:
                continue
            length = math.hypot(*field[:, y, x])
            ux, uy = field[:, y, x] / length if length > 1e-12 else (0.0, 0.0)
            along, across = (j - x) * ux + (i - y) * uy, abs((j - x) * uy - (i - y) * ux)
            distance = math.hypot(i - y, j - x)
            cone = math.tan(math.radians(22.5)) * max(along, 0) + 1.5
            if along >= -1.5 and across <= cone and distance <= 1.5 * sides[depth[i, j]] + 1.5 and distance < nearest:
                nearest, ids[y, x] = distance, names[(i, j)]
    ids = slow_pieces(ids)
    bins = {names[place]: int(depth[place]) for place in alive}
    for _ in range(16):
        grown = ids.copy()
        for y, x in itertools.product(range(height), range(width)):
            if kind[y, x] and not ids[y, x]:
                near = [ids[p] for p in beside(y, x) if ids[p] and kind[p] == kind[y, x]]
                grown[y, x] = min((k for k in near if abs(bins[k] - int(depth[y, x])) <= 3), default=0)
        ids = grown
    partner = {}
    for place in alive:
        own, borders = names[place], Counter()
        members = [p for p in itertools.product(range(height), range(width)) if ids[p] == own]
        if not members:
            continue
        mean = sum(field[:, y, x] for y, x in members) / len(members)
        borders = Counter(int(ids[q]) for p in members for q in beside(*p) if ids[q] not in (0, own))
        fitting = []
        for other in alive:
            way = np.array([other[1] - place[1], other[0] - place[0]], dtype=float)
            ahead = way @ mean >= math.sqrt(0.5) * np.linalg.norm(way) * np.linalg.norm(mean)
            alike = kind[other] == kind[place] and abs(bins[names[other]] - bins[own]) <= 3
            if borders[names[other]] and ahead and alike and np.linalg.norm(mean) > 0.4:
                fitting.append((-borders[names[other]], names[other]))
        if fitting:
            partner[own] = min(fitting)[1]
    result = np.zeros_like(ids)
    for name in names.values():
        chain = [name]
        while chain[-1] in partner and partner[chain[-1]] not in chain:
            chain.append(partner[chain[-1]])
        cycle = chain[chain.index(partner[chain[-1]]) :] if chain[-1] in partner else chain[-1:]
        result[ids == name] = min(cycle)
    return result


def draw_leaning_discs(count: int, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images (3, 64, 64) of three to seven discs of random size, every other one lying over the one before."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.arange(64)[:, None] + 0.5, torch.arange(64) + 0.5
    images, targets = [], []
    for _ in range(count):
        image, masks = torch.zeros(3, 64, 64), []
        number = int(torch.randint(3, 8, (), generator=g))
        radius = (9 * torch.rand(number, generator=g) + 5).tolist()
        places, turns = (
            (64 * torch.rand(number, 2, generator=g)).tolist(),
            (2 * math.pi * torch.rand(number, generator=g)).tolist(),
        )
        for k in range(number):
            if k % 2:
                way = 0.75 * (radius[k] + radius[k - 1])
                before = places[k - 1]
                places[k] = [before[0] + way * math.cos(turns[k]), before[1] + way * math.sin(turns[k])]
            places[k] = [min(max(v, radius[k] / 2), 64 - radius[k] / 2) for v in places[k]]
            distance = (x - places[k][0]) ** 2 + (y - places[k][1]) ** 2
            disc = distance < radius[k] ** 2
            masks = [mask & ~disc for mask in masks] + [disc]
            image = torch.where(disc & (distance > (radius[k] - 2) ** 2), 0.3, torch.where(disc, 1.0, image))
        stack = torch.stack([mask for mask in masks if mask.sum() > 12])
        columns, rows = stack.any(1).float(), stack.any(2).float()
        ends = [columns.argmax(1), rows.argmax(1), 64 - columns.flip(1).argmax(1), 64 - rows.flip(1).argmax(1)]
        images.append(image + 0.1 * torch.randn(3, 64, 64, generator=g))
        targets.append(target_of(stack.to(torch.uint8), boxes=torch.stack(ends, 1).float()))
    return images, targets
