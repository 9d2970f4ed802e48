"""A sound block and backbone, and blocks that each break one promise."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from broken import Case, case
from torchive.protocols import Level

C = 4


class SoundBlock(nn.Module):
    """A residual convolution with a batch norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)
        self.register_buffer("gain", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Any:
        if x.ndim != 4 or x.shape[1] != C:
            raise ValueError(f"expected (N, {C}, H, W), got {tuple(x.shape)}")
        return self.body(x)

    def body(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.norm(self.conv(x)))


class LeaksAcrossTheBatch(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) - x.mean(0)


class DependsOnTheFirstRow(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + torch.tanh(x[:1])


class MutatesItsInput(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        y = super().body(x)
        if self.training:
            x.data.mul_(2)
        return y


class HidesAConstant(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.ones(C, 1, 1)

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + self.offset.to(x)


class ForgetsABuffer(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(C, 1, 1)

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean((0, 2, 3)).view(C, 1, 1)
        return super().body(x) + self.seen.to(x)


class LeavesStateOutOfTheStateDict(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return super().body(x) + 1e-3 * self.seen


class HasADeadParameter(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(C))


class MakesARampOnTheCpu(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + torch.linspace(0, 1, x.shape[3]).to(x.dtype)


class IsCutByDetach(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x.detach())


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class HasAWrongGradient(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return _Scaled.apply(super().body(x), 2.0)


class ClimbsInsteadOfDescending(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return _Scaled.apply(super().body(x), -1.0)


class HasAGradientOfNaN(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + (x * 0).sqrt()


class ChangesItsTypeInEval(SoundBlock):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, 2 * y) if self.training else y


class ReturnsATuple(SoundBlock):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class DrawsFromTheGlobalGenerator(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + 0 * torch.rand(1, dtype=x.dtype, device=x.device)


class RemembersTheLastCall(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().body(x) + (1 if self.calls == 3 else 0)


class LosesChannelsLast(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x).contiguous()


class NeedsContiguousInput(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x.view(x.numel()).view(x.shape))


class IsWrongInBfloat16(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body((x + 100) - 100)


class ReturnsFloat32(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x).float()


class HardCodesItsSize(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, C, 9, 13))

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + self.position


class BreaksTheGraph(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().body(x)


class RecompilesForEachSize(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + (1e-3 if x.shape[-1] % 2 else 0.0)


class BranchesOnData(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        y = super().body(x)
        return y + 0 if bool(x.mean() > 0) else y


class HasNoOnnxForm(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + 0.1 * torch.special.i0e(x)


class ChangesTheSize(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x)[:, :, : 2 * (x.shape[2] // 2)]


class AcceptsAnyChannels(SoundBlock):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x[:, :C] if x.ndim == 4 else x)


class AcceptsIntegers(SoundBlock):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.is_floating_point() else x.float())


class AcceptsAnyRank(SoundBlock):
    def forward(self, x: Tensor) -> Any:
        return x if x.ndim == 1 else super().forward(x)


class AcceptsTooSmall(SoundBlock):
    pass


class IgnoresItsDivisor(SoundBlock):
    pass


class FailsAtOnePixel(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(F.pad(x, (1, 1, 1, 1), mode="reflect"))[:, :, 1:-1, 1:-1]


class FailsOnNoSamples(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return torch.cat([super(FailsOnNoSamples, self).body(row[None]) for row in x])


class SqueezesASingleSample(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        y = super().body(x)
        return y.squeeze(0) if len(y) == 1 else y


class CannotBePickled(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x

    def body(self, x: Tensor) -> Tensor:
        return self.act(super().body(x))


class CannotBeCopied(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class IgnoresTheSeed(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.conv.weight += torch.from_numpy(0.1 * np.random.default_rng().random((C, C, 3, 3), np.float32)).to(
                self.conv.weight
            )


class HoldsMemoryOnMeta(SoundBlock):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(0.5, device="cpu"))


class SwitchesItselfToEval(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return super().body(x)


class ReturnsNaN(SoundBlock):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + torch.where(x > 1.5, torch.nan, 0.0)


class IsNotBuildable(SoundBlock):
    def __init__(self) -> None:
        raise TypeError("always")


class SoundBackbone(nn.Module):
    """Two levels of strided convolutions."""

    levels = (Level(4, 2), Level(6, 4))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4:
            raise ValueError(f"expected 4 axes, got {x.ndim}")
        fine = torch.tanh(self.first(x))
        return [fine, torch.tanh(self.second(fine))]


class PromisesOtherLevels(SoundBackbone):
    levels = (Level(4, 2), Level(8, 4))


class PoolsToOneSize(SoundBackbone):
    def forward(self, x: Tensor) -> list[Tensor]:
        fine, coarse = super().forward(x)
        return [fine, F.adaptive_avg_pool2d(coarse, (3, 4)) if len(x) else coarse]


BLOCK = {"inputs": [(2, C, 9, 13)], "smallest": [1, C, 1, 1]}
BACKBONE = {"inputs": [(2, 3, 12, 16)], "smallest": [1, 3, 1, 1]}
SOUND: tuple[Case, ...] = (case(SoundBlock, "block", "", **BLOCK), case(SoundBackbone, "backbone", "", **BACKBONE))
BROKEN: tuple[Case, ...] = (
    case(LeaksAcrossTheBatch, "block", "batch_independence nan_stays", **BLOCK),
    case(DependsOnTheFirstRow, "block", "batch_independence row_order nan_stays", **BLOCK),
    case(MutatesItsInput, "block", "input_unchanged", **BLOCK),
    case(HidesAConstant, "block", "moves", **BLOCK),
    case(ForgetsABuffer, "block", "moves state_dict other_device", **BLOCK),
    case(LeavesStateOutOfTheStateDict, "block", "state_dict", **BLOCK),
    case(HasADeadParameter, "block", "parameter_gradients", **BLOCK),
    case(MakesARampOnTheCpu, "block", "meta_device other_device", **BLOCK),
    case(IsCutByDetach, "block", "input_gradient gradcheck", **BLOCK),
    case(HasAWrongGradient, "block", "gradcheck", **BLOCK),
    case(ClimbsInsteadOfDescending, "block", "gradcheck learns", **BLOCK),
    case(HasAGradientOfNaN, "block", "input_gradient gradcheck learns smallest", **BLOCK),
    case(ChangesItsTypeInEval, "block", "same_type_in_eval", **BLOCK),
    case(ReturnsATuple, "block", "forward_contract", **BLOCK),
    case(DrawsFromTheGlobalGenerator, "block", "rng_untouched", **BLOCK),
    case(RemembersTheLastCall, "block", "deterministic batch_independence gradcheck state_dict", **BLOCK),
    case(LosesChannelsLast, "block", "channels_last", **BLOCK),
    case(NeedsContiguousInput, "block", "channels_last non_contiguous", **BLOCK),
    case(IsWrongInBfloat16, "block", "bfloat16", **BLOCK),
    case(ReturnsFloat32, "block", "bfloat16 moves gradcheck", **BLOCK),
    case(HardCodesItsSize, "block", "sizes compiles exports onnx", **BLOCK),
    case(BreaksTheGraph, "block", "compiles", **BLOCK),
    case(RecompilesForEachSize, "block", "compiles exports onnx", **BLOCK),
    case(BranchesOnData, "block", "meta_device compiles exports onnx", **BLOCK),
    case(HasNoOnnxForm, "block", "onnx", **BLOCK),
    case(ChangesTheSize, "block", "forward_contract sizes batch_of_one empty_batch smallest", **BLOCK, same_shape=True),
    case(AcceptsAnyChannels, "block", "bad_channels", **BLOCK),
    case(AcceptsIntegers, "block", "bad_dtype", **BLOCK),
    case(AcceptsAnyRank, "block", "bad_rank", **BLOCK),
    case(AcceptsTooSmall, "block", "too_small", **BLOCK, too_small=[1, C, 2, 2]),
    case(IgnoresItsDivisor, "block", "sizes", inputs=[(2, C, 8, 12)], divisor=4),
    case(FailsAtOnePixel, "block", "smallest", **BLOCK),
    case(FailsOnNoSamples, "block", "empty_batch", **BLOCK),
    case(SqueezesASingleSample, "block", "batch_of_one batch_independence smallest", **BLOCK),
    case(CannotBePickled, "block", "pickles", **BLOCK),
    case(CannotBeCopied, "block", "deep_copy pickles", **BLOCK),
    case(IgnoresTheSeed, "block", "seeded_weights", **BLOCK),
    case(HoldsMemoryOnMeta, "block", "meta_device", **BLOCK),
    case(SwitchesItselfToEval, "block", "mode_unchanged", **BLOCK),
    case(
        ReturnsNaN, "block", "forward_contract sizes batch_of_one smallest nan_stays gradcheck bfloat16 learns", **BLOCK
    ),
    case(PromisesOtherLevels, "backbone", "levels", **BACKBONE),
    case(PoolsToOneSize, "backbone", "levels", **BACKBONE),
)
