"""Batch norm with the statistics of all processes, on any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over (N, C, *S) whose mean and variance are those of the samples of all processes.

    With one process, and in evaluation mode, it is batch norm. Two processes with half of a batch each give what one
    gives with the whole, and so do their gradients once averaged. ``torch.nn.SyncBatchNorm`` does so on GPUs only; this
    one is made of plain operations and two small exchanges.

    ``GlobalBatchNorm.convert(model)`` puts it in the place of every batch norm, keeping weights and statistics.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C, *S), got shape {tuple(input.shape)}")

    @classmethod
    def convert(cls, model: nn.Module) -> nn.Module:
        """Replace the batch norms inside a model, in place; the model is returned.

        Raises:
            ValueError: a batch norm that does more than normalise, such as timm's with an activation inside.
        """
        for part in list(model.modules()):
            for name, child in part.named_children():
                if isinstance(child, _BatchNorm) and not isinstance(child, cls):
                    if type(child).forward is not _BatchNorm.forward:
                        raise ValueError(
                            f"{type(child).__name__} {name!r} does more than batch norm; it cannot be replaced"
                        )
                    setattr(part, name, cls._from(child))
        return model

    @classmethod
    def _from(cls, old: _BatchNorm) -> GlobalBatchNorm:
        new = cls(
            old.num_features,
            old.eps,
            old.momentum,
            old.affine,
            old.track_running_stats,
            device="meta",
        )
        new._parameters, new._buffers = dict(old._parameters), dict(old._buffers)
        new.train(old.training)
        return new

    def forward(self, input: Tensor) -> Tensor:
        shared = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not shared:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.ndim)]
        x = input.double() if input.dtype == torch.float64 else input.float()
        ones = x.new_full((1,), x.numel() / x.shape[1])
        summed = all_reduce(torch.cat([ones, x.sum(axes)]))
        count, mean = summed[0].detach(), summed[1:] / summed[0].detach()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / count
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        self._remember(mean.detach(), variance.detach(), count)
        return y.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), share)
