"""Inference without the norm: its multiplication and addition move into the convolution in front."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torchive.methods.blocks.mabn.convolution import CenConv2d, centre
from torchive.methods.blocks.mabn.norm import MABN2d


@torch.no_grad()
def fold_into_conv(conv: nn.Conv2d, norm: MABN2d | None = None) -> nn.Conv2d:
    """One plain convolution that equals ``norm(conv(x))`` in eval mode, without the norm's activation.

    W' = gamma / sqrt(v + eps) (W - mean W), b' = beta + gamma / sqrt(v + eps) b. The filters of a plain ``Conv2d`` are
    not centred. Without a norm, the centred filters alone are written down.

    Raises:
        TypeError: ``conv`` is no ``Conv2d`` or ``norm`` no ``MABN2d``.
        ValueError: the norm has other channels than the convolution gives.
    """
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"expected a torch.nn.Conv2d, got {type(conv).__name__}")
    if norm is not None and not isinstance(norm, MABN2d):
        raise TypeError(f"expected an MABN2d, got {type(norm).__name__}")
    if norm is not None and norm.channels != conv.out_channels:
        raise ValueError(f"the convolution gives {conv.out_channels} channels, the norm has {norm.channels}")
    weight = centre(conv.weight) if isinstance(conv, CenConv2d) else conv.weight.clone()
    bias = None if conv.bias is None else conv.bias.clone()
    if norm is not None:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (C,)
        weight = weight * scale.to(weight.dtype).view(-1, 1, 1, 1)
        bias = (norm.bias if bias is None else norm.bias + scale * bias).to(weight.dtype)
    with torch.device("meta"):
        folded = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias is not None,
            conv.padding_mode,
        )
    folded.weight = nn.Parameter(weight)
    folded.bias = None if bias is None else nn.Parameter(bias)
    return folded.eval()


def fold(model: nn.Module, example: Any) -> nn.Module:
    """A copy of the network for inference, every convolution merged with the ``MABN2d`` that alone reads its output.

    One pass over ``example`` (a tensor, or a tuple of arguments) tells which convolution feeds which norm; a norm
    becomes its activation. A norm behind anything else stays. The copy is in eval mode; the network itself stays as it
    was.
    """
    copy = deepcopy(model).eval()
    flow = _Flow(copy)
    with torch.no_grad(), flow:
        outputs = copy(*example) if isinstance(example, tuple) else copy(example)
    flow.returned(outputs)
    names = {id(m): n for n, m in copy.named_modules()}
    for norm, conv in flow.pairs():
        _set(copy, names[id(conv)], fold_into_conv(conv, norm))
        _set(copy, names[id(norm)], nn.Identity() if norm.act is None else norm.act)
    for name, module in list(copy.named_modules()):
        if isinstance(module, CenConv2d):
            _set(copy, name, fold_into_conv(module))
    return copy


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


class _Flow(TorchFunctionMode):
    """Who reads what a convolution gives: the norms, and whether anything else does."""

    #: Questions about a tensor that do not read its values.
    ASKS = frozenset(
        {"__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size"}
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.source: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept, so that its id stays its own
        self.readers: dict[nn.Conv2d, set[MABN2d | None]] = defaultdict(set)
        self.feeds: dict[MABN2d, set[nn.Conv2d | None]] = defaultdict(set)
        self.inside: list[nn.Module] = []
        self.hooks: list[Any] = []
        self.model = model

    def __enter__(self) -> Any:
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d | MABN2d):
                self.hooks.append(module.register_forward_pre_hook(self._before))
                self.hooks.append(module.register_forward_hook(self._after))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        conv = self.source.get(id(args[0]), (None,))[0]
        if isinstance(module, MABN2d):
            self.feeds[module].add(conv)
            if conv is not None:
                self.readers[conv].add(module)
        elif conv is not None:
            self.readers[conv].add(None)
        self.inside.append(module)

    def _after(self, module: nn.Module, _args: Any, output: Tensor) -> None:
        self.inside.pop()
        if isinstance(module, nn.Conv2d):
            self.source[id(output)] = (module, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.inside and getattr(func, "__name__", "") not in self.ASKS:
            self.returned((args, kwargs))
        return func(*args, **kwargs)

    def returned(self, values: Any) -> None:
        """Something that is no norm reads, or hands out, these values."""
        for value in tree_leaves(values):
            if id(value) in self.source and isinstance(value, Tensor):
                self.readers[self.source[id(value)][0]].add(None)

    def pairs(self) -> list[tuple[MABN2d, nn.Conv2d]]:
        """Norms with the one convolution that feeds them and that nothing else reads."""
        single = [(norm, next(iter(convs))) for norm, convs in self.feeds.items() if len(convs) == 1]
        return [(norm, conv) for norm, conv in single if conv is not None and self.readers[conv] == {norm}]
