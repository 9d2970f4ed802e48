r"""Channel equilibrium: after a norm, channels are decorrelated and weighted anew, so that none falls silent.

Paper    Shao et al., "Channel Equilibrium Networks for Learning Deep Representation", ICML 2020, arXiv:2003.00214.
Formula  y = lam W x + (1 - lam) g / s x,  lam = sigmoid(a)                                          (eq. 3)
         W = P_T, P_0 = I, P_{k+1} = 1.5 P_k - 0.5 P_k^3 Sigma / tr(Sigma), for each group of d       (eq. 7)
         Sigma = eps I + mean over (n, h, w) of the centred x x^T
         g = sigmoid(W2 relu(LN(W1 v))), v_nc = variance of x over the positions, s^2 = mean of v
Symbols  N batch, C channels, d channels of a group, T iterations; a = 0 at the start.
Differs  As in the release W goes to sqrt(tr Sigma) Sigma^(-1/2) and x is not centred before it is multiplied; both are
         options. Before the first step of training s = 1 in evaluation, where the release divides by zero, and a map of
         one position, which has no variance, has s = 1, too.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def newton_root(sigma: Tensor, iterations: int = 3) -> Tensor:
    """P_T of (G, d, d) covariances, which goes to (Sigma / tr Sigma)^(-1/2); the same shape."""
    normal = sigma / sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    p = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device).expand_as(sigma)
    for _ in range(iterations):
        p = torch.baddbmm(p, p @ p @ p, normal, beta=1.5, alpha=-0.5)
    return p


class ChannelEquilibrium(nn.Module):
    """(N, C, *S) to the same shape; it stands between a norm and its activation or addition.

    Args:
        channels: C.
        group_channels: d, halved until it divides C.
        reduction: R, the squeeze of the branch that weights each sample's channels.
        iterations: T.
        momentum: share of the running averages that a step keeps.
        eps: what is added to the diagonal of the covariance, and the smallest s^2 in training.
        centred: whether the mean is taken from x before W.
        unit_variance: whether W is divided by sqrt(tr Sigma), so that what it gives has variance one.
        pooled: whether the covariance is that of maxima over 2x2 positions, which is cheaper; for images.
        sync: whether all processes share one mean, covariance and s.

    Raises:
        ValueError: a number below one, or ``momentum`` outside [0, 1]; in ``forward``, an input whose channel axis is
            not C.
        TypeError: in ``forward``, whole numbers.
    """

    def __init__(
        self,
        channels: int,
        *,
        group_channels: int = 16,
        reduction: int = 4,
        iterations: int = 3,
        momentum: float = 0.9,
        eps: float = 1e-5,
        centred: bool = False,
        unit_variance: bool = False,
        pooled: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        if min(channels, group_channels, reduction, iterations) < 1:
            given = f"{channels}, {group_channels}, {reduction} and {iterations}"
            raise ValueError(f"channels, group_channels, reduction and iterations must be >= 1, got {given}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        while channels % group_channels:
            group_channels //= 2
        self.channels, self.group_channels, self.iterations = channels, group_channels, iterations
        self.momentum, self.eps, self.centred, self.unit_variance = momentum, eps, centred, unit_variance
        self.pooled, self.sync = pooled, sync
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels, bias=False)
        self.balance = nn.Parameter(torch.zeros(1))  # a
        groups = channels // group_channels
        self.running_mean: Tensor
        self.running_root: Tensor
        self.running_scale: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_root", torch.eye(group_channels).repeat(groups, 1, 1))  # (G, d, d)
        self.register_buffer("running_scale", torch.zeros(1))

    @classmethod
    def from_channels(cls, channels: int, **options: Any) -> ChannelEquilibrium:
        """The block for a map of C channels."""
        return cls(channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels on axis 1, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point numbers, got {x.dtype}")
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            lam = self.balance.to(wide).sigmoid()
            variance = _variance(x.to(wide))  # (N, C)
            weight = self._gate(variance) / self._scale(variance, x.shape)
            root, mean = self._root(x.to(wide))  # (G, d, d), (C,)
            kernel = (lam * root).to(x.dtype).flatten(0, 1)[:, :, None]  # (C, d, 1)
            shift = None
            if self.centred:
                shift = -(lam * root @ mean.view(-1, self.group_channels, 1)).flatten().to(x.dtype)
            own = ((1 - lam) * weight).to(x.dtype)[(..., *[None] * (x.ndim - 2))]
            groups = self.channels // self.group_channels
            if x.ndim == 4:
                mixed = F.conv2d(x, kernel[..., None], shift, groups=groups)
            else:
                mixed = F.conv1d(x.flatten(2), kernel, shift, groups=groups).view_as(x)
            return torch.addcmul(mixed, x, own)  # as x

    def _gate(self, variance: Tensor) -> Tensor:
        """g: (N, C) in (0, 1)."""
        y = F.linear(variance, self.squeeze.weight.to(variance.dtype))
        slope, start = self.norm.weight.to(y.dtype), self.norm.bias.to(y.dtype)
        y = F.layer_norm(y, y.shape[1:], slope, start, self.norm.eps)
        return F.linear(y.relu(), self.expand.weight.to(y.dtype)).sigmoid()

    def _scale(self, variance: Tensor, shape: torch.Size) -> Tensor:
        """s: (1,)."""
        if not self.training:
            kept = self.running_scale.to(variance.dtype)
            return torch.where(kept > 0, kept, torch.ones_like(kept))
        if math.prod(shape[2:]) == 1 or not variance.numel():
            return variance.new_ones(1)
        total = torch.stack([variance.sum(), variance.new_tensor(float(variance.numel()))])
        total = self._summed(total)
        scale = (total[:1] / total[1:]).clamp(min=self.eps).sqrt()
        self._keep(self.running_scale, scale)
        return scale

    def _root(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W and the mean of each channel."""
        if not self.training or not x.numel():
            return self.running_root.to(x.dtype), self.running_mean.to(x.dtype)
        if self.pooled and x.ndim == 4 and min(x.shape[2:]) > 1:
            x = F.max_pool2d(x, 2)
        rows = x.transpose(0, 1).flatten(1)  # (C, N S)
        count = rows.new_full((1,), float(rows.shape[1]))
        if self.sync:
            sums = self._summed(torch.cat([rows.sum(1), count]))
            mean, count = sums[:-1] / sums[-1], sums[-1:]
        else:
            mean = rows.mean(1)
        centred = (rows - mean[:, None]).unflatten(0, (-1, self.group_channels))  # (G, d, N S)
        products = self._summed(centred @ centred.transpose(1, 2))
        eye = torch.eye(self.group_channels, dtype=x.dtype, device=x.device)
        sigma = products / count + self.eps * eye
        root = newton_root(sigma, self.iterations)
        if self.unit_variance:
            root = root / sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].sqrt()
        self._keep(self.running_root, root)
        self._keep(self.running_mean, mean)
        return root, mean

    def _summed(self, value: Tensor) -> Tensor:
        return all_reduce(value) if self.sync and dist.is_initialized() else value

    @torch.no_grad()
    def _keep(self, average: Tensor, value: Tensor) -> None:
        average.mul_(self.momentum).add_(value.to(average.dtype), alpha=1 - self.momentum)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, group_channels={self.group_channels}, iterations={self.iterations}"


def _variance(x: Tensor) -> Tensor:
    """Unbiased variance over the positions, (N, C, *S) to (N, C); zero where there is one position."""
    count = math.prod(x.shape[2:])
    correction: Any = count / torch.sym_max(count - 1, 1)  # symbolic where it is exported
    variance: Tensor = x.var(tuple(range(2, x.ndim)), correction=0) * correction
    return variance


@torch.no_grad()
def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, block: ChannelEquilibrium) -> nn.Conv2d:
    """One convolution for convolution, norm and block in evaluation, where the block decorrelates only (lam = 1).

    Raises:
        ValueError: lam is not one, so that the block depends on each sample; a convolution of several groups; a norm
            without running statistics.
    """
    if float(block.balance.sigmoid()) != 1:
        raise ValueError(f"only a block with lam = 1 folds, got lam = {float(block.balance.sigmoid())}")
    if conv.groups > 1:
        raise ValueError(f"the convolution must have one group, got {conv.groups}")
    if norm.running_var is None or norm.running_mean is None:
        raise ValueError("the norm must have running statistics, got None")
    slope = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    start = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = slope * start + (0 if norm.bias is None else norm.bias)
    matrix = torch.block_diag(*block.running_root)  # (C, C)
    new = deepcopy(conv)
    new.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
    new.weight.copy_((matrix @ (conv.weight * slope[:, None, None, None]).flatten(1)).view_as(conv.weight))
    new.bias.copy_(matrix @ (bias - (block.running_mean if block.centred else 0)))
    return new.eval()


def inhibited_channels(model: nn.Module, *, below: float = 1e-2) -> float:
    """Share of the channels of all batch norms whose |gamma| is below a bound, in [0, 1].

    Raises:
        ValueError: the model has no batch norm with gamma.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    gammas = [m.weight.detach().abs().flatten() for m in norms if m.weight is not None]
    if not gammas:
        raise ValueError(f"{type(model).__name__} has no batch norm with gamma")
    return float((torch.cat(gammas) < below).double().mean())


def ce_resnet(name: str = "resnet50", *, num_classes: int = 1000, **options: Any) -> nn.Module:
    """A ResNet of torchvision with the block after the stem's norm (d = 64) and the last norms of stages 1 to 3."""
    from torchvision import models

    model = models.get_model(name, weights=None, num_classes=num_classes)
    model.bn1 = nn.Sequential(model.bn1, ChannelEquilibrium(model.bn1.num_features, group_channels=64, **options))
    for stage in (model.layer1, model.layer2, model.layer3):
        for unit in stage:
            last = "bn3" if hasattr(unit, "bn3") else "bn2"
            norm = getattr(unit, last)
            nn.init.zeros_(norm.weight)
            setattr(unit, last, nn.Sequential(norm, ChannelEquilibrium(norm.num_features, **options)))
    for unit in model.layer4:
        nn.init.zeros_(getattr(unit, "bn3" if hasattr(unit, "bn3") else "bn2").weight)
    return model
