r"""EM attention unit: features are rebuilt from a few bases that expectation-maximisation fits to the image itself.

Paper    Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019,
         arXiv:1907.13426, sections 3.2 and 4.
Formula  X' = W_1 x + b_1                                                                  (1x1 convolution)
         z_lk = softmax_k( x'_l . mu_k / tau )                                             (E step, responsibilities)
         mu_k = l2norm( sum_l z_lk x'_l / (1e-6 + sum_l z_lk) )                            (M step, bases)
         X_hat = mu z^T after T of both;  y = relu( x + BN( W_2 relu(X_hat) ) )
         After a training step: mu_0 <- 0.9 mu_0 + 0.1 mean_n mu                           (start of the next run)
Symbols  N batch, C channels, L positions, K = 64 bases, T = 3 iterations, tau = 1 (the paper's lambda is 1 / tau).
Differs  The steps of EM are constants of the graph, as in the release: W_1 stays random and is frozen here, so that no
         distributed run waits for its gradient; ``differentiable`` trains it. The bases move in the training pass
         itself, as batch norm's statistics do; the release's training script does it. Batch norm's momentum is
         PyTorch's 0.1, the release sets 3e-4 in its whole network. The unit that ``convert`` puts in starts as the
         identity and has no last ReLU.
"""

from torchive.methods.blocks.emanet.em import expectation, log_likelihood, maximisation
from torchive.methods.blocks.emanet.unit import EMAttentionUnit

__all__ = ["EMAttentionUnit", "expectation", "log_likelihood", "maximisation"]
