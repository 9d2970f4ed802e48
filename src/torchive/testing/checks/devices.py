"""Another device than the CPU, pretended, so that it is asked on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchive.testing.pretend import PretendedDevice
from torchive.testing.subject import Subject, total
from torchive.testing.tree import finite, leaves, map_tree


def other_device(subject: Subject) -> None:
    """On another device its outputs, losses and predictions lie there, and no tensor of the CPU meets theirs."""
    with PretendedDevice() as pretended:

        def there(value: Any) -> Any:
            return map_tree(lambda t: t.to(pretended.device), value)

        def require(what: str, value: Any) -> None:
            left = [path for path, t in leaves(value, what) if t.device != pretended.device]
            assert not left, f"{', '.join(left[:5])} came out on the CPU, though all that went in was on the device"

        module, inputs = subject.make(), there(subject.inputs())
        if isinstance(module, nn.Module):
            module.to(pretended.device)
        if subject.kind == "metric":
            module.update(*inputs)
            module.compute()
        elif subject.kind == "explanation":
            model, classes = subject.model().to(pretended.device), torch.arange(len(inputs[0])) % 2
            for target in (None, 1, there(classes)):
                require("the maps", module.explain(model, inputs[0], target))
        else:
            losses = _losses(subject, module.train(), inputs, there)
            require("the losses", losses)
            if any(loss.requires_grad for loss in losses.values()):
                total(losses).backward()
            for name, parameter in module.named_parameters():
                fault = finite(parameter.grad)
                assert not fault, f"the gradient of {name}: {fault}"
            module.eval()
            with torch.no_grad():
                require("the output", subject.forward(module, inputs))
                if subject.kind == "system":
                    require("the predictions", module.predict(*inputs))


def _losses(subject: Subject, module: Any, inputs: Any, there: Any) -> dict[str, torch.Tensor]:
    if subject.kind == "procedure":
        return dict(module.losses(there(subject.batch())))
    if subject.kind in ("system", "two_players"):
        return subject.losses(module, inputs, there(subject.targets(inputs, per_image=8)))
    return {path: t.float().mean() for path, t in leaves(module(*inputs)) if t.is_floating_point() and t.numel()}
