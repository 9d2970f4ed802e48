"""What travels between the stages: samples, batches, predictions and architectures. Frozen, and free of behaviour."""

from torchive.structures.batch import Batch, Sample, Target
from torchive.structures.predictions import Classification, Detections, Prediction, Segmentation

__all__ = ["Batch", "Classification", "Detections", "Prediction", "Sample", "Segmentation", "Target"]
