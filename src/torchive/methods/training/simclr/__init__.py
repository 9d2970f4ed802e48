r"""SimCLR: trains an encoder without labels, so that two views of one image lie together, apart from all others.

Paper    Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML
         2020, arXiv:2002.05709.
Formula  h = f(t(x)), z = g(h),  sim(u, v) = u^T v / (|u| |v|)
         l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau) )              (eq. 1)
         L = 1/(2N) sum over both orders of the N positive pairs of l
Symbols  N images, 2 views each, (N, 2, C, H, W); f the encoder, (N, C, H, W) to h (N, D), which is kept; g the
         projection head, h to z (N, E), which is thrown away; tau the temperature.
Differs  the authors' code returns the sum of two means, twice L. Its crops are resized without a low-pass filter,
         here with one. The logistic and the triplet loss are means over an anchor's negatives; the paper is silent.
"""

from torchive.methods.training.simclr.diagnostics import alignment, contrastive_accuracy, norm_leak, uniformity
from torchive.methods.training.simclr.loss import MarginTripletLoss, NTLogisticLoss, NTXentLoss
from torchive.methods.training.simclr.model import ProjectionHead, SimCLR
from torchive.methods.training.simclr.schedule import learning_rate, warmup_cosine
from torchive.nn.views import SimCLRViews

__all__ = [
    "MarginTripletLoss",
    "NTLogisticLoss",
    "NTXentLoss",
    "ProjectionHead",
    "SimCLR",
    "SimCLRViews",
    "alignment",
    "contrastive_accuracy",
    "learning_rate",
    "norm_leak",
    "uniformity",
    "warmup_cosine",
]
