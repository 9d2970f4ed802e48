r"""NASNet: two searched cells, one that keeps the size and one that halves it, stacked to networks of any size.

Paper    Zoph, Vasudevan, Shlens and Le, "Learning Transferable Architectures for Scalable Image Recognition",
         CVPR 2018, arXiv:1707.07012.
Formula  h_j = combine( o_l(h_a), o_r(h_b) ), a, b < j;  cell(h_0, h_1) = [h_j; ... of the states that go out]
         keep = 1 - (1 - k) (cell + 1) / cells * progress;   y = o(h) [u < keep] / keep    (ScheduledDropPath)
Symbols  h_0 the output of the cell before, h_1 that of the one before it, both brought to F channels; o one of 13
         operations; k the share of paths that is kept in the last cell at the end; u uniform in [0, 1) for each sample.
         A network of N normal cells in each of three stages and 24 F channels at its end is called N @ 24F.
Differs  The cells are those of the release, which sends out states that are read inside as well (h_1; b_3 of the
         reduction); the paper's text sends out those that nobody reads. The maps of all strides come out after a ReLU.
"""

from torchive.methods.backbones.nasnet.cell import FactorisedReduction, SearchedCell
from torchive.methods.backbones.nasnet.drop_path import ScheduledDropPath
from torchive.methods.backbones.nasnet.genotype import NASNET_A, CellBlock, CellPlan, Genotype
from torchive.methods.backbones.nasnet.network import NASNet
from torchive.methods.backbones.nasnet.operations import OPERATIONS
from torchive.methods.backbones.nasnet.weights import load_timm

__all__ = [
    "NASNET_A",
    "OPERATIONS",
    "CellBlock",
    "CellPlan",
    "FactorisedReduction",
    "Genotype",
    "NASNet",
    "ScheduledDropPath",
    "SearchedCell",
    "load_timm",
]
