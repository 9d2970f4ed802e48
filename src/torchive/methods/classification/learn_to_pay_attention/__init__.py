r"""Learn to pay attention: an image is classified from local features, weighed by how well they agree with the whole.

Paper    Jetley et al., "Learn to Pay Attention", ICLR 2018, arXiv:1804.02391, section 3.
Formula  c_i = <l_i, g>  (dp)  or  c_i = <u, l_i + g>  (pc);   a = softmax_i(c);   g_a = sum_i a_i l_i
         concat: scores = W [g_a^1, .., g_a^S] + b;   indep: scores = log mean_s softmax(W_s g_a^s + b_s)
Symbols  N batch, l_i the C features at position i of one of S maps, g the C global features, u (C,) learnt; a map with
         other channels is first projected to C.
Surprise with pc and a softmax the map does not depend on g at all: <u, g> is one number for all positions, and a
         softmax does not see it. So what computes g learns nothing; kept as the paper has it, and shown by a test.
Differs  The last map is averaged before the layer that gives g, so that any image size works; at the paper's 32 pixels
         that map is one position. Dropout is the release's (0.5 before the classifier) only where ``drop`` asks for it.
"""

from torchive.methods.classification.learn_to_pay_attention.attention import CompatibilityAttention, GridAttention
from torchive.methods.classification.learn_to_pay_attention.network import AttentionClassifier
from torchive.methods.classification.learn_to_pay_attention.probing import fgsm, foreground, pointing_hits
from torchive.methods.classification.learn_to_pay_attention.resnet import ResNetMaps
from torchive.methods.classification.learn_to_pay_attention.vgg import VGGMaps

__all__ = [
    "AttentionClassifier",
    "CompatibilityAttention",
    "GridAttention",
    "ResNetMaps",
    "VGGMaps",
    "fgsm",
    "foreground",
    "pointing_hits",
]
