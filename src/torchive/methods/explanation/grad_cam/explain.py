"""The public class and guided back-propagation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.explanation.grad_cam.guided import guided_relus
from torchive.methods.explanation.grad_cam.maps import VARIANTS, class_maps, min_max, upsample
from torchive.methods.explanation.grad_cam.tracing import (
    Inputs,
    Layer,
    Pass,
    Target,
    find_layers,
    last_spatial_layer,
    run_with_layers,
    scores_of,
)
from torchive.nn.passes import eval_mode


@dataclass(frozen=True)
class CamMaps:
    """The maps of one layer.

    Attributes:
        maps: (N, 1, H, W) at the size of the input, in the score's units; a tuple of (1, 1, H, W) for a list of
            images of several sizes.
        raw: (N, 1, h, w) at the layer's size.
        scores: y, (N,), or () where the target gave one scalar for the batch.
    """

    maps: Tensor | tuple[Tensor, ...]
    raw: Tensor
    scores: Tensor

    @property
    def display(self) -> Tensor | tuple[Tensor, ...]:
        """``maps``, each sample stretched to [0, 1]."""
        return min_max(self.maps) if isinstance(self.maps, Tensor) else tuple(map(min_max, self.maps))


class GradCAM:
    """Explain a score of any network by the maps of any of its layers, without a change of the network.

    On a network that ends in a global mean and a linear layer the map is ``cam_from_fc``. Multiplying the score by
    a > 0 multiplies a Grad-CAM map by a. One call costs a forward pass and a backward pass from the score to the layer.

    Args:
        layer: dotted name or module, or a list of them; None takes the last activation that has more than one position,
            which costs one more pass over one sample (``last_spatial_layer`` finds it once).
        variant: "grad_cam", "grad_cam++", "hires_cam" or "layer_cam".
        counterfactual: explain what speaks against the score, by -dy/dA.
        reshape: maps the layer's output to (N, K, h, w), for tokens: ``TokenGrid()``.

    Raises:
        ValueError: an unknown variant.
    """

    def __init__(
        self,
        layer: Layer | Sequence[Layer] | None = None,
        *,
        variant: Literal["grad_cam", "grad_cam++", "hires_cam", "layer_cam"] = "grad_cam",
        counterfactual: bool = False,
        reshape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.layer, self.variant, self.counterfactual, self.reshape = layer, variant, counterfactual, reshape

    def explain(self, model: nn.Module, inputs: Inputs, target: Target = None) -> Any:
        """Maps for a batch; the model runs in evaluation mode and is left as it was.

        Args:
            model: any network; for classes as targets it must return logits (N, K), not probabilities.
            inputs: (N, C, H, W), volumes or clips (N, C, T, H, W), or a list of images for a detector.
            target: a class, one for each sample (N,), a callable from the model's output to a score (one scalar, or one
                per sample), a list with a callable for each sample's output, or None for the highest logit.

        Returns:
            A ``CamMaps``; a list of them where several layers were given.

        Raises:
            ValueError: an unknown layer or class, a layer that did not run or does not act on the score.
        """
        several = isinstance(self.layer, Sequence) and not isinstance(self.layer, str)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            inputs = _usable(inputs)
            named = last_spatial_layer(model, inputs) if self.layer is None else self.layer
            layers = find_layers(model, named)
            stack.enter_context(eval_mode(model))
            run = run_with_layers(model, inputs, layers)
            with torch.enable_grad():
                scores = scores_of(run.output, target)
                gradients = _gradients(scores, run.activations)
        found = [self._maps(run, a, g, inputs, scores) for a, g in zip(run.activations, gradients, strict=True)]
        return found if several else found[0]

    def guided(self, model: nn.Module, inputs: Inputs, target: Target = None) -> Tensor | tuple[Tensor, ...]:
        """Guided Grad-CAM: guided back-propagation times the map, in the shape of the inputs. One layer only.

        Raises:
            ValueError: as ``explain``, or several layers.
        """
        found = self.explain(model, inputs, target)
        if isinstance(found, list):
            raise ValueError(f"guided Grad-CAM takes one layer, got {len(found)}")
        saliency = guided_backpropagation(model, inputs, target)
        if isinstance(saliency, Tensor):
            return saliency * found.maps
        return tuple(s * m[0] for s, m in zip(saliency, found.maps, strict=True))

    def _maps(self, run: Pass, activations: Tensor, gradients: Tensor, inputs: Inputs, scores: Tensor) -> CamMaps:
        a, g = activations.detach(), -gradients if self.counterfactual else gradients
        if self.reshape is not None:
            a, g = self.reshape(a), self.reshape(g)
        if a.ndim < 3:
            raise ValueError(f"the layer gives {tuple(a.shape)}, expected (N, K, h, w); give reshape or another layer")
        raw = class_maps(a, g, self.variant)
        return CamMaps(_at_input_size(raw, inputs, run.canvas), raw, scores.detach())


def guided_backpropagation(model: nn.Module, inputs: Inputs, target: Target = None) -> Tensor | tuple[Tensor, ...]:
    """Gradient of the score by the input where each ReLU also stops negative gradients (arXiv:1412.6806).

    ReLU and ReLU6 are caught as modules and as functions; other activations pass their gradient as it is. The modules
    are not touched, so there is nothing to restore.

    Returns:
        The shape of ``inputs``; a tuple for a list of images.

    Raises:
        ValueError: as ``GradCAM.explain``.
    """
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
        batch = _usable(inputs)
        single = isinstance(batch, Tensor)
        leaves = [
            image.detach().clone().requires_grad_() for image in ([batch] if isinstance(batch, Tensor) else batch)
        ]
        with guided_relus():
            scores = scores_of(model(leaves[0] if single else leaves), target)
        gradients = _gradients(scores, leaves)
    return gradients[0] if single else tuple(gradients)


def _gradients(scores: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """dy/dA of each tensor, of all samples in one backward pass."""
    if not scores.requires_grad:
        raise ValueError("the score does not depend on the layer or has no gradient")
    gradients = torch.autograd.grad(scores.sum(), wanted, allow_unused=True)
    for index, gradient in enumerate(gradients):
        if gradient is None:
            raise ValueError(f"the score does not depend on layer {index} of {len(wanted)}")
    return list(gradients)


def _usable(inputs: Inputs) -> Any:
    """The inputs, copied where they come from inference mode, which keeps them out of any graph."""
    if isinstance(inputs, Tensor):
        return inputs.clone() if inputs.is_inference() else inputs
    return [image.clone() if image.is_inference() else image for image in inputs]


def _at_input_size(raw: Tensor, inputs: Inputs, canvas: Any) -> Tensor | tuple[Tensor, ...]:
    if isinstance(inputs, Tensor):
        return upsample(raw, inputs.shape[-(raw.ndim - 2) :])
    sizes = [tuple(image.shape[1:]) for image in inputs]
    if canvas is None:
        maps = [upsample(one[None], size) for one, size in zip(raw, sizes, strict=True)]
    else:  # the map covers the padded batch: cut out where each image lies, then scale to its own size
        whole, inner = canvas
        padded = upsample(raw, whole)
        maps = [
            upsample(one[None, :, :height, :width], size)
            for one, (height, width), size in zip(padded, inner, sizes, strict=True)
        ]
    return torch.cat(maps) if len(set(sizes)) == 1 else tuple(maps)
