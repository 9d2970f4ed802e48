"""The table of checks: a name, a plain function of a ``Subject``, and the kinds that it is asked of.

A function returns where the demand holds, raises ``AssertionError`` where it does not, and ``NotApplicableError`` where
there is nothing to ask. Any other exception counts as a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchive.testing.checks import (
    batches,
    building,
    calling,
    cards,
    devices,
    exporting,
    gradients,
    layouts,
    losses,
    others,
)
from torchive.testing.subject import Subject


@dataclass(frozen=True)
class Check:
    """One demand. ``costly`` ones take seconds (compilation and export)."""

    name: str
    function: Callable[[Subject], None]
    kinds: frozenset[str]
    costly: bool = False

    @property
    def demand(self) -> str:
        """The demand in one line."""
        return (self.function.__doc__ or "").splitlines()[0]


EVERY = frozenset(
    {"block", "backbone", "loss", "system", "two_players", "procedure", "explanation", "metric", "search"}
)
MODULES = frozenset({"block", "backbone", "loss", "system", "two_players", "procedure"})
TRAINED = frozenset({"block", "backbone", "loss", "system", "procedure"})
CALLED = frozenset({"block", "backbone", "loss", "system", "procedure", "explanation"})
PARTS = frozenset({"block", "backbone", "loss"})
MAPS = frozenset({"block", "backbone"})
NETWORKS = frozenset({"block", "backbone", "system"})
SYSTEMS = frozenset({"system", "two_players"})

CHECKS: tuple[Check, ...] = (
    Check("builds", building.builds, EVERY),
    Check("deep_copy", building.deep_copy, EVERY),
    Check("pickles", building.pickles, EVERY),
    Check("meta_device", building.meta_device, MODULES),
    Check("seeded_weights", building.seeded_weights, MODULES),
    Check("card", cards.card, EVERY),
    Check("docstring", cards.docstring, EVERY),
    Check("variants", cards.variants, EVERY),
    Check("forward_contract", calling.forward_contract, MODULES | CALLED),
    Check("same_type_in_eval", calling.same_type_in_eval, TRAINED),
    Check("levels", calling.levels, frozenset({"backbone"})),
    Check("predict_contract", calling.predict_contract, frozenset({"system"})),
    Check("deployable", calling.deployable, frozenset({"procedure"})),
    Check("players", calling.players, frozenset({"two_players"})),
    Check("explains", others.explains, frozenset({"explanation"})),
    Check("model_untouched", others.model_untouched, frozenset({"explanation"})),
    Check("deterministic", calling.deterministic, CALLED),
    Check("rng_untouched", calling.rng_untouched, CALLED),
    Check("input_unchanged", calling.input_unchanged, MODULES | CALLED),
    Check("mode_unchanged", calling.mode_unchanged, TRAINED),
    Check("batch_independence", batches.batch_independence, NETWORKS | frozenset({"procedure", "explanation"})),
    Check("row_order", batches.row_order, NETWORKS | frozenset({"procedure", "explanation"})),
    Check("nan_stays", batches.nan_stays, NETWORKS | frozenset({"procedure"})),
    Check("sizes", batches.sizes, NETWORKS | frozenset({"procedure", "explanation"})),
    Check("batch_of_one", batches.batch_of_one, NETWORKS | frozenset({"procedure", "explanation"})),
    Check("empty_batch", batches.empty_batch, NETWORKS),
    Check("smallest", batches.smallest, NETWORKS),
    Check("too_small", batches.too_small, NETWORKS),
    Check("bad_rank", batches.bad_rank, NETWORKS),
    Check("bad_channels", batches.bad_channels, NETWORKS),
    Check("bad_dtype", batches.bad_dtype, NETWORKS),
    Check("input_gradient", gradients.input_gradient, PARTS),
    Check("parameter_gradients", gradients.parameter_gradients, MODULES),
    Check("gradcheck", gradients.gradcheck, NETWORKS | PARTS),
    Check("state_dict", building.state_dict, MODULES),
    Check("moves", building.moves, MODULES),
    Check("other_device", devices.other_device, MODULES | frozenset({"explanation", "metric"})),
    Check("bfloat16", layouts.bfloat16, MODULES),
    Check("channels_last", layouts.channels_last, NETWORKS | frozenset({"procedure"})),
    Check("non_contiguous", layouts.non_contiguous, NETWORKS | PARTS),
    Check("reductions", losses.reductions, frozenset({"loss"})),
    Check("non_negative", losses.non_negative, frozenset({"loss"})),
    Check("order_invariant", losses.order_invariant, frozenset({"loss"})),
    Check("empty_targets", losses.empty_targets_check, frozenset({"loss", "system"})),
    Check("extreme_predictions", losses.extreme_predictions, frozenset({"loss"})),
    Check("merges", others.merges, frozenset({"metric"})),
    Check("resets", others.resets, frozenset({"metric"})),
    Check("seeded_search", others.seeded_search, frozenset({"search"})),
    Check("resumes", others.resumes, frozenset({"search"})),
    Check("learns", gradients.learns, TRAINED),
    Check("compiles", exporting.compiles, NETWORKS | PARTS | frozenset({"procedure"}), costly=True),
    Check("exports", exporting.exports, NETWORKS | frozenset({"procedure"}), costly=True),
    Check("onnx", exporting.onnx, NETWORKS | frozenset({"procedure"}), costly=True),
)


def names() -> tuple[str, ...]:
    """The names of all checks, in their order."""
    return tuple(check.name for check in CHECKS)


def checks_of(kind: str) -> tuple[Check, ...]:
    """The checks that are asked of a kind.

    Raises:
        ValueError: no such kind.
    """
    if kind not in EVERY:
        raise ValueError(f"kind must be one of {', '.join(sorted(EVERY))}, got {kind!r}")
    return tuple(check for check in CHECKS if kind in check.kinds)
