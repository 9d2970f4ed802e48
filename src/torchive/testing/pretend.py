"""A GPU that is not there: tensors stay on the CPU, say that they lie on the device, and refuse what it would refuse.

    with torchive.testing.PretendedDevice():
        detector = MyDetector().to("cuda")
        detector.losses([image.to("cuda")], [{"boxes": boxes.to("cuda"), "labels": labels.to("cuda")}])

A constant that was made without ``device=``, a target that was left behind, a CPU generator for a draw on the device or
``.numpy()`` without ``.cpu()`` then fail as they would there, on a machine that has no GPU. Values, speed, memory and
the kernels themselves are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_MARK = "_torchive_place"
#: Calls that may read one device and write another, or that only ask about their tensors.
_ACROSS = {"copy_", "_foreach_copy_", "__set__", "is_same_size", "_has_compatible_shallow_copy_type"}
_INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}


class PretendedDevice(TorchFunctionMode):
    """While it is entered, the device ``name`` is there for Python code of this thread; the CPU does the work.

    A tensor is where it was made or moved to, and what is computed from it is there, too. What was made before, or
    inside a C++ routine, belongs to neither side and goes with both. Tensors without axes may be read from either
    side, and indices of the CPU reach into the device's tensors, as PyTorch has it.

    Args:
        name: the device, such as "cuda:0"; also one without an index.

    Raises:
        RuntimeError: (inside) a call mixes tensors of both sides, or draws on the device by a generator of the CPU.
        TypeError: (inside) a tensor of the device is taken for an array.
    """

    def __init__(self, name: str | torch.device = "cuda:0") -> None:
        super().__init__()
        device = torch.device(name)
        self.device = torch.device(device.type, device.index or 0)
        self.cpu = torch.device("cpu")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer for the device, or let the CPU do it and note where the result lies."""
        named = dict(kwargs or {})
        asked = getattr(func, "__self__", None)  # of an attribute's getter
        if asked is Tensor.device:
            return self._place(args[0]) or args[0].device
        if asked is Tensor.is_cuda or asked is Tensor.is_cpu:
            return (self._place(args[0]) or args[0].device).type == ("cuda" if asked is Tensor.is_cuda else "cpu")
        if func in (Tensor.numpy, Tensor.__array__) and self._place(args[0]) == self.device:
            raise TypeError(f"a tensor on {self.device} cannot become an array; call .cpu() first")
        if func in (Tensor.cpu, Tensor.cuda):
            return self._moved(args[0], (self.cpu if func is Tensor.cpu else self.device,), {})
        if func is Tensor.to:
            return self._moved(args[0], args[1:], named)
        return self._called(func, args, named)

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        wanted = None
        if named.get("device") is not None:
            wanted = self._device(named["device"])
            named["device"] = self.cpu if wanted == self.device else wanted
        given = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        places = [self._place(tensor) for tensor in given]
        here = self.device in places
        name = getattr(func, "__name__", str(func))
        if here:
            self._refuse_mixed(name, given, places)
        generator = named.get("generator")
        if isinstance(generator, torch.Generator) and (wanted or (self.device if here else self.cpu)) == self.device:
            raise RuntimeError(f"{name}: draws on {self.device} by a generator of {generator.device}")
        result = func(*args, **named)
        if name == "__set__" and len(given) == 2:  # `parameter.data = other` takes the other's place
            _mark(given[:1], places[1])
        if wanted is None:
            known = [place for place in places if place is not None]
            wanted = self.device if here else (known[0] if known else None if given else self.cpu)
        _mark([t for t in tree_leaves(result) if isinstance(t, Tensor) and self._place(t) is None], wanted)
        return result

    def _refuse_mixed(self, name: str, given: Sequence[Tensor], places: Sequence[torch.device | None]) -> None:
        if name in _ACROSS:
            return
        strangers = [t for t, place in zip(given, places, strict=True) if place == self.cpu and t.ndim]
        if name in _INDEXING and places[0] != self.cpu:  # indices may come from the CPU, what they put in may not
            put = len(given) > 2 and "get" not in name
            strangers = [t for t in strangers if put and t is given[-1]]
        if strangers:
            shape = tuple(strangers[0].shape)
            raise RuntimeError(f"{name}: one tensor of shape {shape} is on the CPU, another on {self.device}")

    def _moved(self, tensor: Tensor, rest: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
        """``Tensor.to``: a change of place copies, as it would."""
        wanted = None
        words: list[Any] = []
        for value in (*rest, *(named[key] for key in ("device", "other") if key in named)):
            if isinstance(value, Tensor):
                wanted = self._place(value) or value.device
                words.append(value)
            elif isinstance(value, str | torch.device) or type(value) is int:
                wanted = self._device(value)
                words.append(self.cpu if wanted == self.device else wanted)
            else:
                words.append(value)
        others = {key: value for key, value in named.items() if key not in ("device", "other")}
        before = self._place(tensor)
        result = tensor.to(*words, **others)
        if result is tensor and wanted is not None and wanted != (before or self.cpu):
            result = tensor.clone()
        _mark([result], wanted or before)
        return result

    def _device(self, value: Any) -> torch.device:
        device = torch.device(self.device.type, value) if type(value) is int else torch.device(value)
        return self.device if device.type == self.device.type else device

    def _place(self, tensor: Tensor) -> torch.device | None:
        place = tensor.__dict__.get(_MARK)
        if isinstance(place, torch.device):
            return place
        return self.cpu if isinstance(tensor, nn.Parameter) else None  # its constructor is not seen


def _mark(tensors: Sequence[Tensor], place: torch.device | None) -> None:
    if place is not None:
        for tensor in tensors:
            tensor.__dict__[_MARK] = place
