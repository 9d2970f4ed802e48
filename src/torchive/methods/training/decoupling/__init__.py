r"""Decoupling: learns features on the data as they are, then re-balances nothing but the classifier.

Paper    Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis, "Decoupling Representation and Classifier for Long-Tailed
         Recognition", ICLR 2020, arXiv:1910.09217.
Formula  sampling: p_j = n_j^q / sum_i n_i^q;  q = 1 instance-, 0 class-balanced                              (eq. 1)
         progressive: p_j(t) = (1 - t/T) p_j^IB + t/T p_j^CB                                                  (eq. 2)
         cRT: a new classifier, trained class-balanced on frozen features
         tau-normalised: w~_i = w_i / |w_i|^tau, no bias                                                      (eq. 3)
         LWS: w~_i = f_i w_i, f learned class-balanced on frozen features                                     (eq. 4)
         NCM: the class whose mean feature is nearest, by distance or cosine
Symbols  n_j samples of class j, t of T the progress, w_i the classifier's row of class i, f_i its scale, tau in [0, 1].
Differs  progress counts steps, not epochs. NCM gathers its means over the class-balanced second stage: the mean for
         centring in its first half, the class means in its second. The scores of NCM and of a fixed tau get a learned
         scale, which changes no prediction. tau may be learned in the second stage instead of on held-out data. LWS
         scales the bias too, as the release does.
"""

from torchive.methods.training.decoupling.heads import (
    LinearHead,
    NearestMeanHead,
    ScaledHead,
    TauHead,
    best_tau,
    class_means,
    normalise_weights,
    shot_accuracy,
    transform_features,
)
from torchive.methods.training.decoupling.model import Decoupling, RebalancedNetwork

__all__ = [
    "Decoupling",
    "LinearHead",
    "NearestMeanHead",
    "RebalancedNetwork",
    "ScaledHead",
    "TauHead",
    "best_tau",
    "class_means",
    "normalise_weights",
    "shot_accuracy",
    "transform_features",
]
