"""Attention pooling: (N, C, L) positions and a (C,) query to (N, C), with a gradient that reads the input twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention_map(x: Tensor, query: Tensor) -> Tensor:
    """a: (N, C, L) and (C,) to (N, 1, L) weights that sum to one; the soft-max runs in float32 or better."""
    logits = torch.bmm(query.to(x.dtype).expand(x.shape[0], 1, -1), x)
    return logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def attention_pool(x: Tensor, query: Tensor) -> Tensor:
    """sum_j a_j x_j: (N, C, *S) and (C,) to (N, C). Any memory layout; nothing as large as x is copied."""
    if torch.is_grad_enabled() and (x.requires_grad or query.requires_grad):
        return _AttentionPool.apply(x, query)
    flat = x.flatten(2)
    return torch.bmm(attention_map(flat, query), flat.transpose(1, 2)).squeeze(1)


class _AttentionPool(torch.autograd.Function):
    """Autograd alone would write three tensors of the input's size in the backward pass; one is enough."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, query: Tensor) -> Tensor:
        flat = x.flatten(2)
        a = attention_map(flat, query)
        ctx.save_for_backward(x, query, a)
        return torch.bmm(a, flat.transpose(1, 2)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, query, a = ctx.saved_tensors
        flat, grad = x.flatten(2), grad.to(x.dtype)
        slope = torch.bmm(grad.unsqueeze(1), flat)  # (N, 1, L), dLoss/da
        slope = a * (slope - (a * slope).sum(-1, keepdim=True))  # (N, 1, L), dLoss/dlogits
        dquery = torch.bmm(slope, flat.transpose(1, 2)).sum((0, 1)).to(query.dtype)
        dx = torch.empty_like(x)
        torch.mul(grad.unsqueeze(-1), a, out=dx.flatten(2)).addcmul_(query.to(x.dtype).view(1, -1, 1), slope)
        return dx, dquery
