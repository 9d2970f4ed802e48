"""Generated from the cards by `make generate`; do not edit."""

from torchive.catalogue.search import find as find
from torchive.catalogue.search import list_methods as list_methods
from torchive.engine.convert import convert as convert
from torchive.engine.factory import create_method as create_method
from torchive.engine.factory import create_model as create_model
from torchive.methods.blocks.dynamic_relu import DynamicReLU as DynamicReLU

__version__: str
