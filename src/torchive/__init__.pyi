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
from torchive.methods.explanation.grad_cam import GradCAM as GradCAM
from torchive.methods.explanation.grad_cam import TokenGrid as TokenGrid
from torchive.methods.explanation.grad_cam import boxes_from_maps as boxes_from_maps
from torchive.methods.explanation.grad_cam import cam_from_fc as cam_from_fc
from torchive.methods.explanation.grad_cam import faithfulness as faithfulness
from torchive.methods.explanation.grad_cam import guided_backpropagation as guided_backpropagation
from torchive.methods.explanation.grad_cam import last_spatial_layer as last_spatial_layer
from torchive.methods.explanation.grad_cam import localised as localised
from torchive.methods.explanation.grad_cam import min_max as min_max
from torchive.methods.explanation.grad_cam import overlay as overlay
from torchive.methods.explanation.grad_cam import pointing_game as pointing_game
from torchive.methods.explanation.grad_cam import randomisation_check as randomisation_check
from torchive.methods.losses.circle_loss import CircleLoss as CircleLoss
from torchive.methods.segmentation.attention_unet import AttentionGate as AttentionGate
from torchive.methods.segmentation.attention_unet import AttentionUNet as AttentionUNet
from torchive.methods.training.simclr import MarginTripletLoss as MarginTripletLoss
from torchive.methods.training.simclr import NTLogisticLoss as NTLogisticLoss
from torchive.methods.training.simclr import NTXentLoss as NTXentLoss
from torchive.methods.training.simclr import ProjectionHead as ProjectionHead
from torchive.methods.training.simclr import SimCLR as SimCLR
from torchive.methods.training.simclr import SimCLRViews as SimCLRViews
from torchive.methods.training.simclr import alignment as alignment
from torchive.methods.training.simclr import contrastive_accuracy as contrastive_accuracy
from torchive.methods.training.simclr import learning_rate as learning_rate
from torchive.methods.training.simclr import norm_leak as norm_leak
from torchive.methods.training.simclr import uniformity as uniformity
from torchive.methods.training.simclr import warmup_cosine as warmup_cosine

__version__: str
