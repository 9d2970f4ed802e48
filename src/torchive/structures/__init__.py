"""What travels between the stages: samples, batches, predictions and architectures. Frozen, and free of behaviour."""

from torchive.structures.batch import Batch, Sample, Target
from torchive.structures.predictions import Classification, Detections, Panoptic, Prediction, Segment, Segmentation

__all__ = [
    "Batch",
    "Classification",
    "Detections",
    "Panoptic",
    "Prediction",
    "Sample",
    "Segment",
    "Segmentation",
    "Target",
]
