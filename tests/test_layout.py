"""The house is kept: directions of imports, no work at import time, short files, three files per method."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchive.catalogue import get_card
from torchive.catalogue.card import CARDS, KINDS
from torchive.testing import built_methods

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "torchive"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

#: package -> what it may import: cli -> engine -> catalogue, report -> methods -> nn -> ops -> structures.
MAY_IMPORT: dict[str, set[str]] = {
    "structures": set(),
    "protocols": {"structures"},
    "ops": {"structures", "protocols"},
    "nn": {"ops", "structures", "protocols"},
    "methods": {"nn", "ops", "structures", "protocols"},
    "catalogue": set(),
    "transforms": {"ops", "structures", "protocols"},
    "data": {"ops", "structures", "protocols"},
    "report": {"catalogue", "methods", "nn", "ops", "structures", "protocols"},
    "engine": {"catalogue", "report", "data", "transforms", "methods", "nn", "ops", "structures", "protocols"},
    "cli": {"engine", "catalogue", "report", "data", "transforms", "methods", "nn", "ops", "structures", "protocols"},
    "testing": {
        "engine",
        "catalogue",
        "report",
        "data",
        "transforms",
        "methods",
        "nn",
        "ops",
        "structures",
        "protocols",
    },
}
PARTS = {"blocks", "backbones", "losses"}
#: kind -> the other kinds under methods/ that it may use; every other kind is a system and may use all parts.
KIND_MAY_USE: dict[str, set[str]] = {"blocks": set(), "losses": set(), "metrics": set(), "backbones": {"blocks"}}
NOT_USED = {
    *(
        "albumentations",
        "decord",
        "detectron2",
        "fvcore",
        "hydra",
        "lightning",
        "mmcv",
        "mmdet",
        "mmengine",
        "mmpretrain",
    ),
    *("mmseg", "pytorch_lightning", "ultralytics"),
}
MAY_PRINT = ("cli.py", "report/", "testing/__main__.py", "catalogue/generate.py")
MAY_TELL = ("data/", "engine/")  # notices on the standard error stream
MAY_CALL = {
    *("frozenset", "tuple", "dict", "set", "int", "float", "len", "sorted", "range", "namedtuple", "field", "count"),
    "wheel",  # a record of a package
}
MAY_CALL_ON = {"split", "with_name", "compile", "joinpath", "getLogger", "items", "values", "keys", "format", "join"}


def _name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every absolute module name that is imported, anywhere in a file, with ``from a import b`` as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; say it in full"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def _package(dotted: str) -> str:
    return dotted.split(".")[1] if dotted.startswith("torchive.") else ""


def import_faults(path: Path, tree: ast.Module) -> list[str]:
    """What a file imports against the table."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    package, found = parts[0], []
    if len(parts) == 1 and package not in MAY_IMPORT:  # torchive/__init__.py, which resolves names lazily
        return []
    for dotted, node in _imports(tree):
        other = _package(dotted)
        if other in MAY_IMPORT and other != package and other not in MAY_IMPORT[package]:
            found.append(f"line {node.lineno}: {package} may not import {dotted}")
        if other == "methods" and package == "methods":
            mine, theirs = parts[1:3], dotted.split(".")[2:4]
            allowed = KIND_MAY_USE.get(mine[0], PARTS)
            own = tuple(theirs[:2]) == tuple(mine[:2])
            if theirs and not own and theirs[0] not in allowed:
                found.append(
                    f"line {node.lineno}: {'/'.join(mine)} may not use {dotted}; only {sorted(allowed) or 'nothing'}"
                )
            elif theirs and not own and theirs[0] == mine[0]:
                found.append(f"line {node.lineno}: {'/'.join(mine)} reaches sideways to {dotted}")
    return found


def import_time_faults(tree: ast.Module) -> list[str]:
    """Statements at module level that do work."""
    return [fault for node in tree.body for fault in _statement_faults(node)]


def _statement_faults(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Pass):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.If):
        text = ast.unparse(node.test)
        if "__name__" in text:
            return
        if "TYPE_CHECKING" in text or "sys.version_info" in text:
            for child in (*node.body, *node.orelse):
                yield from _statement_faults(child)
            return
    if isinstance(node, ast.Assign | ast.AnnAssign):
        value = node.value
        for call in _calls(value):
            if not _cheap(call):
                yield f"line {node.lineno}: calls {ast.unparse(call.func)} at import time"
        return
    yield f"line {node.lineno}: {type(node).__name__} at import time"


def _calls(node: ast.AST | None) -> Iterator[ast.Call]:
    """Every call of an expression outside the bodies of lambdas."""
    if node is None or isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)


def _cheap(call: ast.Call) -> bool:
    """Constructing a value object, splitting a string, compiling a pattern."""
    if isinstance(call.func, ast.Name):
        return call.func.id in MAY_CALL or call.func.id[:1].isupper()
    if not isinstance(call.func, ast.Attribute):
        return False
    return call.func.attr in MAY_CALL_ON or ast.unparse(call.func.value) == "math"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_point_down(path: Path) -> None:
    assert not import_faults(path, _tree(path))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_star_imports_and_nothing_that_is_not_used_here(path: Path) -> None:
    for dotted, node in _imports(_tree(path)):
        assert not dotted.endswith(".*"), f"line {node.lineno}: star import of {dotted}"
        assert dotted.split(".")[0] not in NOT_USED, f"line {node.lineno}: {dotted} is not used in this project"
        assert not dotted.startswith("torch.jit"), f"line {node.lineno}: TorchScript is not used in this project"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_work_at_import_time(path: Path) -> None:
    assert not import_time_faults(_tree(path))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_are_short_and_well_named(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{lines} lines; 400 is the limit, 250 the wish"
    assert path.stem not in ("utils", "misc", "common", "core", "helpers"), f"{path.name} says nothing"


def _prints(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "print"


def _to_stderr(call: ast.Call) -> bool:
    return any(k.arg == "file" and ast.unparse(k.value) == "sys.stderr" for k in call.keywords)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_library_code_is_quiet_finished_and_free_of_devices(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    calls = [n for n in ast.walk(_tree(path)) if isinstance(n, ast.Call)]
    if not _name(path).startswith(MAY_PRINT):
        prints = [c.lineno for c in calls if _prints(c) and not (_name(path).startswith(MAY_TELL) and _to_stderr(c))]
        assert not prints, f"print in lines {prints}"
    cuda = [c.lineno for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "cuda"]
    assert not cuda, f".cuda() in lines {cuda}; the caller moves to a device"
    unfinished = re.findall(r"NotImplemented" r"Error|\bTO" r"DO\b|\bFIX" r"ME\b", text)
    assert not unfinished, f"unfinished: {unfinished}"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_path_of_one_machine_and_no_test_switched_off(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"[\"'(]/(?:work|root|home|tmp)/", text), "a path of one machine"
    assert not re.search(r"pytest\.(?:skip|xfail)\b|mark\.(?:skip|xfail)\b", text), "a test is switched off"


def test_there_are_no_cycles() -> None:
    """Modules import each other in one direction; imports inside functions are left out."""
    names = {
        ".".join(("torchive", *p.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES
    }
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        top = ast.Module([n for n in _tree(path).body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        wanted = {d if d in names else d.rpartition(".")[0] for d, _ in _imports(top)}
        edges[name] = {w for w in wanted if w in names and w != name}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(edges[name]):
                walk(other, (*trail, name))
            done.add(name)

    for name in names:
        walk(name, ())


def _module_file(kind: str, name: str) -> Path:
    single = SOURCE / "methods" / kind / f"{name}.py"
    return single if single.exists() else SOURCE / "methods" / kind / name / "__init__.py"


@pytest.mark.parametrize("name", built_methods())
def test_a_built_method_is_three_files_with_one_stem(name: str) -> None:
    kind = get_card(name).kind
    assert _module_file(kind, name).exists(), f"the card says built; src/torchive/methods/{kind}/{name} is missing"
    assert (CARDS / f"{name}.toml").exists()
    assert (ROOT / "tests" / "methods" / kind / f"test_{name}.py").exists(), (
        f"tests/methods/{kind}/test_{name}.py is missing"
    )


def test_every_module_and_test_of_a_method_has_a_built_card() -> None:
    built = {(get_card(name).kind, name) for name in built_methods()}
    folders = [SOURCE / "methods" / kind for kind in KINDS if (SOURCE / "methods" / kind).is_dir()]
    modules = {
        (f.name, p.stem) for f in folders for p in f.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    tests = {(p.parent.name, p.stem.removeprefix("test_")) for p in (ROOT / "tests" / "methods").rglob("test_*.py")}
    strangers = {m for m in modules | tests if m[1] != "__init__"} - built
    assert not strangers, f"no built card for {sorted(strangers)}"
    kinds = {p.name for p in (SOURCE / "methods").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert kinds <= set(KINDS), f"folders that are no kind: {sorted(kinds - set(KINDS))}"


@pytest.mark.parametrize("name", built_methods())
def test_a_method_cites_its_paper_and_says_where_it_differs(name: str) -> None:
    card = get_card(name)
    path = _module_file(card.kind, name)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    source = "\n".join(p.read_text(encoding="utf-8") for p in files)
    head = ast.get_docstring(_tree(path)) or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b", head), f"{path.name} cites no paper"
    note = re.search(r"^\s*(?:#\s*)?Differs:?\s+(.*)", source, re.MULTILINE)
    says = note is not None and not note.group(1).lower().startswith("nothing")
    assert says == bool(card.deviations), (
        f"{name}: {len(card.deviations)} deviations on the card, {'a' if says else 'no'} note `Differs` in the source"
    )


def test_the_tests_of_this_file_can_fail() -> None:
    """Each rule on a line that breaks it."""
    path = SOURCE / "methods" / "blocks" / "dynamic_relu.py"
    wrong = [
        "from torchive.data import Loader",
        "from torchive.methods.losses.x import Y",
        "import torchive.engine.train",
    ]
    for line in (
        *wrong,
        "from torchive.methods.blocks.gcnet import GCBlock",
        "def f():\n    from torchive.report import x",
    ):
        assert import_faults(path, ast.parse(line)), line
    assert import_faults(SOURCE / "nn" / "x.py", ast.parse("from torchive.methods.blocks import gcnet"))
    system = SOURCE / "methods" / "detection" / "ssd" / "model.py"
    for line in (
        "from torchive.methods.blocks.gcnet import GCBlock",
        "from torchive.methods.detection.ssd.loss import x",
    ):
        assert not import_faults(system, ast.parse(line)), line
    assert import_faults(system, ast.parse("from torchive.methods.detection.faster_rcnn import FasterRCNN"))
    for line in ("x = torch.zeros(3)", "for i in a: pass", "register(3)", "x = open('f').read()", "with a: pass"):
        assert import_time_faults(ast.parse(line)), line
    for line in (
        "x = 'a b'.split()",
        "X = frozenset({1})",
        "if TYPE_CHECKING:\n    import x",
        "'''doc'''",
        "X = Check('a', f)",
    ):
        assert not import_time_faults(ast.parse(line)), line
