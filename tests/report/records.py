"""Made-up records of a comparison, as the engine writes them, for the tests of the report."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from torchive.report.statistics import Rule


def picture(seed: int, size: int = 64, mode: str = "JPEG") -> str:
    generator = np.random.default_rng(seed)
    small = generator.integers(40, 220, (8, 8), dtype=np.uint8)
    image = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, mode)
    return f"data:image/{mode.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def arm_costs(factor: float) -> dict[str, Any]:
    def times(ms: float) -> dict[str, float]:
        return {"median": ms * factor, "p95": 1.3 * ms * factor}

    return {
        "parameters": 11_170_000 * factor,
        "operations": 149e6 * (1 + (factor - 1) / 3),
        "train_step_ms": times(182.0),
        "latency_1_ms": times(8.4),
        "latency_16_ms": times(61.0),
        "memory_train_mb": 310.0 * factor,
        "memory_predict_mb": 42.0,
    }


def comparison(
    seeds: int = 3, *, effect: float = 0.012, noise: float = 0.008, task: str = "classification", margin: float = 0.0
) -> dict[str, Any]:
    generator = np.random.default_rng(7)
    rule = Rule("accuracy", True, margin, 0.95, seeds)
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        level = 0.71 + 0.02 * generator.normal()
        for arm, shift in (("baseline", 0.0), ("method", effect + noise * generator.normal())):
            top = level + shift
            steps = np.arange(50, 401, 50)
            runs.append(
                {
                    "seed": seed,
                    "arm": arm,
                    "folder": f"runs/{seed}/{arm}",
                    "steps": 400,
                    "seconds": 61.0,
                    "curves": {
                        "loss": [
                            [int(s), float(1.4 * np.exp(-s / 160) + 0.5 + 0.08 * generator.normal())]
                            for s in range(1, 401, 5)
                        ],
                        "val/accuracy": [
                            [int(s), float(top - 0.3 * np.exp(-s / 90) + 0.01 * generator.normal())] for s in steps
                        ],
                    },
                    "test": {
                        "accuracy": top,
                        "balanced_accuracy": top - 0.2,
                        "macro_f1": top - 0.21 - shift,
                        "loss": 1.1 - top,
                    },
                }
            )
    return {
        "schema": 1,
        "kind": "comparison",
        "started": "2026-11-21 10:00",
        "finished": "2026-11-21 10:09",
        "plan": {
            "method": "dynamic_relu",
            "title": "Dynamic ReLU",
            "baseline_title": "ReLU in the same network",
            "citation": "Yinpeng Chen et al., ECCV 2020, arXiv:2003.10027",
            "claim": "Gains of 1 to 5 points on small networks.",
            "task": task,
            "seeds": list(range(seeds)),
            "budget": "400 steps",
            "rule": {
                **{k: getattr(rule, k) for k in ("metric", "higher_is_better", "margin", "level", "pairs")},
                "text": rule.text,
            },
            "arms": {arm: {"recipe": {"task": task, "train": {"steps": 400}}} for arm in ("baseline", "method")},
            "command": "torchive compare dynamic_relu --seeds 3",
        },
        "data": {
            "source": "solar",
            "name": "solar",
            "task": task,
            "classes": ["intact", "possibly defective", "probably defective", "defective"],
            "licence": "CC-BY-NC-SA-4.0",
            "commercial": False,
            "origin": "ELPV dataset, ZAE Bayern (Buerhop-Lutz et al. 2018; Deitsch et al. 2019)",
            "sizes": {"train": 1834, "val": 398, "test": 392},
            "left_out": [],
        },
        "environment": {"machine": "2 cores, x86-64", "python": "3.11.7", "torch": "2.15.0", "torchive": "0.1.0"},
        "pairs": [
            {
                "seed": seed,
                "shared": {"tensors": 62, "values": 11_168_832, "sha256": "ab12"},
                "new": {"baseline": {"tensors": 0, "values": 0}, "method": {"tensors": 68, "values": 702_000}},
            }
            for seed in range(seeds)
        ],
        "runs": runs,
        "costs": {
            "note": "Both arms in one run on one machine, taking turns: 2 threads, float32, 64 x 64 pixels.",
            "how": {"Operations": "counted on one image"},
            "arms": {"baseline": arm_costs(1.0), "method": arm_costs(1.19)},
        },
        "examples": examples(task),
    }


def examples(task: str) -> dict[str, Any]:
    groups = ["method"] * 5 + ["baseline"] * 4 + ["neither"] * 3 + ["both"] * 4
    items = []
    for index, group in enumerate(groups):
        item: dict[str, Any] = {
            "id": f"cell{index:04}.png",
            "image": picture(index),
            "width": 64,
            "height": 64,
            "group": group,
        }
        for arm in ("truth", "baseline", "method"):
            if task == "classification":
                item[arm] = {"label": "possibly defective" if index % 3 else "intact"}
                if arm != "truth":
                    item[arm] |= {"right": group in (arm, "both"), "score_text": f"{60 + index} %"}
            elif task == "segmentation":
                item[arm] = {
                    "mask": picture(90 + index, mode="PNG"),
                    "score_text": "" if arm == "truth" else "IoU 0.71",
                }
            else:
                item[arm] = {
                    "boxes": [[8 + index, 6, 30 + index, 40]],
                    "score_text": "" if arm == "truth" else "2 found",
                }
        items.append(item)
    counts = {"method": 31, "baseline": 24, "neither": 87, "both": 250}
    return {
        "task": task,
        "seed": 0,
        "note": "The test split of 392 samples with the models of seed 0; where the arms disagree comes first.",
        "counts": counts if task == "classification" else None,
        "items": items,
    }
