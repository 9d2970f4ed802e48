"""Parts without a paper of their own that two or more methods use."""

from torchive.nn.classifier import Classifier
from torchive.nn.cosine_classifier import CosineClassifier, CosineNetwork
from torchive.nn.embedder import Embedder
from torchive.nn.network import build_features, build_network
from torchive.nn.plain import PlainNetwork
from torchive.nn.pooled import PooledNetwork
from torchive.nn.residual import ResidualNetwork
from torchive.nn.retinanet import RetinaNet
from torchive.nn.segmenter import Segmenter

__all__ = [
    "Classifier",
    "CosineClassifier",
    "CosineNetwork",
    "Embedder",
    "PlainNetwork",
    "PooledNetwork",
    "ResidualNetwork",
    "RetinaNet",
    "Segmenter",
    "build_features",
    "build_network",
]
