"""A cell as data: which operation reads which state. Checked, printed, and kept as plain lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchive.methods.backbones.nasnet.operations import OPERATIONS

Edge = tuple[int, str]


@dataclass(frozen=True)
class CellBlock:
    """Two operations on two earlier states, and how their results are joined: "add" or "concat"."""

    left: Edge
    right: Edge
    combine: str = field(default="add", kw_only=True)


@dataclass(frozen=True)
class CellPlan:
    """Blocks in their order. State 0 is the last cell's output, 1 the one before, 2 the first block's, and so on.

    Attributes:
        blocks: the blocks; each may read states before its own.
        output: the states that are concatenated to the cell's output; those that no block reads if empty.

    Raises:
        ValueError: an unknown operation or way to combine, or a state that does not exist yet.
    """

    blocks: tuple[CellBlock, ...]
    output: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for number, block in enumerate(self.blocks):
            for state, operation in (block.left, block.right):
                if not 0 <= state < number + 2:
                    raise ValueError(f"block {number} may read states 0 to {number + 1}, got {state}")
                if operation not in OPERATIONS:
                    raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
            if block.combine not in ("add", "concat"):
                raise ValueError(f"combine must be add or concat, got {block.combine!r}")
        if not self.blocks or any(not 0 <= state < len(self.blocks) + 2 for state in self.output):
            raise ValueError(f"{len(self.blocks)} blocks cannot give the states {self.output}")
        if not self.output:
            object.__setattr__(self, "output", self.unread())

    def unread(self) -> tuple[int, ...]:
        """The states that no block reads."""
        read = {state for block in self.blocks for state, _ in (block.left, block.right)}
        return tuple(state for state in range(len(self.blocks) + 2) if state not in read)

    @property
    def multiple(self) -> int:
        """Channels of the output in multiples of F."""
        return sum(self.width(state) for state in self.output)

    def width(self, state: int) -> int:
        """Channels of a state in multiples of F: 2 where a block concatenates."""
        return 2 if state >= 2 and self.blocks[state - 2].combine == "concat" else 1


@dataclass(frozen=True)
class Genotype:
    """A normal cell and a reduction cell; ``print`` shows them, ``to_dict`` is plain data."""

    normal: CellPlan
    reduction: CellPlan

    def __str__(self) -> str:
        lines = []
        for name, plan in (("normal", self.normal), ("reduction", self.reduction)):
            lines.append(f"{name} cell")
            for number, block in enumerate(plan.blocks):
                (a, left), (b, right) = block.left, block.right
                sign = "+" if block.combine == "add" else "|"
                lines.append(f"  h{number + 2} = {left}(h{a}) {sign} {right}(h{b})")
            lines.append("  out = [" + ", ".join(f"h{state}" for state in plan.output) + "]")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers only, for JSON and YAML."""
        return {
            name: {
                "blocks": [[list(b.left), list(b.right), b.combine] for b in plan.blocks],
                "output": list(plan.output),
            }
            for name, plan in (("normal", self.normal), ("reduction", self.reduction))
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Genotype:
        """The inverse of ``to_dict``. Raises: ValueError, as ``CellPlan``, or missing cells."""
        if set(values) != {"normal", "reduction"}:
            raise ValueError(f"expected the cells normal and reduction, got {sorted(values)}")
        return cls(*(_plan(values[name]) for name in ("normal", "reduction")))


def _plan(values: Mapping[str, Any]) -> CellPlan:
    blocks: list[CellBlock] = []
    for left, right, *combine in values["blocks"]:
        blocks.append(CellBlock(_edge(left), _edge(right), combine=combine[0] if combine else "add"))
    return CellPlan(tuple(blocks), output=tuple(int(state) for state in values.get("output", ())))


def _edge(values: Sequence[Any]) -> Edge:
    state, operation = values
    return int(state), str(operation)


#: The best cells of the paper, as the release builds them.
NASNET_A = Genotype(
    CellPlan(
        (
            CellBlock((0, "separable_5x5"), (1, "separable_3x3")),
            CellBlock((1, "separable_5x5"), (1, "separable_3x3")),
            CellBlock((0, "average_3x3"), (1, "identity")),
            CellBlock((1, "average_3x3"), (1, "average_3x3")),
            CellBlock((0, "separable_3x3"), (0, "identity")),
        ),
        output=(1, 2, 3, 4, 5, 6),
    ),
    CellPlan(
        (
            CellBlock((0, "separable_5x5"), (1, "separable_7x7")),
            CellBlock((0, "max_3x3"), (1, "separable_7x7")),
            CellBlock((0, "average_3x3"), (1, "separable_5x5")),
            CellBlock((3, "identity"), (2, "average_3x3")),
            CellBlock((2, "separable_3x3"), (0, "max_3x3")),
        ),
        output=(3, 4, 5, 6),
    ),
)
