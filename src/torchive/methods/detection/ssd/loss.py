"""SSD's loss: localisation of the matched default boxes, confidence of those and of the hardest negatives."""

from torchive.nn.multibox import confidence_loss, multibox_loss

__all__ = ["confidence_loss", "multibox_loss"]
