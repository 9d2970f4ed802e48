"""From a sample as read to a sample as trained on: a thin layer over ``torchvision.transforms.v2``."""

from torchive.transforms.build import Pipeline, build, denormalise, normalisation
from torchive.transforms.steps import AUGMENTATIONS

__all__ = ["AUGMENTATIONS", "Pipeline", "build", "denormalise", "normalisation"]
