r"""Bilinear CNN: the outer product of two feature vectors, averaged over positions, in the place of mean pooling.

Paper    Lin, RoyChowdhury and Maji, "Bilinear Convolutional Neural Networks for Fine-grained Visual Recognition",
         IEEE TPAMI 2017, arXiv:1504.07889. Options: Tensor Sketch (Gao et al., CVPR 2016, arXiv:1511.06062) and the
         matrix square root (Lin and Maji, "Improved Bilinear Pooling with CNNs", BMVC 2017, arXiv:1707.06772).
Formula  Phi = (1 / L) sum_l x_l y_l^T                                             (bilinear pooling; section 3)
         z = sign(Phi) sqrt(|Phi|), then z / ||z||_2, then a linear classifier      (normalisation; section 3)
         one shared stream: y = x, Phi is the Gram matrix; two streams: two networks
         sketch: TS(Phi)_k = sum over i, j with h(i) + g(j) = k mod d of s(i) t(j) Phi_ij
         root of the matrix: Y_0 = A / |A|_F, Z_0 = I, T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; A^(1/2) = Y |A|_F^(1/2)
Symbols  N batch, X (L, C) and Y (L, D) features, L = H W positions (T H W of a clip), K classes, d sketch length,
         h, g random bins, s, t random signs.
Differs  The mean over positions is the release's; the paper sums, which the normalisation takes away. The root is
         z / (sqrt(|z| + eps) + sqrt(eps)), the release's form; the paper's is its limit eps = 0, without gradient at 0.
         The sketch is taken of the pooled matrix, which is the same by linearity and needs no Fourier transform. The
         matrix root's gradient is that of its iterations; the release solves a Lyapunov equation by other iterations.
         Maps of two grids are brought together by bilinear interpolation; the paper leaves out a row and a column.
"""

from torchive.methods.blocks.bilinear_cnn.head import BilinearHead
from torchive.methods.blocks.bilinear_cnn.network import VGGM, BilinearNetwork
from torchive.methods.blocks.bilinear_cnn.pooling import (
    BilinearPooling,
    CompactBilinearPool,
    TensorSketch,
    matrix_root,
    outer_mean,
    signed_root,
    triangle,
)
from torchive.methods.blocks.bilinear_cnn.svm import fit_svm

__all__ = [
    "VGGM",
    "BilinearHead",
    "BilinearNetwork",
    "BilinearPooling",
    "CompactBilinearPool",
    "TensorSketch",
    "fit_svm",
    "matrix_root",
    "outer_mean",
    "signed_root",
    "triangle",
]
