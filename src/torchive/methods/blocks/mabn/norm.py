"""The norm: averaged statistics in the forward and in the backward pass."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def second_moment(x: Tensor) -> Tensor:
    """chi: (N, C, H, W) to the (C,) means of the squares over N, H and W, in float32 or better."""
    kind = torch.promote_types(x.dtype, torch.float32)
    if x.is_contiguous():  # one read, no copy
        return torch.linalg.vector_norm(x, dim=(2, 3), dtype=kind).square().mean(0) / (x.shape[2] * x.shape[3])
    x = x.to(kind)
    return (x * x).mean((0, 2, 3))


class _Normalise(torch.autograd.Function):
    """Forward with given chi and r; backward with the averaged Psi, which it also writes into the ring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,
        bias: Tensor,
        moment: Tensor,  # (C,), chi + eps
        r: Tensor,
        ring: Tensor,  # (m, C)
        place: Tensor,  # (1,), the row of the ring
        averaging: Tensor,  # (), bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, moment, r, place, averaging)
        ctx.ring = ring
        kind = moment.dtype
        zero = torch.zeros_like(moment)
        return torch.native_batch_norm(x, weight.to(kind) * r, bias.to(kind), zero, moment, False, 0.0, 0.0)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, moment, r, place, averaging = ctx.saved_tensors
        scale = weight.to(moment.dtype) * r
        zero = torch.zeros_like(moment)
        dx, gz, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, zero, moment, None, None, False, 0.0, [True, True, True]
        )  # g / sqrt(chi + eps) of shape (N, C, H, W); sums of dL/dy z and of dL/dy of shape (C,)
        psi = gz * scale * (x.shape[1] / x.numel())
        psi = _averaged(ctx.ring, place, psi, averaging)
        slope = (psi / moment).to(x.dtype).view(1, -1, 1, 1)
        dx = dx.addcmul_(x, slope, value=-1)  # (N, C, H, W)
        return dx, (gz * r).to(weight.dtype), dbias.to(weight.dtype), None, None, None, None, None


def _averaged(ring: Tensor, place: Tensor, value: Tensor, averaging: Tensor) -> Tensor:
    """Write this step's (C,) value into its row; give the ring's mean once averaging has begun, else the value."""
    ring.index_copy_(0, place, value.to(ring.dtype)[None])
    return torch.where(averaging, ring.mean(0, dtype=value.dtype), value)


class MABN2d(nn.Module):
    """Normalise (N, C, H, W) by second moments averaged over steps; no mean is subtracted, ``CenConv2d`` in front
    removes it.

    With ``buffer_size=1`` it is x / sqrt(E[x^2] + eps) with its true gradient. In eval mode it is one multiplication
    and one addition for each channel, and nothing is written. An empty batch leaves the statistics alone.

    Args:
        channels: C.
        buffer_size: m, the steps that are averaged: the batch to simulate over the batch given, 32 / 2 in the paper.
        momentum: the fraction of ``running_var`` that a step keeps.
        warmup_iters: steps that use their own statistics alone; at least m steps do.
        eps: added to the moments.
        ema_of: what ``running_var`` follows: the "average" that normalises, as the release does, or the moment of the
        "batch".
        act: a module applied to the result.

    Raises:
        ValueError: ``channels`` or ``buffer_size`` below one, ``momentum`` outside [0, 1], ``warmup_iters`` below zero,
            an unknown ``ema_of``; in ``forward``, an input that is not (N, C, H, W).
    """

    #: Steps before which r is held at 1, and its bound afterwards.
    HELD, BOUND = 1000, 5.0

    def __init__(
        self,
        channels: int,
        *,
        buffer_size: int = 16,
        momentum: float = 0.98,
        warmup_iters: int = 100,
        eps: float = 1e-5,
        ema_of: Literal["average", "batch"] = "average",
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if min(channels, buffer_size) < 1:
            raise ValueError(f"channels and buffer_size must be >= 1, got {channels} and {buffer_size}")
        if not 0 <= momentum <= 1 or warmup_iters < 0:
            raise ValueError(f"momentum must be in [0, 1] and warmup_iters >= 0, got {momentum} and {warmup_iters}")
        if ema_of not in ("average", "batch"):
            raise ValueError(f"ema_of must be average or batch, got {ema_of!r}")
        self.channels, self.buffer_size, self.momentum = channels, buffer_size, momentum
        self.warmup_iters, self.eps, self.ema_of = warmup_iters, eps, ema_of
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_var: Tensor
        self.buffer_x2: Tensor
        self.buffer_gz: Tensor
        self.iterations: Tensor
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("buffer_x2", torch.zeros(buffer_size, channels))
        self.register_buffer("buffer_gz", torch.zeros(buffer_size, channels))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))
        self.act = act

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int | None = None, **options: Any) -> MABN2d:
        """Take over a batch norm's gamma, beta, eps and, where it has them, its dropout and activation; not its
        statistics.

        Raises:
            TypeError: ``old`` is no ``BatchNorm2d``.
            ValueError: ``channels`` is not its number of channels.
        """
        if not isinstance(old, nn.BatchNorm2d):
            raise TypeError(f"expected a torch.nn.BatchNorm2d, got {type(old).__name__}")
        if channels not in (None, old.num_features):
            raise ValueError(f"the batch norm has {old.num_features} channels, got {channels}")
        after = [
            m for m in (getattr(old, "drop", None), getattr(old, "act", None)) if m and not isinstance(m, nn.Identity)
        ]
        options.setdefault("eps", old.eps)
        new = cls(old.num_features, act=nn.Sequential(*after) if after else None, **options)
        for name in ("weight", "bias"):
            given, own = getattr(old, name), getattr(new, name)
            own.requires_grad_(given is not None and given.requires_grad)  # fixed at 1 and 0 where affine=False
            if given is not None:
                own.data = given.detach().clone()
        return new.train(old.training)

    @staticmethod
    def accepts(old: nn.Module) -> bool:
        """Whether a ``BatchNorm2d`` does no more than normalise, drop and activate, as timm's ``BatchNormAct2d``."""
        from timm.layers import BatchNormAct2d

        return type(old).forward in (nn.BatchNorm2d.forward, BatchNormAct2d.forward)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected (N, {self.channels}, H, W), got shape {tuple(x.shape)}")
        if not self.training or x.numel() == 0:
            zero = torch.zeros_like(self.running_var)
            y = F.batch_norm(x, zero, self.running_var + self.eps, self.weight, self.bias, eps=0.0)
        else:
            y = _Normalise.apply(x, self.weight, self.bias, *self._statistics(x))
        return y if self.act is None else self.act(y)  # (N, C, H, W)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Count the step; chi + eps and r, both (C,), the ring of Psi, its row for this step, averaging or not."""
        step = self.iterations.add_(1) + 0  # a copy: the backward pass may come after another step
        place = (step % self.buffer_size).view(1)
        averaging = step > max(self.buffer_size, self.warmup_iters - 1)
        batch = second_moment(x.detach())
        chi = _averaged(self.buffer_x2, place, batch, averaging)
        old = self.running_var.to(chi.dtype)
        bound = torch.where(step > max(self.HELD, self.warmup_iters), self.BOUND, 1.0).to(chi.dtype)
        moment = chi + self.eps
        r = (moment / (old + self.eps)).sqrt().clamp(1 / bound, bound)
        new = torch.lerp(chi if self.ema_of == "average" else batch, old, self.momentum)
        self.running_var.copy_(new)
        return moment, r, self.buffer_gz, place, averaging

    def extra_repr(self) -> str:
        return f"{self.channels}, buffer_size={self.buffer_size}, warmup_iters={self.warmup_iters}, eps={self.eps}"
