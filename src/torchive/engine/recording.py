"""From a finished comparison to the ``measured`` entry of a method's evidence."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torchive.catalogue import record_evidence
from torchive.engine.comparison import Comparison
from torchive.report.summary import ARMS


def record_comparison(comparison: Comparison, *, folder: Path | None = None) -> dict[str, Any]:
    """Add a comparison to the evidence, with its export checked; returns the entry.

    Args:
        folder: of the evidence; the package's own by default.
    """
    entry = measured_entry(comparison)
    entry["export"] = export_figures(comparison)
    command = comparison.record["plan"]["command"]
    if entry["scale"].get("setting"):  # the values of one dial share a command
        command = f"{command}  # at {entry['scale']['setting']}"
    record_evidence(comparison.record["plan"]["method"], "measured", command, folder=folder, **entry)
    return entry


def measured_entry(comparison: Comparison) -> dict[str, Any]:
    """Difference, interval, per-seed values, p, scale, hardware and the ratios of the costs."""
    record, summary = comparison.record, comparison.summary
    plan, metric = record["plan"], summary.deciding
    if metric.estimate is None:
        raise ValueError(f"{comparison.folder}: one pair is not enough for the evidence")
    recipe = plan["arms"]["method"]["recipe"]
    arguments = recipe["model"]["init_args"]
    network = next(
        (arguments[k] for k in ("network", "backbone", "encoder") if isinstance(arguments.get(k), str)), None
    )
    scale = {
        "data": record["data"]["name"],
        "train_samples": plan["samples"]["train"]["count"],
        "test_samples": plan["samples"]["test"]["count"],
        "image_size": recipe["data"]["image_size"],
        "batch_size": recipe["data"]["batch_size"],
        "network": network or recipe["model"]["class_path"].rpartition(".")[2],
        "budget": plan["budget"],
        "setting": plan["setting"],
    }
    estimate = {k: _figures(v) for k, v in metric.estimate.as_dict().items()}
    return {
        "metric": metric.unit.name,
        "unit": metric.unit.difference_unit,
        "higher_is_better": plan["rule"]["higher_is_better"],
        "baseline_title": plan["baseline_title"],
        "seeds": list(metric.seeds),
        "baseline": [_figures(v) for v in metric.baseline],
        "method": [_figures(v) for v in metric.method],
        "difference": estimate,
        "outcome": summary.verdict,
        "margin": plan["rule"]["margin"],
        "others": {
            m.unit.name: [_figures(v) for v in (m.estimate.mean, m.estimate.low, m.estimate.high)]
            for m in summary.metrics
            if m.estimate and not m.decides and "/" not in m.unit.name
        },
        "ratios": _ratios(record.get("costs")),
        "scale": {key: value for key, value in scale.items() if value not in (None, "")},
        "licence_of_data": record["data"]["licence"],
        "hardware": record["environment"]["Processor" if record["environment"]["Device"] == "CPU" else "Device"],
    }


def _figures(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _ratios(costs: dict[str, Any] | None) -> dict[str, float]:
    if not costs:
        return {}
    first, second = (costs["arms"][arm] for arm in ARMS)
    ratios = {}
    for key in first:
        a, b = (v["median"] if isinstance(v, dict) else v for v in (first[key], second[key]))
        if a > 0:
            ratios[key.removesuffix("_ms").removesuffix("_mb")] = round(b / a, 4)
    return ratios


def export_figures(comparison: Comparison) -> dict[str, Any]:
    """Of the exported first seed: the method's largest gap on real samples and both files' latencies, or why not."""
    from torchive.engine.export import ExportError
    from torchive.engine.export_run import export_run, exported_latency

    seed = comparison.record["plan"]["seeds"][0]
    runs = {arm: comparison.folder / "runs" / f"seed{seed}-{arm}" for arm in ARMS}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            report = export_run(runs["method"], Path(scratch))
        latency, decoded = exported_latency(runs)
    except (ExportError, ValueError) as error:
        return {"impossible": " ".join(str(error).split())[:200]}
    first, second = (latency[arm] for arm in ARMS)
    return {
        "gap": report.onnx.gap,
        "file": "ONNX, run in ONNX Runtime at two sizes",
        "latency_ms": latency,
        "latency_ratios": {key: round(second[key] / first[key], 4) for key in first},
        **({"decoded": True} if decoded else {}),
    }
