r"""Moving Average Batch Normalisation: a batch norm for one or two images a step that costs nothing at inference.

Paper    Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR 2020,
         arXiv:2001.06838.
Formula  y   = gamma r z + beta,  z = x / sqrt(chi + eps),  chi = mean_nhw(x^2)
         dx  = ( g - z Psi ) / sqrt(chi + eps),  g = gamma r dL/dy,  Psi = mean_nhw(g z)
         chi and Psi are means over the last m steps once m steps and the warm-up are over; before, over this step alone
         r   = clip( sqrt((chi + eps) / (v + eps)) ),  to [1, 1] for the first 1000 steps, then to [1/5, 5]
         v   = a v + (1 - a) chi, after r is computed; inference: y = gamma x / sqrt(v + eps) + beta
         W'  = W - mean(W) over a filter: the convolution in front removes the mean that the norm does not
Symbols  N batch, C channels, H W positions; m = 16 steps, a = 0.98 (the fraction kept), eps = 1e-5. r and the averages
         carry no gradient. Statistics are those of one device: nothing is exchanged between processes.
Differs  ``CenConv2d`` starts from Kaiming, not from unit, noise. The step counter is a tensor that is never read back,
         so nothing waits for the device. The rings are written once a call, so one norm may serve several places.
"""

from torchive.methods.blocks.mabn.convolution import CenConv2d, centre
from torchive.methods.blocks.mabn.fold import fold, fold_into_conv
from torchive.methods.blocks.mabn.norm import MABN2d

__all__ = ["CenConv2d", "MABN2d", "centre", "fold", "fold_into_conv"]
