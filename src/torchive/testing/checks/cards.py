"""The card and the text: what is written agrees with the class."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch

from torchive.catalogue import Card
from torchive.testing.construct import construct, resolve
from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject


def _card(subject: Subject) -> Card:
    if subject.card is None:
        raise NotApplicableError("it has no card")
    return subject.card


def card(subject: Subject) -> None:
    """Class, exports, hosts and exemptions of the card exist, and the method stands in the folder of its kind."""
    from torchive.testing.checks import names

    sheet = _card(subject)
    cls = resolve(sheet.class_path)
    module = sheet.class_path.partition(":")[0]
    where = f"torchive.methods.{sheet.kind}.{sheet.name}"
    assert module == where or module.startswith(where + "."), f"class is in {module}, kind and name say {where}"
    for export in sheet.exports:
        resolve(f"{module}:{export}")
    unknown = set(sheet.exemptions) - set(names())
    assert not unknown, f"exemptions name unknown checks: {', '.join(sorted(unknown))}; known: {', '.join(names())}"
    empty = [name for name, reason in sheet.exemptions.items() if len(reason.split()) < 3]
    assert not empty, f"exemptions without a reason: {', '.join(empty)}"
    mode = sheet.host.get("mode")
    if mode in ("replace", "insert"):
        part = resolve(sheet.host["new"]) if "new" in sheet.host else cls
        wanted = "from_module" if mode == "replace" else "from_channels"
        assert hasattr(part, wanted), f"host.mode is {mode!r}, yet {part.__name__} has no {wanted}"
    if mode == "rewrite":
        resolve(sheet.host["function"])
    for entry in sheet.host.get("replace", ()):
        resolve(entry["old"])
        if "new" in entry:
            new = resolve(entry["new"] if ":" in entry["new"] or "." in entry["new"] else f"{module}:{entry['new']}")
            assert hasattr(new, "from_module"), f"host.replace: {entry['new']} has no from_module"


def variants(subject: Subject) -> None:
    """Each named variant, made by the class or by the function that it names, has the parameters that the card says."""
    sheet = _card(subject)
    counted = {name: v for name, v in sheet.variants.items() if isinstance(v, dict) and "parameters" in v}
    if not counted:
        raise NotApplicableError("the card names no variant with a parameter count")
    cls = resolve(sheet.class_path)
    for name, variant in counted.items():
        make = resolve(variant["build"]) if "build" in variant else cls
        with torch.device("meta"):
            module = make(**construct(variant.get("args", {})))
        count = sum(p.numel() for p in module.parameters())
        assert count == variant["parameters"], f"{name} has {count} parameters, the card says {variant['parameters']}"


def docstring(subject: Subject) -> None:
    """The module cites its paper and shows a formula or shapes; the class documents every argument, with types."""
    sheet = _card(subject)
    cls = resolve(sheet.class_path)
    text = _module_text(cls, sheet)
    last = sheet.paper.authors.split(",")[0].split()[-1]
    missing = [word for word in (str(sheet.paper.year), last) if word not in text]
    assert not missing, f"the module's docstring does not cite {last} {sheet.paper.year}: {', '.join(missing)} missing"
    if sheet.paper.arxiv:
        assert sheet.paper.arxiv in text, f"the module's docstring lacks arXiv:{sheet.paper.arxiv}"
    own = inspect.getdoc(cls) or ""
    shape = re.search(r"\([A-Z](, ?[^()]+)+\)|Formula|Figure", text + own)
    assert shape, "neither module nor class docstring has a formula or shapes such as (N, C, H, W)"
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise AssertionError(f"{cls.__name__} takes *{name}; list its arguments instead")
        assert re.search(rf"\b{name}\b", own), f"the docstring of {cls.__name__} does not document {name!r}"
        assert parameter.annotation is not parameter.empty, f"{cls.__name__}: {name!r} has no type"


def _module_text(cls: Any, sheet: Card) -> str:
    module = sys.modules[cls.__module__]
    package = sys.modules.get(f"torchive.methods.{sheet.kind}.{sheet.name}")
    return (module.__doc__ or "") + ((package.__doc__ or "") if package and package is not module else "")
