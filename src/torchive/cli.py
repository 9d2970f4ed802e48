"""The command line: arguments only. A verb imports what it needs when it runs, so that ``torchive list`` is quick."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torchive import __version__

EXAMPLES = """examples:
  torchive find "long tail"                        which method answers a problem
  torchive compare gcnet --data folder:my_images   does it help on my data, and what does it cost?
  torchive train solar data.source=folder:my_images train.steps=500 --out runs/mine
  torchive predict runs/mine 'photos/*.jpg' --out predictions
  torchive export runs/mine --int8                 ONNX, checked and scored
"""
_DATA = "a sample set, or folder:, csv:, coco:, panoptic:, voc:, masks:, deepfashion2:, or a path"


def _list(a: argparse.Namespace) -> int:
    from torchive.catalogue import show

    rows = show.list_rows(a.pattern, kind=a.kind, task=a.task, state=a.state, verdict=a.verdict, year=a.year)
    return _emit(a, rows, show.render_list)


def _find(a: argparse.Namespace) -> int:
    from torchive.catalogue import show

    values = show.find_rows(" ".join(a.words), limit=a.limit)
    return _emit(a, values, show.render_find)


def _show(a: argparse.Namespace) -> int:
    from torchive.catalogue import show

    return _emit(a, show.show_values(a.method), show.render_show)


def _verdict(a: argparse.Namespace) -> int:
    from torchive.catalogue import verdict

    if a.write:
        verdict.update_verdicts()
    return _emit(a, verdict.verdict_rows(), verdict.render_verdicts)


def _matrix(a: argparse.Namespace) -> int:
    from torchive.catalogue.matrix import render_matrix
    from torchive.engine.matrix import Cell, measure_matrix, record_matrix

    cells: dict[str, dict[str, Cell]] = {}
    for method, network, cell in measure_matrix(a.methods, a.networks or ()):
        cells.setdefault(method, {})[network] = cell
        print(f"{method} in {network}: {cell.state}", file=sys.stderr, flush=True)
    if a.write:
        record_matrix(cells)
    rows = {method: {network: cell.as_dict() for network, cell in row.items()} for method, row in cells.items()}
    _emit(a, rows, render_matrix)
    return int(any(cell.state == "fails" for row in cells.values() for cell in row.values()))


def _emit(a: argparse.Namespace, values: Any, render: Callable[[Any], str]) -> int:
    print(json.dumps(values, indent=1, ensure_ascii=False) if a.json else render(values))
    return 0


def _train(a: argparse.Namespace) -> int:
    from torchive.engine.recipe import load_recipe
    from torchive.engine.train import train

    recipe = load_recipe(a.recipe, _overrides(a))
    result = train(recipe, Path(a.out or f"runs/{recipe.name}"), resume=not a.fresh, progress=not a.quiet)
    _say(result)
    return 130 if result.interrupted else 0


def _say(text: object) -> None:
    """Print once, also where several processes run the same command."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _overrides(a: argparse.Namespace) -> list[str]:
    from torchive.engine.resolve import source_override

    extra = [source_override(a.data)] if getattr(a, "data", None) else []
    if getattr(a, "skip_faulty", False):
        extra.append("data.skip_faulty=true")
    return [*extra, *a.override]


def _evaluate(a: argparse.Namespace) -> int:
    from torchive.engine.evaluate import evaluate_run

    metrics = evaluate_run(Path(a.run), data=a.data, split=a.split)
    rows = (f"{name:<24} {value:.4f}" for name, value in metrics.items())
    _say(json.dumps(metrics, indent=1) if a.json else "\n".join(rows))
    return 0


def _predict(a: argparse.Namespace) -> int:
    from torchive.engine.predict import predict

    return int(predict(Path(a.run), a.sources, Path(a.out), threshold=a.threshold).exit_status)


def _export(a: argparse.Namespace) -> int:
    from torchive.engine.export_run import export_run

    print(export_run(Path(a.run), Path(a.out) if a.out else None, int8=a.int8, samples=a.samples))
    return 0


def _bench(a: argparse.Namespace) -> int:
    from torchive.engine.bench import bench

    report = bench(a.method, recipe=a.recipe, overrides=a.override, forms=a.forms.split(","), rounds=a.rounds)
    print(json.dumps(report.as_dict(), indent=1) if a.json else report)
    return 0


def _compare(a: argparse.Namespace) -> int:
    from torchive.engine.compare import compare

    comparison = compare(
        a.method,
        recipe=a.recipe,
        data=a.data,
        seeds=a.seeds,
        budget=a.budget,
        dial=a.dial,
        margin=a.margin,
        overrides=_overrides(argparse.Namespace(override=a.override, skip_faulty=a.skip_faulty)),
        out=Path(a.out) if a.out else None,
        record=a.record,
        progress=not a.quiet,
    )
    print(comparison)
    return 0


def _report(a: argparse.Namespace) -> int:
    from torchive.report import render_report

    print(render_report(Path(a.folder)))
    return 0


def _data_list(a: argparse.Namespace) -> int:
    from torchive.data import data_list_rows, render_data_list

    return _emit(a, data_list_rows(), lambda _: render_data_list())


def _data_get(a: argparse.Namespace) -> int:
    from torchive.data import fetch

    for name in a.names:
        fetch(name)
    return 0


def _data_check(a: argparse.Namespace) -> int:
    from torchive.data import check_data

    report = check_data(a.source)
    print(json.dumps(report.to_json(), indent=1) if a.json else report.render())
    return 0 if report.ok else 2


class _Parser(argparse.ArgumentParser):
    """A parser that says what was meant."""

    def error(self, message: str) -> NoReturn:
        """Usage, fault and hint; exit status 2."""
        import re
        from difflib import get_close_matches

        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        close = get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=1) if wrong else []
        super().error(f"no {wrong[1]!r}; did you mean {close[0]}?" if wrong and close else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchive",
        description="An archive of computer-vision papers in which every paper runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torchive {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, run: Callable[[argparse.Namespace], int], text: str, group: Any = verbs
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
        made.set_defaults(run_verb=run)
        return made

    p = verb("list", _list, "list the methods, with filters")
    p.add_argument("pattern", nargs="?", default="*", help="shell pattern of names, such as '*pool*'")
    p.add_argument("--kind", help="folder of methods, such as blocks or losses")
    p.add_argument("--task", help="such as classification or detection")
    p.add_argument("--state", choices=["planned", "built"])
    p.add_argument("--verdict", choices=["ship", "build", "watch"])
    p.add_argument("--year", help="2019 or 2018-2020")
    _json(p)

    p = verb("find", _find, "find methods by words of the problem, by alias, or in spite of a typing error")
    p.add_argument("words", nargs="+")
    p.add_argument("--limit", type=int, default=10)
    _json(p)

    p = verb("show", _show, "show one method: card, proof, figures, how to use it")
    p.add_argument("method")
    _json(p)

    p = verb("verdict", _verdict, "ship, build or watch, computed from the evidence of all measured methods")
    p.add_argument("--write", action="store_true", help="also write each verdict into its method's evidence")
    _json(p)

    p = verb("matrix", _matrix, "convert, train and export blocks in networks of six families")
    p.add_argument("methods", nargs="*", help="blocks; all built ones by default")
    p.add_argument("--networks", nargs="+", metavar="NAME", help="such as ResNet-18; all six by default")
    p.add_argument("--write", action="store_true", help="also record the cells, for the docs")
    _json(p)

    p = verb("train", _train, "train a recipe, resuming what was stopped")
    p.add_argument("recipe", help="a recipe's name or file, or the name of a method that is a model")
    p.add_argument("--data", help=_DATA)
    p.add_argument("--out", help="run folder; default runs/RECIPE")
    p.add_argument("--fresh", action="store_true", help="start again instead of resuming")
    p.add_argument("--skip-faulty", action="store_true", help="leave faulty samples out, and list them")
    p.add_argument("--quiet", action="store_true")
    _override(p)

    p = verb("evaluate", _evaluate, "score a trained run")
    p.add_argument("run", help="run folder")
    p.add_argument("--data", help="other data than the run's own")
    p.add_argument("--split", default="test", choices=["train", "val", "test"])
    _json(p)

    p = verb("predict", _predict, "draw a run's predictions on images, with a JSON file beside each")
    p.add_argument("run", help="run folder")
    p.add_argument("sources", nargs="+", help="files, folders or globs")
    p.add_argument("--out", default="predictions")
    p.add_argument(
        "--threshold", type=float, default=0.3, help="objects below this score are not drawn; the JSON holds them all"
    )

    p = verb("export", _export, "write a run's model as ONNX, run it at two sizes, and score it")
    p.add_argument("run", help="run folder")
    p.add_argument("--out", help="folder; default RUN/export")
    p.add_argument("--int8", action="store_true", help="also a static int8 form, calibrated on training samples")
    p.add_argument("--samples", type=int, default=16, help="real samples for the gap")

    p = verb("bench", _bench, "time a method against its baseline: eager, compiled, exported")
    p.add_argument("method")
    p.add_argument("--recipe", help="default: the card's")
    p.add_argument("--forms", default="eager,onnx", help="of eager, compiled, onnx")
    p.add_argument("--rounds", type=int, default=20)
    _json(p)
    _override(p)

    p = verb("compare", _compare, "train baseline and method with paired seeds, and say whether the method helps")
    p.add_argument("method")
    p.add_argument("--recipe", help="default: the card's")
    p.add_argument("--data", help=_DATA)
    p.add_argument("--seeds", type=int, help="paired seeds, at least 3; default 5")
    p.add_argument("--budget", help="per run: '400 steps' or '60 s'")
    p.add_argument(
        "--dial", help="a setting to sweep, such as train.micro_batch=2,4,8; after 'method:' in the method's arm alone"
    )
    p.add_argument(
        "--margin", type=float, default=0.0, help="the smallest difference of interest, in the metric's unit"
    )
    p.add_argument("--out", help="folder; a stopped comparison continues there")
    p.add_argument("--record", action="store_true", help="add the result to the method's evidence")
    p.add_argument("--skip-faulty", action="store_true", help="leave faulty samples out, and list them")
    p.add_argument("--quiet", action="store_true")
    _override(p)

    p = verb("report", _report, "write a comparison's report again from its records")
    p.add_argument("folder")

    data = verbs.add_parser("data", help="sample sets and the check of your own data").add_subparsers(
        dest="data_verb", required=True, metavar="VERB"
    )
    p = verb("list", _data_list, "the sample sets with task, size, licence and origin", data)
    _json(p)
    p = verb("get", _data_get, "fetch sample sets into the cache", data)
    p.add_argument("names", nargs="+")
    p = verb("check", _data_check, "read every sample once and list each fault with file and line", data)
    p.add_argument("source")
    _json(p)
    return parser


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _override(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("override", nargs="*", metavar="key=value", help="recipe fields, such as train.steps=200")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status is 2 for the user's faults, 130 after Ctrl-C."""
    parser = _parser()
    a, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if "=" not in word or word.startswith("-") or not hasattr(a, "override")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:  # key=value words that stand after an option
        a.override = [*a.override, *rest]
    try:
        return int(a.run_verb(a))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("torchive: stopped", file=sys.stderr)
        return 130
    except (ValueError, KeyError, TypeError, OSError) as error:
        if os.environ.get("TORCHIVE_DEBUG"):
            raise
        print(f"torchive: {_line(error)}", file=sys.stderr)
        return 2


def _line(error: Exception) -> str:
    """File and reason in one line that any terminal takes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())
