r"""Attention U-Net: gates, computed from the coarser scale, weigh each position of a U-Net's skip connections.

Paper    Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018, arXiv:1804.03999.
Formula  q = psi( relu( theta(x) + up(phi(g)) ) )                                                    (eq. 1)
         alpha = up( sigmoid(q) ),  y = alpha x                                                      (eq. 2)
         out = W(y) = BN( conv1x1(y) )
Symbols  x skip (N, C_x, *S); g gating signal (N, C_g, *S'), any coarser size; theta 2x2(x2) convolution of stride 2
         without bias, C_x to C_i; phi and psi 1x1 with bias, C_g to C_i and C_i to 1; up (bi- or tri-)linear; alpha
         (N, 1, *S).
Differs  psi starts near zero weights and bias 3, so that all gates are open by 0.95: the text asks for gates that pass
         everything at first, the released segmentation code does not do it. The Dice loss has its smooth term outside
         the factor two, which keeps the score of an absent class at one; in the release it can reach two.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from torchive.nn.dice import SoftDiceLoss
from torchive.nn.unet import (
    WIDTHS,
    SupervisedHead,
    UNetEncoder,
    UpStep,
    conv_nd,
    init_kaiming,
    norm_nd,
    resize,
    segmentations,
)
from torchive.structures import Segmentation


class AttentionGate(nn.Module):
    """Weigh a skip by an attention map computed from it and a coarser gating signal: (N, C_x, *S) and (N, C_g, *S')
    to (N, C_x, *S).

    With ``psi``'s bias at a large positive number alpha is one everywhere and the gate is its output transform alone.

    Args:
        channels: C_x.
        gate_channels: C_g.
        inter_channels: C_i; half of C_x, at least one, if None.
        ndim: 2 or 3.
        normalisation: "sigmoid", or "softmax" over the positions of the coarse map.
        open_bias: psi's bias at the start; alpha starts near sigmoid(open_bias). A softmax does not see it.
        align_corners: how linear resizing treats the borders.

    Raises:
        ValueError: channels below one, ``ndim`` not 2 or 3, an unknown ``normalisation``; in ``forward``, inputs that
            do not fit or a side of x below two.
    """

    def __init__(
        self,
        channels: int,
        gate_channels: int,
        *,
        inter_channels: int | None = None,
        ndim: int = 2,
        normalisation: Literal["sigmoid", "softmax"] = "sigmoid",
        open_bias: float = 3.0,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        inter_channels = max(channels // 2, 1) if inter_channels is None else inter_channels
        if min(channels, gate_channels, inter_channels) < 1:
            raise ValueError(
                f"channels must be >= 1, got channels={channels}, gate_channels={gate_channels}, "
                f"inter_channels={inter_channels}"
            )
        if normalisation not in ("sigmoid", "softmax"):
            raise ValueError(f"normalisation must be sigmoid or softmax, got {normalisation!r}")
        conv = conv_nd(ndim)
        self.channels, self.gate_channels, self.ndim = channels, gate_channels, ndim
        self.normalisation, self.align_corners, self.open_bias = normalisation, align_corners, open_bias
        self.theta = conv(channels, inter_channels, 2, stride=2, bias=False)
        self.phi = conv(gate_channels, inter_channels, 1)
        self.psi = conv(inter_channels, 1, 1)
        self.output = nn.Sequential(conv(channels, channels, 1), norm_nd(ndim)(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming's initialisation, and open gates."""
        init_kaiming(self)
        nn.init.normal_(self.psi.weight, std=0.01)  # type: ignore[arg-type]
        nn.init.constant_(self.psi.bias, self.open_bias)  # type: ignore[arg-type]

    def attention(self, x: Tensor, g: Tensor) -> Tensor:
        """alpha: (N, 1, *S), in (0, 1)."""
        if x.ndim != self.ndim + 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"expected a {self.ndim + 2}-d x with {self.channels} channels, got shape {tuple(x.shape)}"
            )
        if g.ndim != x.ndim or g.shape[:2] != (x.shape[0], self.gate_channels):
            raise ValueError(f"expected g with shape ({x.shape[0]}, {self.gate_channels}, ...), got {tuple(g.shape)}")
        if min(x.shape[2:]) < 2:
            raise ValueError(f"each side of x must be at least 2, got {tuple(x.shape[2:])}")
        theta = self.theta(x)  # (N, C_i, *S/2)
        q = self.psi((theta + resize(self.phi(g), theta.shape[2:], self.align_corners)).relu())  # (N, 1, *S/2)
        alpha = q.sigmoid() if self.normalisation == "sigmoid" else q.flatten(2).softmax(2).view_as(q)
        return resize(alpha, x.shape[2:], self.align_corners)  # (N, 1, *S)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return self.output(self.attention(x, g) * x)  # (N, C_x, *S)


class AttentionUNet(nn.Module):
    """U-Net with attention gates on its skips, as a segmentation system: (N, C, *S) to logits (N, K, *S).

    The finest skip has no gate. The coarsest gate is fed by a 1x1-BN-ReLU of the bottleneck, each other by the
    decoder's output one level below. Parameters that a plain ``torchive.nn.unet.UNet`` has too bear the same names.

    Args:
        num_classes: K, background included.
        in_channels: C.
        widths: channels of each level, finest first; three or more, the last is the bottleneck. The paper's widths.
        ndim: 2 for images, 3 for volumes.
        normalisation, open_bias: of each ``AttentionGate``; its C_i is C_x, as in the paper's network.
        deep_supervision: fuse the logits of all decoder levels by a 1x1 convolution.
        align_corners: how linear resizing treats the borders.
        loss: of (N, K, *S) logits and (N, *S) classes, 255 ignored; soft Dice over all classes if None.

    Raises:
        ValueError: ``num_classes`` below two, fewer than three ``widths``, ``ndim`` not 2 or 3; in ``forward``, a side
            below ``2 ** (len(widths) - 1)``, 16 by default.
    """

    task = "segmentation"

    def __init__(
        self,
        *,
        num_classes: int = 2,
        in_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        ndim: int = 2,
        normalisation: Literal["sigmoid", "softmax"] = "sigmoid",
        open_bias: float = 3.0,
        deep_supervision: bool = True,
        align_corners: bool = False,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and must be >= 2, got {num_classes}")
        if len(widths) < 3:
            raise ValueError(f"widths must have three or more levels, got {tuple(widths)}")
        conv, norm = conv_nd(ndim), norm_nd(ndim)
        self.encoder = UNetEncoder(in_channels, widths, ndim=ndim)
        bottom = widths[-1]
        self.gating = nn.Sequential(conv(bottom, bottom, 1), norm(bottom), nn.ReLU(inplace=True))
        self.gates, self.combine = nn.ModuleList(), nn.ModuleList()
        for width, below in itertools.pairwise(widths[1:]):
            self.gates.append(
                AttentionGate(
                    width,
                    below,
                    inter_channels=width,
                    ndim=ndim,
                    normalisation=normalisation,
                    open_bias=open_bias,
                    align_corners=align_corners,
                )
            )
            self.combine.append(nn.Sequential(conv(width, width, 1), norm(width), nn.ReLU(inplace=True)))
        pairs = itertools.pairwise(widths)
        self.decoder = nn.ModuleList(UpStep(a, b, ndim=ndim, align_corners=align_corners) for a, b in pairs)
        self.head = SupervisedHead(
            widths[:-1], num_classes, ndim=ndim, deep_supervision=deep_supervision, align_corners=align_corners
        )
        self.loss = SoftDiceLoss() if loss is None else loss
        init_kaiming(self)
        for gate in self.gates:
            gate.reset_parameters()  # type: ignore[operator]

    def forward(self, inputs: Tensor) -> Tensor:
        maps, _ = self._decode(inputs)
        return self.head(maps)  # (N, K, *S)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, on the fused logits of (N, C, *S) images and (N, *S) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> list[Segmentation]:
        """The class of each pixel with its scores, one ``Segmentation`` per image."""
        return segmentations(self(inputs))

    def attention_maps(self, inputs: Tensor) -> list[Tensor]:
        """The gates' alphas, finest first, each (N, 1, *S) at its skip's size: S/2, S/4, S/8 in the paper's network."""
        return self._decode(inputs)[1]

    def _decode(self, inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Decoder maps and attention maps, finest first."""
        *skips, x = self.encoder(inputs)
        maps: list[Tensor] = []
        alphas: list[Tensor] = []
        signal = self.gating(x)
        for level in range(len(skips) - 1, -1, -1):
            skip = skips[level]
            if level > 0:
                gate = self.gates[level - 1]
                alpha = gate.attention(skip, signal)  # type: ignore[operator]
                alphas.insert(0, alpha)
                skip = self.combine[level - 1](gate.output(alpha * skip))  # type: ignore[operator]
            x = signal = self.decoder[level](skip, x)
            maps.insert(0, x)
        return maps, alphas
