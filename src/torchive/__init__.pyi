"""Generated from the cards by `make generate`; do not edit."""

from torchive.catalogue.search import find as find
from torchive.catalogue.search import list_methods as list_methods
from torchive.engine.convert import convert as convert
from torchive.engine.factory import create_method as create_method
from torchive.engine.factory import create_model as create_model
from torchive.methods.blocks.dynamic_relu import DynamicReLU as DynamicReLU
from torchive.methods.blocks.gcnet import GlobalContext as GlobalContext
from torchive.methods.blocks.gcnet import NonLocal as NonLocal
from torchive.methods.blocks.gcnet import SimplifiedNonLocal as SimplifiedNonLocal
from torchive.methods.blocks.gcnet import query_dependence as query_dependence
from torchive.methods.blocks.mabn import CenConv2d as CenConv2d
from torchive.methods.blocks.mabn import MABN2d as MABN2d
from torchive.methods.blocks.mabn import fold_into_conv as fold_into_conv
from torchive.methods.detection.faster_rcnn import FasterRCNN as FasterRCNN
from torchive.methods.detection.ssd import SSD as SSD
from torchive.methods.losses.circle_loss import CircleLoss as CircleLoss
from torchive.methods.segmentation.attention_unet import AttentionGate as AttentionGate
from torchive.methods.segmentation.attention_unet import AttentionUNet as AttentionUNet

__version__: str
